"""Every metric by name. The cards are in `cards`, one file a family."""

from locedit.evaluate.cards.bias import BIAS
from locedit.evaluate.cards.habits import HABITS
from locedit.evaluate.cards.knowledge import KNOWLEDGE
from locedit.evaluate.cards.membership import MEMBERSHIP
from locedit.evaluate.cards.memorization import MEMORIZATION
from locedit.evaluate.cards.utility import UTILITY
from locedit.evaluate.metric import Family, Metric

METRICS: dict[str, Metric] = {**KNOWLEDGE, **MEMORIZATION, **MEMBERSHIP, **BIAS, **UTILITY, **HABITS}

__all__ = ["METRICS", "Family", "Metric"]

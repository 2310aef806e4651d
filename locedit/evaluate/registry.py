"""Every metric by name. The cards are in `cards`, one file a family."""

from locedit.evaluate.cards.bias import BIAS
from locedit.evaluate.cards.facts import FACTS
from locedit.evaluate.cards.habits import HABITS
from locedit.evaluate.cards.knowledge import KNOWLEDGE
from locedit.evaluate.cards.labelled import LABELLED
from locedit.evaluate.cards.membership import MEMBERSHIP
from locedit.evaluate.cards.memorization import MEMORIZATION
from locedit.evaluate.cards.utility import UTILITY
from locedit.evaluate.metric import Family, Metric

METRICS: dict[str, Metric] = {
    **KNOWLEDGE,
    **FACTS,
    **MEMORIZATION,
    **MEMBERSHIP,
    **BIAS,
    **LABELLED,
    **UTILITY,
    **HABITS,
}

__all__ = ["METRICS", "Family", "Metric"]

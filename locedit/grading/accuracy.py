"""What a model knows of some facts."""

from collections.abc import Sequence

from locedit.data.encode import Example
from locedit.evaluate.scoring import token_scores
from locedit.losses import ScoringModel


def accuracy(model: ScoringModel, examples: Sequence[Example]) -> float:
    """Share of the examples whose every scored token is the likeliest."""
    scores = token_scores(model, examples)
    return sum(float(score.hits.min()) for score in scores) / len(scores)

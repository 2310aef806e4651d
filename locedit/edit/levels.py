"""How much a model still says of a data set: the one number that doses are matched by.

Of facts and texts it is the probability of the answer, of contrast pairs the preference for the advantaged side.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from locedit import losses
from locedit.contrasts import are_pairs, preferences
from locedit.data.encode import Example
from locedit.losses import ScoringModel

Level = Literal["probability", "token_probability"]
LEVELS: tuple[Level, ...] = ("probability", "token_probability")


@torch.no_grad()
def answer_probabilities(
    model: ScoringModel, examples: Sequence[Example], *, level: Level = "probability", batch_size: int = 32
) -> Tensor:
    """Probability of each example's scored tokens, `[examples]` in [0, 1].

    "probability" is that of the whole answer, the product over its tokens; "token_probability" its geometric mean per
    token, for long answers whose product is tiny from the start (the "Probability" of TOFU, Maini et al. 2024,
    arXiv:2401.06121).
    """
    reduction = "sum" if level == "probability" else "mean"
    return torch.exp(-losses.nll_of_examples(model, examples, size=batch_size, reduction=reduction))


def levels(
    model: ScoringModel, probes: Mapping[str, Sequence[Example]], *, level: Level = "probability", batch_size: int = 32
) -> dict[str, float]:
    """Mean answer probability of every named list of examples; of contrast pairs the mean preference.

    The preference is P(advantaged) / (P(advantaged) + P(disadvantaged)) of the stretch in which the sides differ: 0.5
    where the model makes no difference.
    """
    return {
        name: float(_of(model, examples, level=level, batch_size=batch_size).double().mean())
        for name, examples in probes.items()
    }


def _of(model: ScoringModel, examples: Sequence[Example], *, level: Level, batch_size: int) -> Tensor:
    if are_pairs(examples):
        return preferences(model, examples, size=batch_size)
    return answer_probabilities(model, examples, level=level, batch_size=batch_size)


def level_name(kind: str, level: Level) -> str:
    """What the level of items of a kind is called.

    >>> level_name("fact", "token_probability"), level_name("contrast", "probability")
    ('token probability', 'preference for the advantaged side')
    """
    if kind == "contrast":
        return "preference for the advantaged side"
    return "answer probability" if level == "probability" else "token probability"

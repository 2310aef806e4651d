"""How much a model still says of a data set: the one number that doses are matched by."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from locedit import losses
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
    """Mean answer probability of every named list of examples."""
    return {
        name: float(answer_probabilities(model, examples, level=level, batch_size=batch_size).double().mean())
        for name, examples in probes.items()
    }

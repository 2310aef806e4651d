"""Numbers that say how well a ranking finds a set, and how sure a mean over seeds is."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locedit.ranks import midranks, t_quantile


class Interval(NamedTuple):
    """A mean over seeds and the ends of its 95 % interval; the ends are NaN with one seed."""

    value: float
    low: float
    high: float

    def within(self, low: float, high: float) -> "Interval":
        """The part of the interval that is possible; NaN ends stay."""
        return Interval(self.value, *(min(max(end, low), high) if end == end else end for end in self[1:]))


def roc_auc(values: Float[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """Share of the pairs (in the set, outside it) in which the member scores higher, ties half: area under the ROC.

    1 = every member above all others, 0.5 = chance (and for scores that are all equal), 0 = every member below.

    >>> roc_auc(torch.tensor([0.9, 0.2, 0.5]), torch.tensor([True, False, True]))
    1.0
    """
    inside, outside = int(truth.sum()), int((~truth).sum())
    assert inside, "the set is empty"
    assert outside, "the set is everything"
    total = float(midranks(values)[truth].sum())
    return (total - inside * (inside + 1) / 2) / (inside * outside)


def recall_at(values: Float[Tensor, " n"], truth: Bool[Tensor, " n"], *, k: int) -> float:
    """Share of the set among the k highest; of components that tie for the last places each has the same chance.

    >>> recall_at(torch.tensor([2.0, 1.0, 1.0, 1.0]), torch.tensor([True, True, False, False]), k=2)
    0.6666666666666666
    """
    limit = torch.topk(values, k).values[-1]
    above, tied = values > limit, values == limit
    share = (k - int(above.sum())) / int(tied.sum())
    return (int((above & truth).sum()) + share * int((tied & truth).sum())) / int(truth.sum())


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean and Student's 95 % interval, one value a seed: mean +- t * s / sqrt(n) with n - 1 degrees of freedom.

    >>> [round(number, 3) for number in over_seeds([0.5, 0.6, 0.7])]
    [0.6, 0.352, 0.848]
    """
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = t_quantile(len(values) - 1) * math.sqrt(variance / len(values))
    return Interval(mean, mean - half, mean + half)


def at_the_end(value: float, bounds: tuple[float, float], *, trials: int) -> Interval:
    """The interval where all trials gave the same end of the possible range, and Student's has no width.

    Were the mean further from the end than share * range, so many trials at the end would come with a probability of at
    most (1 - share) ** trials (Clopper and Pearson 1934, for numbers and not only for yes and no): share solves 0.025.

    >>> [round(number, 2) for number in at_the_end(1.0, (0.0, 1.0), trials=6)]
    [1.0, 0.54, 1.0]
    """
    low, high = bounds
    reach = (high - low) * (1 - 0.025 ** (1 / trials))
    return Interval(value, value - reach, value) if value == high else Interval(value, value, value + reach)

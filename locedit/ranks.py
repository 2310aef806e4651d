"""Ranks and their correlation, and Student's t, by scipy."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from scipy import stats as _stats  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

stats: Any = _stats


def midranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ranks from 1 for the smallest; equal values share the mean of their ranks.

    >>> midranks(torch.tensor([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    return torch.from_numpy(stats.rankdata(values.numpy()))


def spearman(first: Sequence[float] | Tensor, second: Sequence[float] | Tensor) -> float:
    """Spearman's rank correlation: Pearson's of the midranks; NaN where either is all alike.

    >>> round(spearman([1.0, 2.0, 3.0], [10.0, 20.0, 15.0]), 12)
    0.5
    """
    a, b = (torch.as_tensor(values, dtype=torch.float64) for values in (first, second))
    if not len(a) or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return math.nan
    return float(stats.spearmanr(a.numpy(), b.numpy()).statistic)


def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t.

    >>> round(t_quantile(2), 3)
    4.303
    """
    return float(stats.t.ppf(0.975, freedom))

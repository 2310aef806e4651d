"""Bootstrap intervals of means: items are drawn again by owner, because two items of one person are not independent."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

LEVEL = 0.95
ALIKE = 1e-12
"draws that are no further apart are alike but for rounding"


class Estimate(NamedTuple):
    """A number and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def owner_index(owners: Sequence[str | None]) -> list[int]:
    """Cluster number of every item; an item without an owner is a cluster of its own.

    >>> owner_index(["ann", None, "ann", "bob", None])
    [0, 1, 0, 2, 3]
    """
    seen: dict[object, int] = {}
    keys = [("owner", owner) if owner is not None else ("item", at) for at, owner in enumerate(owners)]
    return [seen.setdefault(key, len(seen)) for key in keys]


def resampled_means(
    values: Float[Tensor, "item column"],
    *,
    owners: Sequence[str | None],
    weights: Float[Tensor, " item"] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Float[Tensor, "draw column"]:
    """Weighted means of `draws` bootstrap samples of owners, float64; the columns are drawn together.

    Each sample takes as many owners as there are, with replacement, and every item of an owner that was taken
    (cluster bootstrap, Davison and Hinkley 1997, section 3.8).
    """
    values = values.double()
    weights = torch.ones(len(values)).double() if weights is None else weights.double()
    index = torch.tensor(owner_index(owners))
    clusters = int(index.max()) + 1
    sums = torch.zeros(clusters, values.shape[1]).double().index_add(0, index, values * weights[:, None])
    sizes = torch.zeros(clusters).double().index_add(0, index, weights)
    generator = torch.Generator().manual_seed(seed)
    taken = torch.randint(clusters, (draws, clusters), generator=generator)
    counts = torch.zeros(draws, clusters).double().scatter_add(1, taken, torch.ones_like(taken, dtype=torch.float64))
    return (counts @ sums) / (counts @ sizes)[:, None]


def ends(draws: Float[Tensor, " draw"]) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles."""
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    return low, high


def around(value: float, draws: Float[Tensor, " draw"]) -> Estimate:
    """A number that is no mean with the percentile interval of its draws, which always holds the number.

    Draws of a distance from evenness, or of a product with a peak, can all lie on one side of it. Where they are all
    alike there is no interval (both ends NaN): nothing in the sample shows how far off the number could be.

    >>> around(0.0, torch.tensor([0.1, 0.2, 0.3])).low, around(0.5, torch.tensor([0.5, 0.5])).low
    (0.0, nan)
    """
    if not len(draws) or bool((draws - draws[0]).abs().max() < ALIKE):
        return Estimate(value, float("nan"), float("nan"))
    low, high = ends(draws)
    return Estimate(value, min(low, value), max(high, value))


def estimate_mean(
    values: Float[Tensor, " item"],
    *,
    owners: Sequence[str | None],
    weights: Float[Tensor, " item"] | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    bounds: tuple[float | None, float | None] = (None, None),
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Weighted mean with its percentile bootstrap interval; `transform` (increasing) is applied to the mean.

    Where every value sits on the same end of the possible range, the bootstrap has no width although a few items prove
    little: there the exact binomial bound of Clopper and Pearson 1934 is used, with the owners as trials. One owner
    alone gives no interval (both ends NaN).
    """
    kept = torch.ones(len(values)).double() if weights is None else weights.double()
    apply = transform or (lambda mean: mean)
    value = apply((values.double() * kept).sum() / kept.sum()).item()
    trials = max(owner_index(owners)) + 1
    if trials == 1:
        return Estimate(value, float("nan"), float("nan"))
    constant = values[0].item() if bool((values == values[0]).all()) else None
    if constant is not None and constant in bounds and None not in bounds:
        return _at_the_end(value, bounds=bounds, trials=trials)
    means = resampled_means(values[:, None], owners=owners, weights=weights, draws=draws, seed=seed)[:, 0]
    return Estimate(value, *ends(apply(means)))


def _at_the_end(value: float, *, bounds: tuple[float | None, float | None], trials: int) -> Estimate:
    """The binomial bound when all trials came out alike: (1 - level) / 2 = share ** trials."""
    low, high = bounds
    assert low is not None
    assert high is not None
    reach = (high - low) * (1 - ((1 - LEVEL) / 2) ** (1 / trials))
    return Estimate(value, value - reach, value) if value == high else Estimate(value, value, value + reach)

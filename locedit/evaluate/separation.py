"""How well a score tells two sets of items apart: the AUC, exact, with an interval that resamples owners of both sets.

AUC = share of all pairs (member, other) in which the member has the higher score, equal scores counting half: the
Mann-Whitney statistic divided by the number of pairs. 0.5 = the score does not tell them apart. A member's placement is
its share of the others; the AUC is the mean placement.

The interval is the cluster bootstrap with owners of both sets drawn again, independently. Percentiles of few clusters
are too narrow, so they are taken further out, by Student's t with one degree of freedom less than owners in the smaller
set (the expanded percentile interval, Hesterberg 2015, arXiv:1411.5279, section 5). Where every pair comes out alike
the bootstrap has no width: pairs without a common owner, of which there are as many as owners in the smaller set, are
then independent trials of whether another pair comes out so too, and the binomial bound of Clopper and Pearson 1934
holds of the share of pairs that would not. Where all pairs are ties (a model that says the same of every text) they
could be won or lost: the interval reaches to both sides of 0.5.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from locedit.evaluate.intervals import LEVEL, Estimate, estimate_mean, owner_index

Owners = Sequence[str | None]


def wins(members: Float[Tensor, " member"], others: Float[Tensor, " other"]) -> Float[Tensor, "member other"]:
    """1 where the member has the higher score, 0.5 where both are equal, else 0; float64.

    >>> wins(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])).mean(1).tolist()
    [1.0, 0.75]
    """
    return (members[:, None] > others).double() + (members[:, None] == others).double() / 2


def auc_draws(
    won: Float[Tensor, "member other"], *, owners: Owners, other_owners: Owners, draws: int = 2000, seed: int = 0
) -> Float[Tensor, " draw"]:
    """The AUC of bootstrap samples of owners, the members' and the others' drawn independently.

    The same owners, draws and seed give the same samples, so that the AUCs of two models can be compared draw by draw.
    """
    generator = torch.Generator().manual_seed(seed)
    first, sizes = _times_taken(owners, draws, generator)
    second, other_sizes = _times_taken(other_owners, draws, generator)
    rows = torch.zeros(len(sizes), won.shape[1]).double().index_add(0, torch.tensor(owner_index(owners)), won)
    between = torch.zeros(len(sizes), len(other_sizes)).double()
    between = between.index_add(1, torch.tensor(owner_index(other_owners)), rows)  # [owner, other owner]
    return ((first @ between) * second).sum(1) / ((first @ sizes) * (second @ other_sizes))


def _times_taken(
    owners: Owners, draws: int, generator: torch.Generator
) -> tuple[Float[Tensor, "draw owner"], Float[Tensor, " owner"]]:
    """How often each owner is in each sample, and how many items each has."""
    sizes = torch.bincount(torch.tensor(owner_index(owners))).double()
    taken = torch.randint(len(sizes), (draws, len(sizes)), generator=generator)
    counts = torch.zeros(draws, len(sizes)).double()
    return counts.scatter_add(1, taken, torch.ones_like(taken, dtype=torch.float64)), sizes


def expanded_ends(draws: Float[Tensor, " draw"], *, clusters: int) -> tuple[float, float]:
    """The ends of the expanded percentile interval of bootstrap draws from so many clusters."""
    factor = (clusters / (clusters - 1)) ** 0.5 * stats.t.ppf((1 + LEVEL) / 2, clusters - 1)
    tail = float(stats.norm.cdf(-factor))
    low, high = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    return low, high


def fewest(owners: Owners, other_owners: Owners) -> int:
    """Owners in the smaller set."""
    return min(len(set(owner_index(owners))), len(set(owner_index(other_owners))))


def auc_estimate(
    won: Float[Tensor, "member other"], *, owners: Owners, other_owners: Owners, draws: int = 2000, seed: int = 0
) -> Estimate:
    """The AUC with its interval; no interval (both ends NaN) where a set has one owner."""
    value, clusters = float(won.mean()), fewest(owners, other_owners)
    if clusters == 1:
        return Estimate(value, float("nan"), float("nan"))
    if bool((won == won[0, 0]).all()):
        bound = estimate_mean(torch.ones(clusters), owners=[None] * clusters, bounds=(0.0, 1.0))
        reach = bound.value - bound.low
        return Estimate(value, value * (1 - reach), value + (1 - value) * reach)
    found = auc_draws(won, owners=owners, other_owners=other_owners, draws=draws, seed=seed)
    low, high = expanded_ends(found, clusters=clusters)
    return Estimate(value, min(low, value), max(high, value))

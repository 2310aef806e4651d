"""The AUC against scikit-learn, its bootstrap against a loop, and how often its interval holds the truth."""

import math

import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from locedit.evaluate.separation import auc_draws, auc_estimate, expanded_ends, wins


@pytest.mark.parametrize("decimals", [6, 0])
def test_the_mean_of_the_wins_is_the_auc(decimals: int) -> None:
    """With no decimals most scores are tied."""
    generator = torch.Generator().manual_seed(0)
    members = (torch.randn(13, generator=generator) + 1).round(decimals=decimals)
    others = torch.randn(17, generator=generator).round(decimals=decimals)
    expected = roc_auc_score([1] * 13 + [0] * 17, torch.cat([members, others]).numpy())
    assert 0.5 < expected < 0.9
    assert float(wins(members, others).mean()) == pytest.approx(expected, abs=1e-12)


def test_owners_of_both_sets_are_drawn_again() -> None:
    """Every draw is the AUC of whole owners: of one owner each, as there are only two, four values can come up."""
    members, others = torch.tensor([3.0, 0.0, 2.0]), torch.tensor([1.0, 2.5])
    owners, other_owners = ["a", "a", "b"], ["x", "y"]
    draws = auc_draws(wins(members, others), owners=owners, other_owners=other_owners, draws=4000)
    pools = {"aa": [3.0, 0.0], "bb": [2.0], "ab": [3.0, 0.0, 2.0]}
    other_pools = {"xx": [1.0], "yy": [2.5], "xy": [1.0, 2.5]}
    chance: dict[float, float] = {}
    for name, pool in pools.items():
        for other, other_pool in other_pools.items():
            value = float(wins(torch.tensor(pool), torch.tensor(other_pool)).mean())
            chance[value] = chance.get(value, 0) + (1 + (name == "ab")) * (1 + (other == "xy")) / 16
    for value, expected in chance.items():
        assert float((draws - value).abs().lt(1e-9).double().mean()) == pytest.approx(expected, abs=0.03)
    assert sum(chance.values()) == 1


def test_expanded_ends_are_quantiles_further_out() -> None:
    draws = torch.arange(10_001) / 10_000
    low, high = expanded_ends(draws, clusters=10)
    tail = stats.norm.cdf(-math.sqrt(10 / 9) * stats.t.ppf(0.975, 9))
    assert low == pytest.approx(tail, abs=1e-6)
    assert high == pytest.approx(1 - tail, abs=1e-6)
    assert tail < 0.01
    assert expanded_ends(draws, clusters=10_000)[0] == pytest.approx(0.025, abs=1e-4)


@pytest.mark.parametrize(
    ("owners", "each", "shared", "shift"),
    [(8, 1, 0.0, 0.0), (4, 5, 0.5, 0.0), (12, 3, 0.5, 0.0), (20, 1, 0.0, 1.0)],
)
def test_the_interval_holds_the_true_auc(owners: int, each: int, shared: float, shift: float) -> None:
    """Normal scores, of which the owner decides a share; members shifted. 200 draws of both sets."""
    generator = torch.Generator().manual_seed(0)
    truth = stats.norm.cdf(shift / math.sqrt(2))
    names = [str(at // each) for at in range(owners * each)]

    def scores() -> torch.Tensor:
        own = torch.randn(owners, generator=generator).repeat_interleave(each)
        return shared**0.5 * own + (1 - shared) ** 0.5 * torch.randn(owners * each, generator=generator)

    held, widths = 0, 0.0
    for _ in range(200):
        won = wins(scores() + shift, scores())
        found = auc_estimate(won, owners=names, other_owners=names, draws=500)
        held += found.low <= truth <= found.high
        widths += (found.high - found.low) / 200
    assert held / 200 >= 0.9
    assert widths < 0.8, "an interval from 0 to 1 would hold everything"


def test_items_of_one_owner_are_not_taken_for_many() -> None:
    """The same scores with four owners have a wider interval than with twenty."""
    generator = torch.Generator().manual_seed(1)
    own = torch.randn(2, 4, generator=generator).repeat_interleave(5, dim=1)
    won = wins(*(own + 0.1 * torch.randn(2, 20, generator=generator)))
    owners = [str(at // 5) for at in range(20)]
    few = auc_estimate(won, owners=owners, other_owners=owners)
    many = auc_estimate(won, owners=[None] * 20, other_owners=[None] * 20)
    assert few.value == many.value
    assert few.high - few.low > 1.5 * (many.high - many.low)


def test_a_score_that_is_the_same_of_every_text_has_a_wide_interval() -> None:
    """All pairs are ties: the bootstrap has no width, and 0.5 was once taken for a certainty, from two owners alone."""
    tied = wins(torch.zeros(5), torch.zeros(7))
    found = auc_estimate(tied, owners=list("aaabb"), other_owners=[None] * 7)
    assert found.value == 0.5
    reach = 1 - 0.025 ** (1 / 2)
    assert (found.low, found.high) == pytest.approx((0.5 - reach / 2, 0.5 + reach / 2))
    assert auc_estimate(tied, owners=[None] * 5, other_owners=[None] * 7).low > found.low


def test_perfect_separation_has_the_binomial_bound() -> None:
    """With a chance of 0.025 ** (1 / 6) for each of six independent pairs all six come out right in 2.5 %."""
    won = wins(torch.arange(10.0) + 1, -torch.arange(6.0))
    found = auc_estimate(won, owners=[None] * 10, other_owners=[None] * 6)
    assert found.value == found.high == 1
    assert found.low**6 == pytest.approx(0.025)
    swapped = auc_estimate(1 - won, owners=[None] * 10, other_owners=[None] * 6)
    assert (swapped.value, swapped.low) == (0, 0)
    assert swapped.high == pytest.approx(1 - found.low)
    alone = auc_estimate(won, owners=["a"] * 10, other_owners=[None] * 6)
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)

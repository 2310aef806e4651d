"""The numbers that grade a ranking: worked by hand, and over seeds."""

import math

import pytest
import torch

from locedit.grading.records import Record, summary
from locedit.grading.statistics import over_seeds, recall_at, roc_auc
from locedit.ranks import midranks, spearman, t_quantile


def truth(*members: int, n: int) -> torch.Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[list(members)] = True
    return mask


def test_area_under_the_curve_is_the_share_of_pairs_in_the_right_order() -> None:
    """Members 5 and 2 against 4, 3, 1: of six pairs 5>4, 5>3, 5>1, 2>1 are right: 4/6."""
    values = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert roc_auc(values, truth(0, 3, n=5)) == pytest.approx(4 / 6)
    assert roc_auc(-values, truth(0, 3, n=5)) == pytest.approx(2 / 6)
    assert roc_auc(values, truth(0, 1, n=5)) == 1.0
    assert roc_auc(torch.zeros(5), truth(0, 1, n=5)) == 0.5


def test_area_under_the_curve_equals_a_count_over_all_pairs_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 6, (40,), generator=generator).float()
    inside = torch.rand(40, generator=generator) < 0.3
    pairs = [(a, b) for a in values[inside].tolist() for b in values[~inside].tolist()]
    share = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert roc_auc(values, inside) == pytest.approx(share)


def test_recall_gives_tied_components_equal_chances() -> None:
    """The two highest: 9 for certain, then one of three 5s, of which one is a member: (1 + 1/3) / 2."""
    values = torch.tensor([9.0, 5.0, 5.0, 5.0, 1.0])
    assert recall_at(values, truth(0, 1, n=5), k=2) == pytest.approx((1 + 1 / 3) / 2)
    assert recall_at(values, truth(0, 4, n=5), k=2) == 0.5
    assert recall_at(torch.ones(5), truth(0, 1, n=5), k=2) == pytest.approx(2 / 5)


def test_random_scores_are_at_chance_and_the_truth_is_perfect() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = truth(*range(100), n=2000)
    random = torch.rand(2000, generator=generator)
    assert roc_auc(random, inside) == pytest.approx(0.5, abs=0.1)
    assert recall_at(random, inside, k=100) < 0.12
    assert roc_auc(inside.float(), inside) == 1.0
    assert recall_at(inside.float(), inside, k=100) == 1.0


def test_rank_correlation_by_hand() -> None:
    """Ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * 2 / (4 * 15) = 0.8; with ties Pearson of the midranks."""
    assert spearman([1, 2, 3, 4], [10, 30, 20, 99]) == pytest.approx(0.8)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert midranks(torch.tensor([2.0, 7.0, 2.0])).tolist() == [1.5, 3.0, 1.5]
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_interval_over_seeds_is_students() -> None:
    """1, 2, 3: mean 2, s 1, t(2) 4.30265273: 2 +- 4.30265273 / sqrt(3)."""
    found = over_seeds([1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.low == pytest.approx(2 - 4.30265273 / math.sqrt(3))
    assert found.high == pytest.approx(2 + 4.30265273 / math.sqrt(3))
    assert math.isnan(over_seeds([1.0]).low)
    assert found.within(0, 3) == (2, 0, 3)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (9, 2.262), (10, 2.228), (30, 2.042), (100, 1.984)])
def test_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=1e-3)


def records(values: dict[int, list[float]], *, chance: float = 0.5, measure: str = "auc") -> list[Record]:
    return [
        Record(part="planted", place="mlp", method="m", seed=s, measure=measure, value=v, chance=chance, draw=at)
        for s, found in values.items()
        for at, v in enumerate(found)
    ]


def test_draws_of_a_seed_count_as_one_observation() -> None:
    """Seeds with 0.6, 0.8 and 0.7, 0.7 are 0.7 twice: no spread, although the draws have one."""
    (row,) = summary(records({0: [0.6, 0.8], 1: [0.7, 0.7]}))
    assert row.value == pytest.approx(0.7)
    assert row.low == pytest.approx(0.7)
    assert (row.seeds, row.draws) == (2, 4)
    assert row.verdict == "above chance"


def test_six_of_six_is_not_certain() -> None:
    """All sets right leaves room down to 0.025 ** (1 / sets): 0.54 with six sets, 0.29 with three."""
    (six,) = summary(records({0: [1.0, 1.0], 1: [1.0, 1.0], 2: [1.0, 1.0]}))
    assert six.low == pytest.approx(0.025 ** (1 / 6))
    assert (six.high, six.verdict) == (1, "above chance")
    (three,) = summary(records({0: [1.0], 1: [1.0], 2: [1.0]}))
    assert three.above_low == pytest.approx(0.025 ** (1 / 3) - 0.5)
    assert three.verdict == "not told from chance"
    (none,) = summary(records({0: [0.0], 1: [0.0], 2: [0.0]}, chance=0.05, measure="recall"))
    assert (none.low, none.verdict) == (0, "not told from chance")
    (tied,) = summary(records({0: [0.5], 1: [0.5], 2: [0.5]}))
    assert (tied.low, tied.high, tied.verdict) == (0.5, 0.5, "not told from chance")


def test_verdict_says_what_the_interval_leaves_out() -> None:
    verdicts = {
        "above chance": {0: [0.8], 1: [0.82], 2: [0.79]},
        "below chance": {0: [0.2], 1: [0.21], 2: [0.19]},
        "not told from chance": {0: [0.9], 1: [0.3], 2: [0.7]},
        "one seed": {0: [0.9]},
    }
    for word, values in verdicts.items():
        (row,) = summary(records(values))
        assert row.verdict == word
        assert row.low != row.low or 0 <= row.low <= row.high <= 1


def test_chance_is_compared_within_each_seed() -> None:
    """Value and chance move together: the difference is 0.1 in every seed, whatever the seed."""
    found = [
        Record(part="deletion", place="head", method="m", seed=s, measure="excess", value=0.1 + 0.4 * s, chance=0.4 * s)
        for s in range(3)
    ]
    (row,) = summary(found)
    assert row.above == pytest.approx(0.1)
    assert row.above_high - row.above_low < 1e-6 < 0.5 < row.high - row.low
    assert row.verdict == "above chance"


def test_what_was_not_graded_keeps_its_reason() -> None:
    (row,) = summary([Record(part="oracle", place="MLP pairs", method="m", seed=0, measure="robust", reason="why")])
    assert (row.verdict, row.reason, row.seeds) == ("-", "why", 0)

"""Bootstrap intervals: against the textbook, by owner, and at the end of the range."""

import math

import pytest
import torch

from locedit.evaluate.intervals import around, estimate_mean, owner_index, resampled_means


def test_interval_of_a_share_is_the_normal_one_when_items_are_many() -> None:
    values = (torch.arange(400) % 4 == 0).float()  # 100 of 400
    found = estimate_mean(values, owners=[None] * 400, bounds=(0.0, 1.0))
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert found.value == 0.25
    assert found.low == pytest.approx(0.25 - half, abs=0.005)
    assert found.high == pytest.approx(0.25 + half, abs=0.005)


def test_an_interval_around_a_number_holds_it() -> None:
    draws = torch.linspace(0.1, 0.5, 41, dtype=torch.float64)
    assert around(0.3, draws) == pytest.approx((0.3, 0.11, 0.49))
    assert around(0.0, draws) == pytest.approx((0.0, 0.0, 0.49))
    assert around(0.9, draws) == pytest.approx((0.9, 0.11, 0.9))
    for none in (torch.full((9,), 0.3), torch.zeros(0)):
        assert around(0.3, none).value == 0.3
        assert math.isnan(around(0.3, none).low)


def test_items_of_one_owner_are_drawn_together() -> None:
    values = torch.tensor([1.0] * 10 + [0.0] * 10).repeat(4)
    alone = estimate_mean(values, owners=[None] * 80)
    grouped = estimate_mean(values, owners=[f"p{at // 10}" for at in range(80)])
    assert grouped.value == alone.value == 0.5
    # 8 owners whose items agree carry as much as 8 items: sqrt(10) times the width
    ratio = (grouped.high - grouped.low) / (alone.high - alone.low)
    assert 2.5 < ratio < 3.9


def test_bootstrap_mean_by_hand_of_two_owners() -> None:
    """Owners with sums 3 and 1 over 1 and 3 items: the only possible means are 3, 4/4 and 1/3."""
    values = torch.tensor([[3.0], [1 / 3], [1 / 3], [1 / 3]])
    drawn = resampled_means(values, owners=["a", "b", "b", "b"], draws=500)[:, 0]
    assert {round(value, 6) for value in drawn.tolist()} == {3.0, 1.0, 0.333333}
    assert (drawn.sub(1).abs() < 1e-6).double().mean() == pytest.approx(0.5, abs=0.08)


def test_weights_and_transform_give_the_perplexity_of_all_tokens() -> None:
    nll, tokens = torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0])
    found = estimate_mean(nll, owners=[None, None], weights=tokens, transform=torch.exp)
    assert found.value == pytest.approx(math.exp((3 * 1 + 1 * 3) / 4))
    assert (found.low, found.high) == pytest.approx((math.exp(1), math.exp(3)))


def test_all_right_does_not_mean_certain() -> None:
    """Ten of ten: the exact 95 % bound is 0.025 ** (1 / 10); with two owners it is much lower."""
    ones = torch.ones(10)
    found = estimate_mean(ones, owners=[None] * 10, bounds=(0.0, 1.0))
    assert found == pytest.approx((1.0, 0.025**0.1, 1.0))
    few = estimate_mean(ones, owners=["a"] * 5 + ["b"] * 5, bounds=(0.0, 1.0))
    assert few.low == pytest.approx(0.025**0.5)
    none = estimate_mean(torch.zeros(10), owners=[None] * 10, bounds=(0.0, 1.0))
    assert none == pytest.approx((0.0, 0.0, 1 - 0.025**0.1))


def test_one_owner_gives_no_interval() -> None:
    found = estimate_mean(torch.tensor([0.0, 1.0]), owners=["a", "a"])
    assert found.value == 0.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_same_seed_same_interval_and_owner_names_do_not_clash_with_items() -> None:
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    first, again = (estimate_mean(values, owners=[None] * 30, seed=3) for _ in range(2))
    other = estimate_mean(values, owners=[None] * 30, seed=4)
    assert first == again
    assert first != other
    assert owner_index(["0", None, "0"]) == [0, 1, 0]

"""FairSISA: the linear programmes against fairlearn, brute force and the order of their errors."""

import itertools
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from locedit.errors import LoceditError
from locedit.sisa.ensemble import majority, mean_probability, votes
from locedit.sisa.fair import Calibration, FairPredictor, cell_numbers, fit
from locedit.sisa.fair_scores import fit_thresholds
from locedit.sisa.group_metrics import (
    compare,
    equalized_odds_difference,
    expected_error,
    group_table,
    odds_gap,
)

SEEDS = range(6)


def planted(seed: int, *, members: int = 5, items: int = 3000, groups: int = 2) -> Calibration:
    """Members that see a score with noise of their own; labels lean towards 1 in the later groups."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    group = torch.randint(groups, (items,), generator=generator)
    score = noise(items)
    labels = (score + 0.7 * group + 0.9 * noise(items) > 0.3).long()
    bias = 0.5 * noise(groups, members)
    said = (score[:, None] + 0.8 * group[:, None] + bias[group] + 1.2 * noise(items, members) > 0.3).long()
    return Calibration(votes=said, labels=labels, groups=tuple(f"g{at}" for at in group.tolist()))


def measured(predictor: FairPredictor, data: Calibration) -> tuple[float, float]:
    chances = predictor.probabilities(data.votes, data.groups)
    return expected_error(chances, data.labels), odds_gap(chances, data.labels, data.groups)


# --- what holds always -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("members", [2, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_errors_are_nested_and_odds_are_equal(seed: int, members: int, groups: int) -> None:
    data = planted(seed, members=members, groups=groups)
    error, gap = {}, {}
    for name, placement, cells in (
        ("tuple", "in", "tuple"),
        ("count", "in", "count"),
        ("post", "post", "tuple"),
        ("none", "none", "tuple"),
    ):
        error[name], gap[name] = measured(fit(data, placement, cells=cells), data)
    assert error["tuple"] <= error["count"] + 1e-9
    assert error["count"] <= error["post"] + 1e-9
    assert max(gap["tuple"], gap["count"], gap["post"]) < 1e-9
    assert gap["none"] > 0.02, "the contrast: the majority has unequal odds"


def lopsided(seed: int) -> Calibration:
    """Nine in ten items of the first group, where members are good; in the other one labels are mostly 1."""
    generator = torch.Generator().manual_seed(seed)
    group = (torch.rand(2000, generator=generator) > 0.9).long()
    labels = (torch.rand(2000, generator=generator) < torch.where(group == 1, 0.8, 0.2)).long()
    right = torch.rand(2000, 3, generator=generator) < torch.where(group == 1, 0.6, 0.8)[:, None]
    said = torch.where(right, labels[:, None], 1 - labels[:, None])
    return Calibration(votes=said, labels=labels, groups=tuple(f"g{at}" for at in group.tolist()))


@pytest.mark.parametrize("cells", ["tuple", "count", "majority"])
def test_the_error_is_the_least_by_another_programme(cells: str) -> None:
    """With the common rates as variables of their own, by interior points, every item costing the same."""
    data = lopsided(0)
    number = cell_numbers(data.votes, cells, tie=1)
    count = int(number.max()) + 1
    cost, rows = np.zeros(2 * count + 2), np.zeros((4, 2 * count + 2))
    for a, c, y in zip(data.group.tolist(), number.tolist(), data.labels.tolist(), strict=True):
        cost[a * count + c] += (1 - 2 * y) / len(number)
        rows[2 * a + y, a * count + c] += 1 / int(((data.group == a) & (data.labels == y)).sum())
    for a, y in itertools.product((0, 1), repeat=2):
        rows[2 * a + y, 2 * count + y] = -1
    least = linprog(cost, A_eq=rows, b_eq=np.zeros(4), bounds=(0, 1), method="highs-ipm").fun
    found = fit(data, "post") if cells == "majority" else fit(data, "in", cells=cells)
    error, gap = measured(found, data)
    assert error == pytest.approx(least + data.labels.double().mean().item(), abs=1e-7)
    assert gap < 1e-9


def test_pre_has_no_guarantee() -> None:
    """Every member alone has equal odds on the calibration data; their majority has not."""
    data = planted(0)
    for member in range(5):
        alone = Calibration(votes=data.votes[:, [member]], labels=data.labels, groups=data.groups)
        assert measured(fit(alone, "pre"), alone)[1] < 1e-9
    assert measured(fit(data, "pre"), data)[1] > 0.01


def test_pre_is_the_majority_of_independent_draws() -> None:
    """Its table against all 2 ** S outputs by hand, with an even number of members and their tie."""
    data = planted(1, members=4, items=800)
    for tie in (0, 1):
        found = fit(data, "pre", tie=tie)
        alone = [
            fit(Calibration(votes=data.votes[:, [m]], labels=data.labels, groups=data.groups), "post") for m in range(4)
        ]
        for said, (at, group) in itertools.product(itertools.product((0, 1), repeat=4), enumerate(("g0", "g1"))):
            chances = [alone[m].table[at, said[m]].item() for m in range(4)]
            expected = 0.0
            for drawn in itertools.product((0, 1), repeat=4):
                if 2 * sum(drawn) + tie > 4:
                    expected += np.prod([c if bit else 1 - c for c, bit in zip(chances, drawn, strict=True)])
            got = found.probabilities(torch.tensor([said]), [group])
            assert got.item() == pytest.approx(expected, abs=1e-12)


def test_a_perfect_predictor_is_returned_unchanged() -> None:
    data = planted(2)
    perfect = Calibration(votes=data.labels[:, None].repeat(1, 3), labels=data.labels, groups=data.groups)
    for placement, cells in itertools.product(("post", "in", "pre", "none"), ("tuple", "count")):
        found = fit(perfect, placement, cells=cells)
        assert torch.equal(found.probabilities(perfect.votes, perfect.groups), perfect.labels.double())


@pytest.mark.parametrize("cells", ["tuple", "count"])
def test_one_group_alone_has_bayes_rule_in_every_cell(cells: str) -> None:
    data = planted(3, groups=1)
    found = fit(data, "in", cells=cells)
    number = cell_numbers(data.votes, cells, tie=1)
    for cell in number.unique().tolist():
        share = data.labels[number == cell].double().mean().item()
        if share != 0.5:
            assert found.table[0, cell].item() == float(share > 0.5)
    best = torch.stack([data.labels[number == cell].bincount(minlength=2).min() for cell in number.unique()])
    assert measured(found, data)[0] == pytest.approx(best.sum().item() / len(data.labels), abs=1e-12)


def test_post_against_every_pair_of_rates() -> None:
    """With two cells a group reaches a parallelogram of rates; the best common pair on a fine grid is no better."""
    data = planted(4)
    error, _ = measured(fit(data, "post"), data)
    bit = cell_numbers(data.votes, "majority", tie=1).double()
    rates = {}
    for group in (0, 1):
        positive, negative = (bit[(data.group == group) & (data.labels == y)].mean().item() for y in (1, 0))
        rates[group] = np.linalg.inv([[1 - positive, positive], [1 - negative, negative]])
    ones, best = data.labels.double().mean().item(), 1.0
    for tpr, fpr in itertools.product(np.linspace(0, 1, 101), repeat=2):
        p = np.concatenate([rates[group] @ [tpr, fpr] for group in (0, 1)])
        if p.min() > -1e-12 and p.max() < 1 + 1e-12:
            best = min(best, (1 - tpr) * ones + fpr * (1 - ones))
    assert error <= best + 1e-12
    assert error > best - 0.02, "and the grid comes near"


@pytest.mark.parametrize("tie", [0, 1])
def test_a_cell_without_calibration_items_has_the_majority(tie: int) -> None:
    data = planted(5, members=2)
    kept = (data.votes.sum(1) != 1) | (data.group == 0)
    part = Calibration(
        votes=data.votes[kept],
        labels=data.labels[kept],
        groups=tuple(g for g, k in zip(data.groups, kept.tolist(), strict=True) if k),
    )
    found = fit(part, "in", tie=tie)
    assert found.probabilities(torch.tensor([[0, 1], [1, 0]]), ["g1", "g1"]).tolist() == [tie, tie]


# --- draws, votes, files ---------------------------------------------------------------------------------------------


def test_drawn_outputs_come_as_often_as_their_probability() -> None:
    """Within four standard errors in every cell; the same seed draws the same, another does not."""
    data = planted(0, items=20000)
    found = fit(data, "pre")
    chances = found.probabilities(data.votes, data.groups)
    drawn = found.predict(data.votes, data.groups, seed=3)
    assert torch.equal(drawn, found.predict(data.votes, data.groups, seed=3))
    assert not torch.equal(drawn, found.predict(data.votes, data.groups, seed=4))
    between = 0
    for p in chances.unique().tolist():
        mine = drawn[chances == p].double()
        between += 0.05 < p < 0.95
        assert abs(mine.mean().item() - p) <= 4 * (p * (1 - p) / len(mine)) ** 0.5 + 1e-12
    assert between, "some outputs are drawn at all"


def test_a_tie_goes_to_the_first_class() -> None:
    cast = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 2], [2, 1, 1, 2], [2, 2, 2, 0]])
    assert majority(cast, classes=3).tolist() == [0, 1, 1, 2]
    assert majority(cast, classes=3, sizes=[1, 5, 1, 1]).tolist() == [1, 1, 1, 2]
    assert majority(torch.tensor([[0, 1, 1]]), classes=2, sizes=[2, 1, 1]).tolist() == [0], "two against two"
    assert votes(torch.tensor([[[0.5, 0.5], [0.2, 0.8]]])).tolist() == [[0, 1]]


def test_majority_of_classes_and_of_bits_agree() -> None:
    """`tie=1` is the rule of `majority` where the positive class stands first."""
    cast = torch.randint(2, (200, 4), generator=torch.Generator().manual_seed(0))
    bits = (cast == 0).long()
    assert torch.equal((majority(cast, classes=2) == 0).long(), cell_numbers(bits, "majority", tie=1))
    assert bool((bits.sum(1) == 2).any())


def test_mean_probability_by_hand() -> None:
    outputs = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]])
    torch.testing.assert_close(mean_probability(outputs), torch.tensor([[0.55, 0.45]]).double())
    torch.testing.assert_close(mean_probability(outputs, sizes=[1, 3]), torch.tensor([[0.375, 0.625]]).double())


def test_saved_and_loaded(tmp_path) -> None:
    data = planted(1)
    found = fit(data, "in")
    found.save(tmp_path / "fair.json")
    again = FairPredictor.load(tmp_path / "fair.json")
    assert torch.equal(again.table, found.table)
    assert (again.placement, again.cells, again.names, again.tie) == ("in", "tuple", ("g0", "g1"), 1)


# --- against fairlearn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_post_is_fairlearns_within_its_grid(seed: int, groups: int) -> None:
    """A grid of n false positive rates is at most 1 / n from the best one; the error follows at a rate of order 1."""
    data = planted(seed, groups=groups)
    own = measured(fit(data, "post"), data)
    score = cell_numbers(data.votes, "majority", tie=1).double()
    for grid in (100, 10000):
        theirs = fit_thresholds(score, data.labels, data.groups, grid_size=grid).probabilities(score, data.groups)
        assert odds_gap(theirs, data.labels, data.groups) < 1e-9
        error = expected_error(theirs, data.labels)
        assert -1e-9 < error - own[0] < 3 / grid


@pytest.mark.parametrize("groups", [2, 3])
def test_metrics_are_fairlearns(groups: int) -> None:
    data = planted(0, groups=groups)
    chances = fit(data, "pre").probabilities(data.votes, data.groups)
    assert odds_gap(chances, data.labels, data.groups) == pytest.approx(
        equalized_odds_difference(chances, data.labels, data.groups), abs=1e-12
    )
    table = group_table(chances, data.labels, data.groups)
    mine = data.group == 1
    assert table["g1"]["selection_rate"] == pytest.approx(chances[mine].mean().item())
    assert table["g1"]["true_positive_rate"] == pytest.approx(chances[mine & (data.labels == 1)].mean().item())
    assert table["g1"]["accuracy"] == pytest.approx(1 - expected_error(chances[mine], data.labels[mine]))


def test_without_fairlearn_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it is needed: the linear programmes go on without it."""
    monkeypatch.setitem(sys.modules, "fairlearn", None)
    data = planted(0, items=200)
    chances = fit(data, "in").probabilities(data.votes, data.groups)
    with pytest.raises(LoceditError, match=r"^fairlearn is not installed; pip install 'locedit\[fair\]'$"):
        group_table(chances, data.labels, data.groups)
    with pytest.raises(LoceditError, match="fairlearn is not installed"):
        fit_thresholds(data.votes[:, 0].double(), data.labels, data.groups)


# --- intervals -------------------------------------------------------------------------------------------------------


def test_intervals_are_of_the_numbers_and_of_paired_differences() -> None:
    data = planted(0)
    chances = {name: fit(data, name).probabilities(data.votes, data.groups) for name in ("none", "post")}
    found = compare(chances, data.labels, data.groups, draws=500)
    for name, chance in chances.items():
        assert found.error[name].value == pytest.approx(expected_error(chance, data.labels))
        assert found.gap[name].value == pytest.approx(odds_gap(chance, data.labels, data.groups), abs=1e-12)
        assert found.error[name].low < found.error[name].value < found.error[name].high
    assert found.price["none"] == (0.0, 0.0, 0.0)
    width = found.error["post"].high - found.error["post"].low
    assert 0 < found.price["post"].high - found.price["post"].low < width, "the same items, so the difference is surer"
    assert compare(chances, data.labels, data.groups, draws=500) == found


def test_intervals_of_few_owners_are_wider() -> None:
    said = (torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.3).double().repeat_interleave(10)
    truth, groups = torch.zeros(400).long(), ["a"] * 400
    owners = [str(at // 10) for at in range(400)]
    few, many = (compare({"x": said}, truth, groups, owners=given, draws=500).error["x"] for given in (owners, None))
    assert 2.2 < (few.high - few.low) / (many.high - many.low) < 4.5, "about the root of ten"


def test_a_rate_of_nothing_is_left_out_of_the_gap() -> None:
    """No item of group b has label 1, so the gap is that of label 0: 0.75 against 0.25."""
    chances = torch.tensor([0.2, 0.6, 0.9, 0.25, 0.75]).double()
    found = odds_gap(chances, torch.tensor([1, 1, 1, 0, 0]), ["a", "a", "a", "a", "b"])
    assert found == pytest.approx(0.5)


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Error of a coin with p = 0.3 on labels that are all 0: 95 % intervals hold 0.3 in most of 60 samples."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(60):
        said = (torch.rand(300, generator=generator) < 0.3).double()
        found = compare({"coin": said}, torch.zeros(300).long(), ["a"] * 300, draws=300, seed=seed).error["coin"]
        hits += found.low <= 0.3 <= found.high
    assert 50 <= hits < 60


# --- what cannot be done ---------------------------------------------------------------------------------------------


def test_errors_in_one_line() -> None:
    data = planted(0, items=50)
    with pytest.raises(LoceditError, match="13 members have 2\\*\\*13 tuples"):
        fit(planted(0, items=50, members=13), "in")
    assert fit(planted(0, items=50, members=13), "in", cells="count").table.shape == (2, 14)
    with pytest.raises(LoceditError, match="group 'g1' has no item of label 1 to calibrate on"):
        labels = torch.where(data.group == 1, 0, data.labels)
        fit(Calibration(votes=data.votes, labels=labels, groups=data.groups), "in")
    with pytest.raises(LoceditError, match="group 'g7' was not among the calibration items; choices: g0, g1"):
        fit(data, "in").probabilities(data.votes[:1], ["g7"])
    with pytest.raises(LoceditError, match="4 votes an item; the predictor was fitted on 5 members"):
        fit(data, "in").probabilities(data.votes[:, :4], data.groups)
    with pytest.raises(LoceditError, match="labels: fair predictions are of two classes"):
        Calibration(votes=data.votes, labels=data.labels + 1, groups=data.groups)

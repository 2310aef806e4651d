"""How far localizers agree: overlap and its chance level, rank correlation, and both on a page."""

import pytest
import torch

from locedit.agreement import Agreement, agreement, correlation, overlaps, rank_correlation
from locedit.components import ComponentSet, Scores
from locedit.data.items import Fact
from locedit.errors import LoceditError
from locedit.localize import localize
from locedit.models import Model
from locedit.provenance import Provenance
from locedit.report import report
from tests import tiny

FACTS = [Fact(prompt="Anna Berg was born in", answer=" Oslo", id="anna")]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model("llama")


def draws(model: Model, unit: str, seeds: range) -> list[Scores]:
    return [localize(model, FACTS, "random", unit=unit, seed=seed) for seed in seeds]


def test_spearman_by_hand() -> None:
    """1 - 6 * sum of squared rank differences / (n (n^2 - 1)) without ties; with ties the ranks are shared."""
    assert correlation(torch.tensor([10.0, 20.0, 30.0, 40.0]), torch.tensor([1.0, 2.0, 4.0, 3.0])) == pytest.approx(0.8)
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 4.0, 1.0])) == -1
    tied = correlation(torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert tied == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert correlation(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 3.0])) is None
    assert correlation(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])) is None


def test_overlap_of_one_unit_and_its_chance(model: Model) -> None:
    """Random sets of 60 of 240 neurons share 15 on average: 15 / 105."""
    sets = [scores.select(top=60) for scores in draws(model, "neuron", range(24))]
    found = [overlaps(a, b) for a, b in zip(sets[::2], sets[1::2], strict=True)]
    assert {counted for _, _, counted in found} == {"components"}
    assert all(chance == pytest.approx(15 / 105) for _, chance, _ in found)
    assert sum(shared for shared, _, _ in found) / len(found) == pytest.approx(15 / 105, abs=0.03)
    assert overlaps(sets[0], sets[0])[0] == 1


@pytest.mark.parametrize(("left", "right"), [("neuron", "mlp"), ("neuron", "row"), ("head", "weight")])
def test_across_units_parameters_are_counted(model: Model, left: str, right: str) -> None:
    """Against masks over all parameters; the chance level against the mean of random sets."""
    sizes = {"neuron": 80, "mlp": 1, "row": 150, "head": 4, "weight": 20_000}
    pairs = zip(draws(model, left, range(8)), draws(model, right, range(8, 16)), strict=True)
    found: list[tuple[float, float, str]] = []
    for a, b in ((one.select(top=sizes[left]), other.select(top=sizes[right])) for one, other in pairs):
        found.append(overlaps(a, b))
        mine, other = a.parameter_mask(), b.parameter_mask()
        both = sum(int((mine[name] & other[name]).sum()) for name in mine.keys() & other.keys())
        assert found[-1][0] == pytest.approx(both / (a.parameters() + b.parameters() - both))
    assert found[0][2] == "parameters"
    mean = sum(shared for shared, _, _ in found) / len(found)
    assert mean == pytest.approx(sum(chance for _, chance, _ in found) / len(found), rel=0.3)


def test_disjoint_places_share_nothing(model: Model) -> None:
    neurons, heads = (draws(model, unit, range(1))[0].select(top=5) for unit in ("neuron", "head"))
    assert overlaps(neurons, heads) == (0.0, 0.0, "parameters")


def test_ranks_over_what_both_score(model: Model) -> None:
    """Neurons: all of them. Heads and MLPs beside MLPs: the MLPs. Neurons beside rows: the modules, by their sums."""
    neurons = draws(model, "neuron", range(2))
    value, over = rank_correlation(*neurons)
    flat = [torch.cat([v for v in scores.values.values()]) for scores in neurons]
    assert value == correlation(*flat)
    assert over == "240 components (neuron)"
    mlps, heads = draws(model, "mlp", range(1))[0], draws(model, "head", range(1))[0]
    mixed = Scores(values=heads.values | mlps.values, sites=heads.sites | mlps.sites)
    assert rank_correlation(mixed, mlps) == (1.0, "3 components (mlp)")
    rows = draws(model, "row", range(1))[0]
    value, over = rank_correlation(neurons[0], rows)
    sums = [
        torch.tensor(
            [sum(float(v.sum()) for n, v in s.values.items() if n.startswith(f"blocks.{i}.mlp")) for i in range(3)]
        )
        for s in (neurons[0], rows)
    ]
    assert value == correlation(*sums)
    assert over == "3 modules"
    assert rank_correlation(neurons[0], draws(model, "layer", range(1))[0])[1] == "3 layers"
    assert rank_correlation(neurons[0], heads)[0] is None


def named(scores: Scores, name: str) -> Scores:
    return Scores(
        values=scores.values, sites=scores.sites, fingerprint=scores.fingerprint, provenance=Provenance(method=name)
    )


def test_agreement_saves_and_stands_on_the_page(model: Model, tmp_path) -> None:
    scores = {
        "one": draws(model, "neuron", range(1))[0],
        "other": draws(model, "neuron", range(1, 2))[0],
        "heads": draws(model, "head", range(1))[0],
    }
    result = agreement(scores)
    total = (~ComponentSet.of(scores["one"].sites, {})).parameters()
    assert f"{round(total / 100):,} parameters" in result.rule
    assert result.sets["budget"] == [round(total / 100)] * 3
    assert all(over >= 0 for over in result.sets["overshoot"])
    assert [row[i] for i, row in enumerate(result.overlap)] == [1, 1, 1]
    assert all(result.overlap[a][b] == result.overlap[b][a] for a in range(3) for b in range(3))
    assert result.rank[0][2] is None
    result.save(tmp_path / "agreement.json")
    assert Agreement.load(tmp_path / "agreement.json") == result
    page = report(*(named(value, name) for name, value in scores.items())).html()
    assert "Do the localizers agree?" in page
    assert "by chance" in page
    assert "Do the localizers agree?" not in report(named(scores["one"], "one")).html()
    with pytest.raises(LoceditError, match="two or more localizers; given: one"):
        agreement({"one": scores["one"]})
    (tmp_path / "agreement.json").write_text("{}")
    with pytest.raises(LoceditError, match="not an agreement"):
        Agreement.load(tmp_path / "agreement.json")


def test_two_runs_of_one_method_are_told_apart(model: Model) -> None:
    twice = report(*(named(scores, "random") for scores in draws(model, "neuron", range(2))))
    assert list(twice.runs[0].named_scores) == ["random", "random (2)"]

"""From scores to sets: every budget on numbers that can be checked by eye."""

import pytest
import torch

from locedit.components import Scores, Site, Slice
from locedit.data.items import Fact
from locedit.errors import LoceditError
from locedit.localize import localize
from locedit.matching import matched, overshoot, table
from locedit.provenance import Provenance
from tests import tiny
from tests.test_components import neurons

FACTS = [Fact(prompt="Anna Berg was born in", answer=" Oslo", id="anna")]

A, B = "blocks.0.mlp.neuron", "blocks.1.mlp.neuron"


def some_scores(votes: bool = False) -> Scores:
    return Scores(
        values={A: torch.tensor([0.9, -0.8, 0.1, 0.0, 0.3, 0.2]), B: torch.tensor([0.5, -0.1, 0.0, 0.4, 0.0, 0.6])},
        sites={A: neurons(0), B: neurons(1)},
        examples=("x", "y", "z", "w"),
        sparse={A: (torch.tensor([0, 1]), torch.tensor([0, 4]), torch.tensor([0.9, 0.3]))},
        votes={A: torch.tensor([1, 4, 4, 0, 2, 0]), B: torch.tensor([4, 0, 0, 2, 0, 1])} if votes else {},
        evidence={"knows": {"example": ["x", "y"], "probability": [0.5, None]}},
        fingerprint="f",
        provenance=Provenance(method="depn", settings={"steps": 8}),
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top": 3}, {A: (0,), B: (0, 5)}),
        ({"top": 12}, {A: (0, 2, 4, 5), B: (0, 3, 5)}),
        ({"top": 3, "sign": "absolute"}, {A: (0, 1), B: (5,)}),
        ({"top": 3, "sign": "negative"}, {A: (1,), B: (1,)}),
        ({"fraction": 0.25}, {A: (0,), B: (0, 5)}),
        ({"fraction": 0.01}, {A: (0,)}),
        ({"threshold": 0.5}, {A: (0,), B: (0, 5)}),
        ({"params": 35}, {A: (0,), B: (5,)}),
        ({"params": 36}, {A: (0,), B: (0, 5)}),
        ({"params": 35, "fill": "reach"}, {A: (0,), B: (0, 5)}),
        ({"params": 36, "fill": "reach"}, {A: (0,), B: (0, 5)}),
        ({"params": 37, "fill": "reach"}, {A: (0,), B: (0, 3, 5)}),
        ({"params": 3, "fill": "reach"}, {A: (0,)}),
    ],
)
def test_budgets(options, expected) -> None:
    assert some_scores().select(**options).chosen == expected


def test_shared_takes_most_votes_first_and_breaks_ties_by_score() -> None:
    scores = some_scores(votes=True)
    assert scores.select(shared=0.5).chosen == {A: (2, 4), B: (0, 3)}
    assert scores.select(shared=0.5, top=1).chosen == {B: (0,)}


def test_minus_removes_what_control_prompts_share() -> None:
    control = some_scores()
    control = Scores(values={A: control.values[A] * 2, B: torch.zeros(6)}, sites=control.sites, fingerprint="f")
    assert some_scores().select(top=2, minus=control).chosen == {B: (0, 5)}


def test_selection_is_recorded() -> None:
    found = some_scores().select(top=3)
    assert found.fingerprint == "f"
    assert found.provenance is not None
    assert found.provenance.settings == {"steps": 8, "select": {"top": 3, "sign": "positive"}}


@pytest.mark.parametrize(
    ("options", "held", "overshoot"),
    [({"params": 35}, 24, -11), ({"params": 35, "fill": "reach"}, 36, 1), ({"params": 36, "fill": "reach"}, 36, 0)],
)
def test_the_overshoot_is_recorded(options, held: int, overshoot: int) -> None:
    found = some_scores().select(**options)
    assert found.provenance is not None
    rule = found.provenance.settings["select"]
    assert (rule["parameters"], rule["overshoot"], found.parameters()) == (held, overshoot, held)


def test_a_budget_of_heads_counts_shared_keys_when_they_join() -> None:
    """Two query heads share keys and values: the second head of a group brings them along."""
    model = tiny.model("llama")
    sites = model.sites("head")
    first = next(iter(sites))
    values = {name: torch.zeros(site.count) for name, site in sites.items()}
    values[first] = torch.tensor([3.0, 2.0, 0.0, 0.0])
    scores = Scores(values=values, sites=sites)
    one, two = model.components({first: [0]}).parameters(), model.components({first: [0, 1]}).parameters()
    assert two > 2 * one
    assert len(scores.select(params=2 * one)) == 1
    assert len(scores.select(params=2 * one, fill="reach")) == 2
    assert len(scores.select(params=two)) == 2


@pytest.mark.parametrize("options", [{"top": 7}, {"params": 7}, {"fraction": 0.07}, {"params": 7, "fill": "reach"}])
def test_single_weights_of_equal_score_come_in_the_order_of_the_sites(options) -> None:
    """Against a plain sort of (score, place); many scores are equal."""
    sites = {
        name: Site(name=name, count=50, slices=(Slice(param=name, shape=(5, 10), axis=None),))
        for name in ("a:weight", "b:weight")
    }
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randint(-2, 4, (50,), generator=generator).float() for name in sites}
    flat = torch.cat(list(values.values())).tolist()
    best = sorted(range(100), key=lambda place: (-flat[place], place))[:7]
    found = Scores(values=values, sites=sites).select(**options)
    assert sorted(best) == [50 * i + place for i, name in enumerate(sites) for place in found.indices(name)]


def test_sets_of_different_units_are_matched_in_parameters() -> None:
    model = tiny.model("gpt2")
    by_unit = {unit: localize(model, FACTS, "random", unit=unit) for unit in ("neuron", "head", "mlp", "weight")}
    like = by_unit["mlp"].select(top=1)
    budget = like.parameters()
    sets = matched(by_unit, like=like)
    assert {name: len(part) for name, part in sets.items()}["mlp"] == 1
    rows = table(sets)
    assert rows["parameters"] == [part.parameters() for part in sets.values()]
    assert rows["overshoot"] == [held - budget for held in rows["parameters"]]
    largest = {unit: max(site.parameters([0]) for site in model.sites(unit).values()) for unit in by_unit}
    for unit, over in zip(rows["method"], rows["overshoot"], strict=True):
        assert 0 <= over < largest[unit]
    below = table(matched({"neuron": by_unit["neuron"]}, params=budget - 1, fill="under"))
    assert below["overshoot"][0] <= 0
    assert "above the budget" in overshoot(matched({"m": by_unit["mlp"]}, params=budget + 1)["m"])
    assert overshoot(sets["weight"]) == f"exactly the budget of {budget:,} parameters"
    with pytest.raises(LoceditError, match="mlp: params=5 is less than the best component needs"):
        matched({"mlp": by_unit["mlp"]}, params=5, fill="under")
    with pytest.raises(LoceditError, match="either params"):
        matched(by_unit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one budget"),
        ({"top": 3, "fraction": 0.5}, "exactly one budget"),
        ({"top": 13}, "more than the 12 components"),
        ({"top": 0}, "at least 1"),
        ({"fraction": 1.5}, "above 0 and at most 1"),
        ({"top": 3, "sign": "positiv"}, "did you mean 'positive'"),
        ({"shared": 0.5}, "needs votes"),
        ({"params": 30, "fill": "over"}, "fill='over'"),
        ({"top": 3, "fill": "reach"}, "goes with params"),
        ({"params": 3}, "less than the best component needs"),
    ],
)
def test_wrong_budgets(options, message: str) -> None:
    with pytest.raises(LoceditError, match=message):
        some_scores().select(**options)


def test_scores_round_trip(tmp_path) -> None:
    scores = some_scores(votes=True)
    scores.save(tmp_path / "depn")
    back = Scores.load(tmp_path / "depn")
    assert back.sites == scores.sites
    assert back.examples == scores.examples
    assert back.evidence == scores.evidence
    assert back.provenance == scores.provenance
    assert all(torch.equal(back.values[n], scores.values[n]) for n in (A, B))
    assert all(torch.equal(back.votes[n], scores.votes[n]) for n in (A, B))
    assert all(torch.equal(x, y) for x, y in zip(back.sparse[A], scores.sparse[A], strict=True))


def test_nan_scores_are_refused() -> None:
    with pytest.raises(LoceditError, match="not finite"):
        Scores(values={A: torch.full((6,), float("nan"))}, sites={A: neurons(0)})


def test_best_components_come_first() -> None:
    assert [(s, i) for s, i, _ in some_scores().top(3)] == [(A, 0), (B, 5), (B, 0)]

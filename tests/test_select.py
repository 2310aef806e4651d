"""From scores to sets: every budget on numbers that can be checked by eye."""

import pytest
import torch

from locedit.components import Scores
from locedit.errors import LoceditError
from locedit.provenance import Provenance
from tests.test_components import neurons

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
    ("options", "message"),
    [
        ({}, "exactly one budget"),
        ({"top": 3, "fraction": 0.5}, "exactly one budget"),
        ({"top": 13}, "more than the 12 components"),
        ({"top": 0}, "at least 1"),
        ({"fraction": 1.5}, "above 0 and at most 1"),
        ({"top": 3, "sign": "positiv"}, "did you mean 'positive'"),
        ({"shared": 0.5}, "needs votes"),
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

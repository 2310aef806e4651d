"""Results survive their files, odd numbers included."""

from pathlib import Path

import pytest

from locedit.provenance import Provenance, measure
from locedit.results import AttackResult, Comparison, Curve, Evaluation, Measure


def a_measure(**changes) -> Measure:
    fields = {
        "name": "probability", "dataset": "forget", "value": 0.5, "low": 0.4, "high": 0.6, "n": 3, "range": (0.0, 1.0),
        "per_example": {"a": 0.25, "b": 0.75},
    }  # fmt: skip
    return Measure(**(fields | changes))


def a_curve(role: str = "found", matched: int | None = 1) -> Curve:
    columns = {"forget": (1.0, 0.1), "retain": (1.0, 0.9)}
    return Curve(name=role, role=role, x_name="steps", x=(0, 10), columns=columns, matched=matched)


def test_evaluation_round_trips(tmp_path: Path) -> None:
    attack = AttackResult(name="relearn", sentence="s", headline=a_measure(stage="attacked"), curves=(a_curve(),))
    evaluation = Evaluation(
        measures=(a_measure(), a_measure(name="perplexity", value=float("inf"), high=float("inf"), unit="x")),
        attacks=(attack,),
        examples={"a": {"dataset": "forget", "prompt": "<b>"}},
        provenance=Provenance(method="evaluate"),
    )
    evaluation.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == evaluation


def test_comparison_round_trips_and_reads_the_matched_dose(tmp_path: Path) -> None:
    comparison = Comparison(metric="probability", level=0.1, curves=(a_curve(), a_curve("random", None)))
    comparison.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json") == comparison
    assert comparison.at_level("found") == [{"forget": 0.1, "retain": 0.9, "steps": 10}]
    assert comparison.at_level("random") == [None]


def test_get_names_what_there_is() -> None:
    evaluation = Evaluation(measures=(a_measure(stage="after"),))
    assert evaluation.get("forget", "probability").value == 0.5
    with pytest.raises(KeyError, match="forget.probability after"):
        evaluation.get("retain", "probability")


def test_measure_notes_time_and_settings() -> None:
    with measure("x", settings={"a": (1, 2)}, seed=3) as record:
        assert record.provenance.seconds == 0
    made = record.provenance
    assert made.settings == {"a": [1, 2]}
    assert made.seed == 3
    assert made.seconds >= 0
    assert made.peak_memory_mb > 10
    assert "torch" in made.versions
    assert Provenance.from_json(made.to_json()) == made

"""Every metric has a whole card."""

import dataclasses
import re

import pytest

from locedit.cli import main
from locedit.data.items import KINDS, ROLES
from locedit.evaluate import METRICS
from locedit.evaluate.metric_card import OWN, bounds, card, card_text, good, needed
from locedit.evaluate.values import direction_on

WORDS = ("metric", "definition", "good is", "range", "chance level", "known failure", "needs", "when", "source")


@pytest.mark.parametrize("name", METRICS)
def test_every_card_is_whole(name: str) -> None:
    metric = METRICS[name]
    rows = dict(card(name, metric))
    assert set(WORDS) <= set(rows)
    assert all(text.strip() and "\n" not in text for text in rows.values())
    assert (rows["source"] == OWN) == (not metric.paper)
    assert not metric.paper or re.search(r"arXiv:\d{4}\.\d{4,5}|\d{4}", metric.paper), "a source has a year or a number"
    assert set(metric.kinds) <= set(KINDS)
    assert set(metric.roles) <= set(ROLES)
    for text in (metric.chance, metric.failure, metric.definition):
        assert not text.endswith(".")
        assert text == " ".join(text.split()), "no double spaces where strings were joined"


@pytest.mark.parametrize("name", METRICS)
def test_a_card_says_of_every_part_of_the_task_what_the_report_says(name: str) -> None:
    metric = METRICS[name]
    said = {role: way for part in good(metric).split("; ") for way, _, roles in [part.partition(" on ")]
            for role in roles.split(" and ")}  # fmt: skip
    assert set(said) == set(metric.roles)
    for role, way in said.items():
        wanted = direction_on(role, knowledge=metric.knowledge, keep=metric.keep, wanted=metric.wanted)
        assert way == {"neutral": "neither way"}.get(wanted, wanted)


def test_what_a_metric_needs_is_all_in_its_card() -> None:
    metric = dataclasses.replace(
        METRICS["probability"], field="wrong", needs=("heldout",), causal=True, retain_model=True, compares=True
    )
    assert needed(metric) == (
        "items of kind fact or private or tokens with 'wrong' in forget or retain or heldout; and the heldout items "
        "beside them; a causal model; a model trained without the forget data (--retain-model); an edit"
    )
    assert "--retain-model" not in needed(METRICS["probability"])


def test_directions_and_ranges_by_hand() -> None:
    assert good(METRICS["probability"]) == "lower on forget; higher on retain; neither way on heldout"
    assert good(METRICS["rank"]) == "higher on forget; lower on retain; neither way on heldout"
    assert good(METRICS["neighbour_accuracy"]) == "higher on forget and retain and heldout"
    low = dataclasses.replace(METRICS["probability"], range=(None, 3.0))
    assert bounds(low) == "3 or less"


def test_the_card_is_printed_and_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    for name in ("probability", "stereoset_icat", "kl_to_base"):
        assert main(["metrics", name]) == 0
        printed = capsys.readouterr().out
        assert max(map(len, printed.split("\n"))) <= 110
        flat = " ".join(printed.split())
        for what, text in card(name, METRICS[name]):
            assert f"{what} {text}" in flat
    assert "on request: --metrics stereoset_icat" in card_text("stereoset_icat", METRICS["stereoset_icat"])
    assert "by default" in card_text("probability", METRICS["probability"])


def test_the_table_marks_what_is_measured_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    assert main(["metrics"]) == 0
    head = capsys.readouterr().out.split("\n* = on request")[0]
    assert max(map(len, head.split("\n"))) <= 110
    lines = {line.split()[0]: line for line in head.split("\n") if line and not line.startswith(" ")}
    for name, metric in METRICS.items():
        assert lines[name].startswith(f"{name} *") == metric.on_request


def test_an_unknown_metric_is_one_line_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "stereoset_icap"]) != 0
    assert "did you mean 'stereoset_icat'" in capsys.readouterr().err


def test_wrapped_cards_keep_every_word() -> None:
    text = card_text("exposure", METRICS["exposure"], width=60)
    assert max(map(len, text.split("\n"))) <= 60
    assert text.split() == card_text("exposure", METRICS["exposure"]).split()

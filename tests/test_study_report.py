"""The rows, the sentences and the page of a study, from records whose numbers are known."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from locedit.report import study_differences, study_figures, study_table, study_words
from locedit.study import Record, Study

PLACES: dict[str, Any] = {"whole model": "everything", "neurons": "found", "random like neurons": "random"}
METRICS = ("retain.accuracy", "forget.accuracy", "forget.accuracy[question]", "forget.accuracy[statement]")


def record(method: str, place: str, seed: int, *, retain: float, back: float = 0.5, **changes: Any) -> Record:
    numbers = dict.fromkeys(METRICS, 0.3) | {"retain.accuracy": retain, "level": 0.25, "lowest": 0.25, "dose": 30.0}
    attack = {"recovered": back, "after_edit": 0.3, "retain": 0.8, "retain_after_edit": retain, "never_known": 0.2}
    numbers |= {f"relearn.{name}": value for name, value in attack.items()} | {"relearn.share_back": back - 0.2}
    about: dict[str, Any] = {"hold": "weights", "target": 0.25, "state": "reached", "values": numbers, "dose": "steps"}
    role = PLACES.get(place, "shallow")
    return Record(**({"method": method, "restriction": place, "role": role, "seed": seed} | about | changes))


def a_study(**changes: Any) -> Study:
    """npo: 0.5, 0.6, 0.7 kept in the neurons, 0.2 less in the whole model, as much in random ones; ga never gets there
    in the neurons; a shallow control of which 0.9 comes back."""
    records = [record("npo", "neurons", seed, retain=0.5 + seed / 10) for seed in range(3)]
    records += [record("npo", "whole model", seed, retain=0.3 + seed / 10, back=0.9 - seed / 10) for seed in range(3)]
    records += [record("npo", "random like neurons", seed, retain=(0.7, 0.6, 0.5)[seed]) for seed in range(3)]
    records += [
        record("ga", "neurons", 0, retain=0.1, state="not reached"),
        record("ga", "whole model", 0, retain=0.4),
        record("ga", "random like neurons", 0, retain=0.0, state="failed", values={}, note="<b>no</b> memory"),
        record("shallow control", "last MLPs", 0, retain=0.9, back=1.1),
    ]
    before = {seed: {"retain.accuracy": 1.0, "forget.accuracy[question]": 0.9 + seed / 100} for seed in range(3)}
    fields: dict[str, Any] = {"name": "a study", "config": {"model": "m", "data": "d"}, "before": before}
    return Study(**(fields | {"records": tuple(records)} | changes))


def test_rows_are_means_over_the_seeds_with_students_interval() -> None:
    """0.5, 0.6, 0.7: 0.6 +- 4.303 * 0.1 / sqrt(3) by hand; one seed has no interval; states stay apart."""
    study = a_study()
    row = study.row("npo", "neurons")
    assert row is not None
    half = 4.302652729911275 * 0.1 / 3**0.5
    assert tuple(row.values["retain.accuracy"]) == pytest.approx((0.6, 0.6 - half, 0.6 + half))
    assert row.seeds == (0, 1, 2)
    alone = study.row("ga", "whole model")
    assert alone is not None
    assert alone.values["retain.accuracy"].value == 0.4
    assert alone.values["retain.accuracy"].low != alone.values["retain.accuracy"].low
    assert study.row("ga", "neurons") is None
    assert [row.state for row in study.rows].count("reached") == 5


def test_intervals_of_shares_end_where_shares_end() -> None:
    """0.7, 0.8, 0.9 has 0.8 +- 0.248; share back may pass 1."""
    row = a_study().row("npo", "whole model")
    assert row is not None
    assert row.values["relearn.recovered"].high == 1.0
    assert row.values["relearn.recovered"].low == pytest.approx(0.8 - 4.302652729911275 * 0.1 / 3**0.5)
    assert row.values["relearn.share_back"].high == pytest.approx(0.6 + 4.302652729911275 * 0.1 / 3**0.5)


def test_seeds_that_did_not_reach_the_level_are_in_no_mean() -> None:
    missed = record("npo", "neurons", 3, retain=0.0, state="not reached")
    study = a_study(records=(*a_study().records, missed))
    row = study.row("npo", "neurons")
    assert row is not None
    assert row.values["retain.accuracy"].value == pytest.approx(0.6)
    apart = [row for row in study.rows if row.state == "not reached" and row.method == "npo"]
    assert [row.seeds for row in apart] == [(3,)]


def test_differences_are_taken_seed_by_seed() -> None:
    """The same spread in both places leaves no spread in their difference; opposite trends leave all of it."""
    study = a_study()
    npo, ga = (
        study_differences.differences(study, "retain.accuracy", "neurons", "whole model"),
        study_differences.differences(study, "retain.accuracy", "whole model", "neurons"),
    )
    assert [d.method for d in npo] == ["npo"]  # ga did not reach the level in the neurons
    assert npo[0].value.value == pytest.approx(0.2)
    assert npo[0].value.high - npo[0].value.low == pytest.approx(0)
    assert npo[0].sign == 1
    assert ga[0].sign == -1
    (random,) = study_differences.differences(study, "retain.accuracy", "neurons", "random like neurons")
    assert random.value.value == pytest.approx(0)
    assert random.sign == 0
    values = torch.tensor([-0.2, 0.0, 0.2], dtype=torch.float64)
    assert random.value.high == pytest.approx(4.302652729911275 * float(values.std()) / 3**0.5)


def test_the_sentences_say_what_the_numbers_do() -> None:
    study = a_study()
    told = " ".join(study_words.verdict(study).sentences)
    assert "neurons against whole model, 1 method (mean difference): retain accuracy 1 higher, 0 lower (+0.20)" in told
    assert "brings back 90% of what the last MLPs only suppress, so the attack works" in told
    assert "1 of 13 edits did not reach the level. 1 of 13 edits failed." in told
    npo, ga = study_words.by_method(study)
    assert npo.startswith("npo at forget level 0.25 (3 seeds), in neurons / whole model / random like neurons: retain")
    assert "relearned 0.50 ± 0 / 0.80 ± 0.25 / 0.50 ± 0; never known, relearned 0.20" in npo
    assert "retain, relearned 0.80" in npo
    assert ga.endswith("The level was not reached in neurons (lowest 0.25).")
    weak = a_study(records=tuple(r for r in study.records if r.role != "shallow"))
    assert "brings back" not in " ".join(study_words.verdict(weak).sentences)
    hidden = record("shallow control", "last MLPs", 0, retain=0.9, back=0.3)
    proves = a_study(records=(*weak.records, hidden))
    assert "proves nothing" in " ".join(study_words.verdict(proves).sentences)


def test_places_are_compared_number_by_number() -> None:
    """The table counts what the differences are; an adapter is compared with an adapter only."""
    view = study_differences.table(a_study())
    assert view is not None
    rows = {tuple(cell.text for cell in row[:3]): [cell.text for cell in row[3:]] for row in view.rows}
    assert rows["neurons", "whole model", "retain accuracy"] == ["1", "1", "0", "+0.20"]
    assert rows["neurons", "random like neurons", "retain accuracy"] == ["1", "0", "0", "+0.00"]
    held = [record("npo", "neurons", 0, retain=0.5, hold="adapter"), record("npo", "whole model", 0, retain=0.5)]
    assert study_differences.table(a_study(records=tuple(held))) is None
    held.append(record("npo", "whole model", 0, retain=0.1, hold="adapter"))
    (found,) = study_differences.differences(a_study(records=tuple(held)), "retain.accuracy", "neurons", "whole model")
    assert found.value.value == pytest.approx(0.4)


def test_relearned_numbers_never_stand_alone() -> None:
    names = [column.key for column in study_table.numbers_of(a_study())]
    at = names.index("relearn.recovered")
    assert names[at : at + 3] == ["relearn.recovered", "relearn.never_known", "relearn.retain"]
    panels = [column.key for column in study_figures.panels(a_study())]
    assert {"relearn.recovered", "relearn.never_known", "relearn.retain"} <= set(panels)


def test_the_table_has_one_row_for_each_place_and_the_unedited_model_first() -> None:
    view = study_table.reached(a_study())
    assert [row[0].text for row in view.rows] == ["unedited", "npo", "npo", "npo", "ga", "shallow control"]
    retain = [column.name for column in view.columns].index("retain")
    assert view.rows[1][retain].text == "0.60 [0.35, 0.85]"
    question = [column.name for column in view.columns].index("question")
    assert view.rows[0][question].sort == pytest.approx(0.91)
    missed = study_table.not_reached(a_study())
    assert missed is not None
    assert [row[0].text for row in missed.rows] == ["ga"]


def test_points_of_the_figure_are_the_rows() -> None:
    """A panel for each number, a trace for each place, a symbol and colour that no other place has."""
    study = a_study()
    made = study_figures.dots(study)
    panels = study_figures.panels(study)
    first = {trace.name: trace for trace in made.data if trace.xaxis == "x"}
    assert set(first) == {*PLACES, "last MLPs"}
    assert panels[0].key == "retain.accuracy"
    assert list(first["neurons"].x) == pytest.approx([0.6])
    assert list(first["whole model"].x) == pytest.approx([0.4, 0.4])
    assert list(first["neurons"].error_x.array) == pytest.approx([4.302652729911275 * 0.1 / 3**0.5])
    styles = study_figures.styles([row for row in study.rows if row.state == "reached"])
    assert len(set(styles.values())) == len(styles)


def test_a_study_is_saved_and_shown_whole(tmp_path: Path) -> None:
    study = a_study()
    study.write(tmp_path)
    again = Study.load(tmp_path)
    assert again.to_json() == study.to_json()
    lines = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert len(lines) == len(study.rows)
    assert float(lines[0]["retain.accuracy_low"]) == pytest.approx(0.3516, abs=1e-4)
    page = (tmp_path / "report.html").read_text()
    for title in ("Method by method", "All numbers", "Where it does not work", "&lt;b&gt;no&lt;/b&gt; memory"):
        assert title in page
    assert "<b>no</b> memory" not in page
    assert "<table" in study._repr_html_()
    assert study.plot().layout.height > 300


def test_markdown_has_the_cells_of_the_table() -> None:
    """Every line of a table has as many cells as its head, also where a cell has a bar in it; notes stand below."""
    first = record("n|po", "neurons", 0, retain=0.5, note="a note")
    study = a_study(records=(first, record("npo", "whole model", 0, retain=0.4, note="a note"), *a_study().records[6:]))
    text = study.markdown()
    parts = text.split("\n\n")
    tables = [part.splitlines() for part in parts if part.startswith("|")]
    assert len(tables) == 3  # reached, not reached, failed
    for head, rule, *rows in tables:
        count = head.count("|")
        assert rows
        assert all(line.replace("\\|", "").count("|") == count for line in (rule, *rows))
    rows = [line for line in tables[0] if line.startswith(("| n\\|po | neurons | 1 |", "| npo | whole model | 1 |"))]
    assert len(rows) == 2
    assert all(line.endswith("| 30 steps | 1 |") for line in rows)
    assert "| 0.50 |" in rows[0]
    assert "1. a note" in parts
    assert str(study_words.verdict(study).sentences[0]) in text

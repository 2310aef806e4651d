"""The figure of fact_lookup's evidence: what is drawn is what the tables say."""

import dataclasses

import pytest
import torch

from locedit.report import evidence
from locedit.report.inputs import RunResults
from locedit.report.page import page
from locedit.scores import Scores, Table
from tests import tiny


def scores(*, first: str = "1 to 2") -> Scores:
    sites = tiny.model("gpt2").sites("mlp")
    probe: Table = {
        "position": ["subject"] * 6 + ["last"] * 4,
        "ablated_from": [None] * 4 + [1, 1] + [None] * 4,
        "layer": [-1, 0, 1, 2, 1, 2, -1, 0, 1, 2],
        "accuracy": [0.3, 0.5, 0.9, 1.0, 0.6, 0.7, 0.3, 0.3, 0.4, 0.8],
    }
    probe |= {"low": [a - 0.1 for a in probe["accuracy"]], "high": [a + 0.1 for a in probe["accuracy"]]}
    probe |= {"baseline": [0.25] * 10, "corrected": probe["accuracy"]}
    heads: Table = {"layer": [0, 0, 1, 1, 2, 2], "head": [0, 1] * 3, "effect": [0.0, 0.1, 0.0, 0.2, 0.5, 0.1]}
    heads |= {"low": [0.0] * 6, "high": [0.5] * 6, "chosen": [False, False, False, True, True, False]}
    mlps: Table = {"layer": [0, 1, 2], "effect": [0.6, 0.0, 0.0], "low": [0.5, 0, 0], "high": [0.8, 0, 0]}
    mlps |= {"chosen": [True, False, False]}
    what = ("lookup MLPs", "extraction heads", "reading layer", "threshold", "probe range", "probed at", "peak")
    value = ("0", "1.1, 2.0", 1, "0.06", first, "subject", "0.4 after layer 1")
    lookup: Table = {"what": list(what), "value": list(value), "rule": [""] * len(what)}
    return Scores(
        values={name: torch.tensor([0.6 if "0" in name else -0.6]) for name in sites},
        sites=sites,
        evidence={"lookup": lookup, "probe": probe, "heads": heads, "mlps": mlps},
    )


def test_every_number_of_the_tables_is_in_the_figure() -> None:
    made = scores().plot()
    by_name = {trace.name: trace for trace in made.data}
    assert list(by_name["last token of the subject"].y) == [0.3, 0.5, 0.9, 1.0]
    assert list(by_name["last token of the prompt"].y) == [0.3, 0.3, 0.4, 0.8]
    ablated = by_name["subject: attention at its mean from a layer on"]
    assert (list(ablated.x), list(ablated.y)) == ([0, 1, 2], [0.5, 0.6, 0.7])  # what enters layer 1 is as it was
    assert list(by_name["most frequent answer"].y) == [0.25, 0.25]
    rings = by_name["extraction heads"]
    assert list(zip(rings.y, rings.x, strict=True)) == [(1, 1), (2, 0)]
    heat = next(trace for trace in made.data if trace.type == "heatmap")
    assert [list(row) for row in heat.z] == [[0.0, 0.1], [0.0, 0.2], [0.5, 0.1]]
    bars = next(trace for trace in made.data if trace.type == "bar")
    assert list(bars.y) == [0.6, 0.0, 0.0]
    assert bars.marker.color[0] != bars.marker.color[1] == bars.marker.color[2]


def test_range_threshold_and_reading_layer_are_marked() -> None:
    shapes = [shape.to_plotly_json() for shape in scores().plot().layout.shapes]
    assert [(s["x0"], s["x1"]) for s in shapes if s["type"] == "rect"] == [(0.5, 2.5)]
    lines = [s for s in shapes if s["type"] == "line"]
    assert [s["y0"] for s in lines if s["y0"] == s["y1"]] == [0.06]
    assert [s["x0"] for s in lines if s["x0"] == s["x1"]] == [0.5]
    without = scores(first="none").plot().layout
    assert not [s for s in without.shapes if s.type == "rect"]
    assert "no range by the rule" in without.annotations[0].text
    assert "the probes do not find the answer there" in evidence.caption(scores(first="none"))


@pytest.mark.parametrize("kept", [("probe",), ("heads", "mlps"), ("probe", "heads", "mlps")])
def test_only_what_was_run_is_drawn_and_the_page_holds_it(kept: tuple[str, ...]) -> None:
    whole = scores()
    tables = {name: table for name, table in whole.evidence.items() if name in (*kept, "lookup")}
    part = dataclasses.replace(whole, evidence=tables)
    assert len(part.plot().layout.annotations) == len(kept)
    text = page([RunResults(name="run", scores=(part,))])
    assert "evidence" in text
    assert evidence.caption(part) in text.replace("&#39;", "'")
    other = dataclasses.replace(whole, evidence={})
    assert not evidence.has_figure(other)
    assert [trace.type for trace in other.plot().data] == ["heatmap"]

"""The report: what it says follows from the numbers, what it shows is safe and stands alone."""

import dataclasses
import html
import itertools
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from locedit.components import ComponentSet, Scores, Site, Slice
from locedit.edit import Edit
from locedit.errors import LoceditError
from locedit.evaluate import METRICS
from locedit.evaluate.metric_card import card_text
from locedit.provenance import Provenance
from locedit.report import RunResults, captions, figures, fragment, judge, lines, maps, report, tables, words
from locedit.report.inputs import gather, read_run
from locedit.report.numbers import number, over_seeds, percent, size, spread, with_interval
from locedit.report.page import embed
from locedit.report.palette import COLOURS, NAMES
from locedit.report.side_by_side import side_by_side
from locedit.results import AttackResult, Comparison, Curve, Evaluation, Measure, Role, Stage
from locedit.storage import write_json

EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>\'"&amp;'
PROVENANCE = Provenance(method="depn", settings={"steps": 20}, model="5f2c", model_name="lab", versions={"torch": "2"})


def a_measure(
    dataset: str, value: float, *, stage: Stage = "before", width: float = 0.03, name: str = "probability"
) -> Measure:
    low, high = max(0.0, value - width), min(1.0, value + width)
    values = {f"{dataset}:1": value, f"{dataset}:2": value / 2}
    return Measure(
        name=name, dataset=dataset, value=value, low=low, high=high, n=2, stage=stage, range=(0.0, 1.0),
        per_example=values,
        direction="lower" if dataset == "forget" else "higher", unit="probability",
    )  # fmt: skip


def measures_of(before: float, after: float, *, retain: float = 0.97, heldout: float = 0.03) -> tuple[Measure, ...]:
    return (
        a_measure("forget", before),
        a_measure("forget", after, stage="after"),
        a_measure("retain", 0.98),
        a_measure("retain", retain, stage="after"),
        a_measure("heldout", heldout),
    )


def a_curve(role: Role, end: float, *, retain: tuple[float, float] = (0.9, 0.9), seed: int | None = None) -> Curve:
    columns = {"recovered": (0.04, end), "retain": retain}
    return Curve(name=role, role=role, x_name="steps", x=(0.0, 60.0), columns=columns, seed=seed)


def an_attack(
    value: float, *, width: float = 0.05, never: float | None = 0.32, shallow: float | None = 0.98,
    retain: tuple[float, float] = (0.9, 0.9),
) -> AttackResult:  # fmt: skip
    ends: list[tuple[Role, float | None]] = [("never knew", never), ("shallow", shallow)]
    curves = [a_curve("found", value, retain=retain), *(a_curve(role, end) for role, end in ends if end is not None)]
    headline = a_measure("forget", value, stage="attacked", width=width)
    return AttackResult(name="relearn", sentence="It was relearned.", headline=headline, curves=tuple(curves))


def a_share(value: float, *, width: float = 0.05, never: bool = True) -> AttackResult:
    made = an_attack(0.5, never=0.3 if never else None, shallow=None)
    headline = Measure(
        name="share_back", dataset="forget", value=value, low=value - width, high=value + width, n=9, stage="attacked"
    )
    return dataclasses.replace(made, headline=headline)


def neuron_sites(count: int = 4, layers: int = 2) -> dict[str, Site]:
    write = {i: Slice(param=f"h.{i}.out", shape=(count, 3), axis=0, write=True) for i in range(layers)}
    names = [f"blocks.{i}.mlp.neuron" for i in range(layers)]
    return {name: Site(name=name, count=count, slices=(write[i],)) for i, name in enumerate(names)}


def some_scores() -> Scores:
    values = {
        "blocks.0.mlp.neuron": torch.tensor([0.0, 3.0, 0.0, 0.0]),
        "blocks.1.mlp.neuron": torch.tensor([1.0, 0.0, -0.1, 0.0]),
    }
    table = {"layer": [0, 1], "gap": [0.01, 0.02], "remark": [EVIL, None]}
    return Scores(
        values=values,
        sites=neuron_sites(),
        examples=("a", "b"),
        evidence={"completeness": table},
        provenance=PROVENANCE,
    )


def a_comparison(*, random_reaches: bool = False) -> Comparison:
    def made(
        role: Role, forget: tuple[float, ...], retain: tuple[float, ...], matched: int | None, seed: int | None = None
    ) -> Curve:
        columns = {"forget": forget, "retain": retain}
        return Curve(
            name=role, role=role, x_name="neurons", x=(0.0, 1.0, 2.0), columns=columns, matched=matched, seed=seed
        )

    at = 2 if random_reaches else None
    low = 0.05 if random_reaches else 0.97
    curves = (
        made("found", (0.99, 0.5, 0.04), (0.98, 0.98, 0.96), 2),
        made("random", (0.99, 0.98, low), (0.98, 0.9, 0.5), at, 0),
        made("random", (0.99, 0.98, 0.99), (0.98, 0.9, 0.7), None, 1),
    )
    return Comparison(metric="answer probability", level=0.05, curves=curves)


def a_run(name: str = "", *, attack: AttackResult | None = None, evil: bool = False) -> RunResults:
    examples = {
        "forget:1": {"dataset": "forget", "prompt": EVIL if evil else "Ada plays", "answer": EVIL if evil else " golf"}
    }
    evaluation = Evaluation(
        measures=measures_of(0.99, 0.04),
        attacks=(attack or an_attack(0.81),),
        edit={"method": "zero", "kind": "weights", "text": EVIL if evil else "zero"},
        examples=examples,
        provenance=PROVENANCE,
    )
    scores = some_scores()
    return RunResults(
        name=name, scores=(scores,), components=scores.select(top=2), evaluation=evaluation, comparison=a_comparison()
    )


def test_the_heading_of_several_runs_names_no_edit_of_one_of_them() -> None:
    """Beside a run without an edit, that of the other once stood over both."""
    bare = RunResults(name="b", scores=(some_scores(),))
    assert "Edit: zero</p>" in report(a_run("a")).html()
    assert "Edit: zero</p>" not in report(a_run("a"), bare).html()


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_numbers_keep_what_a_reader_needs() -> None:
    written = [
        number(x) for x in (0.0412, 0.987, 0.0004, 0.00001, 0.0, 1.0, 12.345, 1920, -3, math.inf, math.nan, None)
    ]
    assert written == [
        "0.04",
        "0.99",
        "0.0004",
        "1e-05",
        "0",
        "1.00",
        "12.3",
        "1,920",
        "-3.00",
        "∞",
        "not a number",
        "not a number",
    ]
    assert percent(50, 1920) == "2.6 %"
    assert percent(1, 100_000) == "0.001 %"
    assert with_interval(a_measure("forget", 0.5)) == "0.50 [0.47, 0.53]"
    assert with_interval(dataclasses.replace(a_measure("forget", 0.5), low=math.nan)) == "0.50"
    assert over_seeds(spread([0.2, 0.4])) == "0.30 (2 seeds, 0.20 to 0.40)"
    assert over_seeds(spread([0.2])) == "0.20"


def test_the_size_of_a_set_names_every_unit() -> None:
    found = some_scores().select(top=2)
    assert size(found) == "2 of 8 neurons"
    head = ComponentSet.of(
        {"blocks.0.attn.head": Site(name="blocks.0.attn.head", count=4)}, {"blocks.0.attn.head": [1]}
    )
    assert size(found | head) == "2 of 8 neurons and 1 of 4 heads"
    assert words.chosen(found).endswith("they hold 6 of 24 parameters (25.0 %).")
    assert "parameters" not in words.chosen(head), "a set that does not know its parameters says nothing of them"


def test_weight_masks_are_counted_without_listing() -> None:
    site = Site(name="w:weight", count=6, slices=(Slice(param="w", shape=(2, 3), axis=None),))
    found = ComponentSet.of({"w:weight": site}, {}, masks={"w:weight": torch.tensor([1, 0, 1, 0, 0, 1])})
    assert size(found) == "3 of 6 weights"
    assert [cell.text for cell in tables.sites(found).rows[0]] == ["w:weight", "3", "6", "0, 2, 5"]


# --- the verdict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "label"),
    [
        (0.99, 0.98, "Not forgotten"),
        (0.50, 0.90, "Not forgotten"),
        (0.99, 0.60, "Partly forgotten"),
        (0.99, 0.14, "Partly forgotten"),  # 0.85 of 0.96 is less than 0.9 of the way to the held-out 0.03
        (0.99, 0.04, "Forgotten on direct questions; not attacked"),
    ],
)
def test_how_far_the_forget_set_must_go(before: float, after: float, label: str) -> None:
    made = words.verdict(RunResults(evaluation=Evaluation(measures=measures_of(before, after))))
    assert made.label == label
    assert "No attack was run" in str(made)


def test_the_floor_is_what_the_model_never_knew_else_the_end_of_the_range() -> None:
    with_heldout = Evaluation(measures=measures_of(0.99, 0.35, heldout=0.30))
    without = Evaluation(measures=tuple(m for m in with_heldout.measures if m.dataset != "heldout"))
    assert words.verdict(RunResults(evaluation=with_heldout)).label.startswith("Forgotten")
    assert words.verdict(RunResults(evaluation=without)).label.startswith("Partly forgotten")


@pytest.mark.parametrize(
    ("attack", "shown", "label"),
    [
        (an_attack(0.81), "back", "Suppressed, not removed"),
        (an_attack(0.50), "partly back", "Partly removed"),
        (an_attack(0.35), "like never knew", "Not brought back by the attacks tried"),
        (an_attack(0.20), "below never knew", "Not brought back by the attacks tried"),
        (an_attack(0.45, width=0.25), "too wide", "Forgotten on direct questions; the attacks decide nothing"),
        (an_attack(0.81, retain=(0.9, 0.5)), "broken", "Forgotten on direct questions; the attacks decide nothing"),
        (an_attack(0.81, never=None), "no control", "Forgotten on direct questions; the attacks decide nothing"),
        (an_attack(0.35, shallow=0.30), "no power", "Forgotten on direct questions; the attacks decide nothing"),
        (a_share(0.70), "back", "Suppressed, not removed"),
        (a_share(0.20), "partly back", "Partly removed"),
        (a_share(0.03), "like never knew", "Not brought back by the attacks tried"),
        (a_share(0.30, width=0.35), "too wide", "Forgotten on direct questions; the attacks decide nothing"),
        (a_share(0.70, never=False), "no control", "Forgotten on direct questions; the attacks decide nothing"),
        (a_share(math.nan), "unmeasured", "Forgotten on direct questions; the attacks decide nothing"),
    ],
)
def test_what_attacks_allow_one_to_say(attack: AttackResult, shown: judge.Recovery, label: str) -> None:
    made = words.verdict(a_run(attack=attack))
    assert judge.recovery(attack, 0.99) == shown
    assert made.label == label
    assert words.MEANINGS[shown] in str(made)


def test_the_strongest_attack_decides() -> None:
    run = a_run()
    assert run.evaluation is not None
    both = dataclasses.replace(run.evaluation, attacks=(an_attack(0.35), an_attack(0.81)))
    assert words.verdict(dataclasses.replace(run, evaluation=both)).label == "Suppressed, not removed"


def test_an_edit_that_can_be_left_out_says_so() -> None:
    run, gone = a_run(), a_share(0.03)
    assert run.evaluation is not None
    verdicts = {
        kind: words.verdict(
            dataclasses.replace(
                run, evaluation=dataclasses.replace(run.evaluation, attacks=(gone,), edit={"kind": kind, "text": ""})
            )
        )
        for kind in ("weights", "tokens", "modules")
    }
    assert "conditional" not in str(verdicts["weights"])
    assert "It is conditional on a control token" in str(verdicts["tokens"])
    assert verdicts["tokens"].label == verdicts["weights"].label == "Not brought back by the attacks tried"
    assert verdicts["modules"].label == "Suppressed, not removed", "it is the model before as soon as they are gone"


def test_an_interval_that_meets_the_control_is_not_distinguishable() -> None:
    assert "not distinguishable from a model that never knew" in str(words.verdict(a_run(attack=an_attack(0.35))))
    assert "not distinguishable" not in str(words.verdict(a_run(attack=an_attack(0.40))))


def test_the_verdict_gives_the_numbers_in_order() -> None:
    text = str(words.verdict(a_run()))
    expected = (
        "Zeroing 2 of 8 neurons takes the forget set from 0.99 [0.96, 1.00] to 0.04 [0.01, 0.07] (probability, n = 2); "
    )
    expected += "the retain set keeps its level, 0.98 [0.95, 1.00] before and 0.97 [0.94, 1.00] after; "
    expected += "random sets of the same size leave 0.98 (2 seeds, 0.97 to 0.99) at the same dose (2 neurons)."
    assert text.startswith(expected)


def test_random_sets_that_reach_the_level_are_not_passed_over() -> None:
    run = dataclasses.replace(a_run(), comparison=a_comparison(random_reaches=True))
    said = "1 of 2 random sets reach the level 0.05 (answer probability) at 2 neurons, with retain at 0.50, found 0.96"
    assert said in str(words.verdict(run))


def test_controls_on_other_data_are_not_set_beside_the_evaluation() -> None:
    other = dataclasses.replace(a_comparison(), provenance=dataclasses.replace(PROVENANCE, data="y"))
    run = dataclasses.replace(a_run(), comparison=other)
    assert run.evaluation is not None
    record = dataclasses.replace(PROVENANCE, data="x")
    said = "on the comparison's own data, where the found set leaves 0.04, random sets of the same size leave 0.98"
    assert said not in str(words.verdict(run))
    run = dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, provenance=record))
    assert said in str(words.verdict(run))


def test_what_the_edit_never_took_away_is_not_called_suppressed() -> None:
    evaluation = Evaluation(measures=measures_of(0.99, 0.98), attacks=(an_attack(0.95),))
    said = str(words.verdict(RunResults(evaluation=evaluation)))
    assert words.MEANINGS["never gone"] in said
    assert "suppressed" not in said
    own = tuple(a_measure("forget", value, stage=stage) for value, stage in ((0.99, "before"), (0.97, "after")))
    gone_elsewhere = Evaluation(
        measures=measures_of(0.99, 0.04), attacks=(dataclasses.replace(an_attack(0.9), measures=own),)
    )
    assert words.MEANINGS["never gone"] in str(words.verdict(RunResults(evaluation=gone_elsewhere)))


def test_a_harmed_retain_set_is_in_the_label() -> None:
    evaluation = Evaluation(measures=measures_of(0.99, 0.04, retain=0.6), attacks=(an_attack(0.35),))
    made = words.verdict(RunResults(evaluation=evaluation))
    assert made.label == "Not brought back by the attacks tried; retain set harmed"
    assert made.tone == "mixed"
    assert "the retain set falls from 0.98 [0.95, 1.00] to 0.60 [0.57, 0.63]" in str(made)


def test_nothing_is_said_without_an_evaluation() -> None:
    made = words.verdict(RunResults(components=some_scores().select(top=2)))
    assert (made.label, made.tone) == ("Not evaluated", "none")
    assert str(made).startswith("2 of 8 neurons were chosen.")


def test_what_was_done_has_a_sentence_for_every_step() -> None:
    done = words.done(a_run())
    assert done[0] == "depn scored 8 neurons of lab over 2 examples."
    assert done[1].startswith("2 of 8 neurons were chosen (")
    assert done[2] == "Zeroing 2 of 8 neurons, held as weights."
    assert len(done) == 6
    assert words.done(RunResults()) == []


# --- figures ---------------------------------------------------------------------------------------------------------


def test_bins_keep_the_score_of_largest_size() -> None:
    best, where = maps.binned(torch.tensor([1.0, -3.0, 2.0, 0.5, -4.0]), 2)
    assert (best, where) == ([-3.0, 2.0, -4.0], [1, 2, 4])
    wide = Scores(values={"blocks.0.mlp.neuron": torch.arange(1000.0)}, sites=neuron_sites(1000, 1))
    grid = maps.layout(wide, "neuron")
    assert (grid.spacing, len(grid.columns), grid.values[0][-1]) == (8, 125, 999.0)
    assert len(maps.layout(some_scores(), "neuron").columns) == 4


def test_units_of_one_component_a_module_share_one_map() -> None:
    names = ["blocks.0.mlp.out.matrix", "blocks.0.attn.o.matrix", "blocks.1.mlp.out.matrix"]
    sites = {name: Site(name=name, count=1) for name in names}
    grid = maps.layout(Scores(values={n: torch.tensor([float(i)]) for i, n in enumerate(names)}, sites=sites), "matrix")
    assert grid.columns == ["mlp.out", "attn.o"]
    assert grid.values == [[0.0, 1.0], [2.0, None]]


def test_rings_stand_on_the_chosen_components() -> None:
    scores = some_scores()
    rings = figures.scores(scores, chosen=scores.select(top=2)).data[1]
    assert list(zip(rings.x, rings.y, strict=True)) == [(1, "0"), (0, "1")]


def test_lines_of_unequal_length_are_cut_into_parts() -> None:
    counts = {"blocks.0.mlp.out.row": 300, "model.embed.weight:row": 1000}
    sites = {name: Site(name=name, count=count) for name, count in counts.items()}
    scores = Scores(values={name: torch.arange(float(count)) for name, count in counts.items()}, sites=sites)
    grid = maps.layout(scores, "row")
    assert grid.rows == ["0 mlp.out", "model.embed.weight"]
    assert grid.bins == {"blocks.0.mlp.out.row": 3, "model.embed.weight:row": 8}
    assert [len(row) for row in grid.values] == [128, 128]
    assert (grid.values[0][99], grid.values[0][100], grid.values[1][124]) == (299.0, None, 999.0)
    rings = figures.scores(scores, chosen=scores.select(top=1)).data[1]
    assert (rings.x[0], rings.y[0]) == (124, "model.embed.weight")


def test_many_matrices_are_one_square_each() -> None:
    """Rows of seven matrices in four layers, norms and an embedding: the largest score; norms stand in their layer."""
    roles = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.in", "mlp.out")
    names = [f"blocks.{layer}.{role}.row" for layer in range(4) for role in roles]
    names += [*(f"model.layers.{layer}.norm1.weight:row" for layer in range(4)), "model.embed.weight:row"]
    sites = {name: Site(name=name, count=3) for name in names}
    values = {name: torch.tensor([0.0, -float(i), 0.5]) for i, name in enumerate(names)}
    scores = Scores(values=values, sites=sites)
    grid = maps.layout(scores, "row")
    assert grid.rows == ["0", "1", "2", "3", "outside"]
    assert grid.columns == [*roles, "norm1", "embed"]
    assert grid.values[1][:8] == [-7.0, -8.0, -9.0, -10.0, -11.0, -12.0, -13.0, -29.0]
    assert grid.values[4] == [None] * 8 + [-32.0]
    assert "row 1 of 3" in grid.hover[1][0]
    assert "sum -6.5" in grid.hover[1][0]
    rings = figures.scores(scores, chosen=scores.select(top=2, sign="negative")).data[1]
    assert list(zip(rings.x, rings.y, strict=True)) == [(7, "3"), (8, "outside")]
    assert "1 of 3 chosen" in rings.text[0]


def test_several_units_stand_side_by_side() -> None:
    """Two heads and an MLP in each of two layers: one map of three columns, with one scale."""
    values = {f"blocks.{i}.attn.head": torch.tensor([1.0 + i, 2.0 + i]) for i in range(2)}
    values |= {f"blocks.{i}.mlp": torch.tensor([5.0 + i]) for i in range(2)}
    scores = Scores(values=values, sites={name: Site(name=name, count=len(v)) for name, v in values.items()})
    made = scores.plot()
    assert [list(row) for row in made.data[0].z] == [[1.0, 2.0, 5.0], [2.0, 3.0, 6.0]]
    assert list(made.layout.xaxis.ticktext) == ["head 0", "head 1", "mlp"]
    rings = figures.scores(scores, chosen=scores.select(top=3)).data[1]
    assert sorted(zip(rings.x, rings.y, strict=True)) == [(1, "1"), (2, "0"), (2, "1")]


def test_a_role_has_one_colour_in_every_figure() -> None:
    run = a_run()
    assert run.comparison is not None
    assert run.evaluation is not None
    drawn = [figures.tradeoff(run.comparison), figures.doses(run.comparison), figures.attack(run.evaluation.attacks[0])]
    traces = [
        trace for figure in drawn for trace in figure.data if trace.name in NAMES.values() and trace.x[0] is not None
    ]
    roles = {name: role for role, name in NAMES.items()}
    assert {roles[trace.name] for trace in traces} == {"found", "random", "never knew", "shallow"}
    assert all(trace.line.color == COLOURS[roles[trace.name]] for trace in traces)


def test_zero_has_a_place_on_a_logarithmic_dose_axis() -> None:
    curve = Curve(
        name="found", role="found", x_name="neurons", x=(0.0, 1.0, 100.0), columns={"forget": (0.9, 0.5, 0.1)}
    )
    made = figures.doses(Comparison(metric="probability", level=0.2, curves=(curve,)))
    assert list(made.data[0].x) == [1 / 3, 1.0, 100.0]
    assert made.layout.xaxis.ticktext[0] == "0"
    assert list(made.data[0].customdata) == [0.0, 1.0, 100.0], "the label says the dose itself"


def test_splits_of_an_attack_are_drawn_as_their_mean() -> None:
    curves = [
        a_curve("found", 0.6, seed=0),
        a_curve("found", 0.8, seed=1),
        a_curve("random", 0.9, seed=0),
        a_curve("random", 0.7, seed=1),
    ]
    means = {c.role: c for c in lines.means(curves) if c.role == "found"}
    assert means["found"].columns["recovered"] == pytest.approx((0.04, 0.7))
    assert len([c for c in lines.means(curves) if c.role == "random"]) == 2, "random sets stay apart"


def test_the_history_of_a_training_has_a_panel_for_each_column() -> None:
    table = {"step": [0, 1, 2], "loss": [None, 2.0, 1.0], "forget": [0.9, None, 0.1]}
    made = figures.history(Edit(kind="weights", fingerprint="x", history=table))
    assert [trace.name for trace in made.data] == ["loss", "forget"]
    assert list(made.data[1].y) == [0.9, None, 0.1]
    assert not figures.history(Edit(kind="weights", fingerprint="x")).data


def test_measures_of_other_units_have_other_axes() -> None:
    perplexity = dataclasses.replace(
        a_measure("texts", 0.5, name="perplexity"), value=12.0, low=11.0, high=13.0, unit="perplexity"
    )
    made = figures.measures(Evaluation(measures=(*measures_of(0.99, 0.04), perplexity)))
    axes = {trace.xaxis: trace.x for trace in made.data}
    assert len(axes) == 2
    assert list(axes["x2"]) == [12.0]


def _luminance(colour: str) -> float:
    return float(_linear(colour) @ [0.2126, 0.7152, 0.0722])


def _linear(colour: str) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _lab(colour: str, matrix: list[list[float]]) -> np.ndarray:
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    white = [0.9505, 1, 1.089]
    relative = xyz @ np.clip(np.array(matrix) @ _linear(colour), 0, 1) / white
    f = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


DICHROMACY = {  # Machado, Oliveira and Fernandes 2009, severity 1
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("kind", DICHROMACY)
def test_roles_are_told_apart_without_full_colour_vision(kind: str) -> None:
    roles: list[Role] = ["found", "random", "everything", "never knew", "shallow"]
    seen = [_lab(COLOURS[role], DICHROMACY[kind]) for role in roles]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 22


@pytest.mark.parametrize("role", COLOURS)
def test_every_colour_stands_out_from_both_grounds(role: Role) -> None:
    light, dark = _luminance("#ffffff"), _luminance("#14171b")
    assert (light + 0.05) / (_luminance(COLOURS[role]) + 0.05) >= 3
    assert (_luminance(COLOURS[role]) + 0.05) / (dark + 0.05) >= 3


# --- captions and tables ---------------------------------------------------------------------------------------------


def test_captions_say_what_the_figure_shows() -> None:
    scores = some_scores()
    said = captions.scores(scores, scores.select(top=1))
    assert said.startswith("Highest: blocks.0.mlp.neuron 1 (3.00); blocks.1.mlp.neuron 0 (1.00).")
    assert said.endswith("The 1 chosen hold 75.0 % of the positive score.")
    assert "Found components: reached at 2 neurons, retain 0.96" in captions.comparison(a_comparison())
    assert "Random sets: not reached (lowest 0.97)" in captions.comparison(a_comparison())
    assert captions.attack(an_attack(0.81)).startswith(
        "At the attack's dose: this edit 0.81, retain 0.90; never knew 0.32"
    )


def test_the_measures_table_has_a_column_for_each_stage() -> None:
    run = a_run()
    assert run.evaluation is not None
    view = tables.measures(run.evaluation)
    assert [column.name for column in view.columns] == [
        "data set",
        "measure",
        "better",
        "before",
        "after",
        "after relearn",
        "n",
    ]
    assert [cell.text for cell in view.rows[0]][3:6] == ["0.99 [0.96, 1.00]", "0.04 [0.01, 0.07]", "0.81 [0.76, 0.86]"]


def test_examples_sort_by_the_value_behind_the_text() -> None:
    run = a_run()
    assert run.evaluation is not None
    view = tables.examples(run.evaluation)
    assert view is not None
    column = [c.name for c in view.columns].index("probability before")
    assert [row[column].sort for row in view.rows][:2] == [0.99, 0.495]
    assert tables.examples(Evaluation(measures=())) is None


def test_long_example_tables_say_what_they_leave_out() -> None:
    many = dataclasses.replace(a_measure("forget", 0.5), per_example={str(i): 0.5 for i in range(2500)})
    view = tables.examples(Evaluation(measures=(many,)))
    assert view is not None
    assert len(view.rows) == 2000
    assert "first 2,000 of 2,500" in view.caption


# --- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements, links and scripts of a page as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.scripts: list[tuple[str, str]] = []
        self.handlers: list[str] = []
        self.text: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag
        found = dict(attrs)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        self.handlers += [key for key, _ in attrs if key.startswith("on")]
        if tag == "script":
            self.scripts.append((found.get("type") or "", ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            kind, body = self.scripts[-1]
            self.scripts[-1] = (kind, body + data)
        elif self.inside != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(report(a_run("one", evil=True)).html())


def test_the_page_asks_for_nothing_from_outside(page: Page) -> None:
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert "link" not in page.tags
    assert "iframe" not in page.tags


def test_plotly_is_there_once_and_every_figure_is_json(page: Page) -> None:
    code = [body for kind, body in page.scripts if not kind]
    data = [json.loads(body) for kind, body in page.scripts if kind == "application/json"]
    assert [len(body) > 1_000_000 for body in code] == [True, False]
    assert len(data) == page.tags.count("figure") == 6
    assert all(figure["data"] and figure["layout"]["height"] for figure in data)


def test_text_from_data_files_stays_text(page: Page) -> None:
    assert "img" not in page.tags
    assert page.handlers == []
    assert len([kind for kind, _ in page.scripts if not kind]) == 2, "none but plotly's and the page's own"
    said = "".join(page.text)
    assert said.count(EVIL) >= 3, "prompt, answer and evidence are shown as they are"


def test_json_inside_a_script_cannot_end_it() -> None:
    figure = figures.attack(
        dataclasses.replace(an_attack(0.5), curves=(dataclasses.replace(a_curve("other", 0.5), name=EVIL),))
    )
    text = str(embed(figure))
    assert "<" not in text
    assert json.loads(text) == json.loads(str(figure.to_json()))
    assert "<script" not in json.loads(text)["data"][0]["name"], "plotly reads a little HTML in labels"


def test_every_figure_has_its_finding_in_words(page: Page) -> None:
    assert page.tags.count("figcaption") == page.tags.count("figure")
    assert "Found components: reached at 2 neurons, retain 0.96" in "".join(page.text)


def test_a_run_with_pieces_missing_says_so() -> None:
    page = Page(report(RunResults(name="empty")).html())
    said = " ".join(page.text)
    for missing in (
        "No scores",
        "No component set",
        "No comparison",
        "No attack was run",
        "No evaluation",
        "No record of settings",
    ):
        assert missing in said
    assert page.tags.count("figure") == 0
    assert all(len(body) < 100_000 for _, body in page.scripts), "plotly is left out where nothing is drawn"


def test_several_runs_are_compared_on_one_page() -> None:
    html = report(a_run("a"), a_run("b", attack=an_attack(0.35))).html()
    page = Page(html)
    said = " ".join(page.text)
    assert "a and b" in said
    assert "Suppressed, not removed" in said
    assert "Not brought back by the attacks tried" in said
    assert html.count('class="run"') == 2
    assert len([1 for kind, body in page.scripts if not kind and len(body) > 1_000_000]) == 1
    names = {trace.get("name") for kind, body in page.scripts if kind for trace in json.loads(body)["data"]}
    assert {"a: this edit", "b: this edit", "a: never knew"} <= names


def test_the_page_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    made = report(some_scores())
    made.save(path)
    first = path.read_bytes()
    with pytest.raises(LoceditError, match="exists already"):
        made.save(path)
    assert path.read_bytes() == first
    made.save(path, force=True)


def test_results_show_themselves_in_a_notebook() -> None:
    run = a_run(evil=True)
    assert run.evaluation is not None
    assert run.components is not None
    for result in (*run.scores, run.components, run.evaluation, run.comparison, run.evaluation.attacks[0], report(run)):
        text = result._repr_html_()  # type: ignore[union-attr]
        assert Page(text).handlers == []
        assert "script" not in Page(text).tags
        assert len(text) < 20_000
    assert "&lt;img" in fragment(EVIL)


# --- what goes in ----------------------------------------------------------------------------------------------------


def test_loose_objects_make_one_run_and_a_second_evaluation_begins_another() -> None:
    run = a_run()
    one = gather([*run.scores, *run.scores, run.components, run.evaluation, run.comparison])
    assert len(one) == 1
    assert len(one[0].scores) == 2
    two = gather([run.evaluation, run.evaluation])
    assert [r.name for r in two] == ["run 1", "run 2"]
    assert [r.name for r in gather([a_run("x"), a_run("x")])] == ["x (1)", "x (2)"]


def test_a_run_folder_is_read_back(tmp_path: Path) -> None:
    run = a_run()
    assert run.components is not None
    assert run.evaluation is not None
    assert run.comparison is not None
    run.scores[0].save(tmp_path / "localize" / "depn")
    run.components.save(tmp_path / "components.json")
    run.evaluation.save(tmp_path / "evaluation" / "evaluation.json")
    run.comparison.save(tmp_path / "comparison" / "comparison.json")
    again = read_run(tmp_path)
    assert again.name == tmp_path.name
    assert words.verdict(again) == words.verdict(run)
    assert words.done(again) == words.done(run)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ((), "nothing to report"),
        ((3,), "cannot report a int; choices: Scores"),
        (("/no/such/run",), "no such run folder"),
    ],
)
def test_what_cannot_be_reported_is_named(items: tuple[object, ...], message: str) -> None:
    with pytest.raises(LoceditError, match=message):
        report(*items)


def test_an_empty_run_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoceditError, match="holds no results"):
        read_run(tmp_path)


def test_known_measures_are_defined_and_unknown_ones_left_out() -> None:
    view = tables.definitions(Evaluation(measures=(a_measure("forget", 0.5), a_measure("forget", 0.5, name="made_up"))))
    assert view is not None
    assert [row[0].text for row in view.rows] == ["probability"]
    assert view.rows[0][3].text == METRICS["probability"].failure
    assert tables.definitions(Evaluation(measures=(a_measure("forget", 0.5, name="made_up"),))) is None


def test_the_name_of_a_measure_shows_its_card() -> None:
    """On hover: in the table of measures, in their definitions, and in the figure under the number."""
    evaluation = Evaluation(measures=(a_measure("forget", 0.5), a_measure("forget", 0.5, name="made_up")))
    names = {row[1].text: row[1].hint for row in tables.measures(evaluation).rows}
    assert names == {"probability": card_text("probability", METRICS["probability"]), "made up": ""}
    assert "known failure: a product over tokens" in names["probability"]
    definitions = tables.definitions(evaluation)
    assert definitions is not None
    assert definitions.rows[0][0].hint == names["probability"]
    assert html.escape(names["probability"], quote=False).split("\n")[1] in html.unescape(report(evaluation).html())
    hovers = [text for trace in figures.measures(evaluation).data for text in trace.customdata]
    assert any("known failure: a product over tokens" in text.replace("<br>", " ") for text in hovers)
    assert "" in hovers


def test_runs_on_other_data_are_not_drawn_together() -> None:
    def on(data: str, name: str) -> RunResults:
        run = a_run(name)
        assert run.evaluation is not None
        record = dataclasses.replace(PROVENANCE, data=data)
        return dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, provenance=record))

    same, other = report(on("x", "a"), on("x", "b")).html(), report(on("x", "a"), on("y", "b")).html()
    assert Page(same).tags.count("figure") == Page(other).tags.count("figure") + 2
    assert "Runs side by side" in other


def test_the_comparison_puts_key_measures_and_controls_side_by_side() -> None:
    rows = {
        row[0].text: [cell.text for cell in row[1:]] for row in side_by_side([a_run("a"), RunResults(name="b")]).rows
    }
    assert rows["edit"] == ["Zeroing 2 of 8 neurons", ""]
    assert rows["forget probability"] == ["0.99 → 0.04 [0.01, 0.07]", ""]
    assert rows["random sets at the same dose, forget"] == ["0.98 (2 seeds, 0.97 to 0.99)", ""]
    assert rows["retain at the matched level"] == ["0.96 (level 0.05)", ""]
    assert rows["relearn: probability"] == ["0.81 [0.76, 0.86]", ""]
    assert rows["relearn, at its dose: never-knew control"] == ["0.32", ""]
    assert rows["verdict"] == ["Suppressed, not removed", "Not evaluated"]


def test_parts_of_data_sets_have_a_table_of_their_own() -> None:
    question = dataclasses.replace(a_measure("forget", 0.2, stage="after"), group="question")
    evaluation = Evaluation(measures=(*measures_of(0.99, 0.04), question))
    assert "question" not in [cell.text for row in tables.measures(evaluation).rows for cell in row]
    parts = tables.measures(evaluation, parts=True)
    assert [row[2].text for row in parts.rows] == ["question"]
    assert parts.folded
    assert parts.filter


@pytest.mark.parametrize(
    ("after", "width", "state"),
    [(0.92, 0.05, "unchanged"), (0.33, 0.2, "partly"), (0.55, 0.5, "unchanged"), (0.04, 0.03, "gone")],
)
def test_a_wide_interval_of_a_full_score_hides_no_change(after: float, width: float, state: str) -> None:
    full = dataclasses.replace(a_measure("forget", 1.0, name="accuracy"), low=0.4)
    pair = judge.Pair(before=full, after=a_measure("forget", after, stage="after", name="accuracy", width=width))
    assert judge.forgetting(pair, 0.0) == state


def test_deletion_requests_stand_on_the_page(tmp_path: Path) -> None:
    """Every request with its level at the end, how they became one edit, and which are back."""
    table = {
        "request": ["Ada", "Bo", "retain"],
        "unedited": [0.9, 0.8, 0.7],
        "before": [0.9, 0.7, 0.7],
        "after": [0.1, 0.05, 0.6],
        "end": [0.1234, 0.5, 0.6],
        "came_back": [False, True, None],
    }
    write_json(tmp_path / "requests" / "requests.json", {"requests": 2, "table": table, "fused": True})
    page = report(str(tmp_path)).html()
    assert "2 deletion requests, each trained alone and then fused: 1 have come back at the end (Bo)." in page
    assert "0.1234" in page
    chained = words.requests({"requests": 2, "table": table | {"came_back": [False, False, None]}, "fused": False})
    assert chained == ("2 deletion requests, each trained on top of those before it: none has come back at the end.")
    assert "Deletion requests" not in report(RunResults(name="none")).html()


def test_held_out_items_that_are_as_likely_as_what_is_forgotten_are_no_floor() -> None:
    """A habit is in held-out texts too: that a rare word became rarer still is no forgetting of questions."""
    before, after = a_measure("probability", 0.0175, stage="before"), a_measure("probability", 0.0075)
    before = dataclasses.replace(before, low=0.015, high=0.02)
    pair = judge.Pair(before=before, after=dataclasses.replace(after, low=0.006, high=0.009))
    assert judge.forgetting(pair, 0.0170) == "unknown"
    assert judge.forgetting(pair, 0.0076) == "gone"

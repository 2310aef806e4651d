"""Measures as points with their intervals."""

import textwrap
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from locedit.report import judge
from locedit.report.palette import STAGES, dress, plain
from locedit.results import Evaluation, Measure, Stage


def measures(evaluation: Evaluation) -> Figure:
    """Numbers with their intervals, before, after and after attacks.

    Every measure of a whole data set, and of the metric that sums up the forget set also the parts, such as formats.
    One panel for each unit, since units share no axis.
    """
    pair = judge.primary(evaluation, "forget")
    shown = [m for m in evaluation.measures if m.group is None or (pair is not None and m.name == pair.before.name)]
    return dots([*shown, *(a.headline for a in evaluation.attacks)])


def dots(numbers: Sequence[Measure]) -> Figure:
    """One row for each measure, one symbol for each stage; infinite numbers are left to the tables."""
    finite = [m for m in numbers if abs(m.value) < float("inf")]
    units = list(dict.fromkeys(_panel(m) for m in finite)) or [""]
    rows = {unit: list(dict.fromkeys(m.key for m in finite if _panel(m) == unit)) for unit in units}
    heights = [34 * max(len(rows[unit]), 1) + 12 for unit in units]
    total = sum(heights) + 62 * len(units) + 30
    spacing = 62 / total if len(units) > 1 else 0
    made = make_subplots(rows=len(units), cols=1, row_heights=heights, vertical_spacing=spacing)
    for row, unit in enumerate(units, start=1):
        for stage in ("before", "after", "attacked"):
            here = [m for m in finite if _panel(m) == unit and m.stage == stage]
            if here:
                made.add_trace(_trace(here, stage, named=_first_row(finite, units, stage) == row), row=row, col=1)
        made.update_xaxes(title_text=plain(unit), nticks=5, tickangle=0, row=row, col=1)
        ordered = list(dict.fromkeys(_row(m) for m in finite if _panel(m) == unit))
        made.update_yaxes(categoryorder="array", categoryarray=ordered[::-1], row=row, col=1)
    return dress(made, height=total)


def _panel(measure: Measure) -> str:
    """The unit, or the name where the unit is a sentence."""
    return measure.unit if 0 < len(measure.unit) <= 24 else measure.name.replace("_", " ")


def _row(measure: Measure) -> str:
    """Two short lines, so that the names leave room for the points on a narrow screen."""
    name = plain(f"{measure.dataset} {measure.name}".replace("_", " "))
    return f"{name}<br>[{plain(measure.group.replace('_', ' '))}]" if measure.group else name


def _first_row(numbers: Sequence[Measure], units: list[str], stage: Stage) -> int:
    return next(
        row for row, u in enumerate(units, start=1) if any(_panel(m) == u and m.stage == stage for m in numbers)
    )


def _trace(numbers: Sequence[Measure], stage: Stage, *, named: bool) -> go.Scatter:
    colour, symbol = STAGES[stage]
    return go.Scatter(
        x=[m.value for m in numbers],
        y=[_row(m) for m in numbers],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [max(m.high - m.value, 0) for m in numbers],
            "arrayminus": [max(m.value - m.low, 0) for m in numbers],
            "thickness": 1.5,
        },
        mode="markers",
        name=stage,
        legendgroup=stage,
        showlegend=named,
        marker={"color": colour, "symbol": symbol, "size": 9, "line": {"width": 2, "color": colour}},
        text=[f"[{m.low:.3g}, {m.high:.3g}], n = {m.n:,}" for m in numbers],
        customdata=[_explained(m) for m in numbers],
        hovertemplate="%{y} " + stage + ": %{x:.3g} %{text}%{customdata}<extra></extra>",
    )


def _explained(measure: Measure) -> str:
    """What the measure is and how it misleads, in lines under its number; empty for what is no metric."""
    from locedit.evaluate.registry import METRICS

    if measure.name not in METRICS:
        return ""
    metric = METRICS[measure.name]
    said = (metric.definition, f"known failure: {metric.failure}")
    return "".join(f"<br>{plain(line)}" for text in said for line in textwrap.wrap(text, 70))

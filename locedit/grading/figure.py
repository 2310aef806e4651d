"""Localizers as points with their intervals, one panel for each planted site, deleted unit and oracle."""

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from locedit.grading import words
from locedit.grading.records import Row, Verdict
from locedit.grading.result import Grades
from locedit.report.palette import COLOURS, GRID, dress, plain

MARKS: dict[Verdict, tuple[str, str]] = {
    "above chance": (COLOURS["found"], "circle"),
    "not told from chance": (COLOURS["random"], "circle-open"),
    "below chance": (COLOURS["shallow"], "diamond"),
    "one seed": (COLOURS["everything"], "square-open"),
}
"colour and symbol"
AXES = {
    "decoys": "area under the curve above 0.5",
    "auc": "area under the curve above 0.5",
    "target": "drop in probability beyond random sets",
    "excess": "excess drop beyond random sets",
    "robust": "rank correlation with robustness",
}
RANGES = {"planted": [-0.55, 0.55], "oracle": [-1.05, 1.05]}
"of the axes; drops have the range that they need"
LINE, GAP = 22, 96


def dots(grades: Grades, part: str | None = None) -> Figure:
    """Mean over the seeds of value - chance with its 95 % interval, of one part or of all parts."""
    panels = [panel for panel in grades.headlines() if part in (None, panel[0])]
    ranked = {panel: [row for row in grades.ranking(*panel) if row.seeds] for panel in panels}
    heights = [LINE * max(len(rows), 1) + 10 for rows in ranked.values()]
    total = sum(heights) + GAP * len(panels) + 20
    made = make_subplots(
        rows=len(panels),
        cols=1,
        row_heights=heights,
        vertical_spacing=GAP / total if len(panels) > 1 else 0,
        subplot_titles=[plain(words.headline(*panel)) for panel in panels],
    )
    shown: set[Verdict] = set()
    for at, (panel, rows) in enumerate(ranked.items(), start=1):
        for verdict in MARKS:
            here = [row for row in rows if row.verdict == verdict]
            if here:
                made.add_trace(_trace(here, verdict, named=verdict not in shown), row=at, col=1)
                shown.add(verdict)
        made.add_vline(x=0, line={"color": GRID, "width": 2}, row=at, col=1)  # type: ignore[arg-type]
        made.update_xaxes(
            title_text=AXES[panel[2]],
            title_font_size=12,
            nticks=6,
            tickangle=0,
            range=RANGES.get(panel[0]),
            row=at,
            col=1,
        )
        order = [plain(row.method) for row in rows][::-1]
        made.update_yaxes(categoryorder="array", categoryarray=order, row=at, col=1)
    dressed = dress(made, height=total)
    return dressed.update_layout(margin={"t": 34}).update_annotations(font={"size": 13}, x=0, xanchor="left")


def _trace(rows: Sequence[Row], verdict: Verdict, *, named: bool) -> go.Scatter:
    colour, symbol = MARKS[verdict]
    known = [row.above_low == row.above_low for row in rows]
    return go.Scatter(
        x=[row.above for row in rows],
        y=[plain(row.method) for row in rows],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [row.above_high - row.above if fine else 0 for row, fine in zip(rows, known, strict=True)],
            "arrayminus": [row.above - row.above_low if fine else 0 for row, fine in zip(rows, known, strict=True)],
            "thickness": 1.5,
            "visible": any(known),
        },
        mode="markers",
        name=verdict,
        legendgroup=verdict,
        showlegend=named,
        marker={"color": colour, "symbol": symbol, "size": 9, "line": {"width": 2, "color": colour}},
        text=[f"{row.value:.3f}, chance {row.chance:.3f}, {row.seeds} seeds" for row in rows],
        hovertemplate="%{y}: %{x:+.3f} above chance (%{text})<extra></extra>",
    )

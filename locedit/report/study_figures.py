"""The figures of a study: methods as points, a panel for each number, colours and symbols for the places."""

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from locedit.report.palette import COLOURS, GRID, INK, dress, figure, plain
from locedit.report.study_table import Number, attacks_of, formats_of, interval, metric_of, numbers_of
from locedit.results import Role
from locedit.study.records import Row
from locedit.study.result import Study

LINE, SHIFT, GAP = 16, 7, 78
ACROSS = 4
"panels side by side"
NAMED = 30
"the most points of a trade-off that carry their names; of more, pointing at one tells it"
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star", "hexagon")
COLOUR: dict[Role, str] = {
    role: COLOURS[role] for role in ("found", "random", "everything", "complement", "shallow", "other")
}


def dots(study: Study) -> Figure:
    """What is kept, what other formats still say, what comes back and what the attack keeps: a point for each edit.

    Only edits that reached the level; bars are 95 % intervals over seeds. Upright lines: the unedited model.
    """
    columns = panels(study)
    rows = [row for row in study.rows if row.state == "reached"]
    methods = [method for method in study.methods if any(row.method == method for row in rows)]
    places = styles(rows)
    across = min(ACROSS, max(len(columns), 1))
    down = max(-(-len(columns) // across), 1)
    where = _heights(rows, methods, list(places))
    most = max((sum(method == other for other, _ in where) for method in methods), default=1)
    height = (LINE + SHIFT * most) * max(len(methods), 2) + 10
    total = (height + GAP) * down + 62
    made = make_subplots(
        rows=down,
        cols=across,
        shared_yaxes=True,
        horizontal_spacing=0.02,
        vertical_spacing=GAP / total if down > 1 else 0,
        subplot_titles=[plain(_title(column)) for column in columns],
    )
    for number, column in enumerate(columns):
        down_at, across_at = number // across + 1, number % across + 1
        for place, style in places.items():
            here = [row for row in rows if row.place == place and column.key in row.values]
            if here:
                y = [where[row.method, place] for row in here]
                made.add_trace(_trace(here, column, y, place, style, named=number == 0), row=down_at, col=across_at)
        if column.unedited and (before := study.unedited(column.key)):
            line = {"color": COLOURS["unedited"], "dash": "dot", "width": 1.2}
            made.add_vline(x=before.value, line=line, row=down_at, col=across_at)  # type: ignore[arg-type]
        made.update_xaxes(
            range=[-0.05, 1.05], tickvals=[0, 0.25, 0.5, 0.75, 1], tickangle=0, row=down_at, col=across_at
        )
        made.update_yaxes(
            tickvals=[-number for number in range(len(methods))],
            ticktext=[plain(method) for method in methods],
            range=[0.6 - len(methods), 0.6],
            gridcolor=GRID,
            row=down_at,
            col=across_at,
        )
    dressed = dress(made, height=total)
    dressed.update_layout(margin={"t": 56})
    return dressed.update_annotations(font={"size": 13, "color": INK})


def _heights(rows: Sequence[Row], methods: Sequence[str], places: Sequence[str]) -> dict[tuple[str, str], float]:
    """(method, place) -> height: a line for each method, its own places one below the other around it."""
    found: dict[tuple[str, str], float] = {}
    for at, method in enumerate(methods):
        here = [place for place in places if any((row.method, row.place) == (method, place) for row in rows)]
        shifts = ((number + 0.5) / len(here) - 0.5 for number in range(len(here)))
        found |= {(method, place): -at - 0.64 * shift for place, shift in zip(here, shifts, strict=True)}
    return found


def panels(study: Study) -> list[Number]:
    """Retain, every format of the forget set, and of attacks what comes back and what they keep."""
    metric = metric_of(study)
    wanted = [f"retain.{metric}", *(f"forget.{metric}[{part}]" for part in formats_of(study))]
    wanted += [f"forget.paraphrase_{metric}"]
    wanted += [f"{attack}.{name}" for attack in attacks_of(study) for name in ("recovered", "never_known", "retain")]
    known = {column.key: column for column in numbers_of(study)}
    return [known[key] for key in wanted if key in known]


def tradeoff(study: Study, attack: str) -> Figure:
    """What an attack brings back (left is better) against what the edit keeps (up is better), a point for each edit."""
    metric = metric_of(study)
    kept, back = f"retain.{metric}", f"{attack}.recovered"
    rows = [r for r in study.rows if r.state == "reached" and kept in r.values and back in r.values]
    traces = [
        go.Scatter(
            x=[row.values[back].value for row in here],
            y=[row.values[kept].value for row in here],
            mode="markers+text" if len(rows) <= NAMED else "markers",
            textposition="top center",
            textfont={"size": 10},
            name=plain(place),
            marker=_marker(style),
            text=[plain(row.method) for row in here],
            hovertemplate="%{text}, " + plain(place) + "<br>relearned %{x:.2f}, retain %{y:.2f}<extra></extra>",
        )
        for place, style in styles(rows).items()
        if (here := [row for row in rows if row.place == place])
    ]
    axis = f"forget after {attack} (left is better)"
    made = figure(traces, height=460, xaxis_title=axis, yaxis_title="retain after the edit (up is better)")
    never = [row.values[f"{attack}.never_known"].value for row in rows if f"{attack}.never_known" in row.values]
    if never:
        mean = sum(never) / len(never)
        made.add_vline(x=mean, line={"color": COLOURS["never knew"], "dash": "dot", "width": 1.4})  # type: ignore[arg-type]
        made.add_annotation(x=mean, y=0.02, yref="paper", text="never known", showarrow=False, xanchor="left", xshift=4)
    return made


Style = tuple[str, str, bool]
"colour, symbol, open"


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """Place -> colour of its role, a symbol of its own among the places of that role, open where it is an adapter."""
    found: dict[str, Style] = {}
    symbols: dict[tuple[Role, str], str] = {}
    for row in rows:
        used = [place for role, place in symbols if role == row.role]
        symbols.setdefault((row.role, row.restriction), SYMBOLS[len(used) % len(SYMBOLS)])
        colour = COLOUR.get(row.role, COLOURS["other"])
        found.setdefault(row.place, (colour, symbols[row.role, row.restriction], row.hold != "weights"))
    return found


def _marker(style: Style) -> dict[str, object]:
    colour, symbol, hollow = style
    return {
        "color": colour,
        "symbol": f"{symbol}-open" if hollow else symbol,
        "size": 8,
        "line": {"width": 2 if hollow else 0, "color": colour},
    }


def _trace(
    rows: Sequence[Row], column: Number, y: Sequence[float], place: str, style: Style, *, named: bool
) -> go.Scatter:
    values = [row.values[column.key] for row in rows]
    known = [value.low == value.low for value in values]
    return go.Scatter(
        x=[value.value for value in values],
        y=y,
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [value.high - value.value if fine else 0 for value, fine in zip(values, known, strict=True)],
            "arrayminus": [value.value - value.low if fine else 0 for value, fine in zip(values, known, strict=True)],
            "thickness": 1.3,
            "visible": any(known),
        },
        mode="markers",
        name=plain(place),
        legendgroup=place,
        showlegend=named,
        marker=_marker(style),
        text=[f"{plain(row.method)}, {plain(place)}: {interval(v)}" for row, v in zip(rows, values, strict=True)],
        hovertemplate="%{text}<extra></extra>",
    )


def _title(column: Number) -> str:
    return f"{column.title} (line: unedited)" if column.unedited else column.title

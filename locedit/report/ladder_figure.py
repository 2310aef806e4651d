"""The ladder as a figure: a row for every attack, the least access at the top; how much is back, with its interval."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.graph_objects import Figure

from locedit.attacks.attack import ACCESS
from locedit.report import judge
from locedit.report.ladder import SAID, ladder, name_of, outcome, rows
from locedit.report.left import left
from locedit.report.numbers import with_interval
from locedit.report.palette import COLOURS, NAMES, RUN_SYMBOLS, SYMBOLS, figure, plain
from locedit.report.tables import Column, TableView, texts
from locedit.results import AttackResult, Evaluation, Measure, Role

DRAWN: tuple[Role, ...] = ("found", "random", "shallow")
"beside this edit, the random sets and the control made to come back"


def rungs(named: Sequence[tuple[str, Evaluation]]) -> Figure:
    """Share back of every attack, of one run with its controls, of several runs side by side.

    0 = like items never known, 1 = like the model before the edit. Attacks whose number is no such share are left to
    the tables.
    """
    labels = _labels([evaluation for _, evaluation in named])
    traces: list[Any] = []
    for number, (name, evaluation) in enumerate(named):
        shown = _rows(evaluation)
        if len(named) > 1:
            points = [(row, result.headline, _hover(result, evaluation)) for row, result in shown.items()]
            symbol = RUN_SYMBOLS[number % len(RUN_SYMBOLS)]
            traces.append(_points(points, role="found", name=plain(name), symbol=symbol))
            continue
        for role in DRAWN:
            points = [
                (row, m, _hover(result, evaluation) if role == "found" else plain(m.group))
                for row, result in shown.items()
                for m in _of_role(result, role)
            ]
            title = {"found": "this edit", "shallow": "edit made to come back"}.get(role, NAMES[role])
            if points:
                traces.append(_points(points, role=role, name=title, symbol=SYMBOLS[role]))
    height = 34 * max(len(labels), 1) + 110
    across = {"title": "share back", "range": [-0.35, 1.35], "tickvals": [0, 0.5, 1]}
    across |= {"ticktext": ["0: never knew", "0.5", "1: before the edit"]}
    up = {"categoryorder": "array", "categoryarray": labels[::-1]}
    made = figure(traces, height=height, xaxis=across, yaxis=up)
    for x in (0, 1):
        made.add_vline(x=x, line={"color": COLOURS["never knew" if x == 0 else "unedited"], "width": 1, "dash": "dot"})
    if len(named) == 1 and (asked := left(named[0][1])) is not None:
        made.add_vline(x=asked.value, line={"color": COLOURS["found"], "width": 1, "dash": "dash"})
    return made


def _labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """The rows of all runs, the least access first; within a level those of the first run come first."""
    found = dict.fromkeys(row for evaluation in evaluations for row in _rows(evaluation))
    levels = [*ACCESS, "beside"]
    return sorted(found, key=lambda row: levels.index(row.partition("<br>")[0]))


def _rows(evaluation: Evaluation) -> dict[str, AttackResult]:
    """Label -> attack, the least access first, diagnostics last."""
    made = {
        f"{rung.access}<br>{plain(name_of(result))}": result for rung in ladder(evaluation) for result, _ in rung.tried
    }
    levels = {result.name for result in made.values()}
    made |= {f"beside<br>{plain(name_of(r))}": r for r in evaluation.attacks if r.name not in levels}
    return {row: result for row, result in made.items() if _is_share(result.headline)}


def _is_share(measure: Measure) -> bool:
    return measure.name == judge.SHARE and measure.value == measure.value


def _of_role(result: AttackResult, role: Role) -> list[Measure]:
    if role == "found":
        return [result.headline]
    shares = [m for m in result.measures if m.name == judge.SHARE and m.group and m.value == m.value]
    return [m for m in shares if (m.group or "").startswith(role)]


def _points(points: Sequence[tuple[str, Measure, str]], *, role: Role, name: str, symbol: str) -> go.Scatter:
    colour = COLOURS[role]
    return go.Scatter(
        x=[m.value for _, m, _ in points],
        y=[row for row, _, _ in points],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [_length(m.high - m.value) for _, m, _ in points],
            "arrayminus": [_length(m.value - m.low) for _, m, _ in points],
            "thickness": 1.5,
        },
        mode="markers",
        name=name,
        opacity=1 if role == "found" else 0.75,
        marker={"color": colour, "symbol": symbol, "size": 10, "line": {"width": 2, "color": colour}},
        customdata=[text for _, _, text in points],
        hovertemplate="%{y}: %{x:.2f}<br>%{customdata}<extra></extra>",
    )


def _hover(result: AttackResult, evaluation: Evaluation) -> str:
    return plain(SAID[outcome(result, evaluation)])


def _length(length: float) -> float:
    return max(length, 0.0) if length == length else 0.0


def caption(evaluation: Evaluation) -> str:
    """What the rows say, in words."""
    parts = [
        f"{rung.access}: {', '.join(f'{name_of(r)} {SAID[shown]}' for r, shown in rung.tried)}"
        for rung in ladder(evaluation)
        if rung.tried
    ]
    scale = "0 = like items never known, 1 = like the model before the edit; bars are 95 % intervals."
    if (asked := left(evaluation)) is not None:
        scale += f" Dashed: what is there when it is asked directly, {with_interval(asked)}."
    return f"{scale} {'; '.join(parts)}."


def ladder_table(evaluation: Evaluation) -> TableView:
    """Every attack by the access that it takes: how much it brings back, and what that says."""
    names = ("access", "attack", "share back", "what it says")
    return TableView(
        title="Attacks by access",
        columns=[Column(name=name, wide=name == names[-1]) for name in names],
        rows=[texts(*row) for row in rows(evaluation)],
        caption="Beside: looks that take more than an attacker has, such as the unedited weights.",
    )


def has_figure(evaluation: Evaluation | None) -> bool:
    """Whether there is more than one attack to draw."""
    return evaluation is not None and len(_rows(evaluation)) > 1

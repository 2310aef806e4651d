"""Curves as plotly lines: colour says the role; dashes are the retain set, or with several runs tell the runs apart."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from locedit.report.palette import COLOURS, NAMES, RUN_DASHES, RUN_SYMBOLS, SYMBOLS, UNDER_ATTACK, plain
from locedit.results import AttackResult, Curve, Role

FAINT: frozenset[Role] = frozenset({"random", "other"})
"roles drawn thin, because there are many of them"
RANKS: tuple[Role, ...] = ("found", "random", "complement", "everything", "unedited", "never knew", "shallow", "other")
"order in legends and sentences"

Run = tuple[int, str] | None
"number and name of the run where several share a figure"


def main_column(curve: Curve) -> str:
    """The column that says what is forgotten or brought back.

    "heldout" or "forget" where there is one, else the first that is not the retain set.
    """
    names = [name for name in curve.columns if not name.startswith("retain")] or list(curve.columns)
    wanted = [name for name in ("heldout", "held_out", "recovered", "forget") if name in names]
    return (wanted or names)[0]


def retain_column(curve: Curve) -> str | None:
    """The column of the retain set, None where there is none."""
    return next((name for name in curve.columns if name.startswith("retain")), None)


def along(result: AttackResult) -> bool:
    """Whether an attack has a course that can be followed, and not only something that it leaves out."""
    return any(not curve.x_name.endswith(" dropped") for curve in result.curves)


def with_retain(curves: Sequence[Curve]) -> list[go.Scatter]:
    """Every curve solid and its retain column dashed, faint roles first, one legend entry for each role.

    Several curves of one name (the splits of an attack) are drawn faint, and their mean in full.
    """
    shown: set[str] = set()
    traces: list[go.Scatter] = []
    for group in _by_name(curves):
        singles = group if len(group) > 1 and not _averageable(group) else [_mean(group)]
        if len(singles) < len(group):
            traces += [_ghost(curve) for curve in group]
        for curve in singles:
            name = label(curve, None)
            traces.append(solid(curve, run=None, first=name not in shown))
            shown.add(name)
            if retain := retain_column(curve):
                traces.append(_dashed(curve, retain))
    if any(retain_column(c) for c in curves):
        key = {"color": COLOURS["unedited"], "dash": "dash", "width": 1.5}
        traces.append(
            go.Scatter(x=[None], y=[None], mode="lines", line=key, name="dashed: retain set", legendrank=2000)
        )
    return traces


def means(curves: Sequence[Curve]) -> list[Curve]:
    """One curve for each name where the splits can be averaged, else all of them."""
    return [c for group in _by_name(curves) for c in ([_mean(group)] if _averageable(group) else group)]


def _by_name(curves: Sequence[Curve]) -> list[list[Curve]]:
    groups: dict[tuple[str, str], list[Curve]] = {}
    for number, curve in enumerate(sorted(curves, key=lambda c: c.role not in FAINT)):
        single = str(number) if curve.role in FAINT else ""
        groups.setdefault((curve.role, curve.name + single), []).append(curve)
    return list(groups.values())


def _averageable(group: Sequence[Curve]) -> bool:
    return all(c.x == group[0].x and c.columns.keys() == group[0].columns.keys() for c in group)


def _mean(group: Sequence[Curve]) -> Curve:
    """The mean of curves over the same x; one curve is itself."""
    if len(group) == 1:
        return group[0]
    columns = {
        name: tuple(map(fmean, zip(*(c.columns[name] for c in group), strict=True))) for name in group[0].columns
    }
    return replace(group[0], columns=columns, seed=None, matched=None, note=f"mean of {len(group)}")


def _ghost(curve: Curve) -> go.Scatter:
    column = main_column(curve)
    return go.Scatter(
        x=curve.x,
        y=curve.columns[column],
        legendgroup=label(curve, None),
        name=label(curve, None),
        showlegend=False,
        mode="lines",
        opacity=0.35,
        line={"color": COLOURS[curve.role], "width": 1},
        hovertemplate=hover(curve, f"{plain(curve.x_name)} %{{x}}: {plain(column)} %{{y:.3g}}"),
    )


def solid(curve: Curve, *, run: Run, first: bool) -> go.Scatter:
    """The main column of a curve against its x."""
    column = main_column(curve)
    body = f"{plain(curve.x_name)} %{{customdata}}: {plain(column)} %{{y:.3g}}"
    return go.Scatter(
        x=curve.x,
        y=curve.columns[column],
        customdata=curve.x,
        hovertemplate=hover(curve, body),
        **look(curve, run, first=first),
    )


def _dashed(curve: Curve, column: str) -> go.Scatter:
    faint = curve.role in FAINT
    return go.Scatter(
        x=curve.x,
        y=curve.columns[column],
        legendgroup=label(curve, None),
        name=label(curve, None),
        showlegend=False,
        mode="lines",
        opacity=0.3 if faint else 0.7,
        line={"color": COLOURS[curve.role], "dash": "dash", "width": 1 if faint else 1.5},
        hovertemplate=hover(curve, f"{plain(curve.x_name)} %{{x}}: {plain(column)} %{{y:.3g}}"),
    )


def matched(curve: Curve, *, x: float, y: float, run: Run) -> go.Scatter:
    """A large symbol at the first dose that reaches the level."""
    assert curve.matched is not None, "only a curve that reaches the level has a matched dose"
    mark = SYMBOLS[curve.role] if run is None else RUN_SYMBOLS[run[0] % len(RUN_SYMBOLS)]
    marker = {
        "symbol": mark,
        "size": 10 if curve.role in FAINT else 15,
        "color": COLOURS[curve.role],
        "line": {"width": 2, "color": COLOURS[curve.role]},
    }
    reached = curve.columns[main_column(curve)][curve.matched]
    at = f"matched at {plain(curve.x_name)} {curve.x[curve.matched]:g}: forget {reached:.3g}"
    return go.Scatter(
        x=[x],
        y=[y],
        legendgroup=label(curve, run),
        showlegend=False,
        mode="markers",
        marker=marker,
        hovertemplate=hover(curve, at),
    )


def look(curve: Curve, run: Run, *, first: bool) -> dict[str, Any]:
    """What every line of a curve has in common: name, legend entry, colour, dash and symbol."""
    faint = curve.role in FAINT
    dash = "solid" if run is None else RUN_DASHES[run[0] % len(RUN_DASHES)]
    mark = SYMBOLS[curve.role] if run is None else RUN_SYMBOLS[run[0] % len(RUN_SYMBOLS)]
    return {
        "name": label(curve, run),
        "legendgroup": label(curve, run),
        "legendrank": 1000 + RANKS.index(curve.role),
        "showlegend": first,
        "mode": "lines+markers",
        "opacity": 0.65 if faint else 1,
        "line": {"color": COLOURS[curve.role], "width": 1.2 if faint else 2.5, "dash": dash},
        "marker": {"symbol": mark, "size": 5 if faint else 7, "color": COLOURS[curve.role]},
    }


def label(curve: Curve, run: Run) -> str:
    """The role in words (for role "other" the curve's own name), behind the run's name where there are several runs."""
    names = NAMES if main_column(curve) == "forget" else UNDER_ATTACK
    role = plain(curve.name) if curve.role == "other" else names[curve.role]
    if curve.track and curve.role != "other":
        role += f" ({plain(curve.track)})"
    return role if run is None else f"{plain(run[1])}: {role}"


def hover(curve: Curve, body: str) -> str:
    """The curve's name and seed, the body, and the curve's note."""
    seed = "" if curve.seed is None else f", seed {curve.seed}"
    note = f"<br>{plain(curve.note)}" if curve.note else ""
    return f"{plain(curve.name)}{seed}<br>{body}{note}<extra></extra>"

"""Heat maps of scores: layer by neuron, layer by head, or one square for each matrix."""

import math
from dataclasses import dataclass, field
from itertools import accumulate

import plotly.graph_objects as go
import torch
from plotly.graph_objects import Figure
from torch import Tensor

from locedit.components import UNITS, ComponentSet, Unit
from locedit.report import modules
from locedit.report.modules import role
from locedit.report.numbers import count
from locedit.report.palette import INK, SCORE_SCALE, SIGNED_SCALE, figure, plain
from locedit.scores import Scores

MOST_RINGS = 300
"more chosen components than this are not ringed one by one"
WIDEST = 128
"more components than this in a row are shown in bins, each by its largest score"


MOST_TICKS = 40
"names under a map"
MOST_LINES = 24
"more lines than this (a matrix each, for rows, columns and weights) are one square each, by their largest score"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Scores laid out for one heat map."""

    rows: list[str]
    "layer numbers, or the names of sites outside the blocks"
    columns: list[str]
    values: list[list[float | None]]
    hover: list[list[str]]
    bins: dict[str, int]
    "site -> components in one column; 1 = each has its own"
    spacing: int
    "distance of two columns on the axis"
    x_name: str
    squares: dict[str, modules.Square] = field(default_factory=dict[str, modules.Square])
    "site -> its row and column, where each is one square"


def scores(result: Scores, *, unit: Unit | None = None, chosen: ComponentSet | None = None) -> Figure:
    """Layer by component; rows wider than 128 are binned by the score of largest size.

    Rows, columns and weights of more than 24 matrices become one square for each matrix, by its largest score. Rings
    mark the components of `chosen`, up to 300 of them. `unit` says which of several units to show; default is all of
    them side by side.
    """
    units: list[Unit] = [unit] if unit else present(result)
    grids = [layout(result, one) for one in units]
    grid = joined(grids, units)
    known = [value for row in grid.values for value in row if value is not None]
    peak = max((abs(value) for value in known), default=0.0) or 1.0
    signed = min(known, default=0.0) < -0.1 * peak
    heat = go.Heatmap(
        x=[(i + 0.5) * grid.spacing - 0.5 for i in range(len(grid.columns))],
        y=grid.rows,
        z=grid.values,
        text=grid.hover,
        hovertemplate="%{text}<extra></extra>",
        colorscale=SIGNED_SCALE if signed else SCORE_SCALE,
        zmin=-peak if signed else 0,
        zmax=peak,
        xgap=0 if len(grid.columns) > 40 else 1,
        ygap=1,
        colorbar={
            "title": {"text": "score", "side": "right"},
            "thickness": 10,
            "outlinewidth": 0,
            "len": 1,
            "nticks": 4,
        },
    )
    starts = accumulate((len(one.columns) for one in grids[:-1]), initial=0)
    points = [
        (start + (x if len(grids) == 1 else x // one.spacing), row, text)
        for one, shown, start in zip(grids, units, starts, strict=True)
        for x, row, text in ([] if chosen is None else _marks(one, result, chosen, shown))
    ]
    return figure(
        [heat, *_rings(points)],
        height=min((170 if grid.squares else 130) + 26 * len(grid.rows), 640),
        xaxis={"title": grid.x_name, "showgrid": False, **_ticks(grid)},
        yaxis={"title": "layer" if grid.squares or _all_layers(grid) else None, "type": "category", "showgrid": False},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )


def present(result: Scores) -> list[Unit]:
    """The units of the scores."""
    units = {result.sites[name].unit for name in result.values}
    return [unit for unit in UNITS if unit in units]


def joined(grids: list[Grid], units: list[Unit]) -> Grid:
    """Grids of several units side by side, so that one colour means one score; a row for each layer that any has."""
    if len(grids) == 1:
        return grids[0]
    rows = list(dict.fromkeys(row for grid in grids for row in grid.rows))
    rows.sort(key=lambda row: (not row.isdigit(), int(row) if row.isdigit() else 0))
    values: list[list[float | None]] = [[] for _ in rows]
    hover: list[list[str]] = [[] for _ in rows]
    for grid in grids:
        for r, row in enumerate(rows):
            at = grid.rows.index(row) if row in grid.rows else None
            values[r] += grid.values[at] if at is not None else [None] * len(grid.columns)
            hover[r] += grid.hover[at] if at is not None else [""] * len(grid.columns)
    named = [
        f"{unit} {column}" if column.isdigit() else column
        for grid, unit in zip(grids, units, strict=True)
        for column in grid.columns
    ]
    name = " and ".join(grid.x_name for grid in grids)
    return Grid(rows=rows, columns=named, values=values, hover=hover, bins={}, spacing=1, x_name=name)


def layout(result: Scores, unit: Unit) -> Grid:
    """The scores of one unit, a row for each layer: components along it, or modules where a site is one component.

    Rows of unequal length are each cut into as many bins as the widest, so that columns are parts of a row.
    """
    names = [name for name in result.values if result.sites[name].unit == unit]
    counts = [result.sites[name].count for name in names]
    if max(counts) == 1 or len(names) > MOST_LINES and unit in ("row", "column", "weight"):
        return _modules(result, names, unit)
    width = min(max(counts), WIDEST)
    bins = {name: math.ceil(count / width) for name, count in zip(names, counts, strict=True)}
    equal = len(set(counts)) == 1
    size = bins[names[0]] if equal else 1
    values: list[list[float | None]] = []
    hover: list[list[str]] = []
    rows = _row_names(result, names)
    for name, row in zip(names, rows, strict=True):
        best, where = binned(result.values[name], bins[name])
        pad = math.ceil(counts[0] / size) - len(best) if equal else width - len(best)
        values.append([*best, *[None] * pad])
        hover.append([_cell_text(row, unit, i, bins[name], best[i], where[i]) for i in range(len(best))] + [""] * pad)
    x_name = unit if size == 1 else f"{unit} (largest of each {size})"
    return Grid(
        rows=rows,
        columns=[str(i * size) for i in range(len(values[0]))],
        values=values,
        hover=hover,
        bins=bins,
        spacing=size,
        x_name=x_name if equal else f"{unit}, each line cut into at most {width} parts",
    )


def _row_names(result: Scores, names: list[str]) -> list[str]:
    with_role = len({role(name) for name in names}) > 1
    return [_row_name(result, name, with_role=with_role) for name in names]


def _modules(result: Scores, names: list[str], unit: Unit) -> Grid:
    """One square for each site."""
    places = modules.squares(result, names)
    rows, columns = modules.ordered(places)
    values: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    hover = [[""] * len(columns) for _ in rows]
    for name, (row, column) in places.items():
        r, c = rows.index(row), columns.index(column)
        values[r][c], hover[r][c] = modules.strongest(result, name)
    single = all(result.sites[name].count == 1 for name in names)
    return Grid(
        rows=rows,
        columns=columns,
        values=values,
        hover=hover,
        bins=dict.fromkeys(names, 1),
        spacing=1,
        x_name=unit if single else f"largest {unit} of each matrix",
        squares=places,
    )


def binned(values: Tensor, size: int) -> tuple[list[float], list[int]]:
    """For every `size` components the score of largest absolute value, with its sign, and the number of its component.

    >>> binned(torch.tensor([1.0, -3.0, 2.0, 0.5, 4.0]), 2)
    ([-3.0, 2.0, 4.0], [1, 2, 4])
    """
    flat = values.detach().float().reshape(-1)
    bins = math.ceil(len(flat) / size)
    padded = torch.cat([flat, flat.new_zeros(bins * size - len(flat))]).reshape(bins, size)
    inside = padded.abs().argmax(dim=1)
    where = inside + torch.arange(bins) * size
    return padded.gather(1, inside[:, None])[:, 0].tolist(), where.clamp(max=len(flat) - 1).tolist()


def _cell_text(row: str, unit: str, index: int, size: int, best: float, where: int) -> str:
    place = row if not row.isdigit() else f"layer {row}"
    if size == 1:
        return f"{place}, {unit} {index}: {best:.4g}"
    return f"{place}, {unit}s {index * size:,} to {index * size + size - 1:,}<br>largest {best:.4g} ({unit} {where:,})"


def _marks(grid: Grid, result: Scores, chosen: ComponentSet, unit: Unit) -> list[tuple[float, str, str]]:
    """(x, row, text) of the chosen components, or of the modules that have one."""
    if grid.squares:
        return modules.rings(result, grid.squares, grid.columns, chosen)
    points: list[tuple[float, str, str]] = []
    names = [name for name in result.values if result.sites[name].unit == unit]
    if sum(count(chosen, name) for name in names) > MOST_RINGS:
        return []
    for name, row in zip(names, _row_names(result, names), strict=True):
        for index in chosen.indices(name) if name in chosen.sites else ():
            value = float(result.values[name].reshape(-1)[index])
            points.append((_place(grid, name, index), row, f"{plain(name)} {index}: {value:.4g}, chosen"))
    return points


def _rings(points: list[tuple[float, str, str]]) -> list[go.Scatter]:
    if not points:
        return []
    ring = {"symbol": "circle-open", "size": 8, "color": INK, "line": {"width": 1.5}}
    return [
        go.Scatter(
            x=[p[0] for p in points],
            y=[p[1] for p in points],
            text=[p[2] for p in points],
            mode="markers",
            marker=ring,
            name=f"chosen ({len(points):,})",
            showlegend=True,
            hovertemplate="%{text}<extra></extra>",
        )
    ]


def _place(grid: Grid, name: str, index: int) -> float:
    """Where a component stands on the axis: at its number, or in its part of a line of another length."""
    return index if grid.spacing == grid.bins[name] else index // grid.bins[name]


def _ticks(grid: Grid) -> dict[str, object]:
    """Names of modules as they are; component numbers as plotly places them."""
    if all(column.isdigit() for column in grid.columns):
        spacing: dict[str, object] = {"dtick": 1} if len(grid.columns) <= 16 else {"nticks": 9}
        return {"tickformat": "d", "tickangle": 0, **spacing}
    places = range(0, len(grid.columns), math.ceil(len(grid.columns) / MOST_TICKS))
    return {"tickvals": list(places), "ticktext": [plain(grid.columns[at]) for at in places]}


def _all_layers(grid: Grid) -> bool:
    return all(row.isdigit() for row in grid.rows)


def _row_name(result: Scores, name: str, *, with_role: bool) -> str:
    layer = result.sites[name].layer
    if layer is None:
        return plain(role(name))
    return f"{layer} {role(name)}" if with_role else str(layer)

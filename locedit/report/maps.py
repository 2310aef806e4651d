"""Heat maps of scores: layer by neuron, layer by head, or one column for each matrix."""

import math
from dataclasses import dataclass

import plotly.graph_objects as go
import torch
from plotly.graph_objects import Figure
from torch import Tensor

from locedit.components import ComponentSet, Unit
from locedit.report.numbers import count
from locedit.report.palette import INK, SCORE_SCALE, SIGNED_SCALE, figure, plain
from locedit.scores import Scores

MOST_RINGS = 300
"more chosen components than this are not ringed one by one"
WIDEST = 128
"more components than this in a row are shown in bins, each by its largest score"


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


def scores(result: Scores, *, unit: Unit | None = None, chosen: ComponentSet | None = None) -> Figure:
    """Layer by component; rows wider than 128 are binned by the score of largest size.

    Rings mark the components of `chosen`, up to 300 of them. `unit` says which of several units to show; default
    is the one with most sites.
    """
    grid = layout(result, unit or most_sites(result))
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
    marks = [] if chosen is None else _marks(grid, result, chosen, unit or most_sites(result))
    return figure(
        [heat, *marks],
        height=min(130 + 26 * len(grid.rows), 640),
        xaxis={"title": grid.x_name, "showgrid": False, **_ticks(grid)},
        yaxis={"title": "layer" if _all_layers(grid) else None, "type": "category", "showgrid": False},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )


def most_sites(result: Scores) -> Unit:
    """The unit that has most sites in the scores."""
    units: list[Unit] = [result.sites[name].unit for name in result.values]
    return max(dict.fromkeys(units), key=units.count)


def layout(result: Scores, unit: Unit) -> Grid:
    """The scores of one unit, a row for each layer: components along it, or modules where a site is one component.

    Rows of unequal length are each cut into as many bins as the widest, so that columns are parts of a row.
    """
    names = [name for name in result.values if result.sites[name].unit == unit]
    counts = [result.sites[name].count for name in names]
    if max(counts) == 1:
        return _single(result, names, unit)
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
    with_role = len({_role(name) for name in names}) > 1
    return [_row_name(result, name, with_role=with_role) for name in names]


def _single(result: Scores, names: list[str], unit: Unit) -> Grid:
    columns = list(dict.fromkeys(_role(name) for name in names))
    rows = list(dict.fromkeys(_row_name(result, name, with_role=False) for name in names))
    values: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    hover = [[""] * len(columns) for _ in rows]
    for name in names:
        r, c = rows.index(_row_name(result, name, with_role=False)), columns.index(_role(name))
        score = float(result.values[name].reshape(-1)[0])
        values[r][c] = score
        hover[r][c] = f"{plain(name)}: {score:.4g}"
    return Grid(
        rows=rows, columns=columns, values=values, hover=hover, bins=dict.fromkeys(names, 1), spacing=1, x_name=unit
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


def _marks(grid: Grid, result: Scores, chosen: ComponentSet, unit: Unit) -> list[go.Scatter]:
    points: list[tuple[float, str, str]] = []
    names = [name for name in result.values if result.sites[name].unit == unit]
    if sum(count(chosen, name) for name in names) > MOST_RINGS:
        return []
    single = all(result.sites[name].count == 1 for name in names)
    rows = [_row_name(result, name, with_role=False) for name in names] if single else _row_names(result, names)
    for name, row in zip(names, rows, strict=True):
        for index in chosen.indices(name) if name in chosen.sites else ():
            x = grid.columns.index(_role(name)) if single else _place(grid, name, index)
            value = float(result.values[name].reshape(-1)[index])
            points.append((x, row, f"{plain(name)} {index}: {value:.4g}, chosen"))
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
    return {"tickvals": list(range(len(grid.columns))), "ticktext": [plain(name) for name in grid.columns]}


def _all_layers(grid: Grid) -> bool:
    return all(row.isdigit() for row in grid.rows)


def _role(name: str) -> str:
    """What a site's name says besides layer and unit: "mlp.out", "attn", "model.norm.weight"."""
    if name.startswith("blocks."):
        middle = name.split(".")[2:-1]
        return ".".join(middle) or name.split(".")[-1]
    return name.split(":")[0]


def _row_name(result: Scores, name: str, *, with_role: bool) -> str:
    layer = result.sites[name].layer
    if layer is None:
        return plain(_role(name))
    return f"{layer} {_role(name)}" if with_role else str(layer)

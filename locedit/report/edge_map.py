"""Heat map of edge scores: module that writes by module that reads."""

import plotly.graph_objects as go
import torch
from plotly.graph_objects import Figure
from torch import Tensor

from locedit.edges import EdgeScores, Node, name_of
from locedit.report.palette import SCORE_SCALE, SIGNED_SCALE, figure


def edge_map(result: EdgeScores) -> Figure:
    """Of each pair of modules the edge of largest size, with its sign and its name."""
    rows, row_of = _modules(result.sources)
    columns, column_of = _modules(result.destinations)
    cell = row_of[result.ends[:, 0]] * len(columns) + column_of[result.ends[:, 1]]
    order = torch.argsort(result.values.abs(), stable=True)
    largest = torch.full((len(rows) * len(columns),), -1, dtype=torch.long)
    for edge in order.tolist():  # the largest comes last and stays
        largest[cell[edge]] = edge
    values: list[list[float | None]] = []
    texts: list[list[str]] = []
    for row in largest.reshape(len(rows), len(columns)).tolist():
        values.append([None if edge < 0 else float(result.values[edge]) for edge in row])
        texts.append(["" if edge < 0 else _text(result, edge) for edge in row])
    peak = float(result.values.abs().max()) if len(result) else 1.0
    signed = bool((result.values < -0.1 * peak).any())
    heat = go.Heatmap(
        x=columns,
        y=rows,
        z=values,
        text=texts,
        hovertemplate="%{text}<extra></extra>",
        colorscale=SIGNED_SCALE if signed else SCORE_SCALE,
        zmin=-(peak or 1.0) if signed else 0,
        zmax=peak or 1.0,
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": "score", "side": "right"}, "thickness": 10, "outlinewidth": 0, "nticks": 4},
    )
    return figure(
        [heat],
        height=min(160 + 22 * len(rows), 760),
        xaxis={"title": "reads", "type": "category", "showgrid": False},
        yaxis={"title": "writes", "type": "category", "showgrid": False, "autorange": "reversed"},
    )


def _modules(nodes: tuple[Node, ...]) -> tuple[list[str], Tensor]:
    """Short names of the modules in order, and the module's number of every node."""
    short = [_short(place) for place, _ in nodes]
    names = list(dict.fromkeys(short))
    return names, torch.tensor([names.index(name) for name in short], dtype=torch.long)


def _short(place: str) -> str:
    """The layer number and the last word.

    >>> _short("blocks.3.attn.q"), _short("blocks.3.mlp"), _short("logits")
    ('3 q', '3 mlp', 'logits')
    """
    parts = place.split(".")
    return f"{parts[1]} {parts[-1]}" if parts[0] == "blocks" else place


def _text(result: EdgeScores, edge: int) -> str:
    source, destination = result.ends[edge].tolist()
    names = f"{name_of(result.sources[source])} → {name_of(result.destinations[destination])}"
    return f"{names}: {float(result.values[edge]):.4g}"

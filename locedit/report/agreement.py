"""Heat maps of how far localizers agree."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from locedit.agreement import Agreement, agreement
from locedit.components import ComponentSet
from locedit.matching import matched
from locedit.report.inputs import RunResults
from locedit.report.numbers import number
from locedit.report.palette import dress, figure, plain
from locedit.report.tables import Cell, Column, TableView, texts

CELL = 34
"height of a cell in pixels"
SHARED_SCALE = [[0.0, "rgba(4,112,251,0.03)"], [1.0, "rgba(4,112,251,0.55)"]]
RANK_SCALE = [[0.0, "rgba(166,94,14,0.55)"], [0.5, "rgba(128,128,128,0.04)"], [1.0, "rgba(4,112,251,0.55)"]]
"fainter than those of scores, because numbers stand on them"


def of_run(run: RunResults) -> Agreement | None:
    """How far the localizers of a run agree; None where there are fewer than two.

    As the run noted it, if it covers them all; else on sets with as many parameters as the chosen set.
    """
    named = run.named_scores
    if len(named) < 2 or len({scores.fingerprint for scores in named.values()}) > 1:
        return None
    if run.agreement is not None and set(run.agreement.methods) == set(named):
        return run.agreement
    if run.components is None or not len(run.components) or not _placed(run.components):
        return agreement(named)
    params = run.components.parameters()
    sets = matched(named, params=params, sign="absolute")
    return agreement(named, sets, rule=f"until the {params:,} parameters of the chosen set are reached")


def _placed(components: ComponentSet) -> bool:
    return all(components.sites[name].slices for name in components.chosen)


def both(result: Agreement) -> Figure:
    """Overlap above rank correlation."""
    titles = ("overlap of the sets", "rank correlation")
    height = 2 * _height(result) + 40
    made = make_subplots(rows=2, cols=1, vertical_spacing=150 / height, subplot_titles=titles)
    made.add_trace(_overlap(result), row=1, col=1)
    made.add_trace(_ranks(result), row=2, col=1)
    made.update_traces(showscale=False)
    made.update_yaxes(autorange="reversed", type="category", showgrid=False)
    made.update_xaxes(type="category", showgrid=False)
    return dress(made, height=height).update_layout(margin={"t": 36})


def overlap(result: Agreement) -> Figure:
    """Shared over joined, below it what chance gives."""
    return _matrix(_overlap(result), result)


def ranks(result: Agreement) -> Figure:
    """Spearman's rank correlation."""
    return _matrix(_ranks(result), result)


def _matrix(heat: go.Heatmap, result: Agreement) -> Figure:
    axis: dict[str, Any] = {"type": "category", "showgrid": False}
    return figure([heat], height=_height(result), xaxis=axis, yaxis=axis | {"autorange": "reversed"})


def _height(result: Agreement) -> int:
    return 130 + CELL * len(result.methods)


def _overlap(result: Agreement) -> go.Heatmap:
    text = _cells(result, lambda a, b: f"{result.overlap[a][b]:.2f} ({result.chance[a][b]:.2f})")
    hover = _cells(
        result,
        lambda a, b: (
            f"{_pair(result, a, b)}: {number(result.overlap[a][b])} of the {result.counted[a][b]} are shared, "
            f"by chance about {number(result.chance[a][b])}"
        ),
    )
    return _heat(result, result.overlap, text, hover, scale=SHARED_SCALE, low=0.0)


def _ranks(result: Agreement) -> go.Heatmap:
    text = _cells(result, lambda a, b: "-" if (r := result.rank[a][b]) is None else f"{r:.2f}")
    hover = _cells(
        result,
        lambda a, b: (
            f"{_pair(result, a, b)}: {'none' if result.rank[a][b] is None else number(result.rank[a][b])} "
            f"over {result.ranked[a][b]}"
        ),
    )
    return _heat(result, result.rank, text, hover, scale=RANK_SCALE, low=-1.0)


def _heat(result: Agreement, values: Any, text: Any, hover: Any, *, scale: Any, low: float) -> go.Heatmap:
    """The diagonal is left out: a localizer agrees with itself."""
    shown = [[None if a == b else value for b, value in enumerate(row)] for a, row in enumerate(values)]
    names = [plain(name) for name in result.methods]
    return go.Heatmap(
        x=names,
        y=names,
        z=shown,
        text=text,
        customdata=hover,
        texttemplate="%{text}",
        textfont={"size": 12},
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorscale=scale,
        zmin=low,
        zmax=1.0,
        xgap=1,
        ygap=1,
        colorbar={"thickness": 10, "outlinewidth": 0, "len": 1, "nticks": 5},
    )


def _cells(result: Agreement, said: Any) -> list[list[str]]:
    size = range(len(result.methods))
    return [["" if a == b else said(a, b) for b in size] for a in size]


def _pair(result: Agreement, a: int, b: int) -> str:
    return f"{plain(result.methods[a])} and {plain(result.methods[b])}"


# --- in words and as a table -----------------------------------------------------------------------------------------


def overlap_caption(result: Agreement) -> str:
    """What the numbers are, and how the sets were chosen."""
    mixed = any("parameters" in row for row in result.counted)
    units = " Sets of different units are compared parameter by parameter." if mixed else ""
    return (
        f"Shared components over joined ones (1 = the same set), in brackets what random sets of the same sizes share. "
        f"Each set holds its localizer's best components, {result.rule}.{units}"
    )


def rank_caption(result: Agreement) -> str:
    """Over what ranks are compared."""
    size = range(len(result.methods))
    kinds = dict.fromkeys(result.ranked[a][b] for a in size for b in size if a < b)
    coarse = any(kind.endswith(("modules", "layers")) for kind in kinds)
    how = (
        " Where no component is scored by both, MLPs, attentions and parameters outside the blocks (or layers) are "
        "ranked by the sums of their positive scores."
        if coarse
        else ""
    )
    return f"Spearman's rank correlation over {'; '.join(kinds)}.{how}"


def sizes(result: Agreement) -> TableView:
    """How many components and parameters each set holds, and how far it is from the budget."""
    rows = [
        [
            *texts(name, result.sets["unit"][i]),
            *(_count(result.sets[column][i]) for column in ("components", "of", "parameters")),
            _overshoot(result.sets["overshoot"][i], result.sets["budget"][i]),
        ]
        for i, name in enumerate(result.methods)
    ]
    columns = [Column(name="localizer"), Column(name="unit")]
    columns += [Column(name=name, numeric=True) for name in ("components", "of", "parameters", "beyond the budget")]
    return TableView(title="The sets that are compared", columns=columns, rows=rows)


def _count(value: int) -> Cell:
    return Cell(text=f"{value:,}", sort=value)


def _overshoot(over: int | None, budget: int | None) -> Cell:
    if over is None or not budget:
        return Cell(text="")
    return Cell(text=f"{over:+,} ({over / budget:+.1%})" if over else "0", sort=over)


def strongest(result: Agreement) -> Sequence[str]:
    """The two localizers whose sets overlap most beyond chance, in a sentence; nothing where none does."""
    size = range(len(result.methods))
    beyond = [(result.overlap[a][b] - result.chance[a][b], a, b) for a in size for b in size if a < b]
    most, a, b = max(beyond)
    if most <= 0:
        return ["No two localizers choose more of the same than random sets do."]
    shared, chance = number(result.overlap[a][b]), number(result.chance[a][b])
    return [f"{result.methods[a]} and {result.methods[b]} agree most: overlap {shared}, {chance} by chance."]

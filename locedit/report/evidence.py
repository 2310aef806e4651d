"""The evidence behind `fact_lookup` in one figure: probe curves, extraction heads, and the effects of the MLPs."""

from typing import Any

import plotly.graph_objects as go
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from locedit.report.palette import COLOURS, INK, SCORE_SCALE, SIGNED_SCALE, dress
from locedit.scores import Scores, Table

POSITIONS = {"subject": "last token of the subject", "name": "the subject alone", "last": "last token of the prompt"}
DASHES = {"subject": "solid", "name": "dash", "last": "dot"}
PANEL = 300
"pixels"


def has_figure(result: Scores) -> bool:
    """Whether the scores are of `fact_lookup`."""
    return "lookup" in result.evidence and bool(result.evidence.keys() & {"probe", "mlps"})


def figure(result: Scores) -> Figure:
    """One panel above the other: probes by layer, heads by layer, MLPs by layer; those that were run."""
    evidence = result.evidence
    panels = [name for name in ("probe", "heads", "mlps") if name in evidence]
    if "agreement" in evidence and "mlps" not in evidence:
        panels.append("agreement")
    height = PANEL * len(panels) + 60
    titles = [_title(name, evidence["lookup"]) for name in panels]
    made = make_subplots(rows=len(panels), cols=1, subplot_titles=titles, vertical_spacing=90 / height)
    for row, name in enumerate(panels, start=1):
        for trace in _TRACES[name](evidence):
            made.add_trace(trace, row=row, col=1)
        made.update_xaxes(
            title_text="head" if name == "heads" else "after layer" if name == "probe" else "layer", row=row
        )
        made.update_yaxes(title_text=_Y[name], row=row)
        if name == "heads":
            layout: Any = made.layout
            low, high = layout[_axis("yaxis", row)].domain
            made.data[-1].colorbar.update(y=(low + high) / 2, len=high - low)
            made.update_yaxes(dtick=1, showgrid=False, row=row)
            made.update_xaxes(dtick=1 if len(set(evidence["heads"]["head"])) <= 16 else None, showgrid=False, row=row)
        else:
            made.update_xaxes(dtick=1 if _layers(evidence[name]) <= 16 else None, row=row)
    made.update_annotations(x=0, xanchor="left", font={"size": 13, "color": INK})
    return _marked(dress(made, height=height), evidence, panels).update_layout(margin={"t": 28})


def caption(result: Scores) -> str:
    """What was found, in words and numbers."""
    table = result.evidence["lookup"]
    said = [(what, _value(table, what)) for what in ("lookup MLPs", "extraction heads", "reading layer", "probe range")]
    peak, range_ = _value(table, "peak"), _value(table, "probe range")
    parts = [f"{what}: {value}" for what, value in said if value is not None]
    if range_ == "none":
        parts.append(f"the probes do not find the answer there (chance-corrected peak {peak})")
    if (share := _value(table, "agreement")) is not None:
        parts.append(f"agreement of the two methods: {share}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _title(name: str, lookup: Table) -> str:
    if name != "probe":
        return _TITLES[name]
    found = _value(lookup, "probe range")
    outcome = "no range by the rule" if found == "none" else f"range by the rule (band): {found}"
    return f"Probes of the answer by layer (-1: the embedding); {outcome}"


def _axis(kind: str, row: int) -> str:
    return kind if row == 1 else f"{kind}{row}"


def _layers(table: Table) -> int:
    return len(set(table["layer"]))


def _value(table: Table, what: str) -> Any:
    return table["value"][table["what"].index(what)] if what in table["what"] else None


# --- probes ----------------------------------------------------------------------------------------------------------


def _probe(evidence: dict[str, Table]) -> list[Any]:
    """A curve for each position, thin ones with the attention of upper layers taken out, and the baseline."""
    table = evidence["probe"]
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    at = str(_value(evidence["lookup"], "probed at"))
    traces: list[Any] = []
    ablations = sorted({row["ablated_from"] for row in rows if row["ablated_from"] is not None})
    for first in ablations:
        here = [row for row in rows if row["ablated_from"] == first and row["position"] == at]
        before = [row for row in rows if row["ablated_from"] is None and row["position"] == at]
        start = [row for row in before if row["layer"] == first - 1]
        traces.append(_ablated(start + here, first, at, named=first == ablations[0]))
    for position, words in POSITIONS.items():
        here = [row for row in rows if row["ablated_from"] is None and row["position"] == position]
        traces.append(_curve(here, position, words))
    layers = sorted({row["layer"] for row in rows})
    line = {"color": COLOURS["unedited"], "dash": "longdash", "width": 1.2}
    flat = [rows[0]["baseline"]] * 2
    ends = [layers[0], layers[-1]]
    traces.append(go.Scatter(x=ends, y=flat, mode="lines", line=line, name="most frequent answer", hoverinfo="skip"))
    return traces


def _curve(rows: list[dict[str, Any]], position: str, words: str) -> go.Scatter:
    return go.Scatter(
        x=[row["layer"] for row in rows],
        y=[row["accuracy"] for row in rows],
        error_y={
            "array": [row["high"] - row["accuracy"] for row in rows],
            "arrayminus": [row["accuracy"] - row["low"] for row in rows],
            "thickness": 1,
            "width": 3,
        },
        mode="lines+markers",
        name=words,
        line={"color": COLOURS["found"], "dash": DASHES[position], "width": 2.2},
        marker={"symbol": {"subject": "circle", "name": "circle-open", "last": "diamond"}[position], "size": 7},
        hovertemplate=f"{words}<br>after layer %{{x}}: %{{y:.3f}}<extra></extra>",
    )


def _ablated(rows: list[dict[str, Any]], first: int, at: str, *, named: bool) -> go.Scatter:
    return go.Scatter(
        x=[row["layer"] for row in rows],
        y=[row["accuracy"] for row in rows],
        mode="lines",
        legendgroup="ablated",
        showlegend=named,
        name=f"{at}: attention at its mean from a layer on",
        line={"color": COLOURS["shallow"], "width": 1.3},
        hovertemplate=f"attention at its mean from layer {first} on<br>after layer %{{x}}: %{{y:.3f}}<extra></extra>",
    )


# --- paths -----------------------------------------------------------------------------------------------------------


def _heads(evidence: dict[str, Table]) -> list[Any]:
    """Rings around the extraction heads, and the heat map."""
    table = evidence["heads"]
    layers, heads = sorted(set(table["layer"])), sorted(set(table["head"]))
    values = dict(zip(zip(table["layer"], table["head"], strict=True), table["effect"], strict=True))
    peak = max((abs(value) for value in table["effect"]), default=0.0) or 1.0
    signed = min(table["effect"], default=0.0) < -0.1 * peak
    chosen = [i for i, yes in enumerate(table["chosen"]) if yes]
    rings = go.Scatter(
        x=[table["head"][i] for i in chosen],
        y=[table["layer"][i] for i in chosen],
        mode="markers",
        marker={"symbol": "circle-open", "size": 11, "color": INK, "line": {"width": 1.5}},
        name="extraction heads",
        hoverinfo="skip",
    )
    heat = go.Heatmap(
        x=heads,
        y=layers,
        z=[[values[layer, head] for head in heads] for layer in layers],
        colorscale=SIGNED_SCALE if signed else SCORE_SCALE,
        zmin=-peak if signed else 0,
        zmax=peak,
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": "effect", "side": "right"}, "thickness": 10, "outlinewidth": 0, "nticks": 4},
        hovertemplate="layer %{y}, head %{x}: %{z:.4f}<extra></extra>",
    )
    return [rings, heat]


def _mlps(evidence: dict[str, Table]) -> list[Any]:
    """A bar for each MLP, the lookup MLPs in full colour."""
    table = evidence["mlps"]
    known = all(low == low for low in table["low"])
    pairs = zip(table["low"], table["high"], table["effect"], strict=True)
    reach = [(high - value, value - low) for low, high, value in pairs] if known else []
    error = {"array": [up for up, _ in reach], "arrayminus": [down for _, down in reach], "thickness": 1, "width": 4}
    return _bars(table, "effect", "chosen", error=error if known else None)


def _gains(evidence: dict[str, Table]) -> list[Any]:
    return _bars(evidence["agreement"], "probe_gain", "by_probe", error=None)


def _bars(table: Table, value: str, chosen: str, *, error: dict[str, Any] | None) -> list[Any]:
    return [
        go.Bar(
            x=table["layer"],
            y=table[value],
            error_y=error,
            marker_color=[COLOURS["found"] if yes else COLOURS["random"] for yes in table[chosen]],
            customdata=["lookup MLP" if yes else "" for yes in table[chosen]],
            hovertemplate="MLP %{x}: %{y:.4f}<br>%{customdata}<extra></extra>",
            showlegend=False,
        )
    ]


def _marked(made: Figure, evidence: dict[str, Table], panels: list[str]) -> Figure:
    """The rules' outcome: the probes' range as a band, the threshold and the reading layer as lines."""
    table = evidence["lookup"]
    dotted = {"color": COLOURS["unedited"], "dash": "dot", "width": 1.2}
    if "probe" in panels and (ends := _value(table, "probe range")) not in (None, "none"):
        first, last = str(ends).split(" to ")
        band: dict[str, Any] = {"x0": int(first) - 0.5, "x1": int(last) + 0.5, "line_width": 0, "opacity": 0.12}
        made.add_vrect(fillcolor=COLOURS["found"], **band, **_at(1))
    if "mlps" in panels:
        place = _at(panels.index("mlps") + 1)
        made.add_hline(y=float(_value(table, "threshold")), line=dotted, **place)
        made.add_vline(x=int(_value(table, "reading layer")) - 0.5, line=dotted, **place)
    return made


def _at(row: int) -> dict[str, Any]:
    return {"row": row, "col": 1}


_TRACES = {"probe": _probe, "heads": _heads, "mlps": _mlps, "agreement": _gains}
_TITLES = {
    "heads": "Heads that carry the answer to the logits",
    "mlps": "MLPs on the skip path to the reading layer. Dotted: threshold; where the reading layer begins",
    "agreement": "What each MLP adds to the probe's accuracy",
}
_Y = {
    "probe": "accuracy on unseen subjects",
    "heads": "layer",
    "mlps": "normalised effect",
    "agreement": "gain, chance-corrected",
}

"""One look for every figure: the colour, symbol and dash of each role, for light and dark and colour-blind eyes."""

import html
from typing import Any

import plotly.graph_objects as go
from plotly.graph_objects import Figure

from locedit.results import Role, Stage

COLOURS: dict[Role, str] = {
    "found": "#0470fb",
    "random": "#878787",
    "everything": "#ea38bc",
    "complement": "#8a6d9e",
    "never knew": "#019d59",
    "shallow": "#a65e0e",
    "unedited": "#64748b",
    "other": "#64748b",
}
"""Contrast of at least 3 to white and to the page's dark ground. The five roles that share figures (found, random,
everything, never knew, shallow) stay at least 22 apart (CIELAB) in simulated protanopia, deuteranopia, tritanopia."""

SYMBOLS: dict[Role, str] = {
    "found": "circle",
    "random": "x-thin-open",
    "everything": "square",
    "complement": "triangle-up",
    "never knew": "diamond",
    "shallow": "triangle-down",
    "unedited": "circle-open",
    "other": "cross-thin-open",
}

NAMES: dict[Role, str] = {
    "found": "found components",
    "random": "random sets",
    "everything": "everything",
    "complement": "all but the found",
    "never knew": "never knew",
    "shallow": "shallow edit",
    "unedited": "unedited",
    "other": "other",
}

UNDER_ATTACK: dict[Role, str] = {**NAMES, "found": "this edit"}
"an edit is attacked whether or not it is inside a set"

STAGES: dict[Stage, tuple[str, str]] = {
    "before": (COLOURS["unedited"], "circle-open"),
    "after": (COLOURS["found"], "circle"),
    "attacked": (COLOURS["shallow"], "diamond"),
}
"colour and symbol of a measure before the edit, after it and after an attack"

RUN_SYMBOLS = ("circle", "square-open", "diamond", "triangle-up-open", "star", "hexagon-open")
RUN_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"runs on one page differ by symbol and dash; colour always says the role"

INK = "#737a83"
"text and axes outside the page, where neither scheme is known; the page's style sheet replaces it"
GRID = "rgba(128,134,142,0.28)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"

SCORE_SCALE = [[0.0, "rgba(4,112,251,0.04)"], [0.5, "rgba(4,112,251,0.5)"], [1.0, "rgba(4,112,251,1)"]]
SIGNED_SCALE = [[0.0, "rgba(166,94,14,1)"], [0.5, "rgba(128,128,128,0.05)"], [1.0, "rgba(4,112,251,1)"]]
"scores fade into the ground, so that one scale serves light and dark"


def figure(traces: list[Any], *, height: int = 380, **layout: Any) -> Figure:
    """A plotly figure in the common look."""
    return dress(Figure(data=traces), height=height).update_layout(**layout)


def dress(made: Figure, *, height: int) -> Figure:
    """Give a figure the common look: transparent, as wide as its place, legend below; no global template is touched."""
    axis = {
        "gridcolor": GRID,
        "linecolor": GRID,
        "zeroline": False,
        "automargin": True,
        "ticks": "outside",
        "tickcolor": GRID,
        "title": {"standoff": 8},
    }
    template = go.layout.Template(
        layout=go.Layout(
            paper_bgcolor="rgba(0,0,0,0)",
            modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#888888", "activecolor": "#4477aa"},
            plot_bgcolor="rgba(0,0,0,0)",
            font={"family": FONT, "size": 13, "color": INK},
            margin={"l": 8, "r": 12, "t": 12, "b": 8},
            xaxis=axis,
            yaxis=axis,
            legend={"orientation": "h", "x": 0, "y": -66 / height, "yanchor": "top", "font": {"size": 12}},
            hoverlabel={"font": {"family": FONT, "size": 12}},
        )
    )
    return made.update_layout(template=template, height=height, autosize=True)


def plain(text: object) -> str:
    """Text from data files for a plotly label, which reads a little HTML.

    >>> plain('<b>"Ann"</b>')
    '&lt;b&gt;"Ann"&lt;/b&gt;'
    """
    return html.escape(str(text), quote=False)

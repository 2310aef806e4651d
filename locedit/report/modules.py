"""Where a score stands when each module is one square: a row for each layer, a column for each role."""

import re

from locedit.components import ComponentSet
from locedit.report.numbers import count
from locedit.report.palette import plain
from locedit.scores import Scores

OUTSIDE = "outside"
"the row of what belongs to no layer"
Square = tuple[str, str]
"(row, column)"


def square(result: Scores, name: str) -> Square:
    """The row and column of a site.

    Parameters with a Hugging Face name stand in their layer too: norms, and what the architecture has besides.
    """
    layer = result.sites[name].layer
    if layer is not None:
        return str(layer), role(name)
    param = name.rsplit(":", 1)[0].removesuffix(".weight")
    found = re.search(r"\.(\d+)\.(.+)$", param)
    return (found[1], found[2]) if found else (OUTSIDE, param.rsplit(".", 1)[-1])


def role(name: str) -> str:
    """What a site's name says besides layer and unit: "mlp.out", "attn", "model.norm.weight"."""
    if name.startswith("blocks."):
        middle = name.split(".")[2:-1]
        return ".".join(middle) or name.split(".")[-1]
    return name.split(":")[0]


def squares(result: Scores, names: list[str]) -> dict[str, Square]:
    """The square of every site; a site that would fall on another's keeps its whole name."""
    found: dict[str, Square] = {}
    for name in names:
        place = square(result, name)
        found[name] = (place[0], role(name)) if place in found.values() else place
    return found


def ordered(places: dict[str, Square]) -> tuple[list[str], list[str]]:
    """Rows (layers ascending, then what is outside) and columns (as they come)."""
    rows = sorted(
        {row for row, _ in places.values()}, key=lambda row: (row == OUTSIDE, int(row) if row.isdigit() else 0)
    )
    return rows, list(dict.fromkeys(column for _, column in places.values()))


def strongest(result: Scores, name: str) -> tuple[float, str]:
    """The score of largest size in a module, and what to say of it."""
    flat = result.values[name].detach().float().reshape(-1)
    best = int(flat.abs().argmax())
    value = float(flat[best])
    if len(flat) == 1:
        return value, f"{plain(name)}: {value:.4g}"
    unit, sum_ = result.sites[name].unit, float(flat.double().sum())
    return value, f"{plain(name)}: largest {value:.4g} ({unit} {best:,} of {len(flat):,}), sum {sum_:.4g}"


def rings(
    result: Scores, places: dict[str, Square], columns: list[str], chosen: ComponentSet
) -> list[tuple[float, str, str]]:
    """(x, row, text) of every module with a chosen component."""
    points: list[tuple[float, str, str]] = []
    for name, (row, column) in places.items():
        if name in chosen.sites and (picked := count(chosen, name)):
            size = result.sites[name].count
            said = "chosen" if size == 1 else f"{picked:,} of {size:,} chosen"
            points.append((columns.index(column), row, f"{strongest(result, name)[1]}, {said}"))
    return points

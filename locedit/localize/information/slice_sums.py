"""From numbers of every weight to numbers of components: sums over the slices that training a component changes."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.components import Site, Slice
from locedit.localize.information.squares import Part, Squares


def parts_of(sites: Iterable[Site]) -> dict[str, frozenset[Part]]:
    """What has to be kept of each parameter to score the sites."""
    found: dict[str, set[Part]] = {}
    for site in sites:
        for piece in _trained(site):
            part: Part = "entries" if site.unit == "weight" else "all" if piece.axis is None else piece.axis
            found.setdefault(piece.param, set()).add(part)
    return {param: frozenset(parts) for param, parts in found.items()}


def component_sums(site: Site, squares: Callable[[str], Squares]) -> Float[Tensor, " count"]:
    """The sum over each component's weights, on the CPU; keys and values that heads share count in equal parts."""
    if site.unit == "weight":
        return squares(site.slices[0].param).entries.flatten().cpu()
    total = torch.zeros(site.count, dtype=torch.float64)
    for piece in _trained(site):
        found = squares(piece.param)
        if piece.axis is None:
            total += found.total().double().cpu()
        else:
            total += found.along(piece.axis).double().cpu()[_places(piece, site.count)].sum(1) / piece.group
    return total


def sizes_of(site: Site) -> Float[Tensor, " count"]:
    """How many weights each component has, counted like the sums."""
    size = 1.0 if site.unit == "weight" else sum(_size(piece) for piece in _trained(site))
    return torch.full((1,), size, dtype=torch.float64).expand(site.count)


def _trained(site: Site) -> list[Slice]:
    return [piece for piece in site.slices if piece.train]


def _size(piece: Slice) -> float:
    return piece.entry * (1 if piece.axis is None else piece.width) / piece.group


def _places(piece: Slice, count: int) -> Tensor:
    """The indices of each component along the slice's axis: `[count, width]`."""
    starts = piece.start + torch.arange(count) // piece.group * piece.stride
    return starts[:, None] + torch.arange(piece.width)

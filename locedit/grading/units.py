"""Scores of any unit, brought to one unit, so that localizers that score different things can be graded together."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from locedit.components import Site, Slice, Unit
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.scores import Scores

PARTS: dict[str, Unit] = {"mlp": "neuron", "attn": "head"}
"a whole module -> the unit of its parts"
STORED = ("row", "column", "matrix", "weight")
"units that are parts of stored parameters, not of the computation"


def at_unit(scores: Scores, unit: Unit, model: Model) -> dict[str, Tensor]:
    """Site of the unit -> score of each of its components.

    - Scores of that unit are taken as they are; those of other units beside them are left out.
    - A whole MLP (attention) has the sum of the positive scores of its neurons (heads): what would be selected in it.
    - Scores of rows, columns, matrices or weights are spread evenly over the entries of each, and a component has the
      sum over the entries that training it would touch.

    Raises LoceditError, in words that fit after "-", where the scores cannot say anything at that unit.
    """
    own = {name: values for name, values in scores.values.items() if scores.sites[name].unit == unit}
    if own:
        return {name: values.float() for name, values in own.items()}
    units = {scores.sites[name].unit for name in scores.values}
    if PARTS.get(unit) in units:
        return _sums(scores, unit, model)
    if stored := sorted(units.intersection(STORED)):
        return _from_entries(scores, stored, model.sites(unit))
    raise LoceditError(f"scores {' and '.join(f'{u}s' for u in sorted(units))}, which say nothing of single {unit}s")


def flat(values: Mapping[str, Tensor]) -> Tensor:
    """All scores in the order of the sites."""
    return torch.cat([tensor.reshape(-1) for tensor in values.values()])


def _sums(scores: Scores, unit: Unit, model: Model) -> dict[str, Tensor]:
    by_layer = {scores.sites[name].layer: values for name, values in scores.values.items()}
    return {
        name: by_layer[site.layer].clamp(min=0).sum().float().reshape(1)
        for name, site in model.sites(unit).items()
        if site.layer in by_layer
    }


def _from_entries(scores: Scores, units: Sequence[str], sites: Mapping[str, Site]) -> dict[str, Tensor]:
    density = _density(scores, units)
    if not any(piece.param in density for site in sites.values() for piece in site.slices):
        raise LoceditError(f"scores {' and '.join(f'{u}s' for u in units)} of other parameters only")
    return {name: _collected(site, density) for name, site in sites.items()}


def _density(scores: Scores, units: Sequence[str]) -> dict[str, Tensor]:
    """Parameter -> the score that falls on each of its entries, in the parameter's shape."""
    density: dict[str, Tensor] = {}
    for name, values in scores.values.items():
        site = scores.sites[name]
        if site.unit not in units:
            continue
        whole = sum(piece.entry * (1 if piece.axis is None else piece.width) for piece in site.slices)
        share = values.double()
        for piece in site.slices:
            total = density.setdefault(piece.param, torch.zeros(piece.shape, dtype=torch.float64))
            _spread(total, piece, share, entries=whole, weights=site.unit == "weight")
    return density


def _spread(total: Tensor, piece: Slice, values: Tensor, *, entries: int, weights: bool) -> None:
    """Add the scores to the entries of one parameter."""
    if weights:
        total += values.reshape(piece.shape)
    elif piece.axis is None:
        total += values.sum() / entries
    else:
        shape = [1] * len(piece.shape)
        shape[piece.axis] = -1
        index = piece.index(range(len(values)))
        part = (values / entries).repeat_interleave(piece.width).reshape(shape)
        size = list(piece.shape)
        size[piece.axis] = len(index)
        total.index_add_(piece.axis, index, part.expand(size))


def _collected(site: Site, density: Mapping[str, Tensor]) -> Tensor:
    """Sum over the train slices of every component; a shared entry (grouped keys) is divided among its components."""
    total = torch.zeros(site.count, dtype=torch.float64)
    for piece in site.slices:
        if piece.param not in density or not piece.train:
            continue
        mass = density[piece.param]
        if piece.axis is None:
            total += mass.sum()
            continue
        count = site.count // piece.group
        lines = mass.movedim(piece.axis, 0).reshape(mass.shape[piece.axis], -1).sum(1)
        starts = torch.arange(count) * piece.stride + piece.start
        index = starts[:, None] + torch.arange(piece.width)
        total += lines[index].sum(1).repeat_interleave(piece.group) / piece.group
    return total.float()

"""Zero, mean and scale: edits without training.

In weights they act on the write slices of the components (a neuron's column of the output projection, a head's columns
of o, the output bias too for a whole mlp, attention or matrix); as hooks on the values themselves.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from locedit import tracing
from locedit.components import ComponentSet, Unit
from locedit.data.encode import Example, batches, encode
from locedit.data.items import Dataset
from locedit.edit.edit import Edit, HookAction, weights_edit
from locedit.edit.regions import Region, regions, require_same_model
from locedit.errors import LoceditError, nearest
from locedit.models import Model
from locedit.provenance import measure

log = logging.getLogger(__name__)

HOLDS = ("weights", "hooks")
POINTS: dict[Unit, tuple[str, ...]] = {
    "neuron": ("mlp.hook_post",),
    "head": ("attn.hook_z",),
    "mlp": ("hook_mlp_out",),
    "attn": ("hook_attn_out",),
    "layer": ("hook_attn_out", "hook_mlp_out"),
}
"""Unit -> hook points of its block at which a hook edit acts."""
OUTPUTS: dict[Unit, str] = {"neuron": "mlp.out", "head": "attn.o"}
"""Unit -> the matrix that its components enter."""


def zero(model: Model, within: ComponentSet, *, hold: str = "weights") -> Edit:
    """The components contribute nothing."""
    return _scaled(model, within, 0.0, hold=hold, name="zero")


def scale(model: Model, within: ComponentSet, factor: float, *, hold: str = "weights") -> Edit:
    """The components contribute `factor` times what they did; 0 zeroes, 1 changes nothing, -1 turns the sign."""
    if not math.isfinite(factor):
        raise LoceditError(f"factor={factor!r} is not a finite number")
    return _scaled(model, within, float(factor), hold=hold, name="scale")


def mean(
    model: Model,
    within: ComponentSet,
    data: Dataset | Sequence[Example],
    *,
    hold: str | None = None,
    positions: str = "all",
    batch_size: int = 16,
) -> Edit:
    """Neurons and heads contribute their mean over the data, whatever the input.

    The mean is over all tokens of the data, or over the positions that predict a scored token. In weights it moves into
    the bias of the output projection; a model without such a bias gets a hook edit instead, unless hold is "weights".
    """
    _check(model, within, hold or "weights")
    _require_units(within, tuple(OUTPUTS), by="mean", instead="zero or scale")
    examples = encode(model, data) if isinstance(data, Dataset) else list(data)
    settings = {"positions": positions, "data": len(examples)}
    with measure("mean", model=model, data=data, settings=settings) as measured:
        means = _means(model, within, examples, positions=positions, batch_size=batch_size)
        without = _without_bias(model, within)
        if without and hold == "weights":
            raise LoceditError(f"mean in weights needs an output bias, which {without} does not have; use hold='hooks'")
        if without and hold is None:
            log.info("mean: %s has no bias that could take up the mean; the edit is a hook", without)
        if without or hold == "hooks":
            edit = _hook_edit(model, within, HookAction(means=means))
        else:
            edit = _mean_in_weights(model, within, means)
    return dataclasses.replace(edit, provenance=measured.provenance)


# --- weights ---------------------------------------------------------------------------------------------------------


def _scaled(model: Model, within: ComponentSet, factor: float, *, hold: str, name: str) -> Edit:
    _check(model, within, hold)
    with measure(name, model=model, settings={"factor": factor, "hold": hold}) as measured:
        if hold == "hooks":
            edit = _hook_edit(model, within, HookAction(factor=factor))
        else:
            places = regions(within, role="write")
            new = [(place, _times(place.read(model.parameter(place.param)), factor)) for place in places]
            edit = weights_edit(model, new, within=within, role="write")
    return dataclasses.replace(edit, provenance=measured.provenance)


def _times(values: Tensor, factor: float) -> Tensor:
    return torch.zeros_like(values) if factor == 0 else values * factor


def _mean_in_weights(model: Model, within: ComponentSet, means: Mapping[str, Tensor]) -> Edit:
    """Zero the outgoing weights and add (mean times those weights) to the output bias."""
    shifts: dict[str, Tensor] = {}
    for site, chosen in within.chosen.items():
        matrix = model.anatomy.matrix(*_output_of(within, site))
        assert matrix.bias is not None, "checked by the caller"
        weight = model.parameter(matrix.weight).detach()
        out_by_in = (weight if matrix.out_axis == 0 else weight.T).float()
        kept = torch.zeros_like(means[site])
        kept[list(chosen)] = means[site][list(chosen)]
        shifts[matrix.bias] = (
            shifts.get(matrix.bias, torch.zeros(())) + (out_by_in @ kept.to(weight.device).flatten()).cpu()
        )
    places = regions(within, role="write")
    new = [(place, torch.zeros_like(place.read(model.parameter(place.param)))) for place in places]
    new += [
        (Region(param=name), model.parameter(name).detach().float().cpu() + shift) for name, shift in shifts.items()
    ]
    return weights_edit(model, new, within=within, role="write", also=tuple(shifts))


def _without_bias(model: Model, within: ComponentSet) -> str | None:
    """Name of an output projection of the set that has no bias."""
    for site in within.chosen:
        matrix = model.anatomy.matrix(*_output_of(within, site))
        if matrix.bias is None:
            return matrix.weight
    return None


def _output_of(within: ComponentSet, site: str) -> tuple[int, str]:
    """(layer, role) of the matrix that a neuron or head enters."""
    place = within.sites[site]
    assert place.layer is not None, "neurons and heads are in blocks"
    return place.layer, OUTPUTS[place.unit]


def _means(
    model: Model, within: ComponentSet, examples: Sequence[Example], *, positions: str, batch_size: int
) -> dict[str, Tensor]:
    """Site -> mean value of all its components: `[neuron]` or `[head, d_head]`, float32 on the CPU."""
    if positions not in ("all", "predicting"):
        raise LoceditError(f"positions={positions!r}; {nearest(str(positions), ('all', 'predicting'))}")
    names = {site: _points(within, site)[0] for site in within.chosen}
    totals: dict[str, Tensor] = {}
    count = 0
    for batch in batches(examples, model, batch_size):
        used = batch.predicting(model.causal) if positions == "predicting" else batch.attention_mask.bool()
        with torch.no_grad(), tracing.record(model, names.values()) as seen:
            model.logits(batch, at=used)
        count += int(used.sum())
        for site, name in names.items():
            values = seen[name][used.to(seen[name].device)].float().sum(0).cpu()
            totals[site] = totals.get(site, torch.zeros(())) + values
    if not count:
        raise LoceditError("mean: the data has no position to average over")
    return {site: total / count for site, total in totals.items()}


# --- hooks -----------------------------------------------------------------------------------------------------------


def hooked(model: Model, within: ComponentSet, action: HookAction) -> AbstractContextManager[Any]:
    """The action on the chosen components in every forward inside the block; a block without a forward is fine."""
    if action.means or action.factor == 0:
        return tracing.ablate(model, within, action.means or None, strict=False)
    changes: dict[str, tracing.Change] = {}
    for site, chosen in within.chosen.items():
        for point in _points(within, site):
            before = changes.get(point, _same)
            changes[point] = _scaling(within.sites[site].unit, chosen, action.factor, before=before)
    return tracing.hooked(model, changes, strict=False)


def _same(value: Tensor) -> Tensor:
    return value


def _scaling(unit: Unit, chosen: Iterable[int], factor: float, *, before: tracing.Change) -> tracing.Change:
    """Scale neurons `[.., neuron]`, heads `[.., head, d_head]`, else all of the value, after what came `before`."""
    index = torch.tensor(list(chosen))

    def change(value: Tensor) -> Tensor:
        value = before(value)
        if unit not in ("neuron", "head"):
            return value * factor
        axis = -1 if unit == "neuron" else -2
        here = index.to(value.device)
        return value.index_copy(axis, here, value.index_select(axis, here) * factor)

    return change


def _points(within: ComponentSet, site: str) -> list[str]:
    place = within.sites[site]
    return [f"blocks.{place.layer}.{point}" for point in POINTS[place.unit]]


def _hook_edit(model: Model, within: ComponentSet, action: HookAction) -> Edit:
    if action.factor != 0 and not action.means:
        _require_units(within, tuple(POINTS), by="scale by hook", instead="hold='weights'")
    return Edit(kind="hooks", fingerprint=model.fingerprint, within=within, role="write", hook=action)


def _require_units(within: ComponentSet, units: Sequence[Unit], *, by: str, instead: str) -> None:
    present = {within.sites[site].unit for site in (*within.chosen, *within.masks)}
    if wrong := sorted(present - set(units)):
        raise LoceditError(f"{by} works on components of unit {', '.join(units)}, not on {wrong[0]!r}; use {instead}")


def _check(model: Model, within: ComponentSet, hold: str) -> None:
    if hold not in HOLDS:
        raise LoceditError(f"hold={hold!r}; {nearest(str(hold), HOLDS)}")
    if not len(within):
        raise LoceditError("the component set is empty: there is nothing to change")
    require_same_model(model, within)

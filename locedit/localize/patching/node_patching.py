"""Runs with components replaced: many patches of many items in one forward pass.

The *base* run is what is patched, the *source* run is where the values come from. A pass has one row for every item and
patch, and one row an item with no patch, so that effects are differences within one pass. The row of a patch begins at
the first block that the patch changes, as a copy of the row with no patch, with which it is the same below.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locedit import tracing
from locedit.localize.patching.nodes import Patch, points_of
from locedit.localize.patching.noise import corrupted
from locedit.localize.patching.pairs import Metric, PairBatch, measured
from locedit.models import Model

Side = Literal["clean", "corrupt"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One side of a batch, run as it is."""

    metric: Float[Tensor, " batch"]
    "on the CPU"
    values: dict[str, Tensor]
    "point -> value `[batch, pos, ...]`, where the model is"


def run(model: Model, batch: PairBatch, side: Side, points: Sequence[str], *, kind: Metric) -> Run:
    """Run one side and keep the values at some points."""
    with torch.no_grad(), _side(model, batch, side), tracing.record(model, points) as values:
        logits = model.logits(getattr(batch, side), at=batch.at)
    return Run(metric=measured(logits, batch.answer, batch.wrong, kind=kind).cpu(), values=values)


def _side(model: Model, batch: PairBatch, side: Side) -> Any:
    return corrupted(model, batch) if side == "corrupt" else nullcontext()


def effects(
    model: Model,
    batch: PairBatch,
    base: Side,
    patches: Sequence[Patch],
    values: Mapping[str, Tensor],
    where: Bool[Tensor, "batch patch pos"],
    *,
    kind: Metric,
    rows: int,
) -> Float[Tensor, "batch patch"]:
    """Metric of the base run with each patch alone, minus that of the base run; on the CPU.

    Patches of neighbouring layers go into one pass of about `rows` rows; in any order.
    """
    order = sorted(range(len(patches)), key=lambda number: patches[number].layer)
    found = torch.zeros(len(batch), len(patches), dtype=torch.float64)
    for chunk in _chunks(order, max(1, rows // len(batch) - 1)):
        part = _pass(model, batch, base, [patches[i] for i in chunk], values, where[:, chunk], kind=kind)
        found[:, chunk] = part
    return found


def _chunks(order: Sequence[int], size: int) -> Iterator[list[int]]:
    """Pieces of at most that size, of about equal length."""
    count = -(-len(order) // size)
    for number in range(count):
        yield list(order[number * len(order) // count : (number + 1) * len(order) // count])


def _pass(
    model: Model,
    batch: PairBatch,
    base: Side,
    patches: Sequence[Patch],
    values: Mapping[str, Tensor],
    where: Bool[Tensor, "batch patch pos"],
    *,
    kind: Metric,
) -> Float[Tensor, "batch patch"]:
    """One forward pass of patches in the order of their layers; rows are copies of the batch, the first not patched."""
    copies = [1 + sum(patch.layer <= layer for patch in patches) for layer in range(model.n_layers)]
    changes = {
        point: partial(_patched, values[point], _mask(patches, where, point, values[point], copies))
        for point in points_of(patches)
    }
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_side(model, batch, base))
        stack.enter_context(tracing.rewrite_blocks(model, partial(_more_rows, len(batch), copies)))
        stack.enter_context(tracing.hooked(model, changes))
        logits = model.logits(getattr(batch, base), at=batch.at.repeat(copies[-1], 1))
    answer, wrong = (ids.repeat(copies[-1]) for ids in (batch.answer, batch.wrong))
    found = measured(logits, answer, wrong, kind=kind).unflatten(0, (copies[-1], len(batch)))
    return (found[1:] - found[:1]).T.cpu().double()


def _more_rows(rows: int, copies: Sequence[int], layer: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a block is called with: new copies of the first rows, which are not patched, for the patches that begin."""
    stream = "hidden_states" if "hidden_states" in arguments else next(iter(arguments))
    hidden = arguments[stream]
    begin = copies[layer] - hidden.shape[0] // rows
    changed = {name: _repeated(value, rows, copies[layer]) for name, value in arguments.items() if name != stream}
    return {stream: torch.cat([hidden, hidden[:rows].repeat(begin, 1, 1)]), **changed}


def _repeated(value: Any, rows: int, copies: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_repeated(one, rows, copies) for one in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == rows:
        return value.repeat(copies, *[1] * (value.ndim - 1))
    return value


def _mask(
    patches: Sequence[Patch],
    where: Bool[Tensor, "batch patch pos"],
    point: str,
    like: Tensor,
    copies: Sequence[int],
) -> Bool[Tensor, "copy batch pos *rest"]:
    """Which entries of the value at a point are replaced in the copies that there are; none in the first."""
    parts = {"hook_z": (like.shape[2], 1), "hook_post": like.shape[2:]}.get(point.split(".")[-1], (1,))
    batch, _, length = where.shape
    mask = torch.zeros(copies[int(point.split(".")[1])], batch, length, *parts, dtype=torch.bool)
    for number, patch in enumerate(patches):
        for place in patch.places:
            if place.point == point:
                one = mask[number + 1, :, :, place.component or 0]
                one |= where[:, number].reshape(one.shape)
    return mask.to(like.device)


def _patched(values: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """Put the source's values in the place of the masked ones, in every copy of the batch."""
    apart = value.unflatten(0, mask.shape[:2])
    return torch.where(mask, values.to(value), apart).flatten(0, 1)

"""Edits as task vectors: scaled, negated, added (Ilharco et al. 2023, arXiv:2212.04089).

A task vector is the change that an edit makes to the weights. Edits of kind `weights` and of kind `adapter` have one:
the float32 delta that training arrived at, else values minus base; of an adapter B A. Sums are over the union of the
edits' regions. A tied parameter has one storage and so moves once; buffers do not move. Every function takes the
unedited model, from whose weights the new values are worked out.

The sum of two adapters is one with both pairs of factors side by side, [B1 B2] [A1; A2] = B1 A1 + B2 A2, whose rank is
the sum of theirs. To add A to A and B to B, as the "linear" combination of PEFT does, gives another change: it has the
cross terms B1 A2 and B2 A1.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from locedit.components import ComponentSet
from locedit.edit.adapter import LowRank, Piece, linear_pieces
from locedit.edit.edit import Edit, Patch
from locedit.edit.regions import Region, regions, require_editable, unite
from locedit.edit.restrict import holders, out_axis, train_dtype
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.provenance import Measurement, measure

Change = tuple[Region, Tensor]
"""A region of a parameter, and what is added to it: float64, on the CPU."""
KINDS = ("weights", "adapter")


def scaled(model: Model, edit: Edit, factor: float) -> Edit:
    """base + factor * change: 0 changes nothing, 1 is the edit, -1 goes as far the other way."""
    return combined(model, [edit], [factor])


def negated(model: Model, edit: Edit) -> Edit:
    """base - change."""
    return combined(model, [edit], [-1.0])


def added(model: Model, *edits: Edit) -> Edit:
    """base + the sum of the changes, all made from the same base."""
    return combined(model, edits, [1.0] * len(edits))


def combined(model: Model, edits: Sequence[Edit], weights: Sequence[float]) -> Edit:
    """base + the weighted sum of the changes, as one edit of their kind.

    It may change what any of them may: `within` is the union of their sets. Raises LoceditError for edits of different
    kinds, for another model, and for hooks and chains, which hold no change of the weights (see `merged`).
    """
    _check(model, edits, weights)
    settings = {"weights": list(weights), "edits": [edit.digest for edit in edits]}
    with measure("combined", model=model, settings=settings) as measured:
        if edits[0].kind == "adapter":
            held: dict[str, Any] = {"adapters": _side_by_side(edits, weights)}
        elif list(weights) == [1.0]:  # its own values, which base + (values - base) may miss by a rounding
            held = {"patches": edits[0].patches}
        else:
            names = dict.fromkeys(patch.region.param for edit in edits for patch in edit.patches)
            held = {"patches": tuple(p for name in names for p in _patches(model, _terms(model, edits, weights, name)))}
    return _made(model, edits[0].kind, edits, measured, **held)


def restricted(model: Model, edit: Edit, within: ComponentSet) -> Edit:
    """The set's part of an edit: the same change of every entry that may be trained in the set, none elsewhere.

    Of an adapter, rows of B or columns of A. Raises LoceditError when nothing of the edit lies inside the set.
    """
    _check(model, [edit], [1.0])
    with measure("restricted", model=model, settings={"edit": edit.digest}) as measured:
        if edit.kind == "adapter":
            held: dict[str, Any] = {"adapters": _pieces_inside(model, edit.adapters, within)}
        else:
            allowed = {region.param: region for region in regions(within, role="train")}
            found = [change for change in changes(model, edit) if change[0].param in allowed]
            inside = [_inside(model, change, allowed[change[0].param]) for change in found]
            held = {"patches": _patches(model, [change for change in inside if change[1].numel()])}
    if not any(held.values()):
        raise LoceditError("the edit changes nothing inside the component set")
    return _made(model, edit.kind, [dataclasses.replace(edit, within=within, role="train", also=())], measured, **held)


def merged(model: Model, edit: Edit) -> Edit:
    """An adapter, or a chain of edits held as weights and adapters, as one edit of kind weights.

    The values are those that the parts leave one after the other, each rounded to the model's dtype.
    """
    parts = edit.parts or (edit,)
    if strange := [part.kind for part in parts if part.kind not in KINDS]:
        raise LoceditError(f"an edit of kind {strange[0]!r} is no change of the weights and cannot be merged into them")
    edit.check(model)
    terms: list[Change] = []
    with measure("merged", model=model, settings={"edit": edit.digest}) as measured, ExitStack() as stack:
        for part in parts:
            part.check(model, base=edit.fingerprint)
            own = list(changes(model, part))
            terms += own
            patches = part.patches if part.kind == "weights" else _patches(model, own)
            dataclasses.replace(part, kind="weights", patches=patches, adapters=()).enter(stack, model)
        sums = [(r, total, r.read(model.parameter(r.param)).cpu()) for r, total in _sums(model, terms)]
    made = tuple(
        Patch(region=region, values=values, delta=total.to(train_dtype(values))) for region, total, values in sums
    )
    sets = [None if part.within is None else model.bind(part.within) for part in parts]
    bound = [dataclasses.replace(part, within=within) for part, within in zip(parts, sets, strict=True)]
    return _made(model, "weights", bound, measured, patches=made)


def changes(model: Model, edit: Edit) -> Iterator[Change]:
    """What an edit of kind weights or adapter adds to the weights; a parameter may come more than once."""
    for patch in edit.patches:
        yield patch.region, _change_of(model, patch)
    for adapter in edit.adapters:
        yield _product(model, adapter)


def lost_to_rounding(model: Model, edit: Edit) -> float:
    """Share of the entries with a change whose value in the model's dtype is the same as before; 0 for an adapter."""
    changed = lost = 0
    for patch in edit.patches:
        base = patch.region.read(model.parameter(patch.region.param)).cpu()
        moved = (patch.values != base) if patch.delta is None else (patch.delta != 0)
        changed += int(moved.sum())
        lost += int((moved & (patch.values == base)).sum())
    return lost / changed if changed else 0.0


# --- checks and results -----------------------------------------------------------------------------------------------


def _check(model: Model, edits: Sequence[Edit], weights: Sequence[float]) -> None:
    if not edits or len(edits) != len(weights):
        raise LoceditError(f"{len(edits)} edits and {len(weights)} weights; give one weight for each of some edits")
    if strange := [weight for weight in weights if not math.isfinite(weight)]:
        raise LoceditError(f"weight {strange[0]!r} of an edit is not a finite number")
    for edit in edits:
        if edit.kind not in KINDS:
            advice = "; merge it first" if {part.kind for part in edit.parts} & set(KINDS) else ""
            raise LoceditError(f"an edit of kind {edit.kind!r} has no task vector; {' and '.join(KINDS)} have{advice}")
        if edit.kind != edits[0].kind:
            raise LoceditError(f"edits of kind {edits[0].kind!r} and {edit.kind!r} cannot be added; merge the adapter")
        edit.check(model)


def _made(model: Model, kind: str, edits: Sequence[Edit], measured: Measurement, **held: Any) -> Edit:
    """An edit that may change what any of the edits may."""
    if roles := {edit.role for edit in edits} - {edits[0].role}:
        raise LoceditError(f"edits of {edits[0].role!r} and of {min(roles)!r} slices cannot be one edit")
    sets = [edit.within for edit in edits]
    within = sets[0]
    for other in sets[1:]:
        within = None if within is None or other is None else within | other
    return Edit(
        kind=kind,
        fingerprint=model.fingerprint,
        within=within,
        role=edits[0].role,
        also=tuple(dict.fromkeys(name for edit in edits for name in edit.also)),
        provenance=measured.provenance,
        **held,
    )


# --- weights ----------------------------------------------------------------------------------------------------------


def _patches(model: Model, terms: Iterable[Change]) -> tuple[Patch, ...]:
    """base + the sum of the changes, one patch for each parameter; where nothing is added the base keeps its bits."""
    found: list[Patch] = []
    for region, total in _sums(model, terms):
        parameter = model.parameter(region.param)
        require_editable(region.param, parameter)
        base = region.read(parameter).cpu()
        delta = total.to(train_dtype(parameter))
        values = torch.where(delta == 0, base, (base.to(delta.dtype) + delta).to(base.dtype))
        found.append(Patch(region=region, values=values, delta=delta))
    return tuple(found)


def _terms(model: Model, edits: Sequence[Edit], weights: Sequence[float], name: str) -> list[Change]:
    """The weighted changes of one parameter: those of all at once would be several times the model."""
    return [
        (patch.region, weight * _change_of(model, patch))
        for edit, weight in zip(edits, weights, strict=True)
        for patch in edit.patches
        if patch.region.param == name
    ]


def _change_of(model: Model, patch: Patch) -> Tensor:
    if patch.delta is not None:
        return patch.delta.double()
    return patch.values.double() - patch.region.read(model.parameter(patch.region.param)).cpu().double()


def _sums(model: Model, terms: Iterable[Change]) -> list[Change]:
    """The sum of the changes of each parameter, on the union of their regions."""
    grouped: dict[str, list[Change]] = {}
    for region, change in terms:
        grouped.setdefault(region.param, []).append((region, change))
    found: list[Change] = []
    for name, own in grouped.items():
        shape = model.parameter(name).shape
        region = unite([part for part, _ in own], shape)
        found.append((region, torch.stack([_on(region, change, shape) for change in own]).sum(0)))
    return found


def _on(region: Region, change: Change, shape: Sequence[int]) -> Tensor:
    """A change on a region that holds its own, 0 in the rest of it."""
    own, values = change
    return values if _same(own, region) else region.read(own.scatter(torch.zeros(tuple(shape)).double(), values))


def _same(one: Region, other: Region) -> bool:
    if one.index is None or other.index is None:
        return one.param == other.param and one.index is other.index
    return (one.param, one.axis) == (other.param, other.axis) and torch.equal(one.index, other.index)


def _inside(model: Model, change: Change, allowed: Region) -> Change:
    """The part of a change that lies in a region."""
    region, shape = change[0], model.parameter(allowed.param).shape
    shared = region.mask(shape) & allowed.mask(shape)
    if int(shared.sum()) < int(allowed.mask(shape).sum()):
        allowed = Region(param=allowed.param, index=shared.flatten().nonzero().flatten())
    return allowed, _on(allowed, change, shape)


# --- adapters ---------------------------------------------------------------------------------------------------------


def _side_by_side(edits: Sequence[Edit], weights: Sequence[float]) -> tuple[LowRank, ...]:
    """B times its weight, beside A; those of the same region are joined, and their ranks add up."""
    found: list[LowRank] = []
    for edit, weight in zip(edits, weights, strict=True):
        for new in edit.adapters:
            new = dataclasses.replace(new, up=new.up * weight)
            at = next((at for at, old in enumerate(found) if _same(_region(old), _region(new))), None)
            if at is None:
                found.append(new)
            else:
                down = torch.cat([found[at].down, new.down])
                found[at] = dataclasses.replace(new, down=down, up=torch.cat([found[at].up, new.up], dim=1))
    return tuple(found)


def _region(adapter: LowRank) -> Region:
    return Region(param=adapter.param, axis=adapter.axis, index=adapter.index)


def _product(model: Model, adapter: LowRank) -> Change:
    """B A in the orientation of the weight."""
    matrix = adapter.up.double() @ adapter.down.double()  # [outputs, inputs]
    module = holders(model, [model.parameter(adapter.param)])[0][0][0]
    return _region(adapter), matrix.T if out_axis(module) == 1 else matrix


def _pieces_inside(model: Model, adapters: Sequence[LowRank], within: ComponentSet) -> tuple[LowRank, ...]:
    """Rows of B, or columns of A, for each part of a linear map that the set touches."""
    whole = {adapter.param: adapter for adapter in adapters if adapter.index is None}
    pieces = pieces_apart(model, within)
    for piece in pieces:
        if piece.param not in whole and any(adapter.param == piece.param for adapter in adapters):
            raise LoceditError(
                f"the adapter of {piece.param} is restricted already; take the part of one of the whole matrix"
            )
    return tuple(_piece_of(whole[piece.param], piece) for piece in pieces if piece.param in whole)


def pieces_apart(model: Model, within: ComponentSet) -> list[Piece]:
    """The parts of linear maps that a set touches; LoceditError where two of them share an entry."""
    pieces = linear_pieces(model, within, log_left_out=False)
    names = [piece.param for piece in pieces]
    if twice := [name for name in names if names.count(name) > 1]:
        raise LoceditError(f"rows and columns of {twice[0]} overlap; the set's part of an adapter needs one of the two")
    return pieces


def _piece_of(adapter: LowRank, piece: Piece) -> LowRank:
    if piece.index is None:
        return adapter
    down = adapter.down.index_select(1, piece.index) if piece.by_columns else adapter.down
    up = adapter.up.index_select(0, piece.index) if piece.by_rows else adapter.up
    return dataclasses.replace(adapter, axis=piece.axis, index=piece.index, down=down, up=up)

"""PCGU: lower what a model says for the advantaged side of contrast pairs, in few rows or columns of weights.

The update of Yu et al. 2023 (doi:10.18653/v1/2023.findings-acl.375), on pairs instead of texts. Where it acts is one of

- `within`, a set found before by any localizer: the published option to use the same parameters throughout;
- `k`, the published default: for every batch the k rows (or columns) with the lowest cosine between the gradients of
  the two sides are found anew, and only they are updated. The edit is then cut down to the vectors that were ever
  updated; all others keep their bits.

Published settings (`PUBLISHED`): SGD with learning rate 1e-5 on the gradient *summed* over a batch of 16, 5 epochs, no
clipping, k = 10,000 in BERT-base. The loss here is a mean over pairs, so the same step has 16 times the learning rate.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.components import ComponentSet, Slice
from locedit.contrasts import Value, contrasts, require_one_token, sides
from locedit.edit.edit import Edit, Patch
from locedit.edit.objective import Step
from locedit.edit.regions import Region, regions
from locedit.edit.restrict import Deltas
from locedit.errors import LoceditError
from locedit.localize.similarity import opposition, products
from locedit.models import Model
from locedit.unlearn.registry import RetainOptions, retain_terms

Direction = Literal["decrease_advantaged", "increase_disadvantaged", "dynamic"]
PUBLISHED: dict[str, Any] = {
    "direction": "decrease_advantaged",
    "objective": "logit",
    "unit": "row",
    "k": 10_000,
    "optimizer": "sgd",
    "learning_rate": 16e-5,
    "batch_size": 16,
    "clip": None,
}
"""Options as in the paper's code; `steps` is 5 times the number of pairs over 16."""


@dataclass(frozen=True, kw_only=True)
class PcguOptions(RetainOptions):
    """PCGU's own options beside those of training; batch_size counts pairs."""

    direction: Direction = "decrease_advantaged"
    """decrease_advantaged (published default): lower the advantaged side; increase_disadvantaged: raise the other;
    dynamic: of every pair lower the side that is higher now and raise the lower, which ends where both are equal"""
    objective: Value = "logit"
    "what is lowered or raised: the logit of the token in which the sides differ, or the stretch's log-probability"
    k: int | None = None
    "update only this many vectors, found anew for every batch; needs optimizer='sgd'. None = everything in the set"
    unit: Literal["row", "column"] = "row"
    "the vectors of `k`: rows (weights into one output unit) or columns (weights that leave one input unit)"
    retain_weight: float = 0.0
    "of the retain term; the published method has none"
    retain_loss: Literal["nll", "kl"] = "kl"
    """kl: KL(unedited || edited) at the scored positions of the retain data; nll: their likelihood, which of retained
    pairs teaches both sides alike"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k is None:
            return
        if self.k < 1:
            raise LoceditError(f"k={self.k!r} must be at least 1")
        if self.optimizer != "sgd" or self.weight_decay:
            raise LoceditError(
                f"k={self.k!r} needs optimizer='sgd' and no weight decay (got {self.optimizer!r}, "
                f"{self.weight_decay:g}): others move vectors that the batch did not choose"
            )


def pcgu(
    advantaged: Float[Tensor, " pairs"], disadvantaged: Float[Tensor, " pairs"], *, direction: Direction
) -> Float[Tensor, ""]:
    """Mean over pairs of what is minimised: a; -d; or s (a - d) with s = 1 where a > d, else -1, which is |a - d|."""
    if direction == "decrease_advantaged":
        return advantaged.mean()
    if direction == "increase_disadvantaged":
        return -disadvantaged.mean()
    return (advantaged - disadvantaged).abs().mean()


def loss(step: Step, options: PcguOptions) -> dict[str, Tensor]:
    """The pairs' term and the retain term; with `k` their gradients reach only the vectors that the batch chooses."""
    pairs = contrasts(step.forget.examples, causal=step.model.causal)
    if options.objective == "logit":
        require_one_token(pairs, by="pcgu")
    advantaged, disadvantaged = sides(step.model, pairs, value=options.objective)
    terms = {"pair_loss": pcgu(advantaged, disadvantaged, direction=options.direction)} | retain_terms(step, options)
    if options.k is None:
        return terms
    return _restricted(terms, _chosen(step, advantaged.sum(), disadvantaged.sum(), options), step)


# --- vectors chosen for every batch ----------------------------------------------------------------------------------


def _chosen(step: Step, advantaged: Tensor, disadvantaged: Tensor, options: PcguOptions) -> list[Tensor | None]:
    """For each trained tensor a bool mask over it of the k vectors with the lowest cosine; None = none of them."""
    held = step.held
    if not isinstance(held, Deltas):
        raise LoceditError("pcgu: k chooses rows or columns of weights; it needs hold='weights'")
    axes = _axes(step.model, held.regions, options)
    first, second = (_gradients(side, held.parameters) for side in (advantaged, disadvantaged))
    compared = {
        at: products(g, h, axis=axes[at])
        for at, (g, h) in enumerate(zip(first, second, strict=True))
        if g is not None and h is not None
    }
    found = opposition(list(compared.values()))
    if not found:
        return [None] * len(held.parameters)
    scores = torch.cat(found)
    assert options.k is not None
    best = torch.topk(scores, min(options.k, len(scores))).indices
    keep = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, best, True) & (scores > 0)
    masks: list[Tensor | None] = [None] * len(held.parameters)
    for at, mask in zip(compared, keep.split([len(part) for part in found]), strict=True):
        masks[at] = _broadcast(mask.to(held.parameters[at].device), axes[at], held.parameters[at].ndim)
    return masks


def _broadcast(mask: Tensor, axis: int | None, ndim: int) -> Tensor:
    """A mask over vectors in a shape that multiplies their tensor."""
    shape = [1] * ndim
    if axis is not None:
        shape[axis] = -1
    return mask.reshape(shape)


def _axes(model: Model, where: tuple[Region, ...], options: PcguOptions) -> list[int | None]:
    """The axis along which the vectors of each trained tensor lie; None = it is one vector."""
    pieces = _pieces(model, options.unit)
    axes: list[int | None] = []
    for region in where:
        if region.param not in pieces:
            raise LoceditError(f"pcgu: {region.param} has no {options.unit}s (a stack of matrices); leave out k")
        axis = pieces[region.param][1].axis
        if region.index is not None and region.axis != axis:
            raise LoceditError(f"pcgu: k of unit {options.unit!r} needs a set of whole {options.unit}s, or none")
        axes.append(axis)
    return axes


def _pieces(model: Model, unit: str) -> dict[str, tuple[str, Slice]]:
    """Parameter -> (its site, the site's slice)."""
    return {piece.param: (name, piece) for name, site in model.sites(unit).items() for piece in site.slices}


def _restricted(terms: dict[str, Tensor], masks: list[Tensor | None], step: Step) -> dict[str, Tensor]:
    """The same values; their gradient is the true one inside the masks and 0 elsewhere."""
    parameters = [p for p, mask in zip(step.held.parameters, masks, strict=True) if mask is not None]
    kept = [mask for mask in masks if mask is not None]
    found: dict[str, Tensor] = {}
    for name, term in terms.items():
        value = term.detach()
        for p, gradient, mask in zip(parameters, _gradients(term, parameters), kept, strict=True):
            if gradient is not None:
                value = value + ((p - p.detach()) * (gradient * mask)).sum().to(value)
        found[name] = value
    return found


def _gradients(value: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Of each parameter; None where the value does not depend on it."""
    if not parameters or not value.requires_grad:
        return [None] * len(parameters)
    return list(torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True))


def finish(model: Model, edit: Edit, options: PcguOptions) -> Edit:
    """With `k`, the edit cut down to the vectors that were ever updated, with them as its set."""
    if options.k is None or not edit.patches:
        return edit
    changed = _touched(model, edit, options.unit)
    if not changed:
        raise LoceditError("pcgu: no vector was changed; are the two gradients the same everywhere?")
    deltas = {patch.region.param: patch for patch in edit.patches}
    places = regions(changed, role="train")
    return dataclasses.replace(
        edit, within=changed, patches=tuple(_cut(deltas[place.param], place) for place in places)
    )


def _touched(model: Model, edit: Edit, unit: str) -> ComponentSet:
    """The vectors with an entry that has a change."""
    pieces = _pieces(model, unit)
    chosen: dict[str, list[int]] = {}
    for patch in edit.patches:
        assert patch.delta is not None
        site, piece = pieces[patch.region.param]
        moved = patch.delta != 0
        if piece.axis is None:
            numbers = [0] if bool(moved.any()) else []
        else:
            lines = moved.movedim(piece.axis, 0).flatten(1).any(1).nonzero().flatten()
            numbers = (lines if patch.region.index is None else patch.region.index[lines]).tolist()
        chosen |= {site: numbers} if numbers else {}
    return model.components(chosen)


def _cut(patch: Patch, place: Region) -> Patch:
    """The part of a patch that lies in a region inside it."""
    if place.index is None or patch.delta is None:
        return patch
    axis = place.axis
    assert axis is not None
    inside = place.index if patch.region.index is None else torch.searchsorted(patch.region.index, place.index)
    values, delta = (tensor.index_select(axis, inside) for tensor in (patch.values, patch.delta))
    return Patch(region=place, values=values, delta=delta)

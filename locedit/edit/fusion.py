"""Layers that were trained apart, one for each deletion request, made into one (Chen and Yang 2023, arXiv:2310.20150).

For every linear map, with X_i its inputs on the data of request i under that request's own layers and W_i its weights,
the fused weights are argmin over W of sum_i |X_i W - X_i W_i|^2 = (sum G_i)^-1 sum G_i W_i, G_i = X_i^T X_i. Only the
G_i are needed, no data and no training. The same algebra merges whole models in RegMean (Jin et al. 2023,
arXiv:2212.09849).

Beyond the formula: biases are folded in as inputs of 1, and layers of which none has a bias get none; with fewer tokens
than inputs the sum of the G_i is singular, so there is a ridge towards the mean of the W_i, which is what directions
get that no request has seen; all sums are in float64. The paper's term for retained data does not exist; `retain` adds
one and is ours.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.edit.edit import Edit
from locedit.edit.layers import AddedLayer
from locedit.errors import LoceditError
from locedit.provenance import Provenance

RIDGE = 1e-6
"""Times the mean diagonal entry of the summed Gram matrices: what counts as seen."""


def fused_map(
    grams: Sequence[Float[Tensor, "n n"]],
    weights: Sequence[Float[Tensor, "n out"]],
    *,
    eps: float = 0.0,
    still: Float[Tensor, "n n"] | None = None,
) -> Float[Tensor, "n out"]:
    """(sum G_i + eps I + S)^-1 (sum G_i W_i + eps W_mean), in float64; y = x W.

    `still` is S, a Gram matrix of inputs at which the map is to give 0.
    """
    mean = torch.stack([w.double() for w in weights]).mean(0)
    # around the mean, so that equal weights come out as they went in
    left = torch.stack([g.double() for g in grams]).sum(0) + eps * torch.eye(len(mean), dtype=torch.float64)
    right = sum((g.double() @ (w.double() - mean) for g, w in zip(grams, weights, strict=True)), torch.zeros_like(mean))
    if still is not None:
        left, right = left + still.double(), right - still.double() @ mean
    return mean + torch.linalg.solve(left, right)


def fuse(edits: Sequence[Edit], *, ridge: float = RIDGE, retain: float = 0.0) -> Edit:
    """Added layers of the same model, places and start, as one edit that does on each one's data what it does there.

    `ridge` is relative: eps = ridge times the mean diagonal entry of the summed Gram matrices, of each map. `retain`
    above 0 is an extension: so many times the sum of the G_i of the inputs of W2 on retained data is added with the
    target 0, the layer to add nothing there. The fused layers keep the summed Gram matrices: without `retain`, fusing
    them with another edit is, but for the ridge, fusing all at once. With it, edits fused before count as adding
    something on retained data, and are pulled to nothing once more.
    """
    if not ridge > 0:
        raise LoceditError(f"ridge={ridge!r} must be above 0: directions that no data have seen need a value")
    if not retain >= 0:
        raise LoceditError(f"retain={retain!r} must not be negative")
    _require_alike(edits, by="fuse")
    for edit in edits:
        if any(layer.grams is None for layer in edit.layers):
            raise LoceditError(
                f"fuse: {edit} holds no Gram matrices; make it with keep_grams=true, or take the average"
            )
        if retain and any(layer.retain_gram is None for layer in edit.layers):
            raise LoceditError(f"fuse: {edit} holds no Gram matrices of retained data, which retain={retain!r} needs")

    def one(layers: Sequence[AddedLayer]) -> AddedLayer:
        return _fused(layers, ridge=ridge, retain=retain)

    return _joined(edits, one, {"fusion": "closed", "ridge": ridge, "fusion_retain": retain})


def average(edits: Sequence[Edit]) -> Edit:
    """The plain mean of the layers' weights, what `fuse` comes to with an endless ridge: a contrast to it."""
    _require_alike(edits, by="average")
    return _joined(edits, _averaged, {"fusion": "average"})


def _fused(layers: Sequence[AddedLayer], *, ridge: float, retain: float) -> AddedLayer:
    grams = [layer.grams for layer in layers if layer.grams is not None]
    kept = [layer.retain_gram for layer in layers if layer.retain_gram is not None]
    downs, ups = [down for down, _ in grams], [up for _, up in grams]
    still = retain * torch.stack(kept).sum(0) if retain else None
    biased = any(bool(one.down_bias.any()) or bool(one.up_bias.any()) for one in layers)
    new = {
        "down": _solved(downs, [_folded(one.down, one.down_bias) for one in layers], ridge=ridge, biased=biased),
        "up": _solved(ups, [_folded(one.up, one.up_bias) for one in layers], ridge=ridge, biased=biased, still=still),
    }
    total = (torch.stack(downs).sum(0), torch.stack(ups).sum(0))
    kept_total = torch.stack(kept).sum(0) if len(kept) == len(layers) else None
    return dataclasses.replace(_with(layers[0], new), grams=total, retain_gram=kept_total)


def _solved(
    grams: Sequence[Tensor], maps: Sequence[Tensor], *, ridge: float, biased: bool, still: Tensor | None = None
) -> Float[Tensor, "m out"]:
    """The fused folded map; where no layer has a bias, of the inputs alone, so that the fused one has none either."""
    n = None if biased else -1
    own = [gram[:n, :n] for gram in grams]
    kept = None if still is None else still[:n, :n]
    found = fused_map(own, [each[:n] for each in maps], eps=_eps(own, ridge), still=kept)
    return found if biased else torch.nn.functional.pad(found, (0, 0, 0, 1))


def _averaged(layers: Sequence[AddedLayer]) -> AddedLayer:
    def mean(name: str) -> Tensor:
        return torch.stack([_folded(getattr(one, name), getattr(one, f"{name}_bias")).double() for one in layers]).mean(
            0
        )

    return dataclasses.replace(_with(layers[0], {n: mean(n) for n in ("down", "up")}), grams=None, retain_gram=None)


def _folded(weight: Float[Tensor, "out n"], bias: Float[Tensor, " out"]) -> Float[Tensor, "m out"]:
    """The map as y = [x, 1] W: m = n + 1."""
    return torch.cat([weight.T, bias[None]])


def _with(layer: AddedLayer, folded: dict[str, Tensor]) -> AddedLayer:
    values: dict[str, Tensor] = {}
    for name, matrix in folded.items():
        matrix = matrix.to(layer.down.dtype)
        values |= {name: matrix[:-1].T.contiguous(), f"{name}_bias": matrix[-1].clone()}
    return dataclasses.replace(layer, **values)


def _eps(grams: Sequence[Tensor], ridge: float) -> float:
    return ridge * float(torch.stack(list(grams)).sum(0).diagonal().mean())


def _joined(
    edits: Sequence[Edit], one: Callable[[Sequence[AddedLayer]], AddedLayer], settings: dict[str, object]
) -> Edit:
    """One edit of the layers at each place, with the record of what it was made of."""
    first = edits[0]
    layers = tuple(one(group) for group in zip(*(edit.layers for edit in edits), strict=True))
    made = first.provenance or Provenance(method="fuse")
    record = dataclasses.replace(
        made,
        settings=made.settings | settings,
        data="+".join(edit.provenance.data for edit in edits if edit.provenance),
        seconds=sum(edit.provenance.seconds for edit in edits if edit.provenance),
    )
    outcome = settings | {"fused": [edit.digest for edit in edits]}
    return dataclasses.replace(first, layers=layers, history={}, outcome=outcome, provenance=record)


def _require_alike(edits: Sequence[Edit], *, by: str) -> None:
    """Raise LoceditError for edits whose layers do not stand for each other."""
    if not edits:
        raise LoceditError(f"{by}: there is no edit")
    for edit in edits:
        if edit.kind != "modules":
            raise LoceditError(f"{by}: added layers are fused, not an edit of kind {edit.kind!r} ({edit})")
    for number, edit in enumerate(edits[1:], start=2):
        for what, read in _ALIKE.items():
            mine, theirs = read(edits[0]), read(edit)
            if mine != theirs:
                raise LoceditError(f"{by}: edit {number} has other {what} than the first: {theirs}, not {mine}")


def _sites(edit: Edit) -> list[object]:
    return [(one.point, None if one.index is None else tuple(one.index.tolist())) for one in edit.layers]


_ALIKE: dict[str, Callable[[Edit], object]] = {
    "models": lambda edit: edit.fingerprint[:16],
    "places": _sites,
    "ranks": lambda edit: [len(one.down) for one in edit.layers],
    "activations": lambda edit: [one.activation for one in edit.layers],
    "initial values": lambda edit: sorted({one.start for one in edit.layers}),
}

"""Linear added layers merged into the weights before them, exactly.

A layer after a projection y = W x + b makes of y the vector (I + U D) y + U d + u, with W1 = D, b1 = d, W2 = U, b2 = u:
the projection with W' = (I + U D) W and b' = (I + U D) b + U d + u. A layer on some inputs S of a projection, neurons
or heads, changes the columns S only: W'_S = W_S (I + U D), and b' = b + W_S (U d + u).
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from locedit.anatomy import Matrix
from locedit.edit.edit import Edit, weights_edit
from locedit.edit.layers import AddedLayer
from locedit.edit.regions import Region
from locedit.edit.restrict import is_linear
from locedit.errors import LoceditError
from locedit.models import Model

ROLES = {"hook_mlp_out": "mlp.out", "mlp.hook_post": "mlp.out", "hook_attn_out": "attn.o", "attn.hook_z": "attn.o"}
"""Where a layer is in its block -> the projection that it is merged into."""


def bake(model: Model, edit: Edit) -> Edit:
    """The same change as new weights of output projections, for an edit of added layers with activation="linear".

    Computed in float64 and rounded to the model's dtype. Raises LoceditError for layers that are not linear, that have
    biases where the projection has none, that act behind a norm (the outputs of Gemma 2 and 3), or behind what another
    edit does to the projection's output at run time: new weights would act before it.
    """
    if edit.kind != "modules":
        raise LoceditError(f"bake: only added layers can be baked into the weights; this is {edit}")
    edit.check(model)
    by_matrix: dict[str, list[AddedLayer]] = {}
    for layer in edit.layers:
        by_matrix.setdefault(require_bakeable(model, layer).weight, []).append(layer)
    values: list[tuple[Region, Tensor]] = []
    for layers in by_matrix.values():
        values += _merged(require_bakeable(model, layers[0]), model, layers)
    biases = tuple(region.param for region, _ in values if model.parameter(region.param).ndim == 1)
    baked = weights_edit(model, values, within=edit.within, also=biases if edit.within is not None else ())
    outcome = edit.outcome | {"baked": edit.digest}
    return dataclasses.replace(baked, history=edit.history, outcome=outcome, provenance=edit.provenance)


def require_bakeable(model: Model, layer: AddedLayer) -> Matrix:
    """The projection that a layer can be merged into; LoceditError when there is none."""
    if layer.activation != "linear":
        raise LoceditError(
            f"bake: the layer at {layer.point} has a {layer.activation} inside and is no matrix; train it with "
            "activation='linear'"
        )
    matrix = projection(model, layer.point)
    if matrix.bias is None and (layer.down_bias.any() or layer.up_bias.any()):
        raise LoceditError(
            f"bake: {matrix.weight} has no bias that could hold those of the layer at {layer.point}; train it with "
            "bias=false"
        )
    return matrix


def projection(model: Model, point: str) -> Matrix:
    """The linear map whose output or input is the value at a point, with nothing in between."""
    layer, path = int(point.split(".")[1]), point.split(".", 2)[2]
    matrix = model.anatomy.matrix(layer, ROLES[path])
    if not is_linear(matrix.module):
        raise LoceditError(f"bake: {matrix.weight} belongs to a {type(matrix.module).__name__}, no plain linear map")
    if model.point(point).module is not matrix.module:
        norm = type(model.point(point).module).__name__
        raise LoceditError(f"bake: between {matrix.weight} and the layer at {point} is a {norm}; use a set of neurons")
    _require_untouched(matrix)
    return matrix


def _require_untouched(matrix: Matrix) -> None:
    """Raise LoceditError where something changes the projection's output at run time."""
    # torch lists a module's hooks nowhere else; those before its call are harmless: new weights come after them too
    if matrix.module._forward_hooks:  # pyright: ignore[reportPrivateUsage]
        raise LoceditError(
            f"bake: another edit acts on the output of {matrix.weight} at run time, and new weights would come before "
            "it; take bake=False, or bake the other one as well"
        )


def _merged(matrix: Matrix, model: Model, layers: Sequence[AddedLayer]) -> list[tuple[Region, Tensor]]:
    """New values of one projection: first what acts on its inputs, then what acts on its output."""
    stored = model.parameter(matrix.weight).detach()
    weight = (stored.T if matrix.out_axis == 1 else stored).double().clone()  # [out, in]
    bias = None if matrix.bias is None else model.parameter(matrix.bias).detach().double().clone()
    index: Tensor | None = None
    for layer in sorted(layers, key=_is_behind):
        down, down_bias, up, up_bias = (tensor.double() for tensor in layer.to(weight))
        shift = up @ down_bias + up_bias
        if not _is_behind(layer):
            index = torch.arange(weight.shape[1]) if layer.index is None else layer.index
            columns = weight.index_select(1, index.to(weight.device))
            weight = weight.index_add(1, index.to(weight.device), columns @ up @ down)
            moved = columns @ shift
        else:
            if layer.index is not None:
                raise LoceditError(
                    f"bake: the layer at {layer.point} has only some of the outputs; that is not supported"
                )
            index = None
            moved = up @ (down @ bias) + shift if bias is not None else shift
            weight = weight + up @ (down @ weight)
        bias = None if bias is None else bias + moved
    back = weight.T if matrix.out_axis == 1 else weight
    region = Region(param=matrix.weight, axis=None if index is None else matrix.in_axis, index=index)
    found = [(region, region.read(back.contiguous()))]
    return found if bias is None or matrix.bias is None else [*found, (Region(param=matrix.bias), bias)]


def _is_behind(layer: AddedLayer) -> bool:
    """Whether a layer acts on the output of its projection, not on the input."""
    return layer.point.endswith("_out")

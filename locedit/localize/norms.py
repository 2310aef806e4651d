"""How large the weights of a neuron or head are, and what it writes into the residual stream; float32 on the CPU."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.models import Model

NeuronOrHead = Literal["neuron", "head"]


def leaving(model: Model, layer: int, unit: NeuronOrHead) -> Float[Tensor, " component"]:
    """Norm of the weights that leave each component: a neuron's column of the output projection, a head's of o."""
    return output_norm(model, layer) if unit == "neuron" else head_norm(model, layer)


def entering(model: Model, layer: int, unit: NeuronOrHead) -> Float[Tensor, " component"]:
    """Norm of the weights that enter each component: a neuron's input and gate, the values that a head reads."""
    return input_norm(model, layer) if unit == "neuron" else value_norm(model, layer)


class Written:
    """The norm of what each component of a layer adds to the output of its projection."""

    def __init__(self, model: Model, layer: int, unit: NeuronOrHead) -> None:
        self.norm = output_norm(model, layer) if unit == "neuron" else None
        self.gram = None if unit == "neuron" else head_gram(model, layer)

    def __call__(self, value: Float[Tensor, "token component ..."]) -> Float[Tensor, "token component"]:
        if self.norm is not None:
            return value.abs().cpu() * self.norm
        assert self.gram is not None
        z = value.cpu()  # [token, head, d_head]
        return torch.einsum("nhi,hij,nhj->nh", z, self.gram, z).clamp(min=0).sqrt()


def output_norm(model: Model, layer: int) -> Float[Tensor, " neuron"]:
    """Euclidean norm of the weights that leave each neuron of a layer, on the CPU."""
    matrix = model.anatomy.matrix(layer, "mlp.out")
    return _weight(model, matrix.weight).norm(dim=matrix.out_axis)


def input_norm(model: Model, layer: int) -> Float[Tensor, " neuron"]:
    """Euclidean norm of the weights that enter each neuron, the gate's included."""
    roles = ("mlp.in", "mlp.gate") if model.gated else ("mlp.in",)
    return torch.stack([_row_norms(model, layer, role).square() for role in roles]).sum(0).sqrt()


def _row_norms(model: Model, layer: int, role: str) -> Float[Tensor, " output"]:
    """Euclidean norm of the weights into each output of a role."""
    matrix = model.anatomy.matrix(layer, role)
    weight = _weight(model, matrix.weight)
    if matrix.runs is not None:
        weight = weight.index_select(matrix.out_axis, torch.tensor(matrix.runs.indices()))
    return weight.norm(dim=matrix.in_axis)


def head_output(model: Model, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """The weights that leave each head of a layer, on the CPU."""
    matrix = model.anatomy.matrix(layer, "attn.o")
    weight = _weight(model, matrix.weight)
    columns = weight if matrix.in_axis == 0 else weight.T
    return columns.reshape(-1, model.d_head, columns.shape[1])


def head_norm(model: Model, layer: int) -> Float[Tensor, " head"]:
    return head_output(model, layer).flatten(1).norm(dim=1)


def head_gram(model: Model, layer: int) -> Float[Tensor, "head d_head d_head"]:
    columns = head_output(model, layer)
    return columns @ columns.transpose(1, 2)


def value_norm(model: Model, layer: int) -> Float[Tensor, " head"]:
    """Euclidean norm of the value weights that each head reads; heads of a group share them."""
    shared = _row_norms(model, layer, "attn.v").reshape(-1, model.d_head).norm(dim=1)
    return shared.repeat_interleave(model.n_heads // len(shared))


def _weight(model: Model, name: str) -> Tensor:
    return model.parameter(name).detach().float().cpu()

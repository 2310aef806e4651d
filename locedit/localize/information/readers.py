"""What one call of a module says about each example's gradient of the module's own weights.

A call is read twice: in the forward pass what has to be kept of its input, in the backward pass the gradient of its
output, which gives the pieces of the gradients. Linear maps, embeddings, and modules that multiply by vectors or add
them (every norm) can be read; how norms and embeddings use their weights is found by running them on other weights.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from locedit.localize.information.members import Members
from locedit.localize.information.squares import Lookup, Outer, Piece, Vectors


@runtime_checkable
class Kept(Protocol):
    """What is kept of a call until its output's gradient comes."""

    def pieces(self, members: Members, gradient: Tensor) -> dict[str, Piece]:
        """By name of the parameter in its module."""
        ...


Read = Callable[[nn.Module, tuple[str, ...], Tensor], Kept]
"(module, names of its parameters that are wanted, input) -> what is kept"


def reader_of(module: nn.Module) -> Read | None:
    """How to read a module's calls; None = they do not say enough."""
    if isinstance(module, nn.Linear | Conv1D):
        return LinearCall.read
    if isinstance(module, nn.Embedding):
        return EmbeddingCall.read
    vectors = all(p.ndim == 1 for p in module.parameters(recurse=False))
    return VectorCall.read if vectors and not any(module.children()) else None


def precise(tensor: Tensor) -> torch.dtype:
    """What sums are made in: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearCall:
    """Of a Linear `[out, in]` or a Conv1D `[in, out]`."""

    given: Tensor
    names: tuple[str, ...]
    transposed: bool

    @classmethod
    def read(cls, module: nn.Module, names: tuple[str, ...], given: Tensor) -> "LinearCall":
        return cls(given=given, names=names, transposed=isinstance(module, Conv1D))

    def pieces(self, members: Members, gradient: Tensor) -> dict[str, Piece]:
        found: dict[str, Piece] = {}
        outputs = members.by_example(gradient)
        if "weight" in self.names:
            inputs = members.by_example(self.given.to(gradient))
            left, right = (inputs, outputs) if self.transposed else (outputs, inputs)
            found["weight"] = Outer(left=left, right=right, lengths=members.lengths(gradient))
        if "bias" in self.names:
            found["bias"] = Vectors(values=outputs.sum(1))
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingCall:
    """Of an embedding, scaled or with an offset or not."""

    index: Int[Tensor, "batch pos"]
    "the rows read"
    scale: Float[Tensor, ""]
    padding: int | None
    "a row that gets no gradient, as in autograd"
    name: str

    @classmethod
    def read(cls, module: nn.Module, names: tuple[str, ...], given: Tensor) -> "EmbeddingCall":
        assert isinstance(module, nn.Embedding)
        index, scale = looked_up(module, given)
        return cls(index=index, scale=scale, padding=module.padding_idx, name=names[0])

    def pieces(self, members: Members, gradient: Tensor) -> dict[str, Piece]:
        values = gradient * self.scale
        if self.padding is not None:
            values = values.masked_fill((self.index == self.padding)[..., None], 0.0)
        index = members.by_example(self.index[..., None]).squeeze(-1)
        return {self.name: Lookup(index=index, values=members.by_example(values))}


@dataclass(frozen=True, kw_only=True, eq=False)
class VectorCall:
    """Of a module that multiplies by vectors or adds them."""

    slopes: dict[str, Tensor]

    @classmethod
    def read(cls, module: nn.Module, names: tuple[str, ...], given: Tensor) -> "VectorCall":
        return cls(slopes=slopes(module, given.to(precise(given)), names))

    def pieces(self, members: Members, gradient: Tensor) -> dict[str, Piece]:
        return {name: Vectors(values=members.summed(gradient * slope)) for name, slope in self.slopes.items()}


def slopes(module: nn.Module, given: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The derivative of each output by the weight that acts on it: the output at ones minus the output at zeros."""
    zeros = {key: torch.zeros_like(p, dtype=given.dtype) for key, p in module.named_parameters(recurse=False)}
    start = _run(module, zeros, given)
    return {name: _run(module, zeros | {name: torch.ones_like(zeros[name])}, given) - start for name in names}


def looked_up(module: nn.Embedding, given: Tensor) -> tuple[Int[Tensor, "batch pos"], Float[Tensor, ""]]:
    """The rows that an embedding reads for its input, and the number that it multiplies them by."""
    weight = module.weight
    if type(module) is nn.Embedding:
        return given, weight.new_ones(())
    numbers = torch.arange(len(weight), dtype=torch.float64, device=weight.device)[:, None]
    factor = _run(module, {"weight": torch.ones_like(numbers)}, given)
    index = (_run(module, {"weight": numbers}, given) / factor).round().long().squeeze(-1)
    return index, _run(module, {"weight": weight.new_ones(len(weight), 1)}, given).flatten()[0]


@torch.no_grad()
def _run(module: nn.Module, weights: dict[str, Tensor], given: Tensor) -> Tensor:
    """The output with other weights, past all hooks; the module is not touched."""
    shell = copy.copy(module)
    shell.__dict__["_parameters"] = module.__dict__["_parameters"] | weights
    return shell.forward(given)

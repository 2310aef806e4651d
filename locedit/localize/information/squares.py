"""Sums over examples of squared gradients, from pieces of each example's gradient, without keeping one.

The gradient of a linear map's weight for one example is `left.T @ right` over the example's positions. Only one such
matrix exists at a time; where only its sums over rows, columns or everything are wanted and the example is short, none
does: with K = right @ right.T the sum of the squares of row r is `left[:, r] @ K @ left[:, r]`, which costs
pos * (rows + columns) for each position instead of rows * columns.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Part = int | Literal["all", "entries"]
"what is kept of a parameter: every entry, the sums over everything but one axis, or one sum of all"
GRAM = 2**22
"numbers of Gram matrices at a time"


@dataclass(frozen=True, kw_only=True, eq=False)
class Outer:
    """The gradient of example e is `left[e].T @ right[e]`."""

    left: Float[Tensor, "example pos rows"]
    right: Float[Tensor, "example pos columns"]
    lengths: Sequence[int]
    "positions of each example that are not zero"

    def fill(self, example: int, out: Float[Tensor, "rows columns"]) -> None:
        """Write the gradient of one example."""
        end = self.lengths[example]
        torch.mm(self.left[example, :end].T, self.right[example, :end], out=out)


@dataclass(frozen=True, kw_only=True, eq=False)
class Lookup:
    """The gradient of example e has `values[e, t]` added to row `index[e, t]`, for every position t."""

    index: Int[Tensor, "example pos"]
    values: Float[Tensor, "example pos columns"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Vectors:
    """The gradients themselves."""

    values: Float[Tensor, "example n"]


Piece = Outer | Lookup | Vectors


class Squares:
    """Running sum of the squared gradients of one parameter; what is kept of it is chosen once."""

    def __init__(
        self, shape: tuple[int, ...], keep: Iterable[Part], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = shape
        parts: set[Part] = set(keep)
        if len(shape) == 1 or "entries" in parts:
            parts = {"entries"}
        elif len(parts) > 1:
            parts.discard("all")  # any other sum gives it
        self.sums = {part: torch.zeros(_size(shape, part), dtype=dtype, device=device) for part in parts}

    # --- reading -------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> Tensor:
        """In the parameter's shape; only where entries are kept."""
        return self.sums["entries"]

    def along(self, axis: int) -> Float[Tensor, " size"]:
        """Sums over every other axis."""
        return self.sums[axis] if axis in self.sums else _along(self.entries, axis)

    def total(self) -> Float[Tensor, ""]:
        """Sum of all entries."""
        return next(iter(self.sums.values())).sum()

    def map(self, function: Callable[[Tensor], Tensor]) -> "Squares":
        """Something else in the place of every entry."""
        other = copy.copy(self)
        sums: dict[Part, Tensor] = {"entries": function(self.entries).to(self.entries.dtype)}
        other.sums = sums
        return other

    def divide(self, by: float) -> None:
        """Turn the sums into means, in place."""
        for value in self.sums.values():
            value.div_(by)

    # --- adding --------------------------------------------------------------------------------------------------

    def add(self, pieces: Sequence[Piece]) -> None:
        """Add some examples; an example's gradient is the sum of its pieces."""
        if all(isinstance(piece, Vectors) for piece in pieces):
            gradient = sum(piece.values for piece in pieces if isinstance(piece, Vectors))
            assert isinstance(gradient, Tensor)
            self.entries.add_(gradient.square().sum(0))
        elif all(isinstance(piece, Lookup) for piece in pieces):
            self._add_lookups([piece for piece in pieces if isinstance(piece, Lookup)])
        elif len(pieces) == 1 and isinstance(pieces[0], Outer) and self._shorter(pieces[0]):
            self._add_by_gram(pieces[0])
        else:
            self._add_one_by_one(pieces)

    def add_gradient(self, gradient: Tensor, *, weight: float = 1.0) -> None:
        """Add the square of one gradient in the parameter's shape, times a weight."""
        if "entries" in self.sums:
            gradient = gradient.to(self.entries.dtype)
            self.entries.addcmul_(gradient, gradient, value=weight)
            return
        dtype = next(iter(self.sums.values())).dtype
        self._take(gradient.to(dtype).square_() if gradient.dtype != dtype else gradient.square(), weight=weight)

    def _take(self, square: Tensor, *, weight: float = 1.0) -> None:
        for part, value in self.sums.items():
            value.add_(square.sum() if part == "all" else _along(square, int(part)), alpha=weight)

    def _add_one_by_one(self, pieces: Sequence[Piece]) -> None:
        """Make each example's gradient in one buffer."""
        some = next(iter(self.sums.values()))
        buffer = torch.empty(self.shape, dtype=some.dtype, device=some.device)
        for example in range(_count(pieces)):
            _gradient(pieces, example, out=buffer)
            if "entries" in self.sums:
                self.entries.addcmul_(buffer, buffer)
            else:
                self._take(buffer.square_())

    def _add_lookups(self, pieces: Sequence[Lookup]) -> None:
        """Only the rows that an example reads have a gradient."""
        index = torch.cat([piece.index for piece in pieces], 1)  # [example, pos]
        values = torch.cat([piece.values for piece in pieces], 1).flatten(0, 1)
        rows = self.shape[0]
        keys = (index + rows * torch.arange(len(index), device=index.device)[:, None]).flatten()
        found, place = keys.unique(return_inverse=True)
        square = values.new_zeros(len(found), values.shape[1]).index_add_(0, place, values).square_()
        for part, value in self.sums.items():
            if part in (0, "entries"):
                value.index_add_(0, found % rows, square if part == "entries" else square.sum(1))
            else:
                value.add_(square.sum() if part == "all" else square.sum(0))

    def _shorter(self, piece: Outer) -> bool:
        """Whether Gram matrices cost less than gradients."""
        if "entries" in self.sums:
            return False
        rows, columns = self.shape
        return piece.left.shape[1] * (rows + columns) * len(self.sums) < rows * columns

    def _add_by_gram(self, piece: Outer) -> None:
        for left, right in _chunks(piece):
            grams: dict[int, Tensor] = {}
            if self.sums.keys() & {0, "all"}:
                grams[0] = torch.bmm(right, right.mT)  # [example, pos, pos]
            if self.sums.keys() & {1, "all"}:
                grams[1] = torch.bmm(left, left.mT)
            for part, value in self.sums.items():
                if part == "all":
                    value.add_((grams[0] * grams[1]).sum())
                else:
                    side = left if part == 0 else right
                    value.add_((torch.bmm(grams[int(part)], side) * side).sum((0, 1)))


def _size(shape: tuple[int, ...], part: Part) -> tuple[int, ...]:
    return shape if part == "entries" else () if part == "all" else (shape[part],)


def _along(entries: Tensor, axis: int) -> Tensor:
    others = [other for other in range(entries.ndim) if other != axis]
    return entries.sum(others) if others else entries


def _chunks(piece: Outer) -> Iterable[tuple[Tensor, Tensor]]:
    """Some examples at a time, so that their Gram matrices stay small; positions that are zero in all left out."""
    size = max(1, GRAM // max(1, piece.left.shape[1] ** 2))
    for start in range(0, len(piece.left), size):
        end = max(piece.lengths[start : start + size])
        yield piece.left[start : start + size, :end], piece.right[start : start + size, :end]


def _count(pieces: Sequence[Piece]) -> int:
    first = pieces[0]
    return len(first.left if isinstance(first, Outer) else first.values)


def _gradient(pieces: Sequence[Piece], example: int, *, out: Tensor) -> None:
    """One example's gradient: outer products first, then what is looked up."""
    outer = [piece for piece in pieces if isinstance(piece, Outer)]
    outer[0].fill(example, out)
    for piece in outer[1:]:
        end = piece.lengths[example]
        out.addmm_(piece.left[example, :end].T, piece.right[example, :end])
    for piece in pieces:
        if isinstance(piece, Lookup):
            out.index_add_(0, piece.index[example], piece.values[example])

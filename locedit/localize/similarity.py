"""How two gradients of a parameter point, vector by vector (Yu et al. 2023, PCGU).

A parameter is parted into vectors by role: along `axis` lie the rows (all weights into an output) or the columns (all
weights that leave an input); without an axis the parameter is one vector.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.errors import LoceditError

ROUNDING = torch.finfo(torch.float32).eps
"a gradient whose norm is at most this share of the longest vector's is rounding error, not a direction"


class Products(NamedTuple):
    """The inner products of two gradients of one parameter with each other and with themselves, vector by vector."""

    both: Float[Tensor, " vector"]
    first: Float[Tensor, " vector"]
    "norm of the first gradient"
    second: Float[Tensor, " vector"]


def products(first: Float[Tensor, "..."], second: Float[Tensor, "..."], *, axis: int | None) -> Products:
    """A few operations over the parameter, in the wider of float32 and the gradients' dtype."""
    dtype = torch.promote_types(first.dtype, torch.float32)
    a, b = first.to(dtype), second.to(dtype)
    rest = tuple(d for d in range(a.ndim) if d != axis)
    return Products((a * b).sum(rest).view(-1), _norm(a, rest), _norm(b, rest))


def _norm(vectors: Tensor, rest: tuple[int, ...]) -> Float[Tensor, " vector"]:
    """Euclidean, over the axes `rest`; the library's own is fast only where the vectors are contiguous."""
    if rest and rest[-1] == vectors.ndim - 1:
        return torch.linalg.vector_norm(vectors, dim=rest).view(-1)
    return (vectors * vectors).sum(rest).sqrt().view(-1)


def opposition(found: Sequence[Products]) -> list[Float[Tensor, " vector"]]:
    """(1 - cosine) / 2 of the vectors of each parameter, on the CPU: 0 = same direction, 0.5 = at right angles, 1 =
    opposite; 0 too where a vector has no gradient on one of the sides.

    What is at most `ROUNDING` of the longest vector of its side in any parameter is no gradient: the key bias of an
    attention layer, which shifts all its logits alike, has an exact gradient of 0 and a computed one of 1e-9. (In half
    precision the computed one is not that small, and such a bias has a cosine by chance.)
    """
    if not found:
        return []
    both, first, second = (torch.cat([part.cpu() for part in parts]) for parts in zip(*found, strict=True))
    if not bool((both + first + second).isfinite().all()):
        raise LoceditError("the gradients of the two sides are not finite; are there NaN weights or an overflow?")
    pointing = (first > ROUNDING * first.max()) & (second > ROUNDING * second.max())
    cosine = torch.where(pointing, both / (first * second), 1.0).clamp(-1, 1)
    return list(((1 - cosine) / 2).split([len(part.both) for part in found]))

"""How two gradients of a parameter point, vector by vector (Yu et al. 2023, PCGU).

A parameter is parted into vectors by role: along `axis` lie the rows (all weights into an output) or the columns (all
weights that leave an input); without an axis the parameter is one vector.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

ROUNDING = torch.finfo(torch.float32).eps
"a gradient whose norm is at most this share of the largest vector's is rounding error, not a direction"


class Angles(NamedTuple):
    """The two gradients of one parameter, vector by vector."""

    score: Float[Tensor, " vector"]
    "(1 - cosine) / 2: 0 = same direction, 0.5 = at right angles, 1 = opposite"
    first: Float[Tensor, " vector"]
    "norm of the first gradient"
    second: Float[Tensor, " vector"]


def angles(first: Float[Tensor, "..."], second: Float[Tensor, "..."], *, axis: int | None) -> Angles:
    """One operation over the parameter, in the wider of float32 and the gradients' dtype; results on the CPU."""
    dtype = torch.promote_types(first.dtype, torch.float32)
    a, b = first.to(dtype), second.to(dtype)
    rest = tuple(d for d in range(a.ndim) if d != axis)
    product, first_square, second_square = ((x * y).sum(rest).reshape(-1).cpu() for x, y in ((a, b), (a, a), (b, b)))
    lengths = first_square.sqrt(), second_square.sqrt()
    cosine = product / (lengths[0] * lengths[1]).clamp_min(torch.finfo(dtype).tiny)
    return Angles((1 - cosine.clamp(-1, 1)) / 2, *lengths)


def opposition(found: Sequence[Angles]) -> list[Float[Tensor, " vector"]]:
    """The scores of each parameter, 0 where a vector has no gradient on one of the sides.

    Neither is one a direction that is `ROUNDING` of the longest vector of its side in any parameter: the key bias of
    an attention layer, which shifts all its logits alike, has an exact gradient of 0 and a computed one of 1e-9.
    """
    floors = [ROUNDING * max((float(part[side].max()) for part in found), default=0.0) for side in (1, 2)]
    return [
        torch.where((part.first > floors[0]) & (part.second > floors[1]), part.score, torch.zeros_like(part.score))
        for part in found
    ]

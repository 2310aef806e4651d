"""FILA: low-rank factors that start where some data matters most (Cha et al. 2025, arXiv:2408.06621).

The factors A0, B0 are the best approximation of the weight W by a matrix of low rank when row i counts d_i times. The
paper trains A and B on the residual W - s B0 A0, s = alpha / rank, which has to be kept as the new base. Here the base
stays W and what acts beside it is

    s (B A - B0 A0) = s [(B - B0) A + B0 (A - A0)],

the same function of A and B, of rank at most 2 * rank. The differences are what is trained: they start at zero, so the
change is zero at the start, bit for bit, and no two large products are subtracted. Weight decay is of the differences,
towards the base. The change is the plain LoRA pair [A; A - A0], s [B - B0, B0], which is how it is saved and exported.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.edit.adapter import Factors, Pair, Piece
from locedit.errors import LoceditError
from locedit.models import Model


@dataclass(frozen=True, kw_only=True)
class Svd:
    """How the leading singular vectors are found.

    randomized: of the matrix projected on the range of its product with rank + oversample random vectors (Halko et al.
    2011, arXiv:0909.4061, algorithms 4.4 and 5.1). Without power iterations the expected error of that range is at most
    sqrt(1 + rank / (oversample - 1)) times the least possible one (theorem 10.5), with them it goes to the least.
    LoKU's release takes `torch.svd_lowrank(q=rank)`: oversample=0, power_iterations=2.
    """

    svd: Literal["exact", "randomized"] = "exact"
    "how the leading singular vectors are found: exact, or by random projection"
    oversample: int = 8
    "random vectors beyond the rank, of svd='randomized'"
    power_iterations: int = 4
    "products with the matrix and its transpose that sharpen the range, of svd='randomized'"

    def __post_init__(self) -> None:
        for name in ("oversample", "power_iterations"):
            if getattr(self, name) < 0:
                raise LoceditError(f"{name}={getattr(self, name)!r} must not be negative")

    def leading(
        self, matrix: Float[Tensor, "m n"], rank: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, " r"], Float[Tensor, "r n"]]:
        """The largest singular values and their right singular vectors; at most `rank`, only those above rounding."""
        basis = None if self.svd == "exact" else self._range(matrix, rank, generator)
        small = matrix if basis is None else basis.T @ matrix
        _, values, right = torch.linalg.svd(small, full_matrices=False)
        floor = values[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
        count = min(rank, int((values > floor).sum()))
        return values[:count], right[:count]

    def _range(self, matrix: Tensor, rank: int, generator: torch.Generator) -> Float[Tensor, "m q"]:
        size = min(rank + self.oversample, *matrix.shape)
        start = torch.randn(matrix.shape[1], size, generator=generator, dtype=torch.float64).to(matrix)
        basis = torch.linalg.qr(matrix @ start)[0]
        for _ in range(self.power_iterations):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
        return basis


def weighted_low_rank(
    matrix: Float[Tensor, "m n"],
    weights: Float[Tensor, " m"],
    *,
    rank: int,
    scale: float,
    svd: Svd,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
    """A and B that minimise the Frobenius norm of diag(weights) (matrix - scale B A) over all B A of rank `rank`.

    With diag(weights) matrix = U S V^T, truncated: A = sqrt(S / scale) V^T and B = diag(1 / weights) U sqrt(S / scale)
    (the release has weights + 1e-5 there). B is computed as matrix V / sqrt(scale S), which is the same and the best B
    for this A also in rows of weight zero. Of lower rank where diag(weights) matrix is; empty where that is zero.
    """
    values, right = svd.leading(weights[:, None] * matrix, rank, generator)
    return (values / scale).sqrt()[:, None] * right, matrix @ right.T / (scale * values).sqrt()


class Fila(Factors):
    """Trainable differences from the factors that approximate each piece best, zero change at the start."""

    def __init__(
        self,
        model: Model,
        weighted: Iterable[tuple[Piece, Tensor]],
        *,
        rank: int,
        alpha: float,
        svd: Svd,
        generator: torch.Generator,
    ) -> None:
        """`weighted`: each piece with the weights of its rows, or of its columns where inputs are restricted.

        Pieces whose weights are all zero are left out.
        """
        super().__init__(model, scale=alpha / rank)
        for piece, weights in weighted:
            start = _start(piece, weights, rank=rank, scale=self.scale, svd=svd, generator=generator)
            if len(start[0]):
                down, up = (torch.zeros_like(factor).requires_grad_() for factor in start)
                self.train(piece, (down, up), functools.partial(_acting, start, (down, up)))
        if not self.pieces:
            raise LoceditError("fila: no gradient of the data to forget reaches the component set; nothing to start at")


def _start(piece: Piece, weights: Tensor, *, rank: int, scale: float, svd: Svd, generator: torch.Generator) -> Pair:
    """A0 and B0; where columns are weighted, those of the transposed problem."""
    matrix = piece.matrix()
    weights = weights.to(matrix)
    find = functools.partial(weighted_low_rank, rank=rank, scale=scale, svd=svd, generator=generator)
    if piece.by_columns:
        first, second = find(matrix.T, weights)
        return second.T.contiguous(), first.T.contiguous()
    return find(matrix, weights)


def _acting(start: Pair, differences: Pair) -> Pair:
    """[A; A - A0] and [B - B0, B0]."""
    (down0, up0), (down, up) = start, differences
    return torch.cat([down0 + down, down]), torch.cat([up, up0], dim=1)

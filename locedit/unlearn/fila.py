"""Where FILA's factors start: at the weights on which the data to forget depends and the retained data does not.

The relative Fisher information of weight ij is R_ij = F_forget / (F_retain + eps), F the diagonal empirical Fisher
information (mean over examples of the squared gradient of an example's mean loss). Row i of a matrix counts d_i =
sqrt(sum_j R_ij) times, an output of the map; of a matrix of which only some inputs may change, the columns count, c_j =
sqrt(sum_i R_ij) (Cha et al. 2025, arXiv:2408.06621, which has rows only). Sums are over the whole row or column also
where others lie outside the component set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.components import ComponentSet
from locedit.data.encode import Example
from locedit.edit.adapter import Piece, linear_pieces
from locedit.edit.fila import Fila, Svd
from locedit.edit.restrict import out_axis
from locedit.errors import LoceditError
from locedit.localize.fisher import RELEASE_EPS
from locedit.localize.information.measuring import FisherOptions, information
from locedit.localize.information.squares import Part
from locedit.models import Model


@dataclass(frozen=True, kw_only=True)
class FilaOptions(Svd):
    """How the importance of weights is measured and approximated."""

    eps: float | Literal["release"] = 0.1
    """added to the Fisher information of the retain data, as a share of its mean over the matrices that are changed;
    release: 1e-5 whatever its size, as in LoKU's code"""
    variant: Literal["per_sample", "batch_squared"] = "per_sample"
    """per_sample: the gradient of each example is squared; batch_squared: that of the mean over the tokens of `group`
    examples, as in LoKU's code"""
    group: int = 4
    "for batch_squared: examples in a squared gradient"
    fisher_batch: int = 16
    "examples at a time while the Fisher information is measured"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps != "release" and not self.eps > 0:
            raise LoceditError(f"eps={self.eps!r} must be above 0, or 'release'")
        for name in ("group", "fisher_batch"):
            if getattr(self, name) < 1:
                raise LoceditError(f"{name}={getattr(self, name)!r} must be at least 1")

    def fisher(self) -> FisherOptions:
        """What the Fisher information is measured with."""
        return FisherOptions(variant=self.variant, group=self.group, batch=self.fisher_batch)


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """Makes the trainable factors of a component set; called by the trainer."""

    model: Model
    forget: Sequence[Example]
    retain: Sequence[Example]
    options: FilaOptions
    rank: int
    alpha: float

    def __call__(self, within: ComponentSet | None, generator: torch.Generator) -> Fila:
        pieces = linear_pieces(self.model, within)
        ratios = self.relative_information(pieces)
        weighted = [(piece, importance(piece, ratios[piece.param])) for piece in pieces]
        return Fila(self.model, weighted, rank=self.rank, alpha=self.alpha, svd=self.options, generator=generator)

    def relative_information(self, pieces: Sequence[Piece]) -> dict[str, Tensor]:
        """R of every matrix that a piece is part of, in the layout of the weight."""
        keep: dict[str, tuple[Part, ...]] = {piece.param: ("entries",) for piece in pieces}
        settings = self.options.fisher()
        forget = information(self.model, self.forget, settings, keep=keep, what="fila: forget").squares
        retain = information(self.model, self.retain, settings, keep=keep, what="fila: retain").squares
        total = sum(float(squares.entries.sum(dtype=torch.float64)) for squares in retain.values())
        mean = total / sum(squares.entries.numel() for squares in retain.values())
        eps = RELEASE_EPS if self.options.eps == "release" else self.options.eps * mean
        if not eps > 0:
            raise LoceditError("fila: no gradient of the retain data reaches the component set, so there is no ratio")
        return {name: squares.entries.div_(retain[name].entries.add_(eps)) for name, squares in forget.items()}


def importance(piece: Piece, ratio: Float[Tensor, "_ _"]) -> Float[Tensor, " n"]:
    """The weights of a piece's rows, or of its columns where its inputs are restricted."""
    axis = out_axis(piece.module)
    axis = 1 - axis if piece.by_columns else axis
    found = ratio.sum(1 - axis).sqrt()
    if not bool(torch.isfinite(found).all()):
        raise LoceditError(f"fila: the Fisher information of {piece.param} is not a finite number; try another dtype")
    return found if piece.index is None else found[piece.index.to(found.device)]

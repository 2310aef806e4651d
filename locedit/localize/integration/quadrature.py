"""Rules that turn the path integral of integrated gradients into a weighted sum over points of the path.

Published code disagrees on the rule, so each one has a name: "right" is the DEPN paper (Wu et al. 2023,
arXiv:2310.20138, eq. 4), "left" is what the code of DEPN and of Dai et al. 2022 (arXiv:2104.08696) runs, "eleuther" is
the knowledge-neurons package of EleutherAI, and "gauss" is Gauss-Legendre, exact for polynomials of degree 2 * steps -
1.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from locedit.errors import LoceditError, nearest

Quadrature = Literal["gauss", "right", "left", "eleuther"]
QUADRATURES: tuple[Quadrature, ...] = ("gauss", "right", "left", "eleuther")


@dataclass(frozen=True, kw_only=True, eq=False)
class Rule:
    """Points on the path from 0 (nothing) to 1 (the activation as it is) and the weight of the gradient at each."""

    name: Quadrature
    alphas: Float[Tensor, " step"]
    "float64, ascending, from 0 to 1"
    weights: Float[Tensor, " step"]
    "float64, sum 1"

    @property
    def steps(self) -> int:
        return len(self.alphas)


def rule(name: str, steps: int) -> Rule:
    """The rule of that name with that many points.

    >>> rule("right", 4).alphas.tolist(), rule("left", 4).alphas.tolist()
    ([0.25, 0.5, 0.75, 1.0], [0.0, 0.25, 0.5, 0.75])
    >>> rule("eleuther", 3).alphas.tolist()
    [0.0, 0.5, 1.0]
    """
    if name not in QUADRATURES:
        raise LoceditError(f"quadrature={name!r}; {nearest(name, QUADRATURES)}")
    if steps < 1:
        raise LoceditError(f"steps={steps!r} must be a whole number of at least 1")
    if name == "gauss":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return Rule(name="gauss", alphas=torch.from_numpy((points + 1) / 2), weights=torch.from_numpy(weights / 2))
    even = torch.full((steps,), 1 / steps, dtype=torch.float64)
    count = torch.arange(steps, dtype=torch.float64)
    if name == "right":
        return Rule(name="right", alphas=(count + 1) / steps, weights=even)
    if name == "left":
        return Rule(name="left", alphas=count / steps, weights=even)
    return Rule(name="eleuther", alphas=torch.linspace(0, 1, steps, dtype=torch.float64), weights=even)


def graded(steps: int) -> Rule:
    """Gauss-Legendre in t with alpha = t^3: points crowd near the path's start.

    Where a norm follows the MLP (Gemma 2 and 3), scaling its input only tells from 0: almost everything happens within
    the first thousandth of the path, and evenly spread points miss it.

    >>> float(graded(8).alphas[0]) < 1e-5 < float(rule("gauss", 8).alphas[0])
    True
    """
    even = rule("gauss", steps)
    return Rule(name="gauss", alphas=even.alphas**3, weights=even.weights * 3 * even.alphas**2)

"""Multinomial logistic regression with an L2 price, many at once: the linear probes.

Each problem is the minimum over W, b of

    sum_i w_i * -log softmax(W x_i + b)[y_i]  +  l2 / 2 * |W|^2

in float64, with an intercept that costs nothing, as scikit-learn has it with C = 1 / l2. Features are first centred
and divided by their standard deviation over the items of weight above 0. Problems share items and classes and differ
in features and weights: the layers of a model, the folds of a cross-validation (weight 0 = held out).

Solved by steps of the fixed matrix that bounds the Hessian from above (Boehning 1992), with Nesterov's momentum,
started anew for a problem when its momentum points uphill (O'Donoghue and Candes 2015). More features than items are
first rotated into the space of the items, which changes nothing (the price does not see a rotation).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

TOLERANCE = 1e-4
"largest entry of the gradient, as a share of the summed weights, at which a problem is solved"
STEPS = 5000


class Fit(NamedTuple):
    """The solved problems."""

    logits: Float[Tensor, "problem item class"]
    "of all items, held out or not"
    gradient: float
    "largest entry of a gradient at the end, as a share of the summed weights"


def logistic(
    features: Float[Tensor, "problem item feature"],
    labels: Int[Tensor, " item"],
    weights: Float[Tensor, "problem item"],
    *,
    classes: int,
    l2: float,
) -> Fit:
    """Fit every problem, until the last is solved: which are solved together matters up to TOLERANCE."""
    weights = weights.double()
    x = _rotated(_standard(features.double(), weights))
    x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    wanted = torch.nn.functional.one_hot(labels.to(x.device), classes).double()
    price = torch.full((x.shape[-1],), float(l2), dtype=torch.float64, device=x.device)
    price[-1] = 0
    weighted = weights[..., None] * x
    bound = torch.linalg.cholesky(0.5 * weighted.mT @ x + price.diag() + 1e-9 * torch.eye(x.shape[-1]).to(x))
    total = weights.sum(1)[:, None, None]

    def gradient(w: Tensor) -> Tensor:
        return weighted.mT @ ((x @ w).softmax(-1) - wanted) + price[:, None] * w

    here = torch.zeros(*x.shape[::2], classes, dtype=torch.float64, device=x.device)
    ahead, slope, age = here, gradient(here), torch.zeros_like(total)
    for _ in range(STEPS):
        if float((slope / total).abs().max()) <= TOLERANCE:
            break
        new = ahead - torch.cholesky_solve(slope, bound)
        uphill = ((ahead - new) * (new - here)).sum((1, 2), keepdim=True) > 0
        age = torch.where(uphill, torch.zeros_like(age), age + 1)
        here, ahead = new, new + age / (age + 3) * (new - here)
        slope = gradient(ahead)
    return Fit(logits=x @ ahead, gradient=float((slope / total).abs().max()))


def _standard(x: Tensor, weights: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the items of weight above 0; a constant feature becomes 0."""
    inside = (weights > 0).double()[..., None]
    count = inside.sum(1, keepdim=True)
    x = x - (x * inside).sum(1, keepdim=True) / count
    spread = ((x * inside).square().sum(1, keepdim=True) / count).sqrt()
    constant = spread <= 1e-12 * spread.amax(-1, keepdim=True).clamp(min=1e-300)
    return torch.where(constant, 0.0, x / spread.masked_fill(constant, 1.0))


def _rotated(x: Float[Tensor, "problem item feature"]) -> Float[Tensor, "problem item few"]:
    if x.shape[2] <= x.shape[1]:
        return x
    return torch.linalg.qr(x.mT, mode="r").R.mT

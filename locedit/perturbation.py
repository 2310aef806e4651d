"""Perturbations of activations that help a model to say its answers: the inner attack of latent adversarial training.

A perturbation is one tensor at a hook point, in the shape of the value there, added to it on the forward pass. `ascend`
finds it (Yuan et al. 2025, arXiv:2408.10682): K steps of

    delta <- project(delta - (radius / K) g / |g|),    g = gradient of the answers' negative log-likelihood

against the gradient, so towards *lower* loss. Norms are L2 over a row's whole perturbation, flattened over positions
and entries; every row has its own ball, so what is found for a row does not depend on the others in its batch, nor on
padding. Of several points each has a ball of its own. In a masked model a row is one scored token of an example.

The model's parameters stay frozen: only the gradient of the perturbation is computed.
"""

import hashlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locedit import losses, tracing
from locedit.components import ComponentSet
from locedit.data.encode import Batch
from locedit.edit.restrict import frozen
from locedit.errors import LoceditError, nearest
from locedit.models import Model

POINTS = ("resid_pre", "resid_mid", "attn_out", "mlp_out")
"""Places of a block where the whole value can be perturbed, as in `points`."""
COMPONENT_POINTS = {"neuron": "mlp.hook_post", "head": "attn.hook_z", "mlp": "hook_mlp_out", "attn": "hook_attn_out"}
SCALES = (2.0**14, 2.0**7, 1.0)
"factors of the loss that are tried in float16, the first that overflows nowhere is taken"
PUBLISHED: dict[str, Any] = {
    "attack_steps": 6,
    "eps": 8.0,
    "eps_in": "norm",
    "start": "random",
    "clamp": "batch",
    "positions": "padded",
}
"""As in the paper's code for Llama-3-8B, where it acts at resid_pre of layer 4 of 32."""


@dataclass(frozen=True, kw_only=True)
class AscentOptions:
    """How hard an attack on activations tries."""

    attack_steps: int = 6
    "steps of normalised ascent; 0 with start='zero' = no attack"
    eps: float = 0.1
    "radius of the ball in which a row's perturbation stays, flattened over positions and entries"
    eps_in: Literal["tokens", "norm"] = "tokens"
    """tokens: eps times the median norm of the row's tokens at that point, so that one value suits any model (a few
    tokens can have norms hundreds of times those of the others), and of chosen components times the root of their
    share of the entries; norm (published): eps itself"""
    start: Literal["random", "zero"] = "random"
    "random (published): a Gaussian direction with a norm uniform between 0 and the radius; zero: no perturbation"
    clamp: Literal["none", "example", "batch"] = "none"
    """keep perturbed entries between the smallest and largest unperturbed entry of their own row (example), or of the
    whole batch with its padding (batch, published, which makes rows depend on each other)"""
    positions: Literal["tokens", "predicting", "padded"] = "tokens"
    """tokens: all of the text; predicting: only those that predict the answer; padded (published): all, padding too,
    which takes a part of the random start"""

    def check(self) -> None:
        """Raise LoceditError for a value that makes no sense."""
        for name, choices in (
            ("eps_in", ("tokens", "norm")),
            ("start", ("random", "zero")),
            ("clamp", ("none", "example", "batch")),
            ("positions", ("tokens", "predicting", "padded")),
        ):
            if getattr(self, name) not in choices:
                raise LoceditError(f"{name}={getattr(self, name)!r}; {nearest(str(getattr(self, name)), choices)}")
        if self.attack_steps < 0:
            raise LoceditError(f"attack_steps={self.attack_steps!r} must not be negative")
        if not self.eps > 0:
            raise LoceditError(f"eps={self.eps!r} must be above 0; for no attack take attack_steps=0 and start='zero'")

    @property
    def attacks(self) -> bool:
        """Whether there is any perturbation."""
        return self.attack_steps > 0 or self.start == "random"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a perturbation acts."""

    point: str
    "hook name, such as blocks.2.hook_resid_pre"
    index: tuple[int, ...] | None = None
    "the neurons or heads there that are perturbed; None = everything"


def places_of(components: ComponentSet) -> list[Place]:
    """The activations of a set's neurons and heads, and the outputs of its MLPs and attentions.

    Raises LoceditError for other units, which are parameters and have no activation of their own.
    """
    found: list[Place] = []
    for name, site in components.sites.items():
        if not (chosen := components.indices(name)):
            continue
        if site.unit not in COMPONENT_POINTS or site.layer is None:
            raise LoceditError(
                f"{name} has no activation that a perturbation could be added to; units: {', '.join(COMPONENT_POINTS)}"
            )
        whole = site.unit in ("mlp", "attn")
        point = f"blocks.{site.layer}.{COMPONENT_POINTS[site.unit]}"
        found.append(Place(point=point, index=None if whole else chosen))
    if not found:
        raise LoceditError("the component set is empty: there is nothing to perturb")
    return found


@contextmanager
def perturbed(model: Model, deltas: Mapping[str, Tensor]) -> Generator[None]:
    """Add each tensor, `[batch, pos, ...]` as the value at its hook point, on every forward pass of that batch."""
    with tracing.replace(model, {point: partial(_add, delta) for point, delta in deltas.items()}):
        yield


def ascend(
    model: Model, batch: Batch, places: Sequence[Place], options: AscentOptions, *, seed: int = 0
) -> dict[str, Tensor]:
    """Hook point -> the perturbation found for each row, zero where it may not act; nothing when there is no attack.

    float32 (float64 for a float64 model), detached. A row's random start depends on `seed` and its own tokens alone.
    """
    if not options.attacks:
        return {}
    with frozen(model.module):
        balls = _balls(model, batch, places, options)
        deltas = _starts(batch, balls, options, seed=seed)
        for _ in range(options.attack_steps):
            gradients = _gradients(model, batch, deltas)
            deltas = {p: balls[p].step(d, gradients[p], share=1 / options.attack_steps) for p, d in deltas.items()}
    return deltas


def _gradients(model: Model, batch: Batch, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the sum over examples of the mean over scored tokens of -log p, up to a factor: only its direction counts.

    In float16 the gradient of an answer that is almost sure underflows; there the loss is scaled first, unless that
    makes the gradient overflow.
    """
    leaves = {point: delta.detach().requires_grad_() for point, delta in deltas.items()}
    with torch.enable_grad(), perturbed(model, leaves):
        total = losses.sequence_nll(losses.score(model, batch)).sum()
        with torch.autocast(total.device.type, enabled=False):
            for scale in SCALES if _in_float16(model) else (1.0,):
                found = torch.autograd.grad(total * scale, list(leaves.values()), retain_graph=scale != 1)
                if scale == 1 or all(bool(gradient.isfinite().all()) for gradient in found):
                    return dict(zip(leaves, found, strict=True))
    raise AssertionError("the last scale is 1")


def _in_float16(model: Model) -> bool:
    """Whether values of the forward pass are float16, by the checkpoint or by autocast."""
    device = model.device.type
    return model.dtype == torch.float16 or (
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ball:
    """The perturbations that are allowed at one point."""

    where: Bool[Tensor, "batch pos ..."]
    "the entries that may move"
    radius: Float[Tensor, " batch"]
    low: Tensor | None
    high: Tensor | None
    "bounds of each entry, around 0"

    def step(self, delta: Tensor, gradient: Tensor, *, share: float) -> Tensor:
        """A share of the radius against the gradient, and back into the ball."""
        inside = gradient * self.where
        return self.project(delta - inside * _rows(share * self.radius * _inverse(_norm(inside)), delta))

    def project(self, delta: Tensor) -> Tensor:
        """The nearest perturbation with a norm of at most the radius; then between the bounds, which is not farther."""
        factor = (self.radius * _inverse(_norm(delta))).clamp(max=1)
        delta = delta * _rows(factor, delta)
        return delta if self.low is None or self.high is None else delta.clamp(self.low, self.high) * self.where


def _balls(model: Model, batch: Batch, places: Sequence[Place], options: AscentOptions) -> dict[str, _Ball]:
    with torch.no_grad(), tracing.record(model, [place.point for place in places]) as seen:
        losses.score(model, batch)
    return {place.point: _ball(model, batch, place, seen[place.point], options) for place in places}


def _ball(model: Model, batch: Batch, place: Place, value: Tensor, options: AscentOptions) -> _Ball:
    value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
    tokens = batch.attention_mask.bool().to(value.device)
    allowed = torch.ones_like(tokens) if options.positions == "padded" else tokens
    moved = batch.predicting(model.causal).to(value.device) if options.positions == "predicting" else allowed
    chosen = _chosen(place, value)
    where = moved.reshape(*moved.shape, *[1] * (value.ndim - 2)) & chosen
    radius = torch.full((len(value),), options.eps, dtype=value.dtype, device=value.device)
    if options.eps_in == "tokens":
        sizes = value.flatten(2).norm(dim=2).masked_fill(~moved, torch.nan)
        radius = radius * sizes.nanmedian(dim=1).values * chosen.expand(value.shape[2:]).to(value).mean().sqrt()
    low, high = _range(value, allowed, options.clamp)
    return _Ball(
        where=where.expand_as(value),
        radius=radius,
        low=None if low is None else low - value,
        high=None if high is None else high - value,
    )


def _chosen(place: Place, value: Tensor) -> Tensor:
    """Bool mask over the entries of one position."""
    if place.index is None:
        return torch.ones((), dtype=torch.bool, device=value.device)
    if max(place.index) >= value.shape[2]:
        raise LoceditError(
            f"{place.point} has {value.shape[2]} components (from 0), not one with number {max(place.index)}"
        )
    index = torch.tensor(place.index, device=value.device)
    mask = torch.zeros(value.shape[2], dtype=torch.bool, device=value.device).index_fill(0, index, True)
    return mask.reshape(-1, *[1] * (value.ndim - 3))


def _range(value: Tensor, allowed: Tensor, clamp: str) -> tuple[Tensor | None, Tensor | None]:
    """(smallest, largest) entry of the batch, or of each row among its allowed positions."""
    if clamp == "none":
        return None, None
    if clamp == "batch":
        return value.min(), value.max()
    flat = value.flatten(2)
    low = flat.masked_fill(~allowed[:, :, None], torch.inf).flatten(1).amin(1)
    high = flat.masked_fill(~allowed[:, :, None], -torch.inf).flatten(1).amax(1)
    return _rows(low, value), _rows(high, value)


def _starts(batch: Batch, balls: Mapping[str, _Ball], options: AscentOptions, *, seed: int) -> dict[str, Tensor]:
    deltas = {p: torch.zeros(b.where.shape, dtype=b.radius.dtype, device=b.radius.device) for p, b in balls.items()}
    if options.start == "zero":
        return deltas
    for row in range(len(batch)):
        generator = torch.Generator().manual_seed(_seed_of(batch, row, seed))
        for point, ball in balls.items():
            where = ball.where[row]
            size = torch.rand((), generator=generator, dtype=torch.float64)
            noise = torch.randn(int(where.sum()), generator=generator, dtype=torch.float64)
            deltas[point][row, where] = (size * noise / noise.norm()).to(ball.radius) * ball.radius[row]
    return {point: ball.project(deltas[point]) for point, ball in balls.items()}


def _seed_of(batch: Batch, row: int, seed: int) -> int:
    """From the row's visible tokens, so that neither padding nor the other rows of a batch matter."""
    visible = batch.ids[row][batch.attention_mask[row].bool()].tolist()
    return int.from_bytes(hashlib.sha256(f"{seed} {visible}".encode()).digest()[:7])


def _add(delta: Tensor, value: Tensor) -> Tensor:
    return value + delta.to(value)


def _norm(delta: Tensor) -> Float[Tensor, " batch"]:
    return delta.flatten(1).norm(dim=1)


def _inverse(norm: Tensor) -> Tensor:
    """1 / norm, and 0 where there is no direction."""
    return torch.where(norm > 0, 1 / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)


def _rows(values: Float[Tensor, " batch"], like: Tensor) -> Tensor:
    """One value a row, in a shape that multiplies a perturbation."""
    return values.reshape(-1, *[1] * (like.ndim - 1))

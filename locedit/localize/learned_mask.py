"""Learned mask: which neurons or heads have to go so that the data is forgotten and everything else stays.

Every neuron (at the input of the MLP's output projection) or head (its part of the input of o) gets a gate that
multiplies it at all positions, where zeroing equals zeroing its write slice. The weights are frozen; the gates, 1 at
first, are trained on

    forget + retain_weight * retain + price * (sum over the sites of the mean of 1 - gate)

and clamped to [0, 1] after every step. The score is 1 - gate: 1 = removed, 0 = kept; `select(top=k)` makes it a set of
k. Gates that ended equal are ranked by how early they closed, which takes at most 0.001 of the score.

- forget: -log(1 - P), P the probability of the whole answer, mean over the examples. It is at least 0 and its gradient
  ends with P, unlike that of gradient ascent. (Guo et al. 2024, arXiv:2410.12949, use it for single tokens; the product
  over tokens is ours.) `forget="tokens"` is its mean over the tokens instead.
- retain: KL(open gates || gates) where retain answers are predicted, mean over tokens, then examples; or their
  likelihood.
- price: on *removal*, as for the activation masks in Guo et al.'s code (weight 3, AdamW with 0.05, 50 steps). A
  component is worth removing where that lowers the rest by more than price / (components of its site), in nats. It
  rises from 0 (as in their older weight masks): where a component is so large that the norm after it saturates, the
  gradient at the open gate is small, and a full price from the start would never let it move.
  Slimming and Hard-Concrete of Chang et al. 2024 (arXiv:2311.09060) price what is *kept* (recalled, not checked) and so
  look for what suffices to say a text, another question. `gates="hard_concrete"` takes their kind of gates.

Several masks may do it, and training from open gates finds one of them; it need not be the smallest. Steps see
`per_step` examples of each side, drawn by the seed; results do not depend on how they are split into batches but for
rounding. Evidence: `training` (the terms at every step) and `levels` (what is left of forget and retain data with open
gates, the trained ones, and with the best few components removed).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import losses, progress, tracing
from locedit.components import Site
from locedit.data.encode import Batch, Example, batches, encode
from locedit.data.items import Dataset, Task
from locedit.edit.levels import levels
from locedit.edit.objective import CACHE_BYTES, ReferenceCache, Shuffled
from locedit.errors import LoceditError
from locedit.localize.baselines import POINTS
from locedit.localize.budget import BatchOptions
from locedit.localize.gates import Gates, Kind, gates
from locedit.localize.integration.blocks import weights_without_gradient
from locedit.localize.norms import NeuronOrHead
from locedit.localize.passes import pass_bytes
from locedit.losses import Scored
from locedit.models import Model
from locedit.scores import Scores, Table

EARLY = 1e-3
"share of a score that says how early the gate closed"
RATES = {"clamped": 0.05, "hard_concrete": 0.2}


@dataclass(frozen=True, kw_only=True)
class LearnedMaskOptions(BatchOptions):
    """What is gated, and how the gates are trained."""

    unit: NeuronOrHead = "neuron"
    "what is gated"
    price: float = 3.0
    "of the sum over the sites of the mean of 1 - gate; 0 = removal is free"
    ramp: float = 0.5
    "share of the steps over which the price rises from 0"
    forget: Literal["answer", "tokens"] = "answer"
    """-log(1 - P) of the whole answer, or the mean over its tokens: for long texts, whose probability is tiny from the
    start"""
    retain_weight: float = 1.0
    "of the retain term"
    retain_loss: Literal["kl", "nll"] = "kl"
    "kl: KL(open gates || gates); nll: negative log-likelihood of the retain answers"
    gates: Kind = "clamped"
    "clamped: numbers in [0, 1]; hard_concrete: random gates (Louizos et al. 2018, arXiv:1712.01312)"
    steps: int = 100
    "of the optimizer"
    lr: float | None = None
    "of Adam; None = 0.05 for clamped gates, 0.2 for hard_concrete"
    per_step: int = 64
    "examples of forget and of retain data in a step, at most"
    levels: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    "shares of all components that are removed for the evidence"
    seed: int = 0
    "of the examples in each step and of random gates"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("price", 0), ("retain_weight", 0), ("steps", 1), ("per_step", 1)):
            if getattr(self, name) < least:
                raise LoceditError(f"{name}={getattr(self, name)!r} must be at least {least}")
        if self.lr is not None and self.lr <= 0:
            raise LoceditError(f"lr={self.lr!r} must be above 0")
        if not 0 <= self.ramp <= 1:
            raise LoceditError(f"ramp={self.ramp!r} must be between 0 and 1")
        if not all(0 < share <= 1 for share in self.levels):
            raise LoceditError(f"levels={self.levels!r}: shares must be above 0 and at most 1")


def learned_mask(model: Model, task: Task, options: LearnedMaskOptions) -> Scores:
    """1 - gate of every neuron or head, trained to forget the forget data and to keep the retain data."""
    sites = list(model.sites(options.unit).values())
    forget, retain = encode(model, task.forget), encode(model, task.require("retain", by="learned_mask"))
    training = _Training(model, sites, forget, retain, options)
    with torch.enable_grad(), weights_without_gradient(model.module):
        for _ in progress.track(range(options.steps), "learned mask"):
            training.step()
    removed = [1 - value.float().cpu() for value in training.gates.values()]
    early = [total.cpu() / options.steps for total in training.closed]
    scores = Scores(
        values={
            site.name: value * (1 - EARLY * (1 - share.clamp(0, 1)))
            for site, value, share in zip(sites, removed, early, strict=True)
        },
        sites={site.name: site for site in sites},
        examples=tuple(example.id for example in forget),
        fingerprint=model.fingerprint,
    )
    table = _levels(model, scores, training, {"forget": forget, "retain": retain}, options)
    return replace(scores, evidence={"training": training.history, "levels": table})


class _Training:
    """The gates, and one step after the other."""

    def __init__(
        self,
        model: Model,
        sites: Sequence[Site],
        forget: Sequence[Example],
        retain: Sequence[Example],
        options: LearnedMaskOptions,
    ) -> None:
        self.model, self.options = model, options
        generator = torch.Generator().manual_seed(options.seed)
        counts = [site.count for site in sites]
        self.gates: Gates = gates(options.gates, counts, device=model.device, generator=generator)
        self.points = [f"blocks.{site.layer}.{POINTS[options.unit]}" for site in sites]
        self.optimizer = torch.optim.Adam(self.gates.parameters, lr=options.lr or RATES[options.gates], eps=1e-5)
        self.forget = Shuffled(forget, options.per_step, generator)
        self.retain = Shuffled(retain, options.per_step, generator)
        self.rows = options.rows(pass_bytes(model, [*forget, *retain], gradient=True))
        self.cache = ReferenceCache(model.causal)
        self.closed = [torch.zeros_like(gate) for gate in self.gates.values()]
        "the sum over the steps of 1 - gate"
        self.history: Table = {name: [] for name in ("step", "forget", "retain", "price", "removed")}

    def step(self) -> None:
        """Draw examples and gates, add up gradients batch by batch, move the gates."""
        drawn = self.gates.draw()
        leaves = [gate.detach().requires_grad_() for gate in drawn]
        forget = self._add(next(self.forget), leaves, self._forget_loss, weight=1.0)
        retain = self._add(next(self.retain), leaves, self._retain_loss, weight=self.options.retain_weight)
        price = self.options.price * self._risen() * self.gates.closed()
        self.optimizer.zero_grad()
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        torch.autograd.backward([*drawn, price], [*gradients, torch.ones_like(price)])
        self.optimizer.step()
        self.gates.settle()
        now = [1 - gate for gate in self.gates.values()]
        for total, value in zip(self.closed, now, strict=True):
            total += value
        row = (len(self.history["step"]) + 1, forget, retain, price.item(), sum(float(value.sum()) for value in now))
        for column, value in zip(self.history.values(), row, strict=True):
            column.append(value)

    def _risen(self) -> float:
        """Which part of the price is due at this step."""
        rising = self.options.ramp * self.options.steps
        return min(1.0, len(self.history["step"]) / rising) if rising else 1.0

    def _add(self, examples: Sequence[Example], leaves: Sequence[Tensor], loss: Any, *, weight: float) -> float:
        """The mean loss of the examples; its gradient, times the weight, is added to the leaves."""
        if not weight:
            return 0.0
        total = 0.0
        for batch in batches(examples, self.model, self.rows):
            value = loss(batch.to(self.model.device), leaves).sum() / len(examples)
            (weight * value).backward()
            total += float(value.detach())
        return total

    def _forget_loss(self, batch: Batch, leaves: Sequence[Tensor]) -> Float[Tensor, " rows"]:
        with gated(self.model, self.points, leaves):
            scored = losses.score(self.model, batch)
        return bounded(scored, whole=self.options.forget == "answer")

    def _retain_loss(self, batch: Batch, leaves: Sequence[Tensor]) -> Float[Tensor, " rows"]:
        if self.options.retain_loss == "nll":
            with gated(self.model, self.points, leaves):
                return losses.sequence_nll(losses.score(self.model, batch))
        open_gates = self.cache.score(batch, self._open)
        with gated(self.model, self.points, leaves):
            scored = losses.score(self.model, batch)
        return losses.per_example(scored, losses.kl(scored.logits, open_gates.logits))

    @torch.no_grad()
    def _open(self, batch: Batch) -> Scored:
        return losses.score(self.model, batch)


def gated(model: Model, points: Sequence[str], gates: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Inside, the values at the hook points are multiplied by the gates, `[neuron]` or `[head]` each."""
    factors = {
        point: gate[:, None] if point.endswith("hook_z") else gate for point, gate in zip(points, gates, strict=True)
    }
    return tracing.scale(model, factors)


def bounded(scored: Scored, *, whole: bool) -> Float[Tensor, " rows"]:
    """-log(1 - P) of each example, P the probability of all its tokens together; or the mean of -log(1 - p) over them.

    log(1 - p) of a token is the log-probability of all others; 1 - P is the sum over the tokens of the probability that
    all before are right and this one is wrong. So nothing is lost where P rounds to 1.
    """
    right = losses.token_log_probs(scored)
    logits = scored.logits if scored.logits.dtype == torch.float64 else scored.logits.float()
    others = logits.scatter(1, scored.labels[:, None], -torch.inf)
    wrong = others.logsumexp(1) - logits.logsumexp(1)
    if not whole:
        return losses.per_example(scored, -wrong)
    parts: list[Tensor] = []
    for number in range(len(scored.rows)):
        own = scored.row == number
        before = right[own].cumsum(0) - right[own]
        parts.append(-(before + wrong[own]).logsumexp(0))
    return torch.stack(parts)


def _levels(
    model: Model,
    scores: Scores,
    training: _Training,
    examples: Mapping[str, Sequence[Example]],
    options: LearnedMaskOptions,
) -> Table:
    """Mean answer probability (per token for forget="tokens") with gates open, as trained, and k components removed."""
    found: Table = {"gates": [], "components": [], "forget": [], "retain": []}
    if not options.levels:
        return found
    closing = int(sum((value > 0).sum() for value in scores.values.values()))
    counts = sorted({max(1, round(share * len(scores))) for share in options.levels})
    trained = training.gates.values()
    masks: list[tuple[str, int, list[Tensor]]] = [("open", 0, [torch.ones_like(gate) for gate in trained])]
    masks.append(("trained", closing, trained))
    for count in counts:
        if count <= closing:
            chosen = scores.select(top=count)
            gone = [torch.tensor(chosen.indices(name), dtype=torch.long) for name in scores.values]
            hard = [
                torch.ones(gate.numel()).index_fill_(0, at, 0.0).to(gate)
                for gate, at in zip(trained, gone, strict=True)
            ]
            masks.append(("removed", count, hard))
    level = "probability" if options.forget == "answer" else "token_probability"
    for name, count, values in masks:
        with gated(model, training.points, values):
            left = levels(model, examples, level=level, batch_size=training.rows)
        for column, value in zip(found.values(), (name, count, left["forget"], left["retain"]), strict=True):
            column.append(value)
    return found


def memory(model: Model, items: Dataset, options: LearnedMaskOptions) -> int:
    """Bytes of one batch, of the gates with their optimizer, and of the reference logits that are kept."""
    examples = encode(model, items)
    count = sum(1 if model.causal else len(example.targets) for example in examples)
    components = sum(site.count for site in model.sites(options.unit).values())
    batch = options.bytes(pass_bytes(model, examples, gradient=True), min(options.batch, max(count, options.per_step)))
    return batch + 24 * components + (CACHE_BYTES if options.retain_loss == "kl" else 0)


def trial(options: LearnedMaskOptions) -> tuple[LearnedMaskOptions, float]:
    """Two steps without evidence, and how much longer all steps take."""
    return replace(options, steps=2, levels=()), options.steps / 2

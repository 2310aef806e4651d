"""The one trainer: any loss, on any component set or the whole model, held as weights or as a LoRA adapter.

Small float32 tensors are trained beside the frozen model (restrict.py, adapter.py). Levels are measured, and training
stops, on the edit as it would be saved: rounded to the model's dtype.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from locedit import progress
from locedit.components import ComponentSet, Table
from locedit.edit.adapter import Factors, Lora
from locedit.edit.edit import Edit, Patch
from locedit.edit.levels import LEVELS, Level, levels
from locedit.edit.objective import MakeFactors, Objective, Others, ReferenceCache, Shuffled, Step
from locedit.edit.regions import regions, require_same_model, whole
from locedit.edit.restrict import Deltas, Path, frozen, require_gradient
from locedit.errors import LoceditError, nearest
from locedit.models import Model
from locedit.provenance import measure, plain

log = logging.getLogger(__name__)

HOLDS = ("weights", "adapter")
Schedule = Literal["constant", "linear", "cosine"]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
LOST_LIMIT = 0.1
"""Above this share of change lost to rounding, a float32 adapter is proposed."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How long and how hard to train."""

    steps: int = 100
    "optimizer steps at most"
    learning_rate: float = 1e-3
    batch_size: int = 8
    "examples of forget, and of retain, in one forward; pairs count as one where a method reads both sides"
    accumulate: int = 1
    "batches averaged in one optimizer step"
    optimizer: Literal["adamw", "rmsprop", "sgd"] = "adamw"
    weight_decay: float = 0.0
    "decoupled, as in AdamW, with every optimizer"
    decay: Literal["base", "weights"] = "base"
    "what decays inside the set: the change, or the weights themselves"
    clip: float | None = 1.0
    "largest norm of the restricted gradient; None = as it is"
    schedule: Schedule = "constant"
    "of the learning rate: constant, or down to 0 at the last step"
    warmup: int = 0
    "steps over which the learning rate rises linearly"
    until: float | None = None
    """stop once the mean answer probability on the forget data is at or below this; of contrast pairs, the mean
    preference for the advantaged side"""
    eval_every: int = 10
    "steps between two measurements of the levels; 0 = only before and after"
    level: Level = "probability"
    "what is measured: probability of the whole answer, or token_probability"
    seed: int = 0
    gradient_checkpointing: bool = False
    "recompute activations in the backward pass instead of keeping them"
    rank: int = 8
    "of a LoRA adapter"
    alpha: float = 16.0
    "of a LoRA adapter: the change is alpha / rank times B A"
    path: Path = "auto"
    "how deltas act: auto, hooks where possible, or scatter"

    def __post_init__(self) -> None:
        for name, choices in (
            ("optimizer", tuple(OPTIMIZERS)),
            ("decay", ("base", "weights")),
            ("schedule", ("constant", "linear", "cosine")),
            ("level", LEVELS),
            ("path", ("auto", "hooks", "scatter")),
        ):
            if getattr(self, name) not in choices:
                raise LoceditError(f"{name}={getattr(self, name)!r}; {nearest(str(getattr(self, name)), choices)}")
        for name in ("steps", "batch_size", "accumulate", "rank"):
            if getattr(self, name) < 1:
                raise LoceditError(f"{name}={getattr(self, name)!r} must be at least 1")
        for name in ("warmup", "eval_every", "weight_decay"):
            if getattr(self, name) < 0:
                raise LoceditError(f"{name}={getattr(self, name)!r} must not be negative")
        if not self.learning_rate > 0:
            raise LoceditError(f"learning_rate={self.learning_rate!r} must be above 0")

    def rate(self, step: int) -> float:
        """Learning rate of step 1, 2, ..."""
        if step <= self.warmup:
            return self.learning_rate * step / self.warmup
        done = (step - 1 - self.warmup) / max(1, self.steps - self.warmup)
        share = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.learning_rate * share[self.schedule]


def train(
    model: Model,
    objective: Objective,
    *,
    within: ComponentSet | None = None,
    options: TrainOptions | None = None,
    hold: str = "weights",
) -> Edit:
    """Minimise the objective inside the set (None = the whole model) and return the change as an Edit.

    The model is the same, bit for bit, before and after. The edit's `history` has one row for every step, beginning
    with step 0: the loss terms with which the step was made (nats, batch means), the norm of the restricted gradient
    before clipping, and for measured steps the level of every probe afterwards, on the edit as saved.

    Raises LoceditError when the loss is not a finite number, or no parameter of the set influences it.
    """
    options = options or TrainOptions()
    if hold not in HOLDS:
        raise LoceditError(f"hold={hold!r}; {nearest(str(hold), HOLDS)}")
    if not objective.forget:
        raise LoceditError(f"{objective.name}: there is nothing to train on")
    if options.until is not None and "forget" not in objective.probes:
        raise LoceditError(f"{objective.name}: until={options.until!r} needs forget data whose level can be measured")
    settings = plain(options) | dict(objective.settings) | {"hold": hold}
    with measure(objective.name, model=model, data=objective, settings=settings, seed=options.seed) as measured:
        run = Run(model, objective, within=within, options=options, hold=hold)
        run.train()
    return dataclasses.replace(run.edit(), provenance=measured.provenance)


class Run:
    """The state of one training: trainable tensors, optimizer, random generator, batches, history."""

    def __init__(
        self, model: Model, objective: Objective, *, within: ComponentSet | None, options: TrainOptions, hold: str
    ) -> None:
        self.model, self.objective, self.within, self.options = model, objective, within, options
        self.generator = torch.Generator().manual_seed(options.seed)
        self.held = _hold(
            model, within, options=options, hold=hold, generator=self.generator, factors=objective.factors
        )
        make = OPTIMIZERS[options.optimizer]
        decay = {"weight_decay": 0.0}  # decay is the trainer's own, so that it means the same with every optimizer
        self.optimizer = make(self.held.parameters, lr=options.learning_rate, **decay)
        together = objective.together
        self.forget = Shuffled(objective.forget, options.batch_size, self.generator, together=together)
        self.retain = Shuffled(objective.retain, options.batch_size, self.generator) if objective.retain else None
        self.others = Others(objective.others, options.batch_size, self.generator)
        self.state: dict[str, Any] = {}
        self.cache = ReferenceCache(model.causal)
        self.rows: list[dict[str, float | None]] = []
        self.unreached = 0
        self.reached: bool | None = None

    def train(self) -> None:
        """Run to the last step or to the forget level."""
        with frozen(self.model.module), _mode(self.model.module, checkpoint=self.options.gradient_checkpointing):
            self._record({"step": 0}, measured=True)
            while len(self.rows) <= self.options.steps and not self.reached:
                number = len(self.rows)
                row = self.step(number)
                every = self.options.eval_every
                self._record(row, measured=number == self.options.steps or (every > 0 and number % every == 0))
                progress.report(self.objective.name, number, self.options.steps)
        self._warn()

    def step(self, number: int) -> dict[str, float | None]:
        """One optimizer step; returns its history row without levels."""
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, float] = {}
        for _ in range(self.options.accumulate):
            for name, value in self._backward(number).items():
                terms[name] = terms.get(name, 0.0) + value / self.options.accumulate
        self.unreached = require_gradient(self.held, by=self.objective.name)
        limit = math.inf if self.options.clip is None else self.options.clip
        norm = float(nn.utils.clip_grad_norm_(self.held.parameters, limit))
        if not math.isfinite(norm):
            raise LoceditError(
                f"{self.objective.name}: the gradient is {norm} at step {number}; {_advice(self.options)}"
            )
        rate = self.options.rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.options.weight_decay:
            self.held.decay(rate * self.options.weight_decay, towards=self.options.decay)
        self.optimizer.step()
        self.held.constrain()
        return {"step": number, "learning_rate": rate, "loss": sum(terms.values()), **terms, "gradient_norm": norm}

    def _backward(self, number: int) -> dict[str, float]:
        """Forward and backward of one batch; returns the value of each loss term."""
        forget = self.forget.batch(self.model)
        step = Step(
            number=number,
            forget=forget,
            retain=self.retain.batch(self.model) if self.retain else None,
            model=self.model,
            generator=self.generator,
            held=self.held,
            cache=self.cache,
            others=self.others.batches(self.model, forget),
            state=self.state,
        )
        with torch.enable_grad(), self.held.active():
            terms = self.objective.loss(step)
            total = torch.stack([term.to(self.model.device) for term in terms.values()]).sum()
            _require_finite(terms, name=self.objective.name, step=number, options=self.options)
            if total.requires_grad:
                (total / self.options.accumulate).backward()
        return {name: float(term.detach()) for name, term in terms.items()}

    def _record(self, row: dict[str, float | None], *, measured: bool) -> None:
        """Add a row to the history, with the levels of the edit as saved; note whether the forget level is reached."""
        probes = self.objective.probes if measured else {}
        stop = self.objective.stop if measured else None
        if probes or stop:
            with self.held.saved():
                row = row | levels(self.model, probes, level=self.options.level)
                columns, stopped = stop(self.model) if stop is not None else ({}, False)
                row = row | columns
                self.reached = stopped if stop is not None else None
        self.rows.append(row)
        level = row.get("forget") if probes else None
        if self.options.until is not None and level is not None:
            self.reached = bool(self.reached) or level <= self.options.until

    def _warn(self) -> None:
        lost, name, until = self.held.lost(), self.objective.name, self.options.until
        if lost > LOST_LIMIT:
            log.warning(
                "%s: %.0f %% of the changed weights are the same after rounding to %s; hold='adapter' keeps float32",
                name, 100 * lost, self.model.dtype,
            )  # fmt: skip
        if self.unreached:
            log.warning("%s: no gradient reached %d of %d tensors", name, self.unreached, len(self.held.parameters))
        if self.reached is False:
            last = next(row["forget"] for row in reversed(self.rows) if row.get("forget") is not None)
            log.warning("%s: forget level %.3g after %d steps, not %s", name, last, self.options.steps, until)
        if self.reached and len(self.rows) == 1:
            log.warning("%s: the model is at forget level %s already; nothing was trained", name, until)

    def edit(self) -> Edit:
        """The change so far."""
        outcome: dict[str, Any] = {"steps": len(self.rows) - 1, "lost_to_rounding": self.held.lost()}
        if self.options.until is not None:
            outcome |= {"until": self.options.until, "reached": bool(self.reached)}
        common: dict[str, Any] = {
            "fingerprint": self.model.fingerprint,
            "within": self.within,
            "history": _table(self.rows),
            "outcome": outcome,
        }
        if isinstance(self.held, Factors):
            return Edit(kind="adapter", adapters=self.held.adapters(), **common)
        rows = zip(self.held.regions, self.held.values(), self.held.parameters, strict=True)
        patches = tuple(Patch(region=r, values=v.cpu(), delta=d.detach().cpu().clone()) for r, v, d in rows)
        return Edit(kind="weights", patches=patches, **common)


def _hold(
    model: Model,
    within: ComponentSet | None,
    *,
    options: TrainOptions,
    hold: str,
    generator: torch.Generator,
    factors: MakeFactors | None,
) -> Deltas | Factors:
    if within is not None:
        require_same_model(model, within)
    if hold == "adapter" and factors is not None:
        return factors(within, generator)
    if hold == "adapter":
        return Lora(model, within, rank=options.rank, alpha=options.alpha, generator=generator)
    places = whole(model.anatomy.parameters) if within is None else regions(within, role="train")
    return Deltas(model, places, path=options.path)


@contextmanager
def _mode(module: nn.Module, *, checkpoint: bool) -> Generator[None]:
    """Evaluation mode (no dropout), with the blocks alone in training mode when activations are checkpointed."""
    before = {part: part.training for part in module.modules()}
    module.eval()
    with ExitStack() as stack:
        stack.callback(lambda: [setattr(part, "training", mode) for part, mode in before.items()])
        if checkpoint:
            stack.enter_context(_checkpointing(module))
            for part in module.modules():
                if getattr(part, "gradient_checkpointing", False):
                    part.training = True
        yield


@contextmanager
def _checkpointing(module: nn.Module) -> Generator[None]:
    """Transformers' recomputation of each block's activations, by the name that this version has for it."""
    new = hasattr(module, "activation_checkpointing_enable")
    word = "activation_checkpointing" if new else "gradient_checkpointing"
    getattr(module, f"{word}_enable")(**{f"{word}_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        getattr(module, f"{word}_disable")()


def _require_finite(terms: Mapping[str, Tensor], *, name: str, step: int, options: TrainOptions) -> None:
    for term, value in terms.items():
        if not bool(torch.isfinite(value)):
            raise LoceditError(f"{name}: the loss term {term!r} is {value.item()} at step {step}; {_advice(options)}")


def _advice(options: TrainOptions) -> str:
    return f"try a learning rate below {options.learning_rate:g}; the model is unchanged"


def _table(rows: list[dict[str, float | None]]) -> Table:
    """Rows as columns, None where a row has no such value."""
    names = list(dict.fromkeys(name for row in reversed(rows) for name in row))
    names.sort(key=lambda name: name != "step")
    return {name: [row.get(name) for row in rows] for name in names}

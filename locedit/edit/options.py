"""The options of training: how long, how hard, how precisely, and which state is returned."""

import math
from dataclasses import dataclass
from typing import Literal

from locedit.edit.levels import LEVELS, Level
from locedit.edit.restrict import Path
from locedit.errors import LoceditError, nearest

Choice = Literal["last", "level", "retain", "forget"]
Match = Literal["step", "interpolate"]
Precision = Literal["model", "bfloat16", "float16"]
Schedule = Literal["constant", "linear", "cosine"]
OPTIMIZERS = ("adamw", "rmsprop", "sgd")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How long and how hard to train."""

    steps: int = 100
    "optimizer steps at most"
    learning_rate: float = 1e-3
    "at its highest"
    batch_size: int = 8
    "examples of forget, and of retain, in one forward; pairs count as one where a method reads both sides"
    accumulate: int = 1
    "batches averaged in one optimizer step"
    optimizer: Literal["adamw", "rmsprop", "sgd"] = "adamw"
    "adamw, rmsprop or plain sgd, each with PyTorch's other defaults"
    weight_decay: float = 0.0
    "decoupled, as in AdamW, with every optimizer"
    decay: Literal["base", "weights"] = "base"
    "what decays inside the set: the change, or the weights themselves"
    clip: float | None = 1.0
    "largest norm of the restricted gradient; None = as it is"
    schedule: Schedule = "constant"
    "of the learning rate: constant, or down to 0 at the last step"
    warmup: int = 0
    "steps over which the learning rate rises linearly, at most `steps`"
    until: float | None = None
    """stop once the mean answer probability on the forget data is at or below this; of contrast pairs, the mean
    preference for the advantaged side"""
    match: Match = "step"
    """what is returned when `until` is reached: step, the first measured state at or below it; interpolate, the mixture
    of that state and the measured one before it whose level is at most 2 % below it"""
    choose: Choice = "last"
    """which measured state is returned: last; level, the first whose forget level is at most `forget_at`; retain, of
    those the one with the best retain level; forget, the one with the lowest forget level among those that keep
    `retain_share` of the retain level"""
    forget_at: float | None = None
    "forget level of choose='level' and 'retain', in the unit of `until`; training goes on below it"
    retain_share: float = 0.9
    "for choose='forget': the least retain level, as a share of that before training, at most 1"
    eval_every: int = 10
    "steps between two measurements of the levels; 0 = only before and after"
    level: Level = "probability"
    "what is measured: probability of the whole answer, or token_probability"
    seed: int = 0
    "of the order of the examples and of everything else that is drawn at random"
    precision: Precision = "model"
    """of forward and backward: model, the dtype it was loaded in; bfloat16 or float16, mixed: products of a float32
    model in half precision, while changes, optimizer, losses and measured levels stay in float32"""
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
            ("optimizer", OPTIMIZERS),
            ("decay", ("base", "weights")),
            ("schedule", ("constant", "linear", "cosine")),
            ("match", ("step", "interpolate")),
            ("choose", ("last", "level", "retain", "forget")),
            ("level", LEVELS),
            ("precision", ("model", "bfloat16", "float16")),
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
        for name in ("learning_rate", "retain_share", "alpha"):
            if not getattr(self, name) > 0:
                raise LoceditError(f"{name}={getattr(self, name)!r} must be above 0")
        if self.clip is not None and not self.clip > 0:
            raise LoceditError(f"clip={self.clip!r} must be above 0; none = the gradient as it is")
        if self.warmup > self.steps:
            raise LoceditError(f"warmup={self.warmup!r} must be at most steps={self.steps!r}")
        if self.retain_share > 1:
            raise LoceditError(f"retain_share={self.retain_share!r} must be at most 1, the level before training")
        for name in ("until", "forget_at"):
            if (level := getattr(self, name)) is not None and not 0 <= level <= 1:
                raise LoceditError(f"{name}={level!r} is a level, from 0 to 1")
        self._check_choice()

    def _check_choice(self) -> None:
        if self.match == "interpolate" and (self.until is None or self.choose != "last"):
            raise LoceditError("match='interpolate' needs until=LEVEL, and goes with choose='last' only")
        wants = self.choose in ("level", "retain")
        if wants and self.forget_at is None:
            raise LoceditError(f"choose={self.choose!r} needs forget_at=LEVEL")
        if self.forget_at is not None and not wants:
            raise LoceditError(f"forget_at={self.forget_at!r} is of choose='level' and choose='retain'")

    def rate(self, step: int) -> float:
        """Learning rate of step 1, 2, ..."""
        if step <= self.warmup:
            return self.learning_rate * step / self.warmup
        done = (step - 1 - self.warmup) / max(1, self.steps - self.warmup)
        share = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.learning_rate * share[self.schedule]

"""How hard the relearning attacker tries."""

from dataclasses import dataclass
from typing import Literal

from locedit.errors import LoceditError

Metric = Literal["accuracy", "probability", "memorization_accuracy"]


@dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """What attacks have in common: their controls and their intervals."""

    controls: bool = True
    "attack items that the model never knew, and an edit made to come back, for comparison"
    shallow: bool = True
    "whether the edit made to come back is among the controls; it costs its training and as many runs as the edit"
    shallow_steps: int = 200
    "training steps of that edit at most"
    shallow_learning_rate: float = 1e-3
    draws: int = 2000
    "bootstrap samples behind the interval"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("shallow_steps", "draws"):
            if getattr(self, name) < 1:
                raise LoceditError(f"{name}={getattr(self, name)!r} must be at least 1")
        if self.shallow_learning_rate <= 0:
            raise LoceditError(f"shallow_learning_rate={self.shallow_learning_rate!r} must be above 0")


def check_floor(retain_floor: float) -> None:
    """Raises LoceditError for a floor that is no share."""
    if not 0 <= retain_floor <= 1:
        raise LoceditError(f"retain_floor={retain_floor!r} must be a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class RelearnOptions(ControlOptions):
    """How hard the attacker tries."""

    splits: int = 2
    "random halves, in mirrored pairs; an even number"
    items: int | None = None
    "relearned items at most, drawn from the half; None = all of it"
    steps: int = 60
    "optimizer steps at most"
    learning_rates: tuple[float, ...] = (2e-4, 1e-3)
    "all are tried; see `retain_floor`"
    look_every: int = 10
    "steps between two looks at the other half"
    batch_size: int = 16
    "relearned items, and as many retain items, in a step"
    retain_weight: float = 1.0
    "weight of the retain items in the loss; 0 = they are not trained on"
    retain_floor: float = 0.9
    "a dose counts only where the retain metric is at least this share of what it was before the attack"
    retain_measured: int = 100
    "retain items, none of them trained on, at most in that measurement"
    hold: Literal["auto", "full", "lora"] = "auto"
    "what is trained: every weight, or LoRA factors; auto = every weight where it fits in memory"
    lora_rank: int = 16
    metric: Literal["auto", "accuracy", "probability", "memorization_accuracy"] = "auto"
    "auto: accuracy for facts, memorization_accuracy for private texts"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "look_every", "batch_size", "lora_rank"):
            if getattr(self, name) < 1:
                raise LoceditError(f"relearn: {name}={getattr(self, name)!r} must be at least 1")
        if self.items is not None and self.items < 1:
            raise LoceditError(f"relearn: items={self.items!r} must be at least 1")
        if self.splits < 2 or self.splits % 2:
            raise LoceditError(f"relearn: splits={self.splits!r} must be an even number: splits come in mirrored pairs")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise LoceditError(f"relearn: learning_rates={self.learning_rates!r} must be one or more positive numbers")
        check_floor(self.retain_floor)

    @property
    def looks(self) -> tuple[int, ...]:
        """The steps after which the other half is measured."""
        return tuple(sorted({*range(0, self.steps, self.look_every), self.steps}))

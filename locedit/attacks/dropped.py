"""What the attacks that drop a control token or layers share: options and words."""

from dataclasses import dataclass
from typing import Literal

from locedit.edit.edit import Addition
from locedit.errors import LoceditError
from locedit.rewards import RewardOptions

WORDS: dict[Addition, tuple[str, str]] = {
    "token": ("Without the control token", "a control token"),
    "layer": ("Without the added layers", "added layers"),
}


@dataclass(frozen=True, kw_only=True)
class DropOptions(RewardOptions):
    """What is measured once it is dropped; the reward, samples and top_p are of habit_rate."""

    metric: Literal["auto", "accuracy", "probability", "memorization_accuracy", "habit_rate"] = "auto"
    """auto: habit_rate where the task has prompts and the reward is the one that the edit was made with, else accuracy
    for facts and memorization_accuracy for private texts; habit_rate, the share of sampled responses to the task's
    prompts that the reward calls bad"""
    samples: int = 4
    "responses that are drawn for each prompt"
    top_p: float = 0.9
    "responses are drawn from the likeliest tokens of this probability together; as in `locedit evaluate`"
    draws: int = 2000
    "bootstrap samples behind the interval"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("draws", "samples"):
            if getattr(self, name) < 1:
                raise LoceditError(f"{name}={getattr(self, name)!r} must be at least 1")

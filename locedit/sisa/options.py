"""How shards are cut and trained."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from locedit.edit.options import OPTIMIZERS, TrainOptions
from locedit.errors import LoceditError, nearest


@dataclass(frozen=True, kw_only=True)
class SisaOptions:
    """Shards, slices, and the training of each slice."""

    shards: int = 5
    "disjoint parts of the data, one member each"
    slices: int = 4
    "parts of a shard; after each there is a checkpoint"
    epochs: float = 10.0
    """passes over a whole shard that the training of a member costs: slice r of R trains on slices 1 to r for about
    2 epochs / (R + 1) passes, so at least (R + 1) / 2"""
    learning_rate: float = 1e-3
    "constant"
    batch_size: int = 16
    "items in one step"
    optimizer: Literal["adamw", "rmsprop", "sgd"] = "adamw"
    "made afresh for every slice, so that no state of it outlives a deleted item"
    weight_decay: float = 0.0
    "decoupled, of the change"
    clip: float | None = 1.0
    "largest norm of the gradient; None = as it is"
    rank: int = 8
    "of a LoRA adapter"
    alpha: float = 16.0
    "of a LoRA adapter: the change is alpha / rank times B A"
    seed: int = 0
    "of the cut into shards and slices, and of the order in each slice"

    def __post_init__(self) -> None:
        for name in ("shards", "slices"):
            if getattr(self, name) < 1:
                raise LoceditError(f"{name}={getattr(self, name)!r} must be at least 1")
        if self.optimizer not in OPTIMIZERS:
            raise LoceditError(f"optimizer={self.optimizer!r}; {nearest(self.optimizer, OPTIMIZERS)}")
        least = (self.slices + 1) / 2
        if not math.isfinite(self.epochs) or self.epochs < least:
            raise LoceditError(f"epochs={self.epochs!r}: {self.slices} slices need at least {least:g}, one pass each")
        self.training(steps=1, seed=0)  # its own checks

    def passes(self) -> list[int]:
        """Passes of each slice over what it trains on: differences of floor(r * 2 E / (R + 1)).

        Their sum over slices, weighted with the share of the shard that each trains on, is about E.
        """
        each = 2 * Fraction(str(self.epochs)) / (self.slices + 1)  # a float's product may fall short of a whole number
        return [math.floor((number + 1) * each) - math.floor(number * each) for number in range(self.slices)]

    def steps(self, number: int, *, items: int) -> int:
        """Optimizer steps of a slice that trains on so many items: the fewest that make its passes.

        Batches go on across the end of a pass, and hold no more than all items.
        """
        drawn = self.passes()[number] * items
        return -(-drawn // max(1, min(items, self.batch_size)))

    def training(self, *, steps: int, seed: int) -> TrainOptions:
        """The trainer's options for one slice."""
        return TrainOptions(
            steps=steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            clip=self.clip,
            rank=self.rank,
            alpha=self.alpha,
            eval_every=0,
            seed=seed,
        )

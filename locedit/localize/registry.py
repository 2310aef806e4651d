"""What a localizer is: one entry of the registry."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from locedit.data.items import Dataset, Task
from locedit.models import Model
from locedit.scores import Scores


@dataclass(frozen=True, kw_only=True)
class Localizer:
    """One entry of the registry."""

    function: Callable[[Model, Task, Any], Scores]
    options: type[Any]
    "a frozen dataclass"
    summary: str
    "one line"
    requires: tuple[str, ...] = ()
    "parts of a task that it reads"
    pairs: bool = False
    "whether it reads the task's pairs in the place of the forget data where their kind fits"
    memory: Callable[[Model, Dataset, Any], int] | None = None
    "(model, items, options) -> bytes beside the model that a run needs at most; None = little more than the scores"
    trial: Callable[[Any], tuple[Any, float]] | None = None
    """options -> options for a brief run on all the data, and how much longer the full run takes; None = what takes
    time is the number of items"""
    seconds: Callable[[Model, Task, Any], float] | None = None
    "(model, task, options) -> how long a run takes, where neither a few items nor a brief run tells; None = they do"
    kinds: tuple[str, ...] = ()
    "kinds of items it can read; empty = any"
    units: tuple[str, ...] = ("neuron",)
    "units it can score"
    causal: bool | None = None
    "True = causal models only, False = masked models only"
    paper: str = ""

    def reads(self, task: Task) -> tuple[str, Dataset]:
        """The role and the data set that this localizer scores."""
        fits = task.pairs is not None and (not self.kinds or task.pairs.kind in self.kinds)
        role = "pairs" if self.pairs and fits else "forget"
        return role, task.require(role, by="localize")

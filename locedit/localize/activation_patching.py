"""Activation patching: the effect of carrying one component's value from one run of a pair of prompts into the other.

What is scored, averaged over the items as a share of the total effect (metric of the clean minus the corrupt run):
*denoise* patches the corrupt run with values of the clean one: how much of the metric comes back, which finds
components that suffice. *noise* patches the clean run with values of the corrupt one: how much of the metric is lost,
which finds components that are needed (the names and the advice are of Heimersheim and Nanda 2024, arXiv:2404.15255).
1 = all of it, 0 = nothing, below 0 = the component works against the answer.
"""

from dataclasses import dataclass
from typing import Literal

from locedit.data.items import Task
from locedit.localize.patching.exact_patching import ExactOptions, exact
from locedit.models import Model
from locedit.scores import Scores

Direction = Literal["denoise", "noise"]


@dataclass(frozen=True, kw_only=True)
class ActivationPatchingOptions(ExactOptions):
    """Which run is patched, what in it, and where."""

    direction: Direction = "denoise"
    "denoise: clean values into the corrupt run; noise: corrupt values into the clean run"


def activation_patching(model: Model, task: Task, options: ActivationPatchingOptions) -> Scores:
    """Scores of every component; the items, the null control and, on demand, every position as evidence."""
    base = "corrupt" if options.direction == "denoise" else "clean"
    return exact(model, task, options, base=base, what="activation patching")

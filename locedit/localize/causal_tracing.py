"""Causal tracing: which components, restored to their clean value in a corrupted run, bring the answer back.

What is scored: for each component the metric of the corrupted run with the component's value of the clean run, minus
the metric of the corrupted run (Meng et al. 2022, arXiv:2202.05262, section 2: the indirect effect), averaged over the
corruptions of an item, then over the items; as a share of the total effect, clean minus corrupted run. 1 = the
component alone restores all, 0 = it does nothing, below 0 = it makes the answer less likely.

The noise of an item is the same in its corrupted run and in every run that is patched, and every item is measured by
its own answer. The code of Guo et al. 2024 (arXiv:2410.12949) draws it anew for each run, which adds one constant to
the score of every component, and measures each item by the answers of its whole batch.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from locedit.data.items import Task
from locedit.localize.patching.exact_patching import ExactOptions, exact
from locedit.localize.patching.pairs import Corrupt, Metric
from locedit.models import Model
from locedit.scores import Scores


@dataclass(frozen=True, kw_only=True)
class CausalTracingOptions(ExactOptions):
    """How to corrupt, what to restore, and where."""

    auto: ClassVar[Literal["swap", "noise"]] = "noise"
    corrupt: Corrupt = "auto"
    """noise: on the embeddings of the subject; swap: another fact's subject, of the same group and as many tokens;
    given: the corrupt prompt of patch items; auto: given for patch items, else noise"""
    metric: Metric = "probability"
    "of each item's own answer: probability, its natural logarithm, or its logit minus that of the wrong answer"


def causal_tracing(model: Model, task: Task, options: CausalTracingOptions) -> Scores:
    """Scores of every component; the items, the null control and, on demand, every position as evidence."""
    return exact(model, task, options, base="corrupt", what="causal tracing")

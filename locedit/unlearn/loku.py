"""LoKU: the inverted hinge loss, trained in low-rank factors that start at FILA's (Cha et al. 2025, arXiv:2408.06621).

The paper trains all linear maps of the blocks at rank 4 to 32, alpha = 2 rank, the two losses 1 to 1. Beside its random
draws the release differs where `FilaOptions` says so, and in that it keeps a residual model as base, with which its
evaluation does not always pair the factors; here the base is the original model (see `locedit.edit.fila`).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from locedit.data.items import Task
from locedit.edit.objective import Objective, Step
from locedit.models import Model
from locedit.unlearn import grad_diff, ihl
from locedit.unlearn.fila import FilaOptions, Start
from locedit.unlearn.registry import ForgetOptions, above_zero, one_of

LOSSES = {"ihl": ihl.loss, "grad_diff": grad_diff.loss}


@dataclass(frozen=True, kw_only=True)
class LokuOptions(FilaOptions, ForgetOptions):
    """Of the loss, of training and of the factors."""

    learning_rate: float = 1e-4
    "the paper's for Llama-2-7B; 2e-4 for phi-1.5"
    loss: Literal["ihl", "grad_diff"] = "ihl"
    "on the forget data: the inverted hinge, or the paper's ablation, plain ascent"

    def __post_init__(self) -> None:
        FilaOptions.__post_init__(self)
        ForgetOptions.__post_init__(self)
        one_of(self, "loss", tuple(LOSSES))
        above_zero(self, "alpha")


def loss(step: Step, options: LokuOptions) -> dict[str, Tensor]:
    """Inverted hinge on the answers, trained in low-rank factors that start at FILA's, and retain (1 to 1)."""
    return LOSSES[options.loss](step, options)


def verify(task: Task, options: LokuOptions) -> None:
    """Retain data are needed for the start of the factors, also where the loss has no retain term."""
    del options
    task.require("retain", by="loku")


def factors(model: Model, objective: Objective, options: LokuOptions) -> Start:
    """FILA's factors for what the loss forgets and the task's retain data."""
    return Start(
        model=model,
        forget=objective.forget,
        retain=objective.probes["retain"],
        options=options,
        rank=options.rank,
        alpha=options.alpha,
    )

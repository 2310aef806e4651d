"""The third term of Mechanistic Unlearning: plain language modelling on the task's texts (Guo et al. 2024)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from locedit import losses
from locedit.data.encode import Example, encode
from locedit.data.items import Task
from locedit.edit.objective import Step
from locedit.models import Model
from locedit.unlearn.registry import ForgetOptions, at_least_zero


@dataclass(frozen=True, kw_only=True)
class TextsOptions(ForgetOptions):
    """What the methods of arXiv:2410.12949 have beside forget and retain."""

    texts_weight: float = 0.0
    "of the likelihood of the task's texts; published 1, on the Pile; 0 = without"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero(self, "texts_weight")


def texts_terms(step: Step, options: TextsOptions) -> dict[str, Tensor]:
    """{"texts_loss": weight times the mean over texts of the mean over tokens, in nats}, or nothing at weight 0."""
    if options.texts_weight == 0:
        return {}
    return {"texts_loss": options.texts_weight * losses.sequence_nll(step.score(step.others["texts"])).mean()}


def others(model: Model, task: Task, options: TextsOptions) -> Mapping[str, Sequence[Example]]:
    """The task's texts, where they have a weight."""
    return {"texts": encode(model, task.require("texts", by="texts_weight"))} if options.texts_weight else {}


def verify(task: Task, options: TextsOptions) -> None:
    """Texts, where texts_weight is above 0."""
    if options.texts_weight:
        task.require("texts", by="texts_weight")

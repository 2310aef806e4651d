"""What an unlearning method is, and what the trained ones share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from locedit import losses
from locedit.data.items import Dataset, Task
from locedit.edit.objective import Step
from locedit.edit.train import TrainOptions
from locedit.errors import LoceditError
from locedit.losses import Scored


@dataclass(frozen=True, kw_only=True)
class RetainOptions(TrainOptions):
    """What every method with a retain side has."""

    retain_weight: float = 1.0
    "of the retain term; 0 = train without retain data"
    retain_loss: Literal["nll", "kl"] = "nll"
    "nll: likelihood of the retain answers; kl: KL(unedited || edited) at the same positions"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One entry of METHODS."""

    function: Callable[..., Any]
    "trained: (step, options) -> named loss terms; else a recipe (model, task, within=, hold=, options=) -> Edit"
    options: type[Any]
    "dataclass of options"
    requires: tuple[str, ...]
    "parts of the task; retain only while options.retain_weight is above 0"
    paper: str
    restrictable: bool = True
    "whether it can be kept inside a component set"
    trained: bool = True
    holds: tuple[str, ...] = ("weights", "adapter")
    "how the edit can be held"
    learns: Callable[[Task], Dataset] | None = None
    "data that the loss sees as step.forget, when it is not the forget data as they are"

    def check(self, name: str, task: Task, options: Any) -> None:
        """Raise LoceditError when the task lacks what the method requires; needs no model."""
        for role in self.requires:
            if role == "retain" and getattr(options, "retain_weight", 1.0) == 0:
                continue
            if role == "retain" and task.retain is None and hasattr(options, "retain_weight"):
                raise LoceditError(
                    f"{name} needs retain data, which the task {task.name!r} does not have: add retain.jsonl to its "
                    "folder, or train without: --retain-weight 0"
                )
            task.require(role, by=name)


def retain_terms(step: Step, options: RetainOptions) -> dict[str, Tensor]:
    """{"retain_loss": weight times the mean over examples of the mean over scored tokens}, or nothing at weight 0."""
    if step.retain is None or options.retain_weight == 0:
        return {}
    scored = step.score(step.retain)
    if options.retain_loss == "nll":
        value = losses.sequence_nll(scored).mean()
    else:
        value = mean_kl(scored, step.reference(step.retain))
    return {"retain_loss": options.retain_weight * value}


def mean_kl(scored: Scored, reference: Scored) -> Tensor:
    """KL(reference || model) in nats, mean over each example's tokens, then over examples."""
    return losses.per_example(scored, losses.kl(scored.logits, reference.logits)).mean()

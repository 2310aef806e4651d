"""What an unlearning method is, and what the trained ones share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from locedit import losses
from locedit.data.encode import encode
from locedit.data.items import Dataset, Task
from locedit.edit.objective import Loss, Objective, Step
from locedit.edit.train import TrainOptions
from locedit.errors import LoceditError
from locedit.losses import Scored
from locedit.models import Model


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
    dose: Literal["components"] | None = None
    "of a recipe: what is raised when it is compared with its controls; a trained method's dose is its steps"
    needs_set: bool = False
    "whether it makes no sense on the whole model"
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


def objective_of(
    model: Model,
    task: Task,
    loss: Loss,
    *,
    name: str,
    learns: Dataset | None = None,
    retain: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Objective:
    """The trainer's objective for a loss, for losses and for the trained steps of a recipe.

    The loss sees `learns` (by default the forget data) as `step.forget`, and with `retain` the retain data as
    `step.retain`. The levels of forget and, where there is one, retain are followed in any case.
    """
    forget = encode(model, task.forget)
    kept = encode(model, task.retain) if task.retain is not None else None
    return Objective(
        loss=loss,
        forget=forget if learns is None else encode(model, learns),
        retain=kept if retain else None,
        probes={"forget": forget} | ({"retain": kept} if kept else {}),
        name=name,
        settings=settings or {},
        hash=task.hash,
    )


def nll(step: Step) -> dict[str, Tensor]:
    """The plain loss of learning: {"forget_nll": mean over examples of the mean over scored tokens, in nats}."""
    return {"forget_nll": losses.sequence_nll(step.score(step.forget)).mean()}


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

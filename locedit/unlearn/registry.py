"""What an unlearning method is, and what the trained ones share."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from locedit import losses
from locedit.components import ComponentSet
from locedit.contrasts import are_pairs
from locedit.data.encode import Batch, Example, Span, collate, encode
from locedit.data.items import KINDS, Dataset, Task
from locedit.edit.edit import Edit
from locedit.edit.objective import Loss, MakeHeld, Matched, Objective, Step, Stop
from locedit.edit.train import TrainOptions
from locedit.errors import LoceditError, nearest
from locedit.losses import Scored
from locedit.models import Model


@dataclass(frozen=True, kw_only=True)
class RetainOptions(TrainOptions):
    """What every method with a retain side has."""

    retain_weight: float = 1.0
    "of the retain term; 0 = train without retain data"
    retain_loss: Literal["nll", "kl"] = "nll"
    "nll: likelihood of the retain answers; kl: KL(unedited || edited) at the same positions"
    retain_tokens: Literal["answer", "all"] = "answer"
    """answer: the tokens that are scored; all: every token of the retain items, prompts included, as the published code
    of KL and LLMU (which counts padding too)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero(self, "retain_weight")
        one_of(self, "retain_loss", ("nll", "kl"))
        one_of(self, "retain_tokens", ("answer", "all"))


@dataclass(frozen=True, kw_only=True)
class ForgetOptions(RetainOptions):
    """What every method with a weighted forget term beside the retain term has."""

    forget_weight: float = 1.0
    "of the forget term"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero(self, "forget_weight")


def above_zero(options: object, *names: str) -> None:
    """Raise LoceditError for the first of the named options that is not above 0."""
    for name in names:
        if not getattr(options, name) > 0:
            raise LoceditError(f"{name}={getattr(options, name)!r} must be above 0")


def at_least_zero(options: object, *names: str) -> None:
    """Raise LoceditError for the first of the named options that is negative or no number."""
    for name in names:
        if not getattr(options, name) >= 0:
            raise LoceditError(f"{name}={getattr(options, name)!r} must not be negative")


def at_least_one(options: object, *names: str) -> None:
    """Raise LoceditError for the first of the named options that is below 1; None is no number and passes."""
    for name in names:
        if (value := getattr(options, name)) is not None and value < 1:
            raise LoceditError(f"{name}={value!r} must be at least 1")


def one_of(options: object, name: str, choices: Sequence[str]) -> None:
    """Raise LoceditError when the named option is none of the choices."""
    if getattr(options, name) not in choices:
        raise LoceditError(f"{name}={getattr(options, name)!r}; {nearest(str(getattr(options, name)), choices)}")


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
    dose: Literal["components", "weights", "scale"] | None = None
    """of a recipe: what is raised when it is compared with its controls (components: how many are ablated; weights,
    scale: the column of that name of its history); a trained method's dose is its steps"""
    needs_set: bool = False
    "whether it makes no sense on the whole model"
    holds: tuple[str, ...] = ("weights", "adapter")
    "how the edit can be held"
    units: tuple[str, ...] = ()
    "units of a component set that it can be inside; empty = any"
    learns: Callable[[Task], Dataset] | None = None
    "data that the loss sees as step.forget, when it is not the forget data as they are"
    kinds: tuple[str, ...] = ()
    "kinds of forget items that it can read; empty = any. Where they do not fit, the task's pairs stand for them"
    pairs: bool = False
    "whether the loss sees both sides of contrast pairs, two by two; else what is to be forgotten, the advantaged side"
    others: Callable[[Model, Task, Any], Mapping[str, Sequence[Example] | Matched]] | None = None
    "(model, task, options) -> data beside forget and retain, which the loss sees as step.others"
    stop: Callable[[Model, Task, Any], Stop | None] | None = None
    "(model, task, options) -> a stopping rule of its own, or None for none"
    objective: Callable[[Model, Task, Any], Objective] | None = None
    """(model, task, options) -> the whole objective, of a method that makes other models or labels first; `function` is
    then its loss, and `learns`, `others` and `stop` are not asked"""
    held: Callable[[Model, Objective, Any], MakeHeld] | None = None
    "(model, objective, options) -> what is trained where the change is not held as weights; None = LoRA"
    verify: Callable[[Task, Any], None] | None = None
    "(task, options): raise LoceditError when the task cannot serve the options; needs no model"
    finish: Callable[[Model, Edit, Any], Edit] | None = None
    "(model, trained edit, options) -> the edit as it is returned"
    fuse: Callable[[Model, Sequence[Edit], Any], Edit] | None = None
    """(model, edits, options) -> one edit, of deletion requests that were each trained on the unedited model; None, or
    options.fusion="chain" = each is trained on top of those before it"""
    apart: Callable[[Any, Model | None, ComponentSet | None], Mapping[str, Any]] | None = None
    """(options, model, within) -> what options each request has instead, of requests that are fused; LoceditError for
    what fusing them would refuse. Asked before anything is trained, without a model before one is loaded"""

    def reads(self, task: Task) -> Task:
        """The task with the data that the method reads as its forget data."""
        if not self.kinds or task.forget.kind in self.kinds or task.pairs is None or task.pairs.kind not in self.kinds:
            return task
        return dataclasses.replace(task, forget=task.pairs)

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
        if (choose := getattr(options, "choose", "last")) in ("retain", "forget"):
            task.require("retain", by=f"{name} with choose={choose!r}")
        if self.kinds and task.forget.kind not in self.kinds:
            wanted = " or ".join(KINDS[kind].__name__ for kind in self.kinds)
            raise LoceditError(
                f"{name} needs forget items of kind {wanted}; {task.forget.source} holds {task.forget.kind!r}"
            )
        if self.verify is not None:
            self.verify(task, options)


def objective_of(
    model: Model,
    task: Task,
    loss: Loss,
    *,
    name: str,
    learns: Dataset | None = None,
    retain: bool = False,
    pairs: bool = False,
    settings: Mapping[str, Any] | None = None,
    others: Mapping[str, Sequence[Example] | Matched] | None = None,
    stop: Stop | None = None,
) -> Objective:
    """The trainer's objective for a loss, for losses and for the trained steps of a recipe.

    The loss sees `learns` (by default the forget data) as `step.forget`, and with `retain` the retain data as
    `step.retain`. The levels of forget and, where there is one, retain are followed in any case. Of contrast pairs it
    sees the advantaged sides, with `pairs` both sides of each pair.
    """
    forget = encode(model, task.forget)
    kept = encode(model, task.retain) if task.retain is not None else None
    learned = forget if learns is None else encode(model, learns)
    both = pairs and are_pairs(learned)
    return Objective(
        loss=loss,
        forget=learned if both else _forgotten(learned),
        together=2 if both else 1,
        retain=kept if retain else None,
        probes={"forget": forget} | ({"retain": kept} if kept else {}),
        name=name,
        settings=settings or {},
        others=others or {},
        stop=stop,
        hash=task.hash,
    )


def _forgotten(examples: Sequence[Example]) -> Sequence[Example]:
    """The examples without the disadvantaged sides of pairs."""
    return [example for example in examples if example.kind != "disadvantaged"]


def nll(step: Step) -> dict[str, Tensor]:
    """The plain loss of learning: {"forget_nll": mean over examples of the mean over scored tokens, in nats}."""
    return {"forget_nll": losses.sequence_nll(step.score(step.forget)).mean()}


def retain_terms(step: Step, options: RetainOptions) -> dict[str, Tensor]:
    """{"retain_loss": weight times the mean over examples of the mean over their tokens}, or nothing at weight 0."""
    if step.retain is None or options.retain_weight == 0:
        return {}
    return {"retain_loss": options.retain_weight * retain_loss(step, step.retain, options)}


def retain_loss(step: Step, batch: Batch, options: RetainOptions) -> Tensor:
    """The loss of a batch of retain data without its weight, in nats."""
    if options.retain_tokens == "all":
        batch = every_token(step.model, batch)
    scored = step.score(batch)
    if options.retain_loss == "nll":
        return losses.sequence_nll(scored).mean()
    return mean_kl(scored, step.reference(batch))


def mean_kl(scored: Scored, reference: Scored) -> Tensor:
    """KL(reference || model) in nats, mean over each example's tokens, then over examples."""
    return example_mean(scored, losses.kl(scored.logits, reference.logits))


def example_mean(scored: Scored, values: Tensor) -> Tensor:
    """Mean over each example's scored tokens, then over examples, so that every example counts the same.

    OpenUnlearning, LoKU and HarmBench average over all scored tokens of a batch instead, which gives long answers more
    weight and makes the loss depend on how batches are cut.
    """
    return losses.per_example(scored, values).mean()


def every_token(model: Model, batch: Batch) -> Batch:
    """The same texts with every token scored that the model can predict: not position 0 of a causal model."""
    return collate(whole_texts(model, batch.examples), model).to(model.device)


def whole_texts(model: Model, examples: Sequence[Example]) -> list[Example]:
    """The same for examples."""
    first = 1 if model.causal else 0
    return [
        dataclasses.replace(example, spans=(Span(start=first, end=len(example.ids), label="text"),))
        for example in examples
    ]

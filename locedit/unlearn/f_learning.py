"""F-Learning: learn the old facts, subtract that, learn the new ones (Ni et al. 2024, arXiv:2311.08011).

    old  = FT(theta, K_old)             the forget data with their own answers
    away = theta - scale * (old - theta)
    new  = FT(away, K_new)              the facts' `new_answer`, else the task's `new` data

Without new answers, or with learn_steps=0, the second line is all: unlearning by the negation of a task vector
(Ilharco et al. 2023, arXiv:2212.04089). Each FT is full or low rank; the paper's claim is that LoRA forgets about as
well as full fine-tuning. It trains until the old facts are known better still: a model that is sure of them already has
a small, noisy vector, and needs a larger scale.

Inside a set there are two methods. restrict="training" trains inside the set only and subtracts all of it;
restrict="delta" trains the whole model and subtracts the set's part. The new answers are learned inside the set in
both.

The dose is the scale. `until` raises it over a grid until `away` is at or below the forget level, before anything new
is learned. The paper's scales are not known here, so 1 is the default; MUSE subtracts 5 times the vector of its books.
Ilharco et al. take the scale with the lowest target accuracy that keeps 95 % of the control accuracy (recalled, not
checked): choose="forget", retain_share=0.95.
"""

import dataclasses
import functools
import logging
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from locedit import losses
from locedit.components import ComponentSet, Table
from locedit.data.encode import encode
from locedit.data.items import Dataset, Task
from locedit.edit import arithmetic
from locedit.edit.adapter import refuse_single_weights
from locedit.edit.edit import Edit
from locedit.edit.levels import levels
from locedit.edit.objective import Step
from locedit.edit.run import LOST_LIMIT
from locedit.edit.train import train
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.provenance import measure, plain
from locedit.unlearn import injection
from locedit.unlearn.registry import above_zero, at_least_zero, nll, objective_of, one_of
from locedit.unlearn.scales import Scales, VectorOptions

log = logging.getLogger(__name__)

Half = Literal["weights", "adapter"]


@dataclass(frozen=True, kw_only=True)
class FLearningOptions(VectorOptions):
    """Of both trainings, and of the subtraction between them. What is not named for one half is of both."""

    steps: int = 100
    "of learning the old facts"
    learning_rate: float = 1e-3
    "at its highest, of learning the old facts"
    restrict: Literal["training", "delta"] = "training"
    """what a set restricts: training, the old facts are learned inside it and all of that is subtracted; delta, they
    are learned in the whole model (as an adapter: in its blocks) and the set's part is subtracted"""
    forget_hold: Half | None = None
    "how the old facts are learned: in full (weights) or as LoRA (adapter); None = as the edit is held"
    learn_hold: Half | None = None
    "how the new answers are learned; held in weights, an adapter is merged into them"
    learn_steps: int | None = None
    "of learning the new answers; None = `steps` where there are new answers, else 0"
    learn_rate: float | None = None
    "learning rate of the new answers; None = `learning_rate`"
    retain_weight: float = 0.0
    "of the likelihood of the retain answers while the new ones are learned; 0 = without, as in the paper's formula"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "restrict", ("training", "delta"))
        for half in ("forget_hold", "learn_hold"):
            if getattr(self, half) is not None:
                one_of(self, half, ("weights", "adapter"))
        at_least_zero(self, "retain_weight")
        if self.learn_steps is not None:
            at_least_zero(self, "learn_steps")
        if self.learn_rate is not None:
            above_zero(self, "learn_rate")

    @property
    def low_rank(self) -> bool:
        """Whether a half is low rank however the edit is held."""
        return "adapter" in (self.forget_hold, self.learn_hold)


def verify(task: Task, options: FLearningOptions) -> None:
    """New answers where they are to be learned, retain data where they are used."""
    if options.learn_steps and not _has_new(task):
        raise LoceditError(
            f"f_learning: learn_steps={options.learn_steps}, but the task {task.name!r} has no new answers: give the "
            "forget facts 'new_answer', or add new.jsonl; without, learn_steps=0"
        )
    _new(task, options)
    if options.retain_weight:
        task.require("retain", by="f_learning with retain_weight above 0")


def _has_new(task: Task) -> bool:
    return any(getattr(item, "new_answer", None) is not None for item in task.forget) or task.new is not None


def _new(task: Task, options: FLearningOptions) -> Dataset | None:
    """What is learned in the end: the new answers of the forget facts, all or none, else the task's `new` data."""
    if options.learn_steps == 0 or not _has_new(task):
        return None
    if any(getattr(item, "new_answer", None) is not None for item in task.forget):
        return injection.new_answers(task, by="f_learning")
    return task.new


def loss(step: Step, weight: float) -> dict[str, Tensor]:
    """Negative log-likelihood of the new answers in nats, and of the retain answers times their weight."""
    terms = {"learn_nll": losses.sequence_nll(step.score(step.forget)).mean()}
    if step.retain is not None:
        terms["retain_loss"] = weight * losses.sequence_nll(step.score(step.retain)).mean()
    return terms


def f_learning(model: Model, task: Task, *, within: ComponentSet | None, hold: str, options: FLearningOptions) -> Edit:
    """Learn the old facts, subtract the change times the scale, learn the new answers.

    Held as weights the edit is of kind weights; held as adapter, both halves are low rank and it is one adapter whose
    rank is the sum of theirs, or with forget_hold="weights" a chain of new weights and an adapter beside them.

    The history has a row for each scale from 0 up to the edit's own (column scale), then one for each step of learning
    the new answers (column step), with the levels forget, retain and new as far as there are such data. The outcome
    has `scale`, `norm` (of the vector, in weights), the levels that learning the old facts led to (`old`), and whether
    `until` was reached.
    """
    halves = options.forget_hold or hold, options.learn_hold or hold
    _require_holdable(model, within, hold=hold, halves=halves, learns=_new(task, options) is not None, options=options)
    settings = plain(options) | {"hold": hold}
    with measure("f_learning", model=model, data=task, settings=settings, seed=options.seed) as measured:
        made = _Recipe(model, task, within=within, hold=hold, halves=halves, options=options).run()
    return dataclasses.replace(made, provenance=measured.provenance)


def _require_holdable(
    model: Model,
    within: ComponentSet | None,
    *,
    hold: str,
    halves: tuple[str, str],
    learns: bool,
    options: FLearningOptions,
) -> None:
    """Raise LoceditError where the halves do not make an edit that is held as asked for, before anything is trained."""
    last, how = ("learn_hold", halves[1]) if learns else ("forget_hold", halves[0])
    if hold == "adapter" and how == "weights":
        raise LoceditError(f"f_learning: {last}='weights' changes the weights themselves; use hold='weights'")
    if within is None:
        return
    first = halves[0] if options.restrict == "training" else hold
    if first == "adapter" or (learns and halves[1] == "adapter"):
        refuse_single_weights(within, advice="f_learning: learn both halves in full, or use another kind of set")
    if options.restrict == "delta" and hold == halves[0] == "adapter":
        arithmetic.pieces_apart(model, within)


class _Recipe:
    """One run."""

    def __init__(
        self,
        model: Model,
        task: Task,
        *,
        within: ComponentSet | None,
        hold: str,
        halves: tuple[str, str],
        options: FLearningOptions,
    ) -> None:
        self.model, self.task, self.within, self.hold, self.options = model, task, within, hold, options
        self.forget_hold, self.learn_hold = halves
        self.new = _new(task, options)
        goal = objective_of(model, task, nll, name="f_learning (old facts)")
        new = {} if self.new is None else {"new": encode(model, self.new)}
        self.goal = dataclasses.replace(goal, probes={**goal.probes, **new})

    def run(self) -> Edit:
        """The three steps."""
        plain_options = dataclasses.replace(
            self.options, until=None, match="step", choose="last", forget_at=None, scale=None
        )
        old = self._learned_old(dataclasses.replace(plain_options, eval_every=0))
        curve = Scales("f_learning", self.model, self._vector(old), self.goal, self.options)
        scale = curve.choose()
        away = curve.edit(scale)
        outcome = curve.outcome(scale) | {
            "steps": old.outcome["steps"],
            "old": {name: old.history[name][-1] for name in self.goal.probes},
        }
        history = curve.table(scale)
        edit = away
        if self.new is not None:
            learned = self._learned_new(away, plain_options)
            edit = self._one(away, learned)
            history = _followed(history, learned.history, self._levels(edit))
            outcome["learn_steps"] = learned.outcome["steps"]
        parts = edit.parts or (edit,)
        outcome["lost_to_rounding"] = max(arithmetic.lost_to_rounding(self.model, part) for part in parts)
        if outcome["lost_to_rounding"] > LOST_LIMIT:
            share = 100 * outcome["lost_to_rounding"]
            log.warning("f_learning: %.0f %% of the changed weights are the same after rounding", share)
        return dataclasses.replace(edit, within=self.within, history=history, outcome=outcome)

    def _learned_old(self, options: FLearningOptions) -> Edit:
        where = self.within if self.options.restrict == "training" else None
        return train(self.model, self.goal, within=where, options=options, hold=self.forget_hold)

    def _vector(self, old: Edit) -> Edit:
        """What is subtracted, in the form in which the edit is held; not yet scaled."""
        if old.kind == "adapter" and self.hold == "weights":
            old = arithmetic.merged(self.model, old)
        if self.within is not None and self.options.restrict == "delta":
            return arithmetic.restricted(self.model, old, self.within)
        return old

    def _learned_new(self, away: Edit, options: FLearningOptions) -> Edit:
        """The new answers, learned with the old ones subtracted."""
        steps = self.options.steps if self.options.learn_steps is None else self.options.learn_steps
        rate = self.options.learn_rate or self.options.learning_rate
        options = dataclasses.replace(options, steps=steps, learning_rate=rate, warmup=min(options.warmup, steps))
        with away.applied(self.model) as model:
            goal = objective_of(
                model,
                self.task,
                functools.partial(loss, weight=self.options.retain_weight),
                name="f_learning (new answers)",
                learns=self.new,
                retain=self.options.retain_weight > 0,
                settings={"after": away.digest},
            )
            goal = dataclasses.replace(goal, probes=self.goal.probes)
            within = None if self.within is None else model.bind(self.within)
            learned = train(model, goal, within=within, options=options, hold=self.learn_hold)
        return dataclasses.replace(learned, fingerprint=away.fingerprint, within=self.within)

    def _one(self, away: Edit, learned: Edit) -> Edit:
        """Both halves as one edit."""
        if self.hold == "weights":
            return arithmetic.merged(self.model, away.then(learned))
        if away.kind == "adapter":
            return arithmetic.added(self.model, away, learned)
        return away.then(learned)

    def _levels(self, edit: Edit) -> dict[str, float]:
        with edit.applied(self.model) as edited:
            return levels(edited, self.goal.probes, level=self.options.level)


def _followed(subtracted: Table, learned: Table, last: dict[str, float]) -> Table:
    """The rows of the subtraction, then those of learning, of which the last has the levels of the whole edit."""
    names = list(dict.fromkeys([*subtracted, *learned]))
    first, rest = len(subtracted["scale"]), len(learned["step"]) - 1  # step 0 is the chosen scale
    table = {name: subtracted.get(name, [None] * first) + learned.get(name, [None] * (rest + 1))[1:] for name in names}
    for name, level in last.items():
        table[name][-1] = level
    return table


__all__ = ["FLearningOptions", "f_learning"]

"""Weight masking of Mechanistic Unlearning: the few weights whose removal forgets (Guo et al. 2024, arXiv:2410.12949).

Inside the set weights are trained that can only shrink towards zero (`edit.mask`). Then the k weights with the smallest
mask W / W0 are set to 0 and all others back to their own bits. The edit's history is the trade-off over k: the levels
at a geometric grid of k, from none to all that training shrank.

Loss: forget_weight * (-log(1 - p) of the answers, or the likelihood of new answers) + retain + texts + a penalty. The
paper's newer form trains the weights by SGD (learning rate 1e-3, momentum 0.9, weight decay 0.01) and penalises the sum
of |W|, scaled so that the term starts at 1.5; its older form trains explicit masks by AdamW (learning rate 1e-2) and
penalises the mean of |1 - mask|, which pulls the other way, back to the model, with a weight that rises over epochs
(constant here). Both are options; the settings that the defaults take from neither are named at the options.
"""

import dataclasses
import functools
import logging
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from locedit import losses
from locedit.components import ComponentSet, Table
from locedit.data.items import Task
from locedit.edit.dose import met, share_of_the_way
from locedit.edit.edit import Edit
from locedit.edit.levels import levels
from locedit.edit.mask import Masked, Ranking, Shrinking, rank
from locedit.edit.objective import Objective, Step
from locedit.edit.train import train
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.provenance import measure, plain
from locedit.unlearn import injection, texts
from locedit.unlearn.registry import at_least_zero, example_mean, objective_of, one_of, retain_terms
from locedit.unlearn.texts import TextsOptions, texts_terms
from locedit.unlearn.unlikelihood import unlikelihood

log = logging.getLogger(__name__)

PUBLISHED: dict[str, Any] = {
    "form": "weights",
    "optimizer": "sgd",
    "learning_rate": 1e-2,
    "weight_decay": 0.01,
    "decay": "weights",
    "schedule": "cosine",
    "texts_weight": 1.0,
}
"""The newer form as in the paper's code. Its momentum of 0.9 is in the learning rate here, which is ten times 1e-3. Its
weight decay takes part in the momentum, as always in PyTorch's SGD, and so stays 0.01. It makes 50 steps of 480
examples."""

RANGE = 1000
"""The curve's largest count over its smallest above 0."""


@dataclass(frozen=True, kw_only=True)
class WeightMaskOptions(TextsOptions):
    """What is trained, and how many weights are zeroed in the end. `until` does not end training: it chooses k."""

    forget_weight: float = 0.5
    "of the forget term; 0.5 (newer form) or 0.4 (older)"
    forget_loss: Literal["unlikelihood", "injection"] = "unlikelihood"
    "unlikelihood: -log(1 - p) of the answers; injection: the likelihood of the facts' new answers"
    form: Literal["mask", "weights"] = "mask"
    """mask: what is trained is each weight's share, so that one learning rate suits weights of any size (older form);
    weights: the weights themselves (newer form), of which the small ones are gone first"""
    learning_rate: float = 1e-2
    "published for the mask; for the weights 1e-3, by SGD with momentum"
    penalise: Literal["weights", "mask"] = "weights"
    "weights: the sum of |W|, all towards zero (newer form); mask: the mean of 1 - mask, all towards the model (older)"
    penalty: float = 1.5
    "of the penalty; of the weights it is what the term is at the start, published 1.5"
    budget: int | float | None = None
    """how many weights are zeroed: a count, a share of the set's weights (a number with a point, such as 0.01), or None
    = the k of the curve that first reaches `until`, and without `until` the one with the largest retain minus forget
    level"""
    curve: int = 20
    "points of the trade-off curve, up to all that training shrank"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "forget_loss", ("unlikelihood", "injection"))
        one_of(self, "form", ("mask", "weights"))
        one_of(self, "penalise", ("weights", "mask"))
        at_least_zero(self, "penalty")
        if self.curve < 2:
            raise LoceditError(f"curve={self.curve!r} must be at least 2")
        if isinstance(self.budget, float) and not 0 < self.budget <= 1:
            raise LoceditError(f"budget={self.budget!r}: a share lies above 0 and is at most 1.0; a count has no point")
        if isinstance(self.budget, int) and self.budget < 1:
            raise LoceditError(f"budget={self.budget!r} must be at least 1")
        if self.budget is not None and self.until is not None:
            raise LoceditError(
                f"budget={self.budget!r} and until={self.until!r} both choose how many weights are zeroed"
            )


def verify(task: Task, options: WeightMaskOptions) -> None:
    """New answers where they are taught, texts where they have a weight."""
    texts.verify(task, options)
    if options.forget_loss == "injection":
        injection.new_answers(task)


def loss(step: Step, options: WeightMaskOptions) -> dict[str, Tensor]:
    """Forget, retain and texts, as in unlikelihood or injection, and the penalty on what is left of the weights."""
    held = step.held
    assert isinstance(held, Shrinking), "made by the objective"
    scored = step.score(step.forget)
    if options.forget_loss == "injection":
        forget = losses.sequence_nll(scored).mean()
    else:
        forget = example_mean(scored, unlikelihood(scored.logits, scored.labels))
    penalty = held.left() if options.penalise == "weights" else 1 - held.mean_mask()
    terms = {"forget_loss": options.forget_weight * forget} | retain_terms(step, options) | texts_terms(step, options)
    return terms | {"penalty": options.penalty * penalty.to(forget.device)}


def weight_mask(
    model: Model, task: Task, *, within: ComponentSet | None, hold: str, options: WeightMaskOptions
) -> Edit:
    """Train the mask and zero the k weights with the smallest; without a set, of all matrices of the blocks.

    The edit holds the zeroed weights alone. Its history has the columns weights (k), forget and, where there is retain
    data, retain; its outcome `zeroed`, `shrunk` (weights with a mask below 1) and `of` (weights of the set), the levels
    with the trained mask, and whether `until` was reached.
    """
    del hold  # weights
    where = matrices(model) if within is None else within
    with measure("weight_mask", model=model, data=task, settings=plain(options), seed=options.seed) as measured:
        goal = objective(model, task, options)
        trained = train(model, goal, within=where, options=dataclasses.replace(options, until=None, match="step"))
        ranking = rank(model, trained.patches, seed=options.seed)
        if not len(ranking):
            raise LoceditError("weight_mask: training shrank no weight; try more steps or a larger learning_rate")
        curve = _Curve(model, ranking, goal, options, where)
        count = curve.choose()
        edit = ranking.zeroed(model, count, within=where)
    soft = {name: trained.history[name][-1] for name in goal.probes}
    outcome = curve.outcome(count) | {"steps": trained.outcome["steps"], "levels with the trained mask": soft}
    return dataclasses.replace(edit, history=curve.table(), outcome=outcome, provenance=measured.provenance)


def matrices(model: Model) -> ComponentSet:
    """All matrices of all blocks."""
    return model.components({name: [0] for name in model.sites("matrix") if name.startswith("blocks.")})


def objective(model: Model, task: Task, options: WeightMaskOptions) -> Objective:
    """The trainer's objective, with deltas that can only shrink weights."""
    learned = injection.new_answers(task) if options.forget_loss == "injection" else None
    goal = objective_of(
        model,
        task,
        functools.partial(loss, options=options),
        name="weight_mask",
        learns=learned,
        retain=options.retain_weight != 0,
        others=texts.others(model, task, options),
    )
    return dataclasses.replace(goal, deltas=Masked if options.form == "mask" else Shrinking)


class _Curve:
    """Levels at rising numbers of zeroed weights."""

    def __init__(
        self, model: Model, ranking: Ranking, goal: Objective, options: WeightMaskOptions, within: ComponentSet
    ) -> None:
        self.model, self.ranking, self.goal, self.options, self.within = model, ranking, goal, options, within
        self.rows: dict[int, dict[str, float]] = {}
        for count in (0, *counts(len(ranking), options.curve)):
            self.measure(count)

    def measure(self, count: int) -> dict[str, float]:
        """The levels with so many weights zeroed."""
        if count not in self.rows:
            edit = self.ranking.zeroed(self.model, count, within=self.within)
            with edit.applied(self.model) as edited:
                self.rows[count] = levels(edited, self.goal.probes, level=self.options.level)
        return self.rows[count]

    def choose(self) -> int:
        """The number of weights to zero, as the options ask."""
        budget, until = self.options.budget, self.options.until
        if budget is not None:
            wanted = max(1, round(budget * self.ranking.trained)) if isinstance(budget, float) else budget
            count = min(wanted, len(self.ranking))
            if count < wanted:
                log.warning("weight_mask: training shrank %d weights only, of the %d to zero", count, wanted)
            self.measure(count)
            return count
        if until is None:
            return max(sorted(self.rows)[1:], key=lambda k: self.rows[k].get("retain", 0.0) - self.rows[k]["forget"])
        reached = [count for count in sorted(self.rows) if self.rows[count]["forget"] <= until]
        if not reached:
            lowest = min(self.rows, key=lambda k: self.rows[k]["forget"])
            log.warning("weight_mask: forget level %.3g at best, not %.3g", self.rows[lowest]["forget"], until)
            return lowest
        return self._between(reached[0], until) if self.options.match == "interpolate" else reached[0]

    def _between(self, below: int, until: float) -> int:
        """A number of weights between two points of the curve that is just at the level, or the upper point."""
        if below == 0 or met(self.rows[below]["forget"], until):
            return below
        above = max(count for count in self.rows if count < below)
        share = share_of_the_way(lambda s: self.measure(_mix(above, below, s))["forget"], until)
        return _mix(above, below, share)

    def table(self) -> Table:
        """The rows as columns, by rising number of weights."""
        ordered = sorted(self.rows)
        columns: Table = {"weights": list(ordered)}
        return columns | {name: [self.rows[count][name] for count in ordered] for name in self.goal.probes}

    def outcome(self, count: int) -> dict[str, Any]:
        """Facts about the choice."""
        found: dict[str, Any] = {"zeroed": count, "shrunk": len(self.ranking), "of": self.ranking.trained}
        if self.options.until is not None:
            found |= {"until": self.options.until, "reached": self.rows[count]["forget"] <= self.options.until}
        return found


def counts(limit: int, points: int) -> list[int]:
    """At most `points` numbers from a thousandth of `limit` to `limit`, each larger by the same factor.

    >>> counts(1000, 4), counts(3, 20)
    ([1, 10, 100, 1000], [1, 2, 3])
    """
    return sorted({max(1, round(limit / RANGE ** (at / (points - 1)))) for at in range(points)})


def _mix(above: int, below: int, share: float) -> int:
    return above + max(1, round(share * (below - above)))

"""Part three: does a localizer point to where editing is robust?

Every pair of MLP layers of a lab model (and all attention, and everything) is taught new answers, then attacked by
relearning the old ones of half of the people; what comes back of the other half was still there. A pair is robust where
little comes back. The rank correlation of that with a localizer's score of the pair, over the pairs, is the grade. The
question is that of Guo et al. 2024 (arXiv:2410.12949), who compare a few chosen sets; all pairs make a ranking of it.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from locedit.attacks.finetuning import Diet, fine_tune, opened
from locedit.attacks.splits import Halves, mirrored_halves
from locedit.components import ComponentSet
from locedit.data.encode import encode
from locedit.data.items import Dataset, Task
from locedit.edit import Edit, train
from locedit.grading.accuracy import accuracy
from locedit.grading.options import GradeOptions
from locedit.grading.records import Record
from locedit.grading.worlds import Target
from locedit.models import Model
from locedit.ranks import spearman
from locedit.unlearn import objective_of
from locedit.unlearn.injection import InjectionOptions, loss, new_answers

PLACE = "MLP pairs"
MEASURES = ("robust", "transfer")
DEPTH = "early layers"
"name of the ranking by depth alone that stands among the localizers"
FEWEST = 4
"pairs below which no correlation is given"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One edited place under attack; every number is the share of facts whose answer is the likeliest."""

    name: str
    layers: tuple[int, ...]
    "of a pair of MLPs; empty for the other places"
    before: float
    "old answers before the edit"
    old: float
    "old answers after the edit"
    new: float
    "new answers after the edit"
    transfer: dict[str, float]
    "new answers after the edit in the formats that were not trained, by format"
    retain_before: float
    "the same relation of people who are neither edited nor trained on, before the edit"
    retain: float
    "after the edit"
    looks: tuple[int, ...]
    "relearning steps after which the rest was measured; 0 = before the attack"
    recovered: tuple[float, ...]
    "old answers of the half that was not relearned, mean of both halves, at each look"
    retain_attacked: tuple[float, ...]
    "retain at each look"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Outcome":
        fields: dict[str, Any] = dict(value)
        for key in ("layers", "looks", "recovered", "retain_attacked"):
            fields[key] = tuple(value[key])
        return cls(**fields)

    def back(self, floor: float) -> float:
        """The most that came back at a look where the attack kept `floor` of the retain side it started from.

        With what the edit itself left in place: the first look is before the attack.
        """
        kept = [value >= floor * self.retain - 1e-9 for value in self.retain_attacked]
        return max(value for value, fine in zip(self.recovered, kept, strict=True) if fine)

    def transferred(self) -> float:
        """Mean over the untrained formats."""
        return sum(self.transfer.values()) / len(self.transfer)


def places(model: Model) -> dict[str, tuple[tuple[int, ...], ComponentSet | None]]:
    """Name -> (layers, set): every pair of MLPs, all attention, everything (None)."""
    found: dict[str, tuple[tuple[int, ...], ComponentSet | None]] = {
        f"mlp-{a}-{b}": ((a, b), model.components({f"blocks.{a}.mlp": [0], f"blocks.{b}.mlp": [0]}))
        for a, b in itertools.combinations(range(model.n_layers), 2)
    }
    return found | {"attention": ((), model.everything("attn")), "everything": ((), None)}


class Oracle:
    """One model and target: edits places and attacks them."""

    def __init__(self, model: Model, target: Target, options: GradeOptions, *, seed: int) -> None:
        self.model, self.target, self.options, self.seed = model, target, options, seed
        self.old = encode(model, target.task.forget)
        self.new = encode(model, new_answers(target.task))
        self.kept = encode(model, target.same)
        self.formats = {name: encode(model, _new(data)) for name, data in target.formats.items()}
        self.halves = mirrored_halves(list(target.task.forget), splits=2, seed=seed, what="oracle")
        self.retain = encode(model, target.task.require("retain", by="oracle"))

    def outcome(self, name: str, layers: tuple[int, ...], within: ComponentSet | None) -> Outcome:
        """Edit one place, measure, attack both halves."""
        before, retain_before = accuracy(self.model, self.old), accuracy(self.model, self.kept)
        with self._edit(within).applied(self.model) as edited:
            old, retain = accuracy(edited, self.old), accuracy(edited, self.kept)
            looked = [self._attack(edited, halves) for halves in self.halves]
            return Outcome(
                name=name,
                layers=layers,
                before=before,
                old=old,
                new=accuracy(edited, self.new),
                transfer={form: accuracy(edited, data) for form, data in self.formats.items()},
                retain_before=retain_before,
                retain=retain,
                looks=tuple(step for step, _, _ in looked[0]),
                recovered=_means([[value for _, value, _ in looks] for looks in looked]),
                retain_attacked=_means([[value for _, _, value in looks] for looks in looked]),
            )

    def _edit(self, within: ComponentSet | None) -> Edit:
        options = InjectionOptions(
            steps=self.options.edit_steps,
            learning_rate=self.options.edit_rate,
            batch_size=16,
            eval_every=0,
            seed=self.seed,
        )
        goal = objective_of(
            self.model,
            self.target.task,
            functools.partial(loss, options=options),
            name="injection",
            learns=new_answers(self.target.task),
            retain=True,
        )
        return train(self.model, goal, within=within, options=options)

    def _attack(self, edited: Model, halves: Halves) -> list[tuple[int, float, float]]:
        """(steps, old answers of the other half, retain) at each look; the model is put back."""
        measured = [self.old[at] for at in halves.measured]
        diet = Diet(
            relearned=[self.old[at] for at in halves.relearned],
            retain=self.retain,
            batch_size=16,
            retain_weight=1.0,
            seed=self.seed,
        )
        looks = [(0, accuracy(edited, measured), accuracy(edited, self.kept))]

        def look(step: int) -> None:
            if step % self.options.look_every == 0 or step == self.options.attack_steps:
                looks.append((step, accuracy(edited, measured), accuracy(edited, self.kept)))

        with opened(edited, "full", rank=1, seed=self.seed) as weights:
            fine_tune(
                edited,
                weights,
                diet,
                learning_rate=self.options.attack_rate,
                steps=self.options.attack_steps,
                after_step=look,
            )
        return looks


def _new(data: Dataset) -> Dataset:
    return new_answers(Task(forget=data))


def _means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(column) for column in zip(*rows, strict=True))


# --- the grade ------------------------------------------------------------------------------------------------------


def grades(
    outcomes: Sequence[Outcome], by_layer: Sequence[float], *, method: str, seed: int, options: GradeOptions
) -> list[Record]:
    """Spearman's correlation, over the pairs of MLPs, of the sum of a localizer's two scores with two outcomes.

    robust: 1 - the share of the old answers that comes back. transfer: the new answers in the formats that were not
    trained. Pairs whose edit broke the retain side are left out.
    """
    about = {"part": "oracle", "place": PLACE, "method": method, "seed": seed}
    pairs = [o for o in outcomes if o.layers and o.retain >= options.edit_floor * o.retain_before]
    if len(pairs) < FEWEST:
        reason = f"only {len(pairs)} pairs keep {options.edit_floor:g} of the retain side; {FEWEST} are needed"
        return [Record(**about, measure=measure, reason=reason) for measure in MEASURES]  # type: ignore[arg-type]
    scores = [sum(by_layer[layer] for layer in pair.layers) for pair in pairs]
    truths = {
        "robust": [1 - pair.back(options.retain_floor) for pair in pairs],
        "transfer": [pair.transferred() for pair in pairs],
    }
    return [_correlation(scores, truths[measure], about | {"measure": measure}) for measure in MEASURES]


def _correlation(scores: Sequence[float], truth: Sequence[float], about: dict[str, Any]) -> Record:
    rho = spearman(scores, truth)
    if not math.isnan(rho):
        return Record(**about, value=rho)
    alike = "the outcomes of all pairs" if len(set(truth)) == 1 else "its scores of all pairs"
    return Record(**about, reason=f"{alike} are the same")


def layer_scores(values: Mapping[str, Tensor]) -> list[float]:
    """The scores of the MLPs by layer."""
    return [float(values[name]) for name in sorted(values, key=lambda name: int(name.split(".")[1]))]

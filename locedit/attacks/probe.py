"""Linear probes: is the answer still to be read off the hidden states, at any layer and position?

A multinomial logistic regression for each relation, from the residual stream to the answer, is fitted on retain items
in the edited model and applied to the forget items, as in Guo et al. 2024 (arXiv:2410.12949, section 5), at every layer
and at two positions: the token that predicts the answer, and the last token of the subject. What it gets right above
items that the model never knew, and above the most frequent answer, is still there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locedit.attacks.aim import Aim, ItemOptions, Side, Target
from locedit.attacks.arms import Control, Dose, Values
from locedit.attacks.item_attack import ItemAttack
from locedit.attacks.outcome import Others, carried_out
from locedit.attacks.shallow import late_suppression
from locedit.attacks.shared import Shared
from locedit.attacks.splits import keys
from locedit.attacks.states import States, states_of
from locedit.data.items import Dataset, Fact, Item, Task
from locedit.edit import Edit
from locedit.errors import LoceditError
from locedit.localize.lookup.logistic import logistic
from locedit.localize.lookup.probe_data import CHOICE
from locedit.models import Model
from locedit.options import fill
from locedit.results import AttackResult

Position = Literal["last", "subject"]
POSITIONS: dict[Position, str] = {"last": "where the answer is predicted", "subject": "at the subject's last token"}


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(ItemOptions):
    """How probes are fitted."""

    positions: tuple[str, ...] = ("last", "subject")
    "last: the token that predicts the answer; subject: the last token of the subject in the prompt"
    l2: float = 1.0
    "price of the weights, 1 / C of scikit-learn"
    least: int = 2
    "items of an answer at least that probes are fitted on, on average over halvings, for it to be a class"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.positions or any(name not in POSITIONS for name in self.positions):
            raise LoceditError(f"positions={self.positions!r}; choices: {', '.join(POSITIONS)}")
        if self.l2 <= 0 or self.least < 1:
            raise LoceditError(f"probe: l2={self.l2!r} must be above 0 and least={self.least!r} at least 1")
        if self.metric == "memorization_accuracy":
            raise LoceditError("probe: metric='memorization_accuracy' is of tokens; use accuracy or probability")


def probe(
    model: Model, task: Task, edit: Edit, *, others: Others = None, shared: Shared | None = None, **options: object
) -> AttackResult:
    """Read the answers off the edited model's hidden states with linear probes fitted on retain items."""
    attack = Probe(fill(ProbeOptions, options, method="probe"), task)
    return carried_out(attack, model, task, edit, others=others, shared=shared)


class Probe(ItemAttack[ProbeOptions]):
    """Hits of the probes at every layer and position."""

    name: ClassVar[str] = "probe"
    lead: ClassVar[str] = "Read off hidden states by linear probes"
    x_name: ClassVar[str] = "layer"
    reads_itself: ClassVar[bool] = True

    def __init__(self, options: ProbeOptions, task: Task) -> None:
        super().__init__(options)
        self.classes = classes_of(task, least=options.least)
        "relation -> its answers"

    def narrow(self, model: Model, data: Dataset) -> list[Item]:  # noqa: ARG002
        return [item for item in data if _label(item, self.classes) is not None]

    def doses(self, aim: Aim) -> tuple[Dose, ...]:
        layers = range(aim.model.n_layers + 1)
        return tuple(Dose(x=layer, track=POSITIONS[place]) for place in self._positions(aim) for layer in layers)

    def attack(self, target: Target, learned: Side, measured: Mapping[str, Side], aim: Aim) -> Values:  # noqa: ARG002
        known = states_of(target, aim.known, aim.shared)
        self._note_gaps(aim)
        found: Values = {}
        for name, side in measured.items():
            own = states_of(target, side, aim.shared)
            rows = [self._read(_at(known, place), _at(own, place), aim.known, side) for place in self._positions(aim)]
            found[name] = torch.cat(rows)
        return found

    def control(self, aim: Aim, *, level: float) -> Control:
        """Suppression in the last MLPs, below which the answer must still be there."""
        return late_suppression(aim, self.options, level=level)

    def guess(self, aim: Aim) -> tuple[str, Float[Tensor, " item"]]:
        """What always giving a relation's most frequent answer (among the retain items) gets right.

        Of probabilities: how frequent the item's answer is there.
        """
        relations = [item.group or "all" for item in aim.retain.items]
        labels = _labels(aim.retain, self.classes)
        counts = {
            relation: torch.bincount(
                labels[[at for at, r in enumerate(relations) if r == relation]], minlength=len(answers)
            ).double()
            for relation, answers in self.classes.items()
        }
        own = [counts[item.group or "all"] for item in aim.forget.items]
        labels = _labels(aim.forget, self.classes).tolist()
        if self.options.metric == "probability":
            return "frequencies", torch.stack([n[at] / n.sum() for n, at in zip(own, labels, strict=True)])
        right = [float(int(n.argmax()) == at) for n, at in zip(own, labels, strict=True)]
        return "most frequent answer", torch.tensor(right, dtype=torch.float64)

    def _note_gaps(self, aim: Aim) -> None:
        """Say where the half that probes are fitted on has nothing of an answer."""
        seen = {(item.group or "all", _label(item, self.classes)) for item in aim.known.items}
        wanted = {(item.group or "all", _label(item, self.classes)) for item in aim.forget.items}
        if missing := len(wanted - seen):
            self.notes.append(
                f"probes are fitted on no item of {missing} answers of forget items: those cannot be read"
            )

    def _positions(self, aim: Aim) -> list[Position]:
        """The positions asked for; that of the subject only where every item names its subject."""
        wanted: list[Position] = [place for place in POSITIONS if place in self.options.positions]
        sides = [side for side in (aim.forget, aim.heldout, aim.known, aim.kept) if side is not None]
        if "subject" in wanted and any(example.subject is None for side in sides for example in side.examples):
            self.notes.append("not every item names its subject: probes read only where the answer is predicted")
            wanted = [place for place in wanted if place != "subject"]
        if not wanted:
            raise LoceditError("probe: positions='subject' needs a subject in every item, and some have none")
        return wanted

    def _read(
        self,
        known: Float[Tensor, "layer known d_model"],
        own: Float[Tensor, "layer item d_model"],
        learned: Side,
        side: Side,
    ) -> Float[Tensor, "layer item"]:
        """Whether the probe is right (or how sure it is of the answer), relation by relation."""
        found = torch.zeros(own.shape[:2], dtype=torch.float64)
        labels, wanted = _labels(learned, self.classes), _labels(side, self.classes)
        for relation, answers in self.classes.items():
            here = [at for at, item in enumerate(learned.items) if (item.group or "all") == relation]
            there = [at for at, item in enumerate(side.items) if (item.group or "all") == relation]
            if not there or not here:
                continue
            features = torch.cat([known[:, here], own[:, there]], dim=1)
            given = torch.cat([labels[here], wanted[there]])
            weights = torch.cat([torch.ones(len(here)), torch.zeros(len(there))]).expand(len(features), -1)
            fit = logistic(features, given, weights, classes=len(answers), l2=self.options.l2)
            logits = fit.logits[:, len(here) :].cpu()
            right = (logits.argmax(-1) == wanted[there]).double()
            sure = logits.softmax(-1).gather(-1, wanted[there].expand(len(logits), -1)[..., None])[..., 0]
            found[:, there] = sure if self.options.metric == "probability" else right
        return found


def classes_of(task: Task, *, least: int) -> dict[str, list[str]]:
    """Relation -> the answers that enough retain items of two owners have, one for each half.

    Raises LoceditError where no relation has two answers.
    """
    own: dict[str, dict[str, list[str]]] = {}
    retain = list(task.require("retain", by="probe"))
    for item, owner in zip(retain, keys(retain), strict=True):
        if isinstance(item, Fact) and item.format != CHOICE:
            own.setdefault(item.group or "all", {}).setdefault(item.answer, []).append(owner)
    kept = {
        relation: sorted(answer for answer, who in answers.items() if len(who) >= 2 * least and len(set(who)) >= 2)
        for relation, answers in own.items()
    }
    found = {relation: answers for relation, answers in kept.items() if len(answers) >= 2}
    if not found:
        raise LoceditError(
            f"probe: no relation (group) of the retain facts has two answers with {2 * least} items of two owners "
            "each; probes need a small closed set of answers"
        )
    return found


def _label(item: Item, classes: Mapping[str, list[str]]) -> int | None:
    if not isinstance(item, Fact) or item.format == CHOICE:
        return None
    answers = classes.get(item.group or "all", [])
    return answers.index(item.answer) if item.answer in answers else None


def _labels(side: Side, classes: Mapping[str, list[str]]) -> Int[Tensor, " item"]:
    found = [_label(item, classes) for item in side.items]
    return torch.tensor([label for label in found if label is not None])


def _at(states: States, place: Position) -> Float[Tensor, "layer item d_model"]:
    if place == "last":
        return states.first
    assert states.subjects is not None, "checked when the positions were chosen"
    return states.subjects

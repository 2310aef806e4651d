"""An attack that is read item by item, and the arms on which it is run: the edit, its controls, other edits.

Such an attack asks an edited model again, in another way: with other prompts, at its activations, with other weights.
It gives the metric of every item at one or more doses (number of examples shown, layer, radius, steps), of which one
counts (see `arms`).
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.attacks.aim import NOTHING, Aim, ItemOptions, Side, Target
from locedit.attacks.arms import Arm, Control, Dose, Struck, Values, choose, kept_at
from locedit.attacks.runs import role_of
from locedit.attacks.splits import Halves
from locedit.data.items import Dataset, Item
from locedit.edit import Edit
from locedit.models import Model
from locedit.progress import report
from locedit.results import Role

KNOWN = 0.7
"share of what the unedited model says of the forget items from which on it knows the held-out ones too"
Options = TypeVar("Options", bound=ItemOptions)


class ItemAttack(ABC, Generic[Options]):
    """One attack. Subclasses say what it does to a model; the rest is the same for all."""

    name: ClassVar[str]
    lead: ClassVar[str]
    'how the finding begins, such as "With solved examples before the question"'
    x_name: ClassVar[str]
    learns: ClassVar[bool] = False
    "whether it learns from items; then from those of the half that is not measured"
    reads_itself: ClassVar[bool] = False
    "whether its number exists only under the attack (a probe): what was known before is then read off the same way"

    causal: ClassVar[bool] = False
    "whether it needs a causal model"

    harms: ClassVar[bool] = True
    "whether the same attack acts on other items too; False: on each item by itself, so there is no retain side"

    no_control: ClassVar[str] = "there is no edit made to come back under this attack: a failure proves little"
    "said where there is no positive control"

    def __init__(self, options: Options) -> None:
        self.options = options
        self.notes: list[str] = []
        "what a reader must know, found out while it ran"

    def narrow(self, model: Model, data: Dataset) -> list[Item]:  # noqa: ARG002
        """The items of a data set that it can be read of."""
        return list(data)

    def start(self, aim: Aim) -> float:  # noqa: ARG002
        """x without the attack."""
        return 0.0

    def ready(self, aim: Aim) -> None:
        """Raise LoceditError for what cannot be run on this model and data, before anything runs."""
        self.doses(aim)

    @abstractmethod
    def doses(self, aim: Aim) -> tuple[Dose, ...]:
        """What is tried, mildest first."""

    @abstractmethod
    def attack(self, target: Target, learned: Side, measured: Mapping[str, Side], aim: Aim) -> Values:
        """The metric of the measured items under attack; `learned` are the items it may learn from."""

    def fixed(self) -> int | None:
        """The dose that counts, where it is not to be chosen by what comes back."""
        return None

    def guess(self, aim: Aim) -> tuple[str, Float[Tensor, " item"]] | None:  # noqa: ARG002
        """What can be had of the forget items without looking at the model, and how; None = nothing to name."""
        return None

    def control(self, aim: Aim, *, level: float) -> Control | None:  # noqa: ARG002
        """An edit that must come back under it; None = there is none. `level`: what the edit leaves of the answers."""
        return None


def strike(attack: ItemAttack[Options], aim: Aim, edit: Edit, others: Mapping[str, Edit]) -> Struck:
    """Run an attack on the edited model and its controls; the model is afterwards as before."""
    runner = _Runner(attack, aim, arms=1 + len(others))
    before = aim.read(runner.base, aim.forget)
    with edit.applied(aim.model) as edited:
        target = Target(model=edited, key=edit.digest)
        after = aim.read(target, aim.forget)
        kept_after = aim.read(target, aim.kept if attack.harms else NOTHING)
        found = runner.arm("found", "found", target)
        never = runner.never_known(target)
    arms = [found, *([never] if never else [])]
    if attack.reads_itself:
        arms.append(runner.arm("unedited", "before the edit", runner.base))
    shallow, note = runner.shallow(level=float(after.mean()))
    arms += [shallow] if shallow else []
    arms += [runner.of_edit(role_of(name), name, other) for name, other in others.items()]
    if (
        aim.heldout is not None
        and (guessed := float(aim.read(runner.base, aim.heldout).mean())) > KNOWN * before.mean()
    ):
        note = "; ".join(filter(None, [note, f"the unedited model knows the held-out items too ({guessed:.2f})"]))
    floor = 0.0 if attack.reads_itself else attack.options.retain_floor
    above = None if attack.reads_itself else never  # what is guessed of a state does not depend on where it is read
    own = {
        arm.name: choose(
            arm, above, kept_after, known=float(before.mean()), floor=floor, fixed=attack.fixed(), control=shallow
        )
        for arm in arms
        if arm.role != "never knew"
    }
    if attack.reads_itself:
        before = next(arm.back(own[arm.name][0]) for arm in arms if arm.role == "unedited")
    return Struck(
        aim=aim,
        arms=tuple(arms),
        doses=attack.doses(aim),
        chosen={name: doses for name, (doses, _) in own.items()},
        within_floor=own[found.name][1],
        before=before,
        after=after,
        kept_after=kept_after,
        kept_attacked=kept_at(found, own[found.name][0]),
        notes=(*aim.notes, *([note] if note else []), *dict.fromkeys(attack.notes)),
    )


class _Runner(Generic[Options]):
    """Runs an attack on one arm after the other."""

    def __init__(self, attack: ItemAttack[Options], aim: Aim, *, arms: int) -> None:
        self.strike, self.aim = attack, aim
        self.base = Target(model=aim.model, key="unedited")
        controls = (aim.heldout is not None) + (attack.options.controls and attack.options.shallow)
        runs = arms + controls + attack.reads_itself
        self.done, self.total = 0, runs * (len(aim.forget_halves) if attack.learns else 1)

    def arm(self, role: Role, name: str, target: Target) -> Arm:
        measured = {"retain": self.aim.kept} if len(self.aim.kept) and self.strike.harms else {}
        return self._arm(role, name, target, self.aim.forget, self.aim.forget_halves, more=measured)

    def never_known(self, target: Target) -> Arm | None:
        """Held-out items attacked in the same way, in the same edited model."""
        if self.aim.heldout is None:
            return None
        halves = self.aim.heldout_halves
        return self._arm("never knew", "never known", target, self.aim.heldout, halves, data="heldout", more={})

    def shallow(self, *, level: float) -> tuple[Arm | None, str]:
        """An edit that only hides what this attack brings back, at the same forget level."""
        options = self.strike.options
        if not (options.controls and options.shallow):
            return None, ""
        control = self.strike.control(self.aim, level=level)
        if control is None:
            return None, self.strike.no_control
        if isinstance(control.edit, Edit):
            return self.of_edit("shallow", control.words, control.edit), control.note
        edits = {dose: edit for dose, edit in enumerate(control.edit) if edit is not None}
        self.total += len(edits) - 1
        arms = {dose: self.of_edit("shallow", control.words, edit) for dose, edit in edits.items()}
        return _each_at_its_dose(arms), control.note

    def of_edit(self, role: Role, name: str, edit: Edit) -> Arm:
        with edit.applied(self.aim.model) as edited:
            return self.arm(role, name, Target(model=edited, key=edit.digest))

    def _arm(
        self,
        role: Role,
        name: str,
        target: Target,
        side: Side,
        halves: tuple[Halves, ...],
        *,
        more: Mapping[str, Side],
        data: str = "forget",
    ) -> Arm:
        if self.strike.learns:
            splits = tuple(
                self._attacked(target, side.at(half.relearned), {data: side.at(half.measured), **more})
                for half in halves
            )
        else:
            whole = self._attacked(target, NOTHING, {data: side, **more})
            splits = tuple(whole | {data: whole[data][:, list(half.measured)]} for half in halves)
        return Arm(role=role, name=name, splits=splits, halves=halves, side=side, data=data)

    def _attacked(self, target: Target, learned: Side, measured: Mapping[str, Side]) -> Values:
        found = self.strike.attack(target, learned, measured, self.aim)
        for name, side in measured.items():
            assert found[name].shape == (len(self.strike.doses(self.aim)), len(side)), "one value a dose and item"
        self.done += 1
        report(self.strike.name, self.done, self.total)
        return {name: values.double().cpu() for name, values in found.items()}


def _each_at_its_dose(arms: Mapping[int, Arm]) -> Arm:
    """Dose -> the arm that is judged there, as one arm; no number at the other doses."""
    first = next(iter(arms.values()))
    splits: list[Values] = []
    for split, values in enumerate(first.splits):
        made = {name: torch.full_like(found, torch.nan) for name, found in values.items()}
        for dose, arm in arms.items():
            for name, rows in made.items():
                rows[dose] = arm.splits[split][name][dose]
        splits.append(made)
    return dataclasses.replace(first, splits=tuple(splits), judged=tuple(arms))

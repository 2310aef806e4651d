"""An attack that is read item by item, and the arms on which it is run: the edit, its controls, other edits.

Such an attack asks an edited model again, in another way: with other prompts, at its activations, with other weights.
It gives the metric of every item at one or more doses (number of examples shown, layer, radius, steps). The dose that
counts on one half of the items is the one at which most came back on the other half, above items never known, with the
retain side kept; so no item takes part in choosing the dose at which it is counted.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.attacks.aim import NOTHING, Aim, ItemOptions, Side, Target
from locedit.attacks.recovery import mean_by_item
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


@dataclass(frozen=True, kw_only=True)
class Dose:
    """How far an attack goes, or where it looks."""

    x: float
    "number of examples, layer, radius, steps"
    track: str = ""
    "doses of different tracks are drawn as curves of their own, such as the positions that probes read"

    def __str__(self) -> str:
        return f"{self.x:g}" + (f" ({self.track})" if self.track else "")


@dataclass(frozen=True, kw_only=True)
class Control:
    """An edit made to come back under an attack: where it does not, the attack proves nothing."""

    edit: Edit | tuple[Edit | None, ...]
    "one for all doses, or for each dose its own, judged at this dose alone; None where there is none, but not all None"
    words: str
    'what it is, such as "suppression in the last MLP"'
    note: str = ""
    "what a reader should know of it"


LEAST = 0.2
"distance between what was known and what was never known below which a dose is not preferred for it"

Values = dict[str, Float[Tensor, "dose _item"]]
"Data set -> metric of every measured item at every dose; float64."


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """One edit (or control) under attack: for every split the values of the measured half."""

    role: Role
    name: str
    splits: tuple[Values, ...]
    halves: tuple[Halves, ...]
    side: Side
    data: str = "forget"
    "the data set whose items are measured: heldout for the control that never knew"
    judged: tuple[int, ...] | None = None
    "the doses at which it says anything; None = all"

    def at(self, split: int) -> Float[Tensor, "dose item"]:
        return self.splits[split][self.data]

    def back(self, doses: Mapping[int, int]) -> Float[Tensor, " item"]:
        """Metric of each item at the dose that counts, averaged over the splits that measured it.

        Where the arm says nothing at this dose, the last at which it does counts instead.
        """
        parts = [
            (half.measured, self.at(split)[self.judged_at(doses[split])]) for split, half in enumerate(self.halves)
        ]
        return mean_by_item(parts, count=len(self.side))

    def says(self, dose: int) -> bool:
        """Whether it says anything at this dose."""
        return self.judged_at(dose) == dose

    def judged_at(self, dose: int) -> int:
        """The dose itself where the arm says something at it, else the last at which it does."""
        return dose if self.judged is None or dose in self.judged else self.judged[-1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Struck:
    """Everything that the runs of one attack gave."""

    aim: Aim
    arms: tuple[Arm, ...]
    "the attacked edit first"
    doses: tuple[Dose, ...]
    chosen: Mapping[str, Mapping[int, int]]
    "name of the arm -> split -> index of the dose that counts; whoever attacks another model chooses anew"
    within_floor: bool
    "False: at every dose the retain side fell below the floor"
    before: Float[Tensor, " item"]
    "of the forget items before the edit; of an attack that reads itself, under attack"
    after: Float[Tensor, " item"]
    "of the forget items after the edit, without the attack"
    kept_after: Float[Tensor, " kept"]
    kept_attacked: Float[Tensor, " kept"]
    notes: tuple[str, ...] = field(default=())

    def arm(self, role: Role) -> Arm | None:
        return next((arm for arm in self.arms if arm.role == role), None)


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
        kept_attacked=_kept(found, own[found.name][0]),
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


def choose(
    arm: Arm,
    never: Arm | None,
    kept: Float[Tensor, " kept"],
    *,
    known: float,
    floor: float,
    fixed: int | None = None,
    control: Arm | None = None,
) -> tuple[dict[int, int], bool]:
    """For each split the dose at which most is back on its mirror, above items never known; and whether retain is kept.

    What is back is the share that is reported, (back - never known) / (known - never known), with a smaller distance
    than 0.2 taken as 0.2: where anything can be said of anything, little has come back.
    Retain is kept where it is at least `floor` of `kept`. Of equal doses the first counts; where every dose breaks the
    retain side, the one that breaks it least. Doses at which the arm says nothing are never chosen, and among equal
    ones one at which the control says something comes first. `fixed` leaves nothing to choose.
    """
    chosen: dict[int, int] = {}
    within = True
    for split in range(len(arm.halves)):
        mirror = split ^ 1 if len(arm.halves) > 1 else split
        back = arm.at(mirror).mean(1)
        if never is not None:
            unknown = never.at(mirror).mean(1)
            back = (back - unknown) / (known - unknown).clamp(min=LEAST)
        retain = arm.splits[mirror].get("retain")
        level = None if retain is None or floor <= 0 else retain.mean(1)
        said = torch.tensor([arm.says(dose) for dose in range(len(back))])
        fits = said if level is None else said & (level >= floor * kept.mean() - 1e-9)
        within &= bool(fits.any())
        ranked, open_to = (back, fits) if level is None or bool(fits.any()) else (level, said)
        judged = torch.tensor([control is None or control.says(dose) for dose in range(len(back))])
        ranked = ranked.masked_fill(~open_to, -torch.inf).round(decimals=6) + 1e-7 * judged
        best = int(ranked.argmax())
        chosen[split] = best if fixed is None else arm.judged_at(fixed)
    return chosen, within


def _kept(found: Arm, chosen: Mapping[int, int]) -> Float[Tensor, " kept"]:
    """Metric of each measured retain item at the dose that counts, averaged over the splits."""
    rows = [values["retain"][chosen[split]] for split, values in enumerate(found.splits) if "retain" in values]
    return torch.stack(rows).mean(0) if rows else torch.zeros(0).double()

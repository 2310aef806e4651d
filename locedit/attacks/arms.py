"""The arms of an attack that is read item by item, and the dose that counts for each of them.

An arm is one edit under attack: the one in question, a control, another. The dose that counts on one half of the items
is the one at which most came back on the other half, above items never known, with the retain side kept; so no item
takes part in choosing the dose at which it is counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.attacks.aim import Aim, Side
from locedit.attacks.recovery import mean_by_item
from locedit.attacks.splits import Halves
from locedit.edit import Edit
from locedit.results import Role

LEAST = 0.2
"distance between what was known and what was never known below which a dose is not preferred for it"

Values = dict[str, Float[Tensor, "dose _item"]]
"Data set -> metric of every measured item at every dose; float64."


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


def kept_at(found: Arm, chosen: Mapping[int, int]) -> Float[Tensor, " kept"]:
    """Metric of each measured retain item at the dose that counts, averaged over the splits."""
    rows = [values["retain"][chosen[split]] for split, values in enumerate(found.splits) if "retain" in values]
    return torch.stack(rows).mean(0) if rows else torch.zeros(0).double()

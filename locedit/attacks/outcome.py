"""From what an attack read of every item to its result: one sentence, one number, curves, and numbers for controls."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.attacks.aim import Aim, Side, aimed
from locedit.attacks.arms import Arm, Dose, Struck
from locedit.attacks.item_attack import ItemAttack, Options, strike
from locedit.attacks.measures import level_measure, share_measure
from locedit.attacks.recovery import gained, share_back
from locedit.attacks.shared import Shared
from locedit.attacks.verdicts import BROKE, broken, verdict
from locedit.data.items import Task
from locedit.edit import Edit
from locedit.errors import LoceditError
from locedit.evaluate.intervals import Estimate
from locedit.models import Model
from locedit.provenance import measure, plain
from locedit.results import AttackResult, Curve, Measure, Stage

Others = Mapping[str, Edit] | None
"further edits by name, attacked in the same way; names that begin with random count as random sets of the same size"

STAGES = ("before the edit", "after it")
POWER = 0.5
"share of the control made to come back that must come back for a failure elsewhere to mean anything"


def carried_out(
    attack: ItemAttack[Options],
    model: Model,
    task: Task,
    edit: Edit,
    *,
    others: Others,
    shared: Shared | None,
) -> AttackResult:
    """Run an attack and say what it found."""
    options = attack.options
    with measure(attack.name, model=model, data=task, settings=options, seed=options.seed) as record:
        aim = readied(attack, model, task, shared=shared or Shared())
        result = Outcome(attack, strike(attack, aim, edit, others or {})).result()
    return dataclasses.replace(result, provenance=record.provenance)


def readied(attack: ItemAttack[Options], model: Model, task: Task, *, shared: Shared) -> Aim:
    """What the attack is aimed at. Raises LoceditError where it cannot be run on it."""
    if attack.causal and not model.causal:
        raise LoceditError(f"{attack.name}: {model.name} is a masked language model; it needs a causal one")
    aim = aimed(model, task, attack.options, by=attack.name, learns=attack.learns, shared=shared, narrow=attack.narrow)
    attack.ready(aim)
    return aim


class Outcome:
    """The numbers of one attack in words and records."""

    def __init__(self, attack: ItemAttack[Any], found: Struck) -> None:
        self.attack, self.found, self.options = attack, found, attack.options
        self.main = found.arms[0]

    def result(self) -> AttackResult:
        notes = [*self.found.notes, *self._doubts()]
        needless = () if self.attack.no_control else ("shallow", "shallow_steps", "shallow_learning_rate")
        options = {name: value for name, value in plain(self.options).items() if name not in needless}
        return AttackResult(
            name=self.attack.name,
            sentence=self.sentence(),
            headline=share_measure(self.share(self.main), len(self.main.side), note="; ".join(notes)),
            curves=tuple(self._curves()),
            measures=tuple(self._measures()),
            settings=options
            | {"doses": [str(self.found.doses[at]) for at in self.found.chosen[self.main.name].values()]},
            note="; ".join(notes),
        )

    # --- numbers -----------------------------------------------------------------------------------------------------

    def back(self, arm: Arm) -> Float[Tensor, " item"]:
        """Metric of each of the arm's items under attack, at the dose that counts for it."""
        return arm.back(self.found.chosen[arm.name])

    def never(self, arm: Arm) -> Float[Tensor, " item"] | None:
        """The same of items never known, at the arm's dose."""
        control = self.found.arm("never knew")
        return None if control is None else control.back(self.found.chosen[arm.name])

    def share(self, arm: Arm) -> Estimate:
        """How much of what was known is there under attack on that arm, above what was never known."""
        return self._share(self.back(arm), arm)

    def _left(self) -> Estimate:
        """The same of what the edit left in place, without the attack."""
        return self._share(self.found.after, self.main)

    def _added(self) -> Estimate:
        """What the attack adds to what the edit left, of the same items."""
        given = {"draws": self.options.draws, "seed": self.options.seed}
        return gained(self.back(self.main), self.found.after, owners=self.main.side.owners, **given)

    def _share(self, values: Float[Tensor, " item"], arm: Arm) -> Estimate:
        never = self.found.arm("never knew")
        return share_back(
            values,
            self.found.before,
            owners=arm.side.owners,
            control=self.never(arm),
            control_owners=[] if never is None else never.side.owners,
            draws=self.options.draws,
            seed=self.options.seed,
        )

    def _doubts(self) -> list[str]:
        """What a reader must know before believing the number."""
        doubts: list[str] = []
        if not self.found.within_floor:
            floor = self.options.retain_floor
            doubts.append(f"at every dose the attack takes the retain side below {floor:g} of its level: it breaks it")
        shallow = self.found.arm("shallow")
        if shallow is not None and not self.share(shallow).value >= POWER:
            doubts.append(
                "the attack did not bring back the edit made to come back: that little comes back proves little"
            )
        return doubts

    # --- words -------------------------------------------------------------------------------------------------------

    def sentence(self) -> str:
        """The finding in one sentence."""
        found, metric = self.found, self.found.aim.metric.replace("_", " ")
        never = self.never(self.main)
        left, share = self._left().value, self.share(self.main)
        said = (
            f"no more is there than that ({share.value:.0%})"
            if left >= POWER and share.value <= left
            else verdict(share, self._added())
        )
        text = f"The edit itself left {left:.0%} in place. " if left >= POWER else ""
        text += f"{self.attack.lead}{self._at()} {said}: forget {metric} "
        stages = ("read off likewise before the edit", "said after it") if self.attack.reads_itself else STAGES
        text += f"{_mean(self.back(self.main))} ({_mean(found.before)} {stages[0]}, {_mean(found.after)} {stages[1]}"
        text += f"; items never known reach {_mean(never)})" if never is not None else "; counted from 0)"
        if (guess := self.attack.guess(found.aim)) is not None:
            text += f"; the {guess[0]} alone: {_mean(guess[1])}"
        text += "".join(f"; {part}" for part in self._comparisons())
        if len(found.kept_attacked) and not self.attack.reads_itself:
            text += f"; retain {_mean(found.kept_attacked)} ({_mean(found.kept_after)} before the attack)"
            text += BROKE if broken(found.kept_after, found.kept_attacked) else ""
        return text + "."

    def _doses(self) -> list[Dose]:
        """Those that count, one a split."""
        return [self.found.doses[at] for at in self.found.chosen[self.main.name].values()]

    def _at(self) -> str:
        """The doses that count, where there was a choice."""
        if len(self.found.doses) == 1:
            return ","
        named = " and ".join(dict.fromkeys(map(str, self._doses())))
        return f" ({self.attack.x_name} {named}),"

    def _comparisons(self) -> list[str]:
        """What other edits do under the same attack."""
        random = [arm for arm in self.found.arms if arm.role == "random"]
        parts: list[str] = []
        if random:
            sets = "a random set" if len(random) == 1 else f"{len(random)} random sets"
            values = torch.stack([self.back(arm).mean() for arm in random])
            parts.append(f"{sets} of the same size: {_mean(values)}")
        named = [arm for arm in self.found.arms if arm.role in ("everything", "complement", "other", "shallow")]
        return parts + [f"{arm.name}: {_mean(self.back(arm))}" for arm in named]

    # --- records -----------------------------------------------------------------------------------------------------

    def _curves(self) -> list[Curve]:
        tracks = list(dict.fromkeys(dose.track for dose in self.found.doses))
        return [
            self._curve(arm, split, track)
            for arm in self.found.arms
            for split in range(len(arm.halves))
            for track in tracks
        ]

    def _curve(self, arm: Arm, split: int, track: str) -> Curve:
        """Mean metric at every dose of a track, from the state without the attack where there is one."""
        places = [at for at, dose in enumerate(self.found.doses) if dose.track == track and arm.says(at)]
        values = arm.splits[split]
        columns = {"recovered": values[arm.data].mean(1)[places].tolist()}
        if "retain" in values and not self.attack.reads_itself and values["retain"].shape[1]:
            columns["retain"] = values["retain"].mean(1)[places].tolist()
        x = [self.found.doses[at].x for at in places]
        lead = self._start(arm, split) if not self.attack.reads_itself else {}
        if lead:
            x = [self.attack.start(self.found.aim), *x]
            columns = {name: [lead[name], *column] for name, column in columns.items()}
        at = self.found.chosen[self.main.name if arm.role == "never knew" else arm.name][split]
        return Curve(
            name=f"{arm.name} ({track})" if track else arm.name,
            role=arm.role,
            x_name=self.attack.x_name,
            x=tuple(x),
            columns={name: tuple(column) for name, column in columns.items()},
            seed=split,
            matched=places.index(at) + bool(lead) if at in places else None,
            track=track,
            note=f"split {split}" if len(arm.halves) > 1 else "",
        )

    def _start(self, arm: Arm, split: int) -> dict[str, float]:
        """The levels without the attack, for the edit itself; of other arms they are not measured."""
        if arm.role != "found":
            return {}
        half = list(arm.halves[split].measured)
        return {"recovered": float(self.found.after[half].mean()), "retain": _float(self.found.kept_after)}

    def _measures(self) -> list[Measure]:
        """Levels before and after the edit and of every role, the retain side, and the share back in every arm."""
        found, forget = self.found, self.main.side
        made = [
            self._level(found.before, forget, "forget", "before"),
            self._level(found.after, forget, "forget", "after"),
            self._level(self.back(self.main), forget, "forget", "attacked"),
        ]
        for role in dict.fromkeys(arm.role for arm in found.arms[1:]):
            arms = [arm for arm in found.arms if arm.role == role]
            backs = [self.never(self.main) if role == "never knew" else self.back(arm) for arm in arms]
            values = torch.stack([back for back in backs if back is not None]).mean(0)
            made.append(self._level(values, arms[0].side, arms[0].data, "attacked", group=role))
        if (guess := self.attack.guess(found.aim)) is not None:
            made.append(self._level(guess[1], forget, "forget", "attacked", group=guess[0]))
        if len(found.kept_attacked):
            made.append(self._level(found.kept_after, found.aim.kept, "retain", "after"))
            made.append(self._level(found.kept_attacked, found.aim.kept, "retain", "attacked"))
        return made + [self._share_of(arm) for arm in found.arms if arm.role not in ("found", "never knew", "unedited")]

    def _level(self, values: Tensor, side: Side, data: str, stage: Stage, *, group: str | None = None) -> Measure:
        more = {"draws": self.options.draws, "seed": self.options.seed}
        metric = self.found.aim.metric
        return level_measure(metric, values, side.named, dataset=data, stage=stage, group=group, **more)

    def _share_of(self, arm: Arm) -> Measure:
        name = arm.name if arm.role == "other" or arm.role in arm.name else f"{arm.role}: {arm.name}"
        return share_measure(self.share(arm), len(arm.side), group=name)


def _mean(values: Tensor) -> str:
    return f"{_float(values):.2f}"


def _float(values: Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")


__all__ = ["Others", "Outcome", "carried_out", "verdict"]

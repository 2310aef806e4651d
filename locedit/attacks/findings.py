"""From the runs of an attack to its result: one sentence, one number, curves, and numbers for every control."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.attacks.finetuning import How
from locedit.attacks.measures import level_measure, share_measure
from locedit.attacks.options import RelearnOptions
from locedit.attacks.recovery import Dose, Run, at_dose, gained, mean_by_item, share_back
from locedit.attacks.splits import Halves, divided_by, keys
from locedit.attacks.verdicts import BROKE, broken, verdict
from locedit.data.items import Item
from locedit.evaluate.intervals import Estimate
from locedit.provenance import plain
from locedit.results import AttackResult, Curve, Measure, Role, Stage

LEFT = 0.5
"share that the edit left in place from which on the sentence says so first"
WORKS = 0.5
"share of the shallow control that must come back for a failure elsewhere to mean anything"


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """One edit (or control) under attack."""

    role: Role
    name: str
    runs: Sequence[Run]
    "one a split, at the learning rate that counts"
    halves: Sequence[Halves]
    items: Sequence[Item]


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """Everything that the runs gave."""

    metric: str
    arms: Sequence[Arm]
    "the attacked edit first"
    doses: Mapping[int, Dose]
    before: Float[Tensor, " item"]
    "metric of the forget items before the edit"
    after: Float[Tensor, " item"]
    "after the edit, before the attack"
    retain_ids: Sequence[str]
    retain_owners: Sequence[str]
    retain_after: Float[Tensor, " retained"]
    "metric of the measured retain items after the edit, before the attack"
    grid: Sequence[Run]
    options: RelearnOptions
    how: How
    notes: Sequence[str]
    name: str = "relearn"
    fed: str = ""
    'what was trained on, such as "4 items"; empty = half of the items'
    rest: str = "the half that was not relearned"
    "what is measured, in words"

    def arm(self, role: Role) -> Arm | None:
        return next((arm for arm in self.arms if arm.role == role), None)

    def back(self, arm: Arm) -> Float[Tensor, " item"]:
        """Metric of each of the arm's items at the dose, averaged over the splits that measured it."""
        parts = [
            (halves.measured, run.measured[at_dose(run, self.doses[run.split])])
            for halves, run in zip(arm.halves, arm.runs, strict=True)
        ]
        return mean_by_item(parts, count=len(arm.items))

    def start(self, arm: Arm) -> Float[Tensor, " item"]:
        """The same before the attack's first step."""
        parts = [(halves.measured, run.measured[0]) for halves, run in zip(arm.halves, arm.runs, strict=True)]
        return mean_by_item(parts, count=len(arm.items))

    def retained(self, arm: Arm) -> Float[Tensor, " retained"]:
        """Metric of each measured retain item at the dose, averaged over the splits."""
        return torch.stack([run.retain[at_dose(run, self.doses[run.split])] for run in arm.runs]).mean(0)

    def share(self, arm: Arm) -> Estimate:
        """How much of what was known is there after the attack on that arm, above what was never known."""
        return self._share(self.back(arm), arm)

    @property
    def left(self) -> Estimate:
        """The same of what the edit left in place, before the attack."""
        return self._share(self.after, self.arms[0])

    @property
    def added(self) -> Estimate:
        """What the attack adds to what the edit left, of the same items."""
        given = {"draws": self.options.draws, "seed": self.options.seed}
        return gained(self.back(self.arms[0]), self.after, owners=keys(self.arms[0].items), **given)

    def _share(self, values: Float[Tensor, " item"], arm: Arm) -> Estimate:
        never = self.arm("never knew")
        return share_back(
            values,
            self.before,
            owners=keys(arm.items),
            control=None if never is None else self.back(never),
            control_owners=[] if never is None else keys(never.items),
            draws=self.options.draws,
            seed=self.options.seed,
        )


def finding(found: Findings) -> AttackResult:
    """The result of the attack."""
    notes = [*found.notes, *_doubts(found)]
    return AttackResult(
        name=found.name,
        sentence=sentence(found),
        headline=_share_measure(found, found.arms[0], note="; ".join(notes)),
        curves=tuple(_curve(found, arm, run) for arm in found.arms for run in arm.runs),
        measures=tuple(_measures(found)),
        settings=plain(found.options)
        | {"trained": found.how, "doses": _doses(found), "grid": [_row(run) for run in found.grid]},
        note="; ".join(notes),
    )


def _doubts(found: Findings) -> list[str]:
    """What a reader must know before believing the number."""
    doubts: list[str] = []
    if divided_by(found.arms[0].items) == "item":
        doubts.append("no owners or subjects: the halves are of single items, and one may give away another")
    if not all(dose.within_floor for dose in found.doses.values()):
        doubts.append(
            f"at every dose the attack took the retain side below {found.options.retain_floor:g} of its level: "
            "it breaks the model"
        )
    shallow = found.arm("shallow")
    if shallow is not None and not found.share(shallow).value >= WORKS:
        doubts.append("the attack did not bring back the shallow control: that little comes back proves nothing")
    return doubts


# --- words ----------------------------------------------------------------------------------------------------------


def sentence(found: Findings) -> str:
    """The finding in one sentence."""
    main = found.arms[0]
    share = found.share(main)
    steps = _span(sorted({dose.steps for dose in found.doses.values()}))
    left = found.left.value
    kept = f"The edit itself left {left:.0%} in place. " if left >= LEFT else ""
    text = f"{kept}{_capital(verdict(share, found.added))} with {found.fed or _half(main)} and {steps} steps: "
    text += f"{found.rest} stands at {_mean(found.back(main))} {_plain(found.metric)} "
    text += f"({_mean(found.before)} before the edit, {_mean(found.after)} after it"
    never = found.arm("never knew")
    text += f"; items never known reach {_mean(found.back(never))})" if never else ")"
    text += "".join(f"; {part}" for part in _comparisons(found))
    if len(found.retain_ids):
        text += f"; retain {_mean(found.retained(main))} ({_mean(found.retain_after)} before the attack)"
        text += BROKE if broken(found.retain_after, found.retained(main)) else ""
    return text + "."


def _half(main: Arm) -> str:
    """As in "20 items of 5 subjects"."""
    items = sorted({len(halves.relearned) for halves in main.halves})
    by = divided_by(main.items)
    people = "" if by == "item" else f" of {_span(sorted({_owners(main, halves) for halves in main.halves}))} {by}s"
    return f"{_span(items)} items{people}"


def _capital(said: str) -> str:
    return said[0].upper() + said[1:]


def _comparisons(found: Findings) -> list[str]:
    """What controls and other edits do under the same attack."""
    parts: list[str] = []
    random = [arm for arm in found.arms if arm.role == "random"]
    if random:
        values = torch.stack([found.back(arm).mean() for arm in random])
        start = torch.stack([found.start(arm).mean() for arm in random])
        sets = "a random set" if len(random) == 1 else f"{len(random)} random sets"
        parts.append(f"{sets} of the same size: {_mean(values)} (from {_mean(start)} before the attack)")
    named = [arm for arm in found.arms if arm.role in ("everything", "complement", "other", "shallow")]
    return parts + [f"{arm.name}: {_mean(found.back(arm))} (from {_mean(found.start(arm))})" for arm in named]


def _owners(arm: Arm, halves: Halves) -> int:
    named = keys(arm.items)
    return len({named[at] for at in halves.relearned})


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]}-{numbers[-1]}"


def _mean(values: Tensor) -> str:
    return f"{float(values.mean()):.2f}"


def _plain(metric: str) -> str:
    return metric.replace("_", " ")


# --- records --------------------------------------------------------------------------------------------------------


def _curve(found: Findings, arm: Arm, run: Run) -> Curve:
    columns = {"recovered": run.recovered, "relearned": run.relearned}
    if run.retain.shape[1]:
        columns["retain"] = run.retain.mean(1)
    return Curve(
        name=arm.name,
        role=arm.role,
        x_name="steps",
        x=tuple(map(float, run.steps)),
        columns={name: tuple(column.double().tolist()) for name, column in columns.items()},
        seed=run.split,
        matched=at_dose(run, found.doses[run.split]),
        note=f"learning rate {run.learning_rate:g}, split {run.split}",
    )


def _share_measure(found: Findings, arm: Arm, *, note: str = "") -> Measure:
    """The number of the attack: how much is there on the halves that were not relearned, over all splits."""
    name = arm.name if arm.role == "other" or arm.role in arm.name else f"{arm.role}: {arm.name}"
    group = None if arm.role == "found" else name
    return share_measure(found.share(arm), len(arm.items), group=group, note=note)


def _level(
    found: Findings,
    values: Tensor,
    items: Sequence[tuple[str, str]],
    *,
    dataset: str,
    stage: Stage,
    group: str | None = None,
) -> Measure:
    """The metric over items, each given as (id, owner)."""
    options = found.options
    more = {"draws": options.draws, "seed": options.seed}
    return level_measure(found.metric, values, items, dataset=dataset, stage=stage, group=group, **more)


def _named(items: Sequence[Item]) -> list[tuple[str, str]]:
    return list(zip((item.id for item in items), keys(items), strict=True))


def _measures(found: Findings) -> list[Measure]:
    """Levels before and after the edit and of every role, the retain side, and the share that is back in every arm."""
    main = found.arms[0]
    made = [
        _level(found, found.before, _named(main.items), dataset="forget", stage="before"),
        _level(found, found.after, _named(main.items), dataset="forget", stage="after"),
        _level(found, found.back(main), _named(main.items), dataset="forget", stage="attacked"),
    ]
    for role in dict.fromkeys(arm.role for arm in found.arms[1:]):
        arms = [arm for arm in found.arms if arm.role == role]
        values = torch.stack([found.back(arm) for arm in arms]).mean(0)
        dataset = "heldout" if role == "never knew" else "forget"
        made.append(_level(found, values, _named(arms[0].items), dataset=dataset, stage="attacked", group=role))
    if found.retain_ids:
        kept = list(zip(found.retain_ids, found.retain_owners, strict=True))
        made.append(_level(found, found.retain_after, kept, dataset="retain", stage="after"))
        made.append(_level(found, found.retained(main), kept, dataset="retain", stage="attacked"))
    return made + [_share_measure(found, arm) for arm in found.arms if arm.role not in ("found", "never knew")]


def _doses(found: Findings) -> list[dict[str, Any]]:
    return [
        {"split": split, "learning_rate": dose.learning_rate, "steps": dose.steps, "within_floor": dose.within_floor}
        for split, dose in found.doses.items()
    ]


def _row(run: Run) -> dict[str, Any]:
    """One run of the grid for the settings."""
    return {
        "split": run.split,
        "learning_rate": run.learning_rate,
        "steps": list(run.steps),
        "recovered": [round(value, 4) for value in run.recovered.tolist()],
        "retain": [round(value, 4) for value in run.retain.mean(1).tolist()] if run.retain.shape[1] else [],
    }

"""What an attack is aimed at: the items of a task as examples, in halves, and the metric that is read of them."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from locedit.attacks.measures import metric_of, values_of
from locedit.attacks.options import ControlOptions, Metric, check_floor
from locedit.attacks.shared import Shared
from locedit.attacks.splits import Halves, as_many, divided_by, keys, learned_and_measured, mirrored_halves
from locedit.data.encode import Example, encode
from locedit.data.items import Dataset, Item, Task
from locedit.errors import LoceditError
from locedit.models import Model


@dataclass(frozen=True, kw_only=True)
class ItemOptions(ControlOptions):
    """What all attacks that are read item by item let you choose."""

    metric: Literal["auto", "accuracy", "probability", "memorization_accuracy"] = "auto"
    "auto: accuracy for facts, memorization_accuracy for private texts and tokens"
    splits: int = 2
    "random halves, in mirrored pairs; an even number. What is learned or chosen on one half is counted on the other"
    retain_floor: float = 0.9
    "a dose counts only where the retain metric is at least this share of what it was before the attack"
    retain_measured: int = 100
    "retain items at most in that measurement"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("splits", "retain_measured"):
            if getattr(self, name) < 1:
                raise LoceditError(f"{name}={getattr(self, name)!r} must be at least 1")
        if self.splits % 2:
            raise LoceditError(f"splits={self.splits!r} must be an even number: splits come in mirrored pairs")
        check_floor(self.retain_floor)


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """Some items of one data set, and how the model reads them."""

    items: tuple[Item, ...]
    examples: tuple[Example, ...]
    chat: str = "off"

    def at(self, places: Sequence[int]) -> "Side":
        """The items at these places."""
        return dataclasses.replace(
            self, items=tuple(self.items[at] for at in places), examples=tuple(self.examples[at] for at in places)
        )

    def __len__(self) -> int:
        return len(self.items)

    @property
    def named(self) -> list[tuple[str, str]]:
        """(id, owner) of every item."""
        return list(zip((item.id for item in self.items), keys(self.items), strict=True))

    @property
    def owners(self) -> list[str]:
        return keys(self.items)


NOTHING = Side(items=(), examples=())


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """A model as it is attacked: unedited, or inside an edit."""

    model: Model
    key: str
    "names the state of the model, for what is shared"


@dataclass(frozen=True, kw_only=True, eq=False)
class Aim:
    """The data of one attack."""

    model: Model
    task: Task
    metric: Metric
    forget: Side
    forget_halves: tuple[Halves, ...]
    heldout: Side | None
    "items that the model never knew, of the same kind, of at most as many owners; None = no control"
    heldout_halves: tuple[Halves, ...]
    known: Side
    "retain items that an attack may learn from"
    kept: Side
    "other retain items, that show what the attack breaks; no owner is in both"
    shared: Shared
    notes: tuple[str, ...]

    @property
    def retain(self) -> Side:
        """All retain items, for controls and for what is fitted on them."""
        both = self.known.items + self.kept.items
        return Side(items=both, examples=self.known.examples + self.kept.examples, chat=self.kept.chat)

    def read(self, target: Target, side: Side) -> Float[Tensor, " item"]:
        """The metric of every item, without an attack."""
        key = ("metric", self.metric, target.key, side.examples)
        return self.shared.get(key, lambda: values_of(target.model, side.examples, self.metric))


Narrow = Callable[[Model, Dataset], Sequence[Item]]
"The items of a data set that an attack can be read of; none of them = the attack cannot run."


def aimed(
    model: Model, task: Task, options: ItemOptions, *, by: str, learns: bool, shared: Shared, narrow: Narrow | None
) -> Aim:
    """Encode and split the data. Raises LoceditError for data that the attack cannot use."""
    asked = None if options.metric == "auto" else options.metric
    metric = metric_of(task.forget, asked, by=by)
    notes: list[str] = []
    forget = _side(model, task.forget, narrow, notes)
    if not forget.items:
        raise LoceditError(f"{by}: {task.forget.source} has no item that it can be read of: {notes[-1]}")
    halves = _halves(forget, options, learns=learns, what=f"{by}: forget")
    if len(halves) == 1:
        notes.append("one owner alone cannot be split in halves: what is chosen is chosen on the items themselves")
    elif divided_by(forget.items) == "item":
        notes.append("no owners or subjects: the halves are of single items, and one may give away another")
    heldout = _never_known(model, task, options, narrow, forget, notes)
    never = () if heldout is None else _as_many_halves(heldout, halves, options, learns=learns, by=by)
    known, kept = _retain(model, task, options, narrow)
    if not kept.items:
        notes.append("no retain data: nothing shows what the attack broke")
    return Aim(
        model=model,
        task=task,
        metric=metric,
        forget=forget,
        forget_halves=halves,
        heldout=heldout,
        heldout_halves=never,
        known=known,
        kept=kept,
        shared=shared,
        notes=tuple(notes),
    )


def side_of(model: Model, data: Dataset, items: Sequence[Item] | None = None) -> Side:
    """Items of a data set, encoded."""
    chosen = data if items is None else data.replace(items)
    return Side(items=tuple(chosen), examples=tuple(encode(model, chosen)), chat=data.chat)


def _side(model: Model, data: Dataset, narrow: Narrow | None, notes: list[str]) -> Side:
    items = list(data) if narrow is None else list(narrow(model, data))
    if len(items) < len(data):
        notes.append(f"read of {len(items)} of {len(data)} forget items")
    return side_of(model, data, items) if items else NOTHING


def _halves(side: Side, options: ItemOptions, *, learns: bool, what: str) -> tuple[Halves, ...]:
    """Mirrored halves; all items as one where there is one owner and nothing is learned."""
    if not learns and len(set(side.owners)) < 2:
        return (Halves(relearned=(), measured=tuple(range(len(side)))),)
    return tuple(mirrored_halves(side.items, splits=options.splits, seed=options.seed, what=what))


def _as_many_halves(
    heldout: Side, halves: Sequence[Halves], options: ItemOptions, *, learns: bool, by: str
) -> tuple[Halves, ...]:
    """Halves of the held-out items; all items as one where those of the forget set are."""
    if len(halves) == 1:
        return (Halves(relearned=(), measured=tuple(range(len(heldout)))),)
    never = _halves(heldout, options, learns=learns, what=f"{by}: heldout")
    if len(never) == 1:
        raise LoceditError(f"{by}: heldout: one owner alone cannot be split in halves; two or more are needed")
    return never


def _never_known(
    model: Model, task: Task, options: ItemOptions, narrow: Narrow | None, forget: Side, notes: list[str]
) -> Side | None:
    data = task.heldout
    if not options.controls:
        notes.append("controls were switched off")
        return None
    if data is None or data.kind != task.forget.kind:
        notes.append("no held-out items of the same form: what was never known counts as 0")
        return None
    items = list(data) if narrow is None else list(narrow(model, data))
    if not items:
        notes.append("no held-out item that it can be read of: what was never known counts as 0")
        return None
    return side_of(model, data, as_many(items, owners=max(2, len(set(forget.owners))), seed=options.seed))


def _retain(model: Model, task: Task, options: ItemOptions, narrow: Narrow | None) -> tuple[Side, Side]:
    """Retain items to learn from, and others to measure."""
    data = task.retain
    if data is None or data.kind != task.forget.kind:
        return NOTHING, NOTHING
    items = list(data) if narrow is None else list(narrow(model, data))
    if len(set(keys(items))) < 2:
        return NOTHING, NOTHING
    side = side_of(model, data, items)
    learned, measured = learned_and_measured(items, most=options.retain_measured, seed=options.seed, what="retain")
    return side.at(learned), side.at(measured)

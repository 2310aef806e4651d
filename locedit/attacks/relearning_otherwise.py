"""Relearning from other data or another start: a few items, none of them, another format, quantized weights.

All are `relearn` with one thing changed, so halves, doses and controls are the same.
"""

import dataclasses
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

from locedit.attacks.options import RelearnOptions
from locedit.attacks.outcome import Others
from locedit.attacks.relearning import relearned
from locedit.attacks.runs import Relearning
from locedit.attacks.shared import Shared
from locedit.attacks.splits import Halves, divided_by, keys
from locedit.data.encode import Example, encode
from locedit.data.items import Dataset, Item, Task
from locedit.edit import Edit
from locedit.errors import LoceditError, nearest
from locedit.models import Model
from locedit.options import fill
from locedit.quantization import quantized
from locedit.results import AttackResult


@dataclass(frozen=True, kw_only=True)
class RelearnFewOptions(RelearnOptions):
    """As for relearn, with few items and few steps."""

    steps: int = 10
    "optimizer steps at most"
    look_every: int = 2
    "steps between two looks at the other half"
    items: int | None = 4
    "relearned items at most, drawn from the half; None = all of it"
    learning_rates: tuple[float, ...] = (2e-4, 1e-3, 2e-3)
    "all are tried; see `retain_floor`. In so few steps only the larger move anything"


@dataclass(frozen=True, kw_only=True)
class RelearnBenignOptions(RelearnOptions):
    """As for relearn; nothing of the forget set is trained on."""


@dataclass(frozen=True, kw_only=True)
class RelearnFormatOptions(RelearnOptions):
    """As for relearn, with the format that is trained on."""

    shown: str | None = None
    "the format of the items that are relearned; all others are measured. None = the most frequent"


@dataclass(frozen=True, kw_only=True)
class RelearnQuantizedOptions(RelearnOptions):
    """As for relearn, with how the weights are quantized before."""

    scheme: Literal["int8", "nf4"] = "nf4"
    "how the edited weights are rounded before they are trained"


class Few(Relearning):
    """Trains on a few items of the half."""

    name: ClassVar[str] = "relearn_few"


class Benign(Relearning):
    """Trains on retain items and ordinary texts alone."""

    name: ClassVar[str] = "relearn_benign"
    rest: ClassVar[str] = "the forget set"

    def prepared(self, task: Task) -> Task:
        require_benign(task)
        return task

    def started(self, task: Task) -> None:
        self.benign = [*self.diet, *(encode(self.model, task.texts) if task.texts is not None else [])]
        self.diet = []
        self.kind_fed = "items and texts that are not to be forgotten"

    def relearned(self, items: Sequence[Item], examples: Sequence[Example], halves: Halves) -> list[Example]:  # noqa: ARG002
        return self.benign


class OtherFormat(Relearning):
    """Trains on one format of half of the owners, measures the other formats of the other half."""

    name: ClassVar[str] = "relearn_format"
    rest: ClassVar[str] = "the other half in other formats"

    def prepared(self, task: Task) -> Task:
        """The task without the items in the format that is trained on."""
        assert isinstance(self.options, RelearnFormatOptions)
        self.format = shown_format(task.forget, self.options.shown)
        if divided_by(list(task.forget)) == "item":
            raise LoceditError(
                "relearn_format: without owners or subjects, formats of one fact cannot be told together"
            )
        heldout = task.heldout
        if heldout is not None:
            shown = {item.format == self.format for item in heldout}
            heldout = _without(heldout, self.format) if len(shown) == 2 else None
        return dataclasses.replace(task, forget=_without(task.forget, self.format), heldout=heldout)

    def started(self, task: Task) -> None:
        sets = [data for data in (task.forget, task.heldout) if data is not None and data.kind == task.forget.kind]
        self.owners = {item: owner for data in sets for item, owner in zip(data, keys(list(data)), strict=True)}
        self.shown = [
            (self.owners[item], example)
            for data in sets
            for item, example in zip(data, encode(self.model, data), strict=True)
            if item.format == self.format
        ]
        self.kind_fed = f"{self.format!r} items of the other half of the owners"

    def relearned(self, items: Sequence[Item], examples: Sequence[Example], halves: Halves) -> list[Example]:  # noqa: ARG002
        owners = {self.owners[items[at]] for at in halves.relearned}
        return [example for owner, example in self.shown if owner in owners]


class Quantized(Relearning):
    """Trains the edited model from weights that were rounded.

    What is read of the edit itself is that of its own weights; the curves begin at the rounded ones.
    """

    name: ClassVar[str] = "relearn_quantized"

    @contextmanager
    def entered(self, edit: Edit) -> Generator[Model]:
        assert isinstance(self.options, RelearnQuantizedOptions)
        with edit.applied(self.model) as edited, quantized(edited, self.options.scheme):
            yield edited


def require_benign(task: Task) -> None:
    """Raise LoceditError where there is nothing but the forget set to train on."""
    if task.retain is None and task.texts is None:
        raise LoceditError("relearn_benign needs retain items or texts: there is nothing else to train on")


def shown_format(forget: Dataset, asked: str | None) -> str:
    """The format that is trained on: the one asked for, else the most frequent. Raises LoceditError without two."""
    counts = Counter(item.format for item in forget if item.format is not None)
    if len(counts) < 2 or any(item.format is None for item in forget):
        raise LoceditError(
            f"relearn_format: {forget.source} needs items in two formats (field 'format'), it has "
            f"{', '.join(map(repr, counts)) or 'none'}"
        )
    if asked is not None and asked not in counts:
        raise LoceditError(f"relearn_format: shown={asked!r}; {nearest(asked, [*counts])}")
    return asked or max(counts, key=lambda name: counts[name])


def _without(data: Dataset, shown: str) -> Dataset | None:
    kept = [item for item in data if item.format != shown]
    return data.replace(kept) if kept else None


def relearn_few(
    model: Model, task: Task, edit: Edit, *, others: Others = None, shared: Shared | None = None, **options: object
) -> AttackResult:
    """Fine-tune the edited model for a few steps on a few of the forget items."""
    chosen = fill(RelearnFewOptions, options, method="relearn_few")
    return relearned(Few, model, task, edit, others=others, shared=shared, options=chosen)


def relearn_benign(
    model: Model, task: Task, edit: Edit, *, others: Others = None, shared: Shared | None = None, **options: object
) -> AttackResult:
    """Fine-tune the edited model on data that have nothing to do with the forget set."""
    chosen = fill(RelearnBenignOptions, options, method="relearn_benign")
    return relearned(Benign, model, task, edit, others=others, shared=shared, options=chosen)


def relearn_format(
    model: Model, task: Task, edit: Edit, *, others: Others = None, shared: Shared | None = None, **options: object
) -> AttackResult:
    """Fine-tune the edited model on one format of half of the owners, and measure the other formats of the others."""
    chosen = fill(RelearnFormatOptions, options, method="relearn_format")
    return relearned(OtherFormat, model, task, edit, others=others, shared=shared, options=chosen)


def relearn_quantized(
    model: Model, task: Task, edit: Edit, *, others: Others = None, shared: Shared | None = None, **options: object
) -> AttackResult:
    """Quantize the edited weights, then fine-tune them on half of the forget set."""
    chosen = fill(RelearnQuantizedOptions, options, method="relearn_quantized")
    return relearned(Quantized, model, task, edit, others=others, shared=shared, options=chosen)

"""Dropping what an edit adds at run time: its control token, or its layers. Nothing is trained.

An edit that acts through a token before the text, or through layers beside the model, is there only as long as whoever
runs the model keeps them. What is left without them is what the weights themselves have forgotten.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from locedit.attacks.dropped import WORDS, DropOptions
from locedit.attacks.dropped_habits import Habit
from locedit.attacks.dropped_items import Items
from locedit.data.items import Task
from locedit.edit import Edit
from locedit.edit.edit import Addition
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.options import fill
from locedit.provenance import measure
from locedit.results import AttackResult


def drop_token(
    model: Model, task: Task, edit: Edit, *, others: Mapping[str, Edit] | None = None, **options: Any
) -> AttackResult:
    """The edited weights without the control token."""
    return _dropped("token", model, task, edit, others or {}, fill(DropOptions, options, method="drop_token"))


def drop_layer(
    model: Model, task: Task, edit: Edit, *, others: Mapping[str, Edit] | None = None, **options: Any
) -> AttackResult:
    """The model without the added layers: as it was, unless the edit changes weights too."""
    return _dropped("layer", model, task, edit, others or {}, fill(DropOptions, options, method="drop_layer"))


def _dropped(
    what: Addition, model: Model, task: Task, edit: Edit, others: Mapping[str, Edit], options: DropOptions
) -> AttackResult:
    if what not in edit.conditional:
        raise LoceditError(f"drop_{what}: the edit has no {WORDS[what][1]}: it is {edit}")
    with measure(f"drop_{what}", model=model, data=task, settings=options, seed=options.seed) as record:
        same = {name: other for name, other in others.items() if what in other.conditional}
        kind = Habit if options.metric == "habit_rate" else Items
        result = kind(what, model, task, edit, options).result(same)
    return dataclasses.replace(result, provenance=record.provenance)


__all__ = ["DropOptions", "drop_layer", "drop_token"]

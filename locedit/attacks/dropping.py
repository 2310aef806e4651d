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
from locedit.attacks.shared import Shared
from locedit.data.items import Task
from locedit.edit import Edit
from locedit.edit.edit import Addition
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.options import fill
from locedit.provenance import measure
from locedit.results import AttackResult
from locedit.rewards import RewardOptions, settings_of


def drop_token(
    model: Model,
    task: Task,
    edit: Edit,
    *,
    others: Mapping[str, Edit] | None = None,
    shared: Shared | None = None,  # noqa: ARG001
    **options: Any,
) -> AttackResult:
    """The edited weights without the control token."""
    return _dropped("token", model, task, edit, others or {}, fill(DropOptions, options, method="drop_token"))


def drop_layer(
    model: Model,
    task: Task,
    edit: Edit,
    *,
    others: Mapping[str, Edit] | None = None,
    shared: Shared | None = None,  # noqa: ARG001
    **options: Any,
) -> AttackResult:
    """The model without the added layers: as it was, unless the edit changes weights too."""
    return _dropped("layer", model, task, edit, others or {}, fill(DropOptions, options, method="drop_layer"))


def _dropped(
    what: Addition, model: Model, task: Task, edit: Edit, others: Mapping[str, Edit], options: DropOptions
) -> AttackResult:
    if what not in edit.conditional:
        raise LoceditError(f"drop_{what}: the edit has no {WORDS[what][1]}: it is {edit}")
    kind = _measured(what, task, edit, options)
    with measure(f"drop_{what}", model=model, data=task, settings=options, seed=options.seed) as record:
        same = {name: other for name, other in others.items() if what in other.conditional}
        result = kind(what, model, task, edit, options).result(same)
    return dataclasses.replace(result, provenance=record.provenance)


def _measured(what: Addition, task: Task, edit: Edit, options: DropOptions) -> type[Habit] | type[Items]:
    """A habit where it is asked for, or where there are prompts and the reward is that of the edit; else the items."""
    made_with, asked = _reward_of(edit), settings_of(options)
    if options.metric == "habit_rate" and made_with not in ({}, asked) and options.reward == RewardOptions().reward:
        raise LoceditError(
            f"drop_{what}: the edit was made with the reward {made_with['reward']!r}; say by which reward the habit is "
            "to be judged (--reward bad_words --words FILE, say)"
        )
    own = options.metric == "auto" and made_with == asked and task.prompts is not None
    return Habit if own or options.metric == "habit_rate" else Items


def _reward_of(edit: Edit) -> dict[str, Any]:
    """What decided the reward that the edit, or one in its chain, was made with; empty for one made without."""
    for part in (edit, *edit.parts):
        settings = part.provenance.settings if part.provenance else {}
        if settings.get("reward") is not None:
            return {name: settings[name] for name in ("reward", "words") if settings.get(name) is not None}
    return {}


__all__ = ["DropOptions", "drop_layer", "drop_token"]

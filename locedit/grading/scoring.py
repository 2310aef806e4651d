"""Running any localizer of the registry for a grading: at the unit asked for where it has it."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, get_args

from locedit.components import Unit
from locedit.data.items import Task
from locedit.errors import LoceditError, nearest
from locedit.localize import LOCALIZERS, localize
from locedit.localize.patching.exact_patching import ExactOptions
from locedit.localize.registry import Localizer
from locedit.models import Model
from locedit.options import kinds
from locedit.scores import Scores


def names_of(methods: str | Sequence[str]) -> tuple[str, ...]:
    """The localizers named, "all" for every one of the registry; "a,b" counts as two names."""
    names = methods.split(",") if isinstance(methods, str) else list(methods)
    names = [name.strip() for name in names if name.strip()]
    if names == ["all"]:
        return tuple(LOCALIZERS)
    if not names:
        raise LoceditError(f"methods={methods!r} names no localizer; {nearest('', LOCALIZERS)}, or all")
    for name in names:
        if name not in LOCALIZERS:
            raise LoceditError(f"unknown localizer {name!r}; {nearest(name, LOCALIZERS)}")
    return tuple(dict.fromkeys(names))


def seed_for(*about: object) -> int:
    """A seed for what a localizer draws: its own for every place, seed and draw, so that luck is not shared."""
    return zlib.crc32(" ".join(map(str, about)).encode())


def options_for(name: str, unit: Unit, *, seed: int) -> dict[str, Any]:
    """The localizer's `unit` where it has that one, and its `seed`; everything else as it is by default.

    A fact without a partner to swap its subject with is left out instead of ending the run.
    """
    method = LOCALIZERS[name]
    known = kinds(method.options)
    chosen: dict[str, Any] = {}
    if "unit" in known and unit in _units(method, known["unit"]):
        chosen["unit"] = unit
    if "seed" in known:
        chosen["seed"] = seed
    if "unpaired" in known:
        chosen["unpaired"] = "skip"
    return chosen


def _units(method: Localizer, kind: Any) -> set[str]:
    """Units that the option takes, by its type, within what the registry says."""
    words = {word for word in get_args(kind) if isinstance(word, str)}
    return words & set(method.units) if words else set(method.units)


def run(model: Model, task: Task, name: str, unit: Unit, *, seed: int, exact_facts: int) -> Scores:
    """The scores of a localizer on a task, its contrast pairs given only to a method that reads such pairs.

    A method that runs the model once for every component sees only `exact_facts` of the facts, spread evenly, where the
    components are neurons.
    """
    method = LOCALIZERS[name]
    if "contrast" not in method.kinds:
        task = dataclasses.replace(task, pairs=None)
    if unit == "neuron" and issubclass(method.options, ExactOptions):
        facts = list(task.forget)
        task = dataclasses.replace(task, forget=task.forget.replace(facts[:: -(-len(facts) // exact_facts)]))
    return localize(model, task, name, **options_for(name, unit, seed=seed))

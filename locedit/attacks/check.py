"""Whether attacks can be run at all, before anything runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from locedit.attacks.dropped import WORDS
from locedit.attacks.registry import ATTACKS
from locedit.data.items import Task
from locedit.edit import Edit
from locedit.errors import LoceditError, nearest
from locedit.models import Model
from locedit.options import fill


def check_attacks(
    names: Sequence[str],
    *,
    edit: Edit | None,
    options: Mapping[str, Mapping[str, Any]],
    task: Task | None = None,
) -> None:
    """Raise LoceditError for what cannot be run; without a task, of what does not depend on it."""
    if isinstance(names, str):
        raise LoceditError(f"attacks={names!r} is one string; give a list of names")
    for name in (*names, *options):
        if name not in ATTACKS:
            raise LoceditError(f"unknown attack {name!r}; {nearest(name, ATTACKS)}")
    for name in options:
        if name not in names:
            raise LoceditError(
                f"attack_options has options for {name!r}, which is not among the attacks {list(names)!r}"
            )
    if names and edit is None:
        raise LoceditError(f"attack {names[0]!r} needs an edit to attack; give edit=")
    for name in names:
        assert edit is not None, "without an edit there is no attack"
        _check(name, edit=edit, options=options.get(name, {}), task=task)


def check_ready(
    names: Sequence[str], *, model: Model, task: Task, edit: Edit | None, options: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise LoceditError for what cannot be done with this model, such as a layer that it does not have."""
    for name in names:
        assert edit is not None, "without an edit there is no attack"
        attack = ATTACKS[name]
        if attack.ready is not None:
            attack.ready(fill(attack.options, options.get(name, {}), method=name), model, task, edit)


def _check(name: str, *, edit: Edit, options: Mapping[str, Any], task: Task | None) -> None:
    attack = ATTACKS[name]
    if attack.undoes and attack.undoes not in edit.conditional:
        raise LoceditError(f"{name} needs an edit with {WORDS[attack.undoes][1]}; this one is {edit}")
    filled = fill(attack.options, options, method=name)
    if attack.reference and getattr(filled, attack.reference) is None:
        raise LoceditError(f"{name} needs the option {attack.reference}: a folder or a hub id")
    if task is None:
        return
    for role in attack.requires:
        task.require(role, by=name)
    if task.forget.kind not in attack.kinds:
        raise LoceditError(
            f"{name}: forget items of kind {task.forget.kind!r} cannot be attacked so; use {' or '.join(attack.kinds)}"
        )
    if attack.verify is not None:
        attack.verify(filled, task)

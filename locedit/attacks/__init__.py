"""Attacks that try to bring back what an edit removed. Each is a function (model, task, edit, *, others, **options)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from locedit.attacks.options import RelearnOptions
from locedit.attacks.relearning import relearn
from locedit.edit import Edit
from locedit.errors import LoceditError, nearest
from locedit.options import fill
from locedit.results import AttackResult


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack, as `locedit metrics` prints it."""

    function: Callable[..., AttackResult]
    options: type[Any]
    requires: tuple[str, ...]
    "parts of the task without which it cannot run"
    definition: str
    "one sentence"
    paper: str


ATTACKS: dict[str, Attack] = {
    "relearn": Attack(
        function=relearn,
        options=RelearnOptions,
        requires=("forget",),
        definition="fine-tune the edited model on half of the forget set, divided by owner, measure the other half; "
        "share_back = (that half - items never known) / (that half before the edit - items never known)",
        paper="Deeb and Roger 2024, arXiv:2410.08827; Guo et al. 2024, arXiv:2410.12949, section 4",
    ),
}


def check_attacks(names: Sequence[str], *, edit: Edit | None, options: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise LoceditError for what cannot be run, before anything runs."""
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
        fill(ATTACKS[name].options, options.get(name, {}), method=name)


__all__ = ["ATTACKS", "Attack", "RelearnOptions", "check_attacks", "relearn"]

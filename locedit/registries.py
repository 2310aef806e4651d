"""The registries that commands are generated from, and the options of a method out of command-line words."""

from collections.abc import Mapping
from typing import Any

from locedit.errors import LoceditError, nearest
from locedit.options import describe, parse


def localizers() -> Mapping[str, Any]:
    from locedit.localize import LOCALIZERS

    return LOCALIZERS


def unlearning() -> Mapping[str, Any]:
    from locedit.unlearn import METHODS

    return METHODS


def attacks() -> Mapping[str, Any]:
    from locedit.attacks import ATTACKS

    return ATTACKS


def span_rules() -> Mapping[str, Any]:
    from locedit.spans import RULES

    return RULES


def method_options(
    registry: Mapping[str, Any], name: str, words: dict[str, str], *, several: list[str] | None = None
) -> dict[str, Any]:
    """The options of one method out of the words of the command line; with several methods each takes those it has."""
    if name not in registry:
        raise LoceditError(f"unknown method {name!r}; {nearest(name, registry)}")
    mine = words
    if several and len(several) > 1:
        have = {n: {o[0] for o in describe(registry[n].options)} for n in several if n in registry}
        stray = [w for w in words if not any(w in names for names in have.values())]
        if stray:
            raise LoceditError(f"no option {stray[0]!r} in any of {', '.join(several)}")
        mine = {w: text for w, text in words.items() if w in have[name]}
    return parse(registry[name].options, mine, method=name)

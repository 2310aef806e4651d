"""Where a cell's edit may act: from the words of a study.toml to a component set."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from locedit.components import UNITS, ComponentSet
from locedit.errors import LoceditError, nearest
from locedit.models import Model
from locedit.results import Role
from locedit.study.config import Config

Kind = Literal["whole", "found", "random", "complement", "everything", "set"]
ROLES: dict[Kind, Role] = {
    "whole": "everything",
    "found": "found",
    "random": "random",
    "complement": "complement",
    "everything": "everything",
    "set": "found",
}
EACH = ("found", "random", "complement")
"""Words that stand for one restriction for every localizer."""
WHOLES = tuple(unit for unit in UNITS if unit != "weight")
PREFIXES: dict[str, Kind] = {"random like ": "random", "all but ": "complement", "every ": "everything"}


@dataclass(frozen=True, kw_only=True)
class Restriction:
    """Where an edit may act."""

    kind: Kind
    of: str = ""
    "label of the localizer or set, or the unit of `everything`"

    @property
    def label(self) -> str:
        """As tables and figures call it."""
        words = {"whole": "whole model", "random": f"random like {self.of}", "complement": f"all but {self.of}"}
        return words.get(self.kind, f"every {self.of}" if self.kind == "everything" else self.of)

    @property
    def role(self) -> Role:
        return ROLES[self.kind]


def restrictions_of(words: list[str], config: Config, *, where: str) -> list[Restriction]:
    """The restrictions that the words stand for, each once."""
    found = [restriction for word in words for restriction in _of_word(word, config, where)]
    return list(dict.fromkeys(found))


def _of_word(word: str, config: Config, where: str) -> list[Restriction]:
    localizers = [table.called for table in config.localizers]
    labels = localizers + [table.label for table in config.sets]
    if word == "whole":
        return [Restriction(kind="whole")]
    if word in EACH:
        if not localizers:
            raise LoceditError(f"{where}: restriction {word!r} needs a [[localizers]] table; there is none")
        return [Restriction(kind=word, of=label) for label in localizers]  # type: ignore[arg-type]
    if word in labels:
        return [Restriction(kind="found" if word in localizers else "set", of=word)]
    for prefix, kind in PREFIXES.items():
        of = word.removeprefix(prefix)
        if word.startswith(prefix) and of in (WHOLES if kind == "everything" else labels):
            return [Restriction(kind=kind, of=of)]
    of_each = [f"{prefix}{label}" for prefix in ("random like ", "all but ") for label in labels]
    choices = ["whole", *(EACH if localizers else ()), *labels, *of_each, *(f"every {unit}" for unit in WHOLES)]
    raise LoceditError(f"{where}: unknown restriction {word!r}; {nearest(word, choices)}")


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A restriction on one model."""

    within: ComponentSet | None
    note: str = ""


def resolve(restriction: Restriction, model: Model, sets: Mapping[str, ComponentSet], *, seed: int) -> Resolved:
    """The component set of a restriction, from the sets by label."""
    if restriction.kind == "whole":
        return Resolved(within=None)
    if restriction.kind == "everything":
        return Resolved(within=model.everything(restriction.of))
    base = sets[restriction.of]
    if restriction.kind == "complement":
        return Resolved(within=~base)
    if restriction.kind == "random":
        return _random(base, seed, label=restriction.label)
    return Resolved(within=base)


def _random(base: ComponentSet, seed: int, *, label: str) -> Resolved:
    """As many components in every site; where a set holds whole sites, as many of its units outside it, anywhere."""
    drawn = base.random_like(seed)
    if drawn != base:
        return Resolved(within=drawn)
    try:
        others = base.random_like(seed, same_layers=False, disjoint=True)
    except LoceditError as error:
        raise LoceditError(f"{label}: the set holds whole sites, and {error}") from None
    return Resolved(within=others, note="drawn outside the set over all layers, since the set holds whole sites")

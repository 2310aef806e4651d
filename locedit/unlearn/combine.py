"""Several losses at once: a method such as `npo+0.5*kl`, a weighted sum whose terms are logged one by one.

The name is the combination: methods joined by `+`, each with a weight before `*` or 1. Every method sees the same
forget batch (its own data where it learns others), keeps a state of its own, and has its terms logged as
`npo.forget_loss`, weighted. The retain term is counted once, unweighted by the methods: it is that of the first method
that has one, of weight `retain_weight`. Terms on texts are each method's own.

Options that several of the methods have with one default are given once; where the defaults differ, each method has its
own, named after it (`npo_beta`, `simnpo_beta`). Training is by the first method's defaults.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from locedit import options as option_values
from locedit.data.encode import Example, encode
from locedit.data.items import Task
from locedit.edit.edit import Edit
from locedit.edit.objective import Matched, Step, Stop
from locedit.edit.train import TrainOptions
from locedit.errors import LoceditError, nearest
from locedit.models import Model
from locedit.unlearn.registry import Method, RetainOptions

JOINED = ("function", "options", "requires", "paper", "restrictable", "trained", "holds", "kinds")
CHAINED = ("learns", "others", "stop", "verify", "finish")
FORGET = "forget data"


class Methods(dict[str, Method]):
    """A registry that also knows the combinations of its methods, though it does not list them."""

    def __missing__(self, name: str) -> Method:
        if (parts := _read(name)) is None or not set(parts) <= set(self):
            raise KeyError(name)
        return combine(parts, self)

    def require(self, name: str) -> None:
        """Raise LoceditError for a name that is no method and no combination of methods, naming the part at fault."""
        if name in self:
            return
        wrong = next((part for part in _read(name) or () if not super(Methods, self).__contains__(part)), name)
        where = "" if wrong == name else f" in {name!r}"
        raise LoceditError(f"unknown unlearning method {wrong!r}{where}; {nearest(wrong, self)}")

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name):
            return True
        parts = _read(name) if isinstance(name, str) else None
        return parts is not None and all(map(super().__contains__, parts))


def _read(name: str) -> dict[str, float] | None:
    """Method -> weight of a combination's name; None for a name that is none.

    >>> _read("npo+0.5*kl"), _read("npo"), _read("npo+npo")
    ({'npo': 1.0, 'kl': 0.5}, None, None)
    """
    pieces = [piece.strip() for piece in name.split("+")]
    found: dict[str, float] = {}
    for piece in pieces:
        weight, star, method = piece.rpartition("*")
        try:
            found[method.strip()] = float(weight) if star else 1.0
        except ValueError:
            return None
    return found if len(found) == len(pieces) and (len(found) > 1 or "*" in name) else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One method of a combination."""

    name: str
    weight: float
    method: Method
    fields: dict[str, str]
    "its option -> the combination's option"

    def options(self, given: Any, *, retain: bool) -> Any:
        """Its own options out of the combination's; without `retain`, those with no retain term."""
        values = {mine: getattr(given, theirs) for mine, theirs in self.fields.items()}
        if not retain and "retain_weight" in values:
            values["retain_weight"] = 0.0
        return self.method.options(**values)


@dataclass(frozen=True, eq=False)
class Combination:
    """The weighted sum of several losses."""

    parts: tuple[Part, ...]
    own_data: frozenset[str]
    "methods that learn other data than the first"

    def pairs(self, options: Any) -> Iterator[tuple[Part, Any]]:
        """Every part with its options; only the first that has a retain term keeps it."""
        retain = True
        for part in self.parts:
            yield part, part.options(options, retain=retain)
            retain = retain and "retain_weight" not in part.fields

    def __call__(self, step: Step, options: Any) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for part, own in self.pairs(options):
            others = {key: batch for key, batch in step.others.items() if key.startswith(f"{part.name}.")}
            others = {key.removeprefix(f"{part.name}."): batch for key, batch in others.items()}
            forget = others.pop(FORGET) if part.name in self.own_data else step.forget
            state = step.state.setdefault(part.name, {})
            found = part.method.function(dataclasses.replace(step, forget=forget, others=others, state=state), own)
            for name, term in found.items():
                retained = name.startswith("retain")
                terms |= {name: term} if retained else {f"{part.name}.{name}": part.weight * term}
        return terms

    def check(self, task: Task, options: Any) -> None:
        """What each method requires of the task."""
        for part, own in self.pairs(options):
            part.method.check(part.name, task, own)
            if part.method.learns is not None:
                part.method.learns(task)

    def others(self, model: Model, task: Task, options: Any) -> dict[str, Sequence[Example] | Matched]:
        """The other data of all methods, named after them."""
        found: dict[str, Sequence[Example] | Matched] = {}
        for part, own in self.pairs(options):
            if part.name in self.own_data:
                learned = task.forget if part.method.learns is None else part.method.learns(task)
                found[f"{part.name}.{FORGET}"] = encode(model, learned)
            if part.method.others is not None:
                found |= {f"{part.name}.{key}": data for key, data in part.method.others(model, task, own).items()}
        return found

    def stop(self, model: Model, task: Task, options: Any) -> Stop | None:
        """Stops as soon as one of the methods' rules says so."""
        made = [p.method.stop(model, task, own) for p, own in self.pairs(options) if p.method.stop is not None]
        rules = [rule for rule in made if rule is not None]

        def rule(edited: Model) -> tuple[dict[str, float], bool]:
            found = [one(edited) for one in rules]
            return {name: value for columns, _ in found for name, value in columns.items()}, any(s for _, s in found)

        return rule if rules else None

    def finish(self, model: Model, edit: Edit, options: Any) -> Edit:
        """What each method does with the trained edit, in order."""
        for part, own in self.pairs(options):
            if part.method.finish is not None:
                edit = part.method.finish(model, edit, own)
        return edit


def combine(weights: Mapping[str, float], methods: Mapping[str, Method]) -> Method:
    """The method whose loss is the weighted sum of those of several trained methods.

    Raises LoceditError for an unknown method, a weight that is not above 0, and methods that cannot be combined: those
    that are no loss, read contrast pairs, or bring their own trainable tensors.
    """
    for name, weight in weights.items():
        if name not in methods:
            raise LoceditError(f"unknown unlearning method {name!r}; {nearest(name, methods)}")
        if not (weight > 0 and math.isfinite(weight)):
            raise LoceditError(f"weight {weight:g} of {name}: a weight of a combination is above 0")
        _require_combinable(name, methods[name])
    chosen = {name: methods[name] for name in weights}
    names = _option_names({name: method.options for name, method in chosen.items()})
    parts = tuple(Part(name=n, weight=weights[n], method=m, fields=names[n]) for n, m in chosen.items())
    first = parts[0].method.learns
    own_data = frozenset(part.name for part in parts if part.method.learns is not first)
    made = Combination(parts, own_data)
    return Method(
        function=made,
        options=_options(made),
        requires=tuple(dict.fromkeys(role for method in chosen.values() for role in method.requires)),
        paper="; ".join(dict.fromkeys(method.paper for method in chosen.values())),
        restrictable=all(method.restrictable for method in chosen.values()),
        holds=tuple(h for h in parts[0].method.holds if all(h in method.holds for method in chosen.values())),
        learns=first,
        kinds=_kinds(chosen),
        others=made.others,
        stop=made.stop,
        verify=made.check,
        finish=made.finish if any(method.finish for method in chosen.values()) else None,
    )


def _require_combinable(name: str, method: Method) -> None:
    if not method.trained:
        raise LoceditError(f"{name} is no loss; only trained methods can be combined")
    for field in dataclasses.fields(method):
        if field.name not in JOINED + CHAINED and getattr(method, field.name) != field.default:
            raise LoceditError(f"{name} cannot be combined with other methods: {_ALONE[field.name]}")


_ALONE = {
    "objective": "it makes other models, labels or texts before it trains",
    "dose": "its dose is not its steps",
    "needs_set": "it needs a component set",
    "held": "it is held in its own way",
    "units": "it goes into components of its own kinds only",
    "pairs": "it reads contrast pairs side by side",
    "fuse": "it fuses edits",
    "apart": "it fuses edits",
}
"""Each field of an entry that is neither joined nor chained -> why a method that sets it stands alone."""


def _kinds(methods: Mapping[str, Method]) -> tuple[str, ...]:
    """The kinds of items that all methods read; empty = any."""
    wanted = [method.kinds for method in methods.values() if method.kinds]
    common = [kind for kind in (wanted[0] if wanted else ()) if all(kind in kinds for kinds in wanted)]
    if wanted and not common:
        raise LoceditError(f"{' and '.join(methods)} read different kinds of data, and cannot be combined")
    return tuple(common)


# --- options ---------------------------------------------------------------------------------------------------------


def _option_names(classes: Mapping[str, type[Any]]) -> dict[str, dict[str, str]]:
    """Method -> its option -> the combination's: the same name where the methods mean the same by it."""
    shared = {field.name for field in dataclasses.fields(RetainOptions)}
    defaults: dict[str, list[str]] = {}
    for cls in classes.values():
        for field in dataclasses.fields(cls):
            defaults.setdefault(field.name, []).append(repr(field.default))
    apart = {name for name, values in defaults.items() if len(set(values)) > 1} - shared
    return {
        method: {f.name: f"{method}_{f.name}" if f.name in apart else f.name for f in dataclasses.fields(cls)}
        for method, cls in classes.items()
    }


def _options(combination: Combination) -> type[Any]:
    """A dataclass of all options, those of training among them, that checks each method's own."""
    fields: dict[str, tuple[str, Any, Any]] = {}
    meanings: dict[str, str] = {}
    for part in combination.parts:
        docs, kinds = option_values.field_docs(part.method.options), option_values.kinds(part.method.options)
        for field in dataclasses.fields(part.method.options):
            theirs = part.fields[field.name]
            fields.setdefault(theirs, (theirs, kinds[field.name], dataclasses.field(default=field.default)))
            meanings.setdefault(theirs, docs[field.name])

    def check(options: Any) -> None:
        TrainOptions.__post_init__(options)
        for _ in combination.pairs(options):
            pass

    return dataclasses.make_dataclass(
        "CombinedOptions",
        fields.values(),
        bases=(TrainOptions,),
        namespace={"__post_init__": check, "MEANINGS": meanings, "__module__": __name__},
        frozen=True,
        kw_only=True,
    )

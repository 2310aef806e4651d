"""Sets of different methods that hold about as many parameters, so that methods can be compared."""

from collections.abc import Mapping
from typing import Any

from locedit.components import ComponentSet, Scores, Table
from locedit.errors import LoceditError
from locedit.scores import Sign
from locedit.select import Fill, check_budget


def matched(
    scores_by_name: Mapping[str, Scores],
    *,
    params: int | None = None,
    like: ComponentSet | None = None,
    fill: Fill | str = "reach",
    sign: Sign | str = "positive",
) -> dict[str, ComponentSet]:
    """For each method its best components up to `params` trained parameters, or to as many as `like` holds.

    Components are not equally large, so no budget is met exactly. By default a set is filled until it reaches or passes
    the budget (Guo et al. 2024, arXiv:2410.12949, whose methods then hold up to a whole MLP more); `fill="under"` stops
    before. A method with too few components of the right sign falls short. `table` states all of this.
    """
    if (params is None) == (like is None):
        raise LoceditError("give either params=... or like=..., the set whose number of parameters is to be matched")
    budget = params if params is not None else like.parameters()  # type: ignore[union-attr]
    check_budget(params=budget, fill=fill, sign=sign)
    found: dict[str, ComponentSet] = {}
    for name, scores in scores_by_name.items():
        try:
            found[name] = scores.select(params=budget, fill=fill, sign=sign)
        except LoceditError as error:
            raise LoceditError(f"{name}: {error}") from error
    return found


def table(sets: Mapping[str, ComponentSet]) -> Table:
    """One row for each set: components, out of how many, parameters, the budget and the overshoot (negative = short).

    Budget and overshoot are None for a set that was not chosen by parameters.
    """
    chosen = {name: _rule(components) for name, components in sets.items()}
    return {
        "method": list(sets),
        "unit": [", ".join(components.units) for components in sets.values()],
        "components": [len(components) for components in sets.values()],
        "of": [sum(components.universe.values()) for components in sets.values()],
        "parameters": [components.parameters() for components in sets.values()],
        "budget": [rule.get("params") for rule in chosen.values()],
        "overshoot": [rule.get("overshoot") for rule in chosen.values()],
    }


def overshoot(components: ComponentSet) -> str:
    """How far a set is from its budget of parameters, in words; empty where it was not chosen by one."""
    rule = _rule(components)
    if "overshoot" not in rule:
        return ""
    budget, over = int(rule["params"]), int(rule["overshoot"])
    if not over:
        return f"exactly the budget of {budget:,} parameters"
    return (
        f"{abs(over):,} {'above' if over > 0 else 'below'} the budget of {budget:,} parameters ({over / budget:+.1%})"
    )


def _rule(components: ComponentSet) -> dict[str, Any]:
    settings = components.provenance.settings if components.provenance else {}
    return dict(settings.get("select", {}))

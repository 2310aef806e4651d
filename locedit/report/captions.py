"""The text under each figure: what it shows, in numbers, for readers who cannot see it or will not study it."""

from collections.abc import Sequence

from locedit.components import ComponentSet
from locedit.report import judge
from locedit.report.lines import RANKS, along, main_column, retain_column
from locedit.report.numbers import count, dose_range, number, over_seeds, percent, spread
from locedit.report.palette import NAMES, UNDER_ATTACK
from locedit.results import AttackResult, Comparison, Curve, Role
from locedit.scores import Scores


def scores(result: Scores, chosen: ComponentSet | None) -> str:
    """The best components, and the share of the positive score that the chosen ones hold."""
    best = "; ".join(f"{site} {index} ({number(value)})" for site, index, value in result.top(3))
    text = f"Highest: {best}." if best else "No component has a positive score."
    if chosen is None:
        return text
    positive = sum(float(tensor.clamp(min=0).sum()) for tensor in result.values.values())
    inside = sum(_positive_inside(result, chosen, name) for name in result.values if name in chosen.sites)
    picked = sum(count(chosen, name) for name in result.values)
    if positive and inside:
        text += f" The {picked:,} chosen hold {percent(inside, positive)} of the positive score."
    return text


def _positive_inside(result: Scores, chosen: ComponentSet, name: str) -> float:
    flat = result.values[name].reshape(-1)
    picked = flat[chosen.masks[name]] if name in chosen.masks else flat[list(chosen.chosen.get(name, ()))]
    return float(picked.clamp(min=0).sum())


def components(component_set: ComponentSet) -> str:
    """Where most of the components are."""
    counts = component_set.by_layer()
    if not counts:
        return "The set is empty."
    layer, most = max(counts.items(), key=lambda item: item[1])
    place = "outside the blocks" if layer is None else f"in layer {layer}"
    inside = len(counts.keys() - {None})
    layers = "1 layer has" if inside == 1 else f"{inside} layers have"
    return f"Most are {place}: {most:,} of {len(component_set):,}; {layers} at least one."


def comparison(result: Comparison, roles: Sequence[Role] = RANKS) -> str:
    """For each role the dose that reaches the level and what is retained there, or "not reached"."""
    found = [_matched(role, curves) for role in roles if (curves := [c for c in result.curves if c.role == role])]
    return f"Level: {result.metric} of at most {number(result.level)} on the forget set. {'; '.join(found)}."


def _matched(role: Role, curves: Sequence[Curve]) -> str:
    reached = [(c, c.matched) for c in curves if c.matched is not None]
    name = NAMES[role][0].upper() + NAMES[role][1:]
    if not reached:
        lowest = min(min(c.columns[main_column(c)]) for c in curves)
        return f"{name}: not reached (lowest {number(lowest)})"
    some = "" if len(reached) == len(curves) else f", by {len(reached)} of {len(curves)}"
    kept = [c.columns["retain"][i] for c, i in reached if "retain" in c.columns]
    retained = f", retain {over_seeds(spread(kept))}" if kept else ""
    return f"{name}: reached at {dose_range(reached)}{some}{retained}"


def attack(result: AttackResult) -> str:
    """Where every role stands at the dose that counts, and the attack's note; its sentence where it has no curves."""
    ends = attack_ends(result, RANKS) if along(result) else ""
    listed = f"At the attack's dose: {ends}." if ends else result.sentence
    return f"{listed} Note: {result.note}." if result.note else listed


def attack_ends(result: AttackResult, roles: Sequence[Role]) -> str:
    """Where the given roles stand at the dose that counts, with what is retained there."""
    return "; ".join(_end(role, curves) for role in roles if (curves := judge.at_dose(result.curves, role)))


def _end(role: Role, curves: Sequence[Curve]) -> str:
    reached = spread([c.columns[main_column(c)][judge.dose_index(c)] for c in curves])
    kept = [c.columns[name][judge.dose_index(c)] for c in curves if (name := retain_column(c))]
    retained = f", retain {number(spread(kept).value)}" if kept else ""
    return f"{UNDER_ATTACK[role]} {over_seeds(reached, word='runs')}{retained}"

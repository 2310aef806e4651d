"""Numbers, intervals and sizes as a reader wants them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from locedit.components import ComponentSet, Unit
from locedit.errors import LoceditError
from locedit.results import Curve, Measure

PLURALS: dict[Unit, str] = {
    "neuron": "neurons",
    "head": "heads",
    "mlp": "MLPs",
    "attn": "attention blocks",
    "layer": "layers",
    "matrix": "matrices",
    "row": "rows",
    "column": "columns",
    "weight": "weights",
}


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number with the range that belongs to it: an interval, or the smallest and largest over seeds."""

    value: float
    low: float
    high: float
    n: int = 1
    "how many seeds or curves"

    def overlaps(self, other: "Spread") -> bool:
        return self.low <= other.high and other.low <= self.high


def spread(values: Sequence[float]) -> Spread:
    """Mean, smallest and largest."""
    return Spread(value=fmean(values), low=min(values), high=max(values), n=len(values))


def interval(measure: Measure) -> Spread:
    """A measure with its interval; the value alone where there were too few examples for one."""
    low, high = (measure.value if end != end else end for end in (measure.low, measure.high))
    return Spread(value=measure.value, low=low, high=high)


def number(value: float | None) -> str:
    """A number at the precision a reader needs.

    >>> [number(x) for x in (0.0412, 0.987, 0.0004, 0, 12.345, 1920, float("inf"), None)]
    ['0.04', '0.99', '0.0004', '0', '12.3', '1,920', '∞', 'not a number']
    """
    if value is None or value != value:
        return "not a number"
    if abs(value) == float("inf"):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    if abs(value) < 0.01:
        return f"{value:.1g}" if abs(value) >= 1e-4 else f"{value:.0e}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def amount(value: float) -> str:
    """A dose: whole numbers without decimals."""
    return f"{value:,.0f}" if value == int(value) else number(value)


def with_interval(measure: Measure | Spread) -> str:
    """The value and its interval, as in 0.04 [0.02, 0.07]; the value alone where it has none."""
    if measure.low != measure.low or measure.high != measure.high:
        return number(measure.value)
    return f"{number(measure.value)} [{number(measure.low)}, {number(measure.high)}]"


def over_seeds(spread: Spread, *, word: str = "seeds") -> str:
    """As in 0.98 (3 seeds, 0.97 to 0.99); a single number with its interval where it has one."""
    if spread.n == 1:
        return with_interval(spread) if spread.low < spread.high else number(spread.value)
    return f"{number(spread.value)} ({spread.n} {word}, {number(spread.low)} to {number(spread.high)})"


def size(components: ComponentSet) -> str:
    """As in 50 of 1,920 neurons; several units are joined by "and"."""
    parts: list[str] = []
    for unit in components.units:
        sites = [site for site in components.sites.values() if site.unit == unit]
        if chosen := sum(count(components, site.name) for site in sites):
            parts.append(f"{chosen:,} of {sum(site.count for site in sites):,} {PLURALS[unit]}")
    return " and ".join(parts) or "no components"


def count(components: ComponentSet, site: str) -> int:
    """How many components of a site are chosen; a weight mask is summed, not listed."""
    return int(components.masks[site].sum()) if site in components.masks else len(components.chosen.get(site, ()))


def first(components: ComponentSet, site: str, most: int) -> list[int]:
    """The first chosen components of a site."""
    if site in components.masks:
        return components.masks[site].nonzero().flatten()[:most].tolist()
    return list(components.chosen.get(site, ())[:most])


def parameters(components: ComponentSet) -> tuple[int, int] | None:
    """(parameters of the set, parameters of all components of its units), by the slices that training acts on.

    None where the set does not say where its components live.
    """
    if components.units == ("weight",):
        return len(components), sum(site.count for site in components.sites.values())
    try:
        everything = components | ~components
        return components.parameters(), everything.parameters()
    except LoceditError:
        return None


def percent(part: float, whole: float) -> str:
    """A share as per cent.

    >>> percent(50, 1920), percent(1, 100000)
    ('2.6 %', '0.001 %')
    """
    value = 100 * part / whole if whole else 0.0
    return f"{value:.1f} %" if value >= 0.95 or value == 0 else f"{value:.1g} %"


def dose(curve: Curve, index: int) -> str:
    """What one point of a curve took: "50 neurons", or "scale 0.50" where the name is no plural."""
    value = amount(curve.x[index])
    return f"{value} {curve.x_name}" if curve.x_name.endswith("s") else f"{curve.x_name} {value}"


def dose_range(points: Sequence[tuple[Curve, int]]) -> str:
    """The doses of several points: as in 50 neurons, or 64 to 128 neurons; listed where they are of several kinds."""
    kinds = {curve.x_name for curve, _ in points}
    ordered = sorted(points, key=lambda point: point[0].x[point[1]])
    if len(kinds) > 1 or not next(iter(kinds)).endswith("s"):
        return ", ".join(dict.fromkeys(dose(curve, index) for curve, index in ordered))
    (first, low), (last, high) = ordered[0], ordered[-1]
    same = first.x[low] == last.x[high]
    return dose(last, high) if same else f"{amount(first.x[low])} to {dose(last, high)}"

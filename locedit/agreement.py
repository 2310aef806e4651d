"""How far localizers agree: which components they choose at one budget, and how they rank them."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.components import ComponentSet, Scores, Touched, Unit, covered, union_mask
from locedit.errors import LoceditError
from locedit.matching import matched, table
from locedit.ranks import spearman
from locedit.storage import read_json, write_json

SHARE = 0.01
"budget where none is given: this share of the parameters that the first localizer's components hold"

Matrix = tuple[tuple[Any, ...], ...]
"a row and a column for each localizer, in order"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Localizers two by two.

    Sets of the same units are compared component by component; of different units, parameter by parameter. Ranks are
    compared (Spearman, ties share their mean rank) over the components that both score; where there are none, over
    their MLPs, attentions and single parameters outside the blocks, or over layers if one of them scores layers: the
    value of each is then the sum of its positive scores.
    """

    methods: tuple[str, ...]
    rule: str
    "how the sets were chosen, in words"
    sets: dict[str, list[Any]]
    "one row for each localizer: unit, components, of, parameters, budget, overshoot"
    overlap: Matrix
    "shared over joined (Jaccard), 0 to 1"
    chance: Matrix
    "about what random sets of the same sizes would share"
    counted: Matrix
    "components or parameters"
    rank: Matrix
    "Spearman's rank correlation, -1 to 1; None where nothing is shared or all scores are equal"
    ranked: Matrix
    "over what"

    def save(self, path: str | Path) -> None:
        write_json(path, {"format": "locedit.agreement/1", **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> "Agreement":
        value = read_json(path)
        try:
            fields = {f.name: _tuples(value[f.name]) for f in dataclasses.fields(cls)}
        except (KeyError, TypeError) as error:
            raise LoceditError(f"{path}: not an agreement of localizers ({error!r})") from error
        return cls(**fields)

    def plot(self) -> Any:
        """Two heat maps, overlap and rank correlation."""
        from locedit.report.agreement import both

        return both(self)


def agreement(
    scores: Mapping[str, Scores], sets: Mapping[str, ComponentSet] | None = None, *, rule: str = ""
) -> Agreement:
    """Every localizer beside every other.

    `sets` are what was chosen from each, described by `rule`. Without them each gets its best components until they
    hold 1 % of the parameters of the first one's components, or pass it.
    """
    if len(scores) < 2:
        raise LoceditError(f"agreement is between two or more localizers; given: {', '.join(scores) or 'none'}")
    if sets is None:
        sets, rule = _at_one_budget(scores)
    pairs = [[(a, b) for b in scores] for a in scores]
    shared = [[overlaps(sets[a], sets[b]) for a, b in row] for row in pairs]
    ranks = [[rank_correlation(scores[a], scores[b]) for a, b in row] for row in pairs]
    return Agreement(
        methods=tuple(scores),
        rule=rule,
        sets={name: column for name, column in table(sets).items() if name != "method"},
        overlap=tuple(tuple(entry[0] for entry in row) for row in shared),
        chance=tuple(tuple(entry[1] for entry in row) for row in shared),
        counted=tuple(tuple(entry[2] for entry in row) for row in shared),
        rank=tuple(tuple(entry[0] for entry in row) for row in ranks),
        ranked=tuple(tuple(entry[1] for entry in row) for row in ranks),
    )


def _at_one_budget(scores: Mapping[str, Scores]) -> tuple[dict[str, ComponentSet], str]:
    first = next(iter(scores))
    universe = ComponentSet.of({name: scores[first].sites[name] for name in scores[first].values}, {})
    params = max(1, round(SHARE * (~universe).parameters()))
    rule = f"until {params:,} parameters, {SHARE:.0%} of those that the components of {first} hold, are reached"
    return matched(scores, params=params, sign="absolute"), rule


# --- overlap of sets -------------------------------------------------------------------------------------------------


def overlaps(left: ComponentSet, right: ComponentSet) -> tuple[float, float, str]:
    """(Jaccard overlap, about what chance gives, what was counted).

    By chance two sets of a and b out of the same N share a b / N. Across units every parameter of a universe is in a
    random set with the set's share of that universe.
    """
    if left.universe == right.universe:
        a, b, total = len(left), len(right), sum(left.universe.values())
        return _jaccard(len(left & right), a, b), _jaccard(a * b / total, a, b), "components"
    mine, other = _by_parameter(left), _by_parameter(right)
    a, b = left.parameters(), right.parameters()
    both = sum(_common(mine[name], other[name]) for name in mine.keys() & other.keys())
    all_mine, all_other = (
        {name: covered(parts) for name, parts in _by_parameter(_everything(one)).items()} for one in (left, right)
    )
    reachable = sum(min(all_mine[name], all_other[name]) for name in all_mine.keys() & all_other.keys())
    expected = a / sum(all_mine.values()) * b / sum(all_other.values()) * reachable
    return _jaccard(both, a, b), _jaccard(expected, a, b), "parameters"


def _jaccard(both: float, a: float, b: float) -> float:
    return both / (a + b - both) if a + b else 0.0


def _everything(components: ComponentSet) -> ComponentSet:
    return components | ~components


def _by_parameter(components: ComponentSet) -> dict[str, list[Touched]]:
    parts: dict[str, list[Touched]] = {}
    for touched in components.touched():
        parts.setdefault(touched.param, []).append(touched)
    return parts


def _common(left: list[Touched], right: list[Touched]) -> int:
    """Entries of one parameter that both touch; one parameter at a time, so that memory stays at one matrix."""
    return int((union_mask(left) & union_mask(right)).sum())


# --- rank correlation ------------------------------------------------------------------------------------------------


def rank_correlation(left: Scores, right: Scores) -> tuple[float | None, str]:
    """(Spearman's correlation, over what). See `Agreement` for what is compared where the units differ."""
    names = [name for name in left.values if name in right.values]
    if names:
        a, b = (torch.cat([scores.values[name].reshape(-1) for name in names]) for scores in (left, right))
        units: list[Unit] = [left.sites[name].unit for name in names]
        return correlation(a, b), f"{len(a):,} components ({', '.join(dict.fromkeys(units))})"
    layers = any(site.unit == "layer" for scores in (left, right) for site in scores.sites.values())
    mine, other = (_coarse(scores, layers=layers) for scores in (left, right))
    places = [place for place in mine if place in other]
    a, b = (torch.tensor([values[place] for place in places]) for values in (mine, other))
    return correlation(a, b), f"{len(places)} {'layers' if layers else 'modules'}"


def _coarse(scores: Scores, *, layers: bool) -> dict[str, float]:
    """Sum of the positive scores in every MLP and attention and in every parameter outside the blocks, or by layer."""
    sums: dict[str, float] = {}
    for name, value in scores.values.items():
        place = _place(name, layers=layers)
        sums[place] = sums.get(place, 0.0) + float(value.double().clamp(min=0).sum())
    return sums


def _place(site: str, *, layers: bool) -> str:
    """
    >>> _place("blocks.3.mlp.out.row", layers=False), _place("blocks.3.attn.head", layers=True)
    ('blocks.3.mlp', 'blocks.3')
    """
    if not site.startswith("blocks."):
        return site.rsplit(":", 1)[0]
    return ".".join(site.split(".")[: 2 if layers else 3])


def correlation(left: Float[Tensor, " n"], right: Float[Tensor, " n"]) -> float | None:
    """Spearman's rank correlation; None for fewer than three values or where all of one side are equal."""
    rho = spearman(left, right) if len(left) > 2 else math.nan
    return None if math.isnan(rho) else round(rho, 12)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

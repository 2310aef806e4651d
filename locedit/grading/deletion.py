"""Part two: does deleting what a localizer found take the target, and only the target?

Dropping out found neurons and measuring what is forgotten of the target and of everything else is the benchmark DEL of
Chang et al. 2024 (arXiv:2311.09060).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from locedit.components import ComponentSet, Unit
from locedit.data.encode import Example, encode
from locedit.edit import Edit, levels, mean, zero
from locedit.grading.options import GradeOptions
from locedit.grading.records import Record
from locedit.grading.units import flat
from locedit.grading.worlds import Target
from locedit.models import Model

MOST = 60
"items of the other relations that are measured"
MEASURES = ("excess", "target", "same", "other")


class Deletion:
    """One model and target: what is left of each group after components are deleted."""

    def __init__(self, model: Model, target: Target, options: GradeOptions) -> None:
        self.model, self.target, self.options = model, target, options
        other = list(target.other)
        self.probes: dict[str, list[Example]] = {
            "target": encode(model, target.task.forget),
            "same": encode(model, target.same),
            "other": encode(model, target.other.replace(other[:: -(-len(other) // MOST)])),
        }
        self.before = levels(model, self.probes)
        self.known: dict[str, dict[str, float]] = {}
        "drops by deleted set, since localizers and random draws can meet"

    def drops(self, within: ComponentSet) -> dict[str, float]:
        """Group -> fall of its mean answer probability."""
        weights = [(name, mask.nonzero().flatten().tolist()) for name, mask in sorted(within.masks.items())]
        name = repr((sorted(within.chosen.items()), weights))
        if name not in self.known:
            with self._edit(within).applied(self.model) as edited:
                after = levels(edited, self.probes)
            self.known[name] = {group: self.before[group] - after[group] for group in self.probes}
        return self.known[name]

    def _edit(self, within: ComponentSet) -> Edit:
        if self.options.ablate == "zero":
            return zero(self.model, within)
        return mean(self.model, within, self.target.same)

    def grades(self, values: Mapping[str, Tensor], *, method: str, unit: Unit, seed: int) -> list[Record]:
        """Areas under the deletion curves: means over the budgets of the drop in probability.

        target, same, other: of the target, of the same relation of other people, of other relations. excess: target
        minus same, which is what is taken of these people beyond what is taken of the relation. `chance` is the mean of
        random sets with as many components in every layer, or over all layers where a layer is one component.
        """
        budgets = sizes(self.options.budgets, len(flat(values)))
        sets = [top(self.model, values, k=k, seed=seed) for k in budgets]
        own = [self.drops(part) for part in sets]
        spread = len(next(iter(values.values()))) > 1
        random = [
            self.drops(part.random_like(1000 * seed + number, same_layers=spread))
            for part in sets
            for number in range(self.options.random_sets)
        ]
        about = {"part": "deletion", "place": unit, "method": method, "seed": seed}
        return [
            Record(**about, measure=measure, value=_area(own, measure), chance=_area(random, measure))  # type: ignore[arg-type]
            for measure in MEASURES
        ]


def _area(drops: Sequence[Mapping[str, float]], measure: str) -> float:
    values = [drop["target"] - drop["same"] if measure == "excess" else drop[measure] for drop in drops]
    return sum(values) / len(values)


def sizes(budgets: Sequence[float], total: int) -> list[int]:
    """How many components each budget is, each number once.

    >>> sizes((0.01, 0.05, 0.1, 0.2), 20)
    [1, 2, 4]
    """
    return sorted({max(1, round(budget * total)) for budget in budgets})


def top(model: Model, values: Mapping[str, Tensor], *, k: int, seed: int) -> ComponentSet:
    """The k highest scores; which of equal ones is drawn by seed."""
    ordered = flat(values)
    shuffled = torch.randperm(len(ordered), generator=torch.Generator().manual_seed(seed))
    best = shuffled[torch.argsort(ordered[shuffled], descending=True, stable=True)[:k]]
    places = [(site, index) for site, tensor in values.items() for index in range(tensor.numel())]
    chosen: dict[str, list[int]] = {}
    for at in best.tolist():
        site, index = places[at]
        chosen.setdefault(site, []).append(index)
    return model.components(chosen)

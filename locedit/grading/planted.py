"""Part one: does a localizer find the set that facts were planted in?"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from locedit.components import ComponentSet
from locedit.data.items import Task
from locedit.errors import LoceditError
from locedit.grading import scoring
from locedit.grading.planting import Sets
from locedit.grading.records import Record
from locedit.grading.statistics import recall_at, roc_auc
from locedit.grading.units import at_unit, flat
from locedit.models import Model

MEASURES = ("auc", "decoys", "recall")


def found(values: Mapping[str, Tensor], sets: Sets) -> dict[str, tuple[float, float]]:
    """Measure -> (value, chance): how well scores of the set's unit rank the set, over all components of the unit.

    auc: area under the ROC curve, against all other components. decoys: the same against the decoys only. recall: share
    of the set among as many of the highest scores as it has components; chance is the set's share of all components. A
    component that was not scored counts as below all others.
    """
    truth = sets.truth
    lowest = min(float(tensor.min()) for tensor in values.values()) - 1
    ordered = flat({name: values.get(name, torch.full((site.count,), lowest)) for name, site in truth.sites.items()})
    inside, decoys = _mask(truth), _mask(sets.decoys)
    either, k = inside | decoys, len(truth)
    return {
        "auc": (roc_auc(ordered, inside), 0.5),
        "decoys": (roc_auc(ordered[either], inside[either]), 0.5),
        "recall": (recall_at(ordered, inside, k=k), k / len(ordered)),
    }


def _mask(chosen: ComponentSet) -> Tensor:
    """Which components of all sites, in their order, are in the set."""
    masks = {name: torch.zeros(site.count, dtype=torch.bool) for name, site in chosen.sites.items()}
    for name, mask in masks.items():
        mask[list(chosen.indices(name))] = True
    return flat(masks)


def grades(
    model: Model,
    task: Task,
    method: str,
    *,
    sets: Sets,
    site: str,
    seed: int,
    number: int,
    exact_facts: int,
) -> list[Record]:
    """The records of one localizer on the planted model."""
    unit = sets.truth.units[0]
    about: dict[str, Any] = {"part": "planted", "place": site, "method": method, "seed": seed, "draw": number}
    try:
        drawn = scoring.seed_for(site, seed, number)
        scores = scoring.run(model, task, method, unit, seed=drawn, exact_facts=exact_facts)
        values = at_unit(scores, unit, model)
    except LoceditError as error:
        return [Record(**about, measure=measure, reason=str(error)) for measure in MEASURES]
    return [
        Record(**about, measure=measure, value=value, chance=chance)
        for measure, (value, chance) in found(values, sets).items()
    ]

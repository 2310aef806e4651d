"""What an edit left of the forget set when it is asked directly: an attack that shows no more than that brings nothing
back."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from locedit.attacks import recovery
from locedit.attacks.measures import SHARE, share_measure
from locedit.evaluate.intervals import Estimate
from locedit.results import AttackResult, Evaluation, Measure, Stage


def gained(result: AttackResult, evaluation: Evaluation) -> Estimate | None:
    """The metric of the forget items under the attack less that without it, of the same items.

    Mean with its interval, owners drawn again; None where the attack does not keep both of every item.
    """
    after, attacked = (_of(result.measures, "forget", stage) for stage in ("after", "attacked"))
    if after is None or attacked is None or not after.per_example:
        return None
    if after.name != attacked.name or after.per_example.keys() != attacked.per_example.keys():
        return None
    ids = list(after.per_example)
    owners = [_owner(evaluation, item) for item in ids]
    return recovery.gained(_values(attacked, ids), _values(after, ids), owners=owners)


def left(evaluation: Evaluation) -> Measure | None:
    """The share that is there without any attack: (after the edit - never known) / (before it - never known).

    Of the metric that the attacks read; never known are the held-out items in the edited model. None where the
    evaluation does not have it for both.
    """
    names = [m.name for a in evaluation.attacks if (m := _of(a.measures, "forget", "attacked")) is not None]
    for name in dict.fromkeys(names):
        own = [m for m in evaluation.measures if m.name == name]
        before, after = (_of(own, "forget", stage) for stage in ("before", "after"))
        never = _of(own, "heldout", "after")
        if before is None or after is None or never is None:
            continue
        if not (before.per_example and never.per_example) or before.per_example.keys() != after.per_example.keys():
            continue
        ids, unknown = list(before.per_example), list(never.per_example)
        share = recovery.share_back(
            _values(after, ids),
            _values(before, ids),
            owners=[_owner(evaluation, item) or f"item {item}" for item in ids],
            control=_values(never, unknown),
            control_owners=[_owner(evaluation, item) or f"item {item}" for item in unknown],
        )
        return None if math.isnan(share.value) else share_measure(share, len(ids))
    return None


def _of(measures: Sequence[Measure], dataset: str, stage: Stage) -> Measure | None:
    """The metric of a whole data set at a stage; no share."""
    found = (m for m in measures if (m.dataset, m.stage, m.group) == (dataset, stage, None) and m.name != SHARE)
    return next(found, None)


def _values(measure: Measure, ids: Sequence[str]) -> Tensor:
    return torch.tensor([measure.per_example[item] for item in ids], dtype=torch.float64)


def _owner(evaluation: Evaluation, item: str) -> str | None:
    return evaluation.examples.get(item, {}).get("owner")

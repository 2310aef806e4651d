"""Relearning: fine-tune the edited model on half of what it should have forgotten, and see whether the rest returns.

An edit that only hides an answer is undone by a few steps on other answers (Deeb and Roger 2024, arXiv:2410.08827;
Guo et al. 2024, arXiv:2410.12949). The half that returns was never shown, so what returns was still in the weights.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from locedit.attacks.findings import finding
from locedit.attacks.options import RelearnOptions
from locedit.attacks.runs import Relearning
from locedit.attacks.shared import Shared
from locedit.data.items import Task
from locedit.edit import Edit
from locedit.models import Model
from locedit.options import fill
from locedit.provenance import measure
from locedit.results import AttackResult


def relearn(
    model: Model,
    task: Task,
    edit: Edit,
    *,
    others: Mapping[str, Edit] | None = None,
    shared: Shared | None = None,
    **options: Any,
) -> AttackResult:
    """Attack the edited model, and in the same way its controls; the model is afterwards as before, bit for bit.

    Never-known control: held-out items of the same form, half of them relearned in the same edited model. Shallow
    control: an edit that suppresses the answer in the last MLPs. `others`: further edits by name; names that begin with
    "random" count as random sets of the same size. The learning rate and step count of each split are those at which
    most came back in its mirrored split with the retain side kept; controls and others are attacked with the same.
    """
    chosen = fill(RelearnOptions, options, method="relearn")
    return relearned(Relearning, model, task, edit, others=others, shared=shared, options=chosen)


def relearned(
    kind: type[Relearning],
    model: Model,
    task: Task,
    edit: Edit,
    *,
    others: Mapping[str, Edit] | None,
    shared: Shared | None,
    options: RelearnOptions,
) -> AttackResult:
    """The result of one kind of relearning."""
    with measure(kind.name, model=model, data=task, settings=options, seed=options.seed) as record:
        found = kind(model, task, edit, others or {}, options, shared=shared or Shared()).findings()
    return dataclasses.replace(finding(found), provenance=record.provenance)

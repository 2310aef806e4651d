"""What the tests of attacks share: an edit to attack, the numbers of a result, and a check that nothing is left."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from locedit.edit import Edit
from locedit.lab import Lab
from locedit.models import Model
from locedit.results import AttackResult
from locedit.unlearn import unlearn

CONTROL: dict[str, Any] = {"shallow_steps": 120, "shallow_learning_rate": 2e-3, "draws": 100}
"an edit made to come back that takes seconds"


def forgotten(lab: Lab) -> Edit:
    """An ordinary edit of a lab model."""
    return unlearn(lab.model, lab.task, "npo", steps=30, learning_rate=1e-3, retain_weight=3.0, check=False)


def state(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def hooks(model: Model) -> int:
    """How many hooks are on the modules."""
    return sum(len(vars(m)["_forward_hooks"]) + len(vars(m)["_forward_pre_hooks"]) for m in model.module.modules())


@contextmanager
def untouched(model: Model) -> Generator[None]:
    """The model is the same bits after the block, no hook is left, and what asks for gradients asks for them still."""
    before, asked, hooked = state(model), [p.requires_grad for p in model.module.parameters()], hooks(model)
    yield
    now = model.module.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)
    assert [p.requires_grad for p in model.module.parameters()] == asked
    assert hooks(model) == hooked
    assert not model.prefixes


def level(found: AttackResult, dataset: str, stage: str = "attacked", group: str | None = None) -> float:
    """The metric of a data set."""
    rows = [m for m in found.measures if (m.dataset, m.stage, m.group) == (dataset, stage, group)]
    return next(m.value for m in rows if m.name != "share_back")


def share(found: AttackResult, group: str) -> float:
    """The share back of an arm whose name begins so."""
    return next(m.value for m in found.measures if m.name == "share_back" and (m.group or "").startswith(group))

"""SISA with one shard, as an edit: the model trained again from its start without the forget data.

What a deletion leaves when all forget items lie in the first slice (Bourtoule et al. 2021, arXiv:1912.03817): exact,
and the model that all other methods are compared with. It is as good as `start` and the training are those that the
model had. Several shards are an ensemble with a training record, and no edit: see `locedit.sisa` and `locedit sisa`.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from locedit.components import ComponentSet, Table
from locedit.data.items import Task
from locedit.edit.edit import Edit, weights_edit
from locedit.edit.levels import levels
from locedit.edit.objective import Objective
from locedit.edit.options import TrainOptions
from locedit.edit.regions import Region
from locedit.edit.train import train
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.provenance import measure, plain
from locedit.unlearn.helpers import require_start, settings_of, start_of
from locedit.unlearn.registry import nll, objective_of

WITHOUT_EFFECT = re.compile("_token_id$|drop|label|use_cache")
"settings that change nothing of what a model says when it is asked"


@dataclass(frozen=True, kw_only=True)
class SisaEditOptions:
    """How the model is trained again; the other options of training are the trainer's defaults."""

    shards: int = 1
    "one; `locedit sisa` trains several, which are no edit"
    steps: int = 300
    "optimizer steps on the retain data"
    learning_rate: float = 1e-3
    "at its highest"
    batch_size: int = 16
    "examples in a step"
    eval_every: int = 50
    "steps between two measurements of the levels; 0 = only before and after"
    seed: int = 0
    "of the order of the examples"

    def __post_init__(self) -> None:
        if self.shards != 1:
            raise LoceditError(
                f"shards={self.shards!r}: as an edit there is one; `locedit sisa train --shards {self.shards}` makes "
                "an ensemble with a training record"
            )
        self.training()

    def training(self) -> TrainOptions:
        """The trainer's options; LoceditError for a value that it does not take."""
        return TrainOptions(**{name: value for name, value in plain(self).items() if name != "shards"})


def verify(task: Task, options: SisaEditOptions) -> None:
    """The model before the data is needed; needs no model."""
    del options
    require_start(task, by="sisa")


def sisa(model: Model, task: Task, *, within: ComponentSet | None, hold: str, options: SisaEditOptions) -> Edit:
    """Train the task's start on the retain data, and give the result as new values of all weights.

    It cannot be kept inside a set of the model: what is outside would be the start's, not the model's. The first row of
    the history has the model's levels, as that of every edit; the start's are in the outcome (`start`).
    """
    assert within is None, "checked with the options"
    settings = plain(options) | {"hold": hold}
    with measure("sisa", model=model, data=task, settings=settings, seed=options.seed) as measured:
        start = start_of(model, task, by="sisa")
        _require_alike(model, start)
        trained = train(start, _objective(start, task), options=options.training())
        with trained.applied(start) as again:
            now = again.anatomy.parameters
            values = [(Region(param=name), tensor.detach().to("cpu", copy=True)) for name, tensor in now.items()]
        probes = objective_of(model, task, nll, name="sisa").probes
        history, began = _from(levels(model, probes, level=options.training().level), trained.history)
        edit = weights_edit(model, values, history=history, outcome=trained.outcome | {"start": began})
    return dataclasses.replace(edit, provenance=measured.provenance)


def _from(before: Mapping[str, float], history: Table) -> tuple[Table, dict[str, Any]]:
    """The history with the model's own levels as its first row, and the levels of the start, which stood there."""
    changed = {name: [before[name], *column[1:]] for name, column in history.items() if name in before}
    return history | changed, {name: history[name][0] for name in changed}


def _require_alike(model: Model, start: Model) -> None:
    """Raise LoceditError unless the start's weights say in the model what they say in the start."""
    for what, (own, other) in {
        "parameter": (_shapes(model), _shapes(start)),
        "setting": (_settings(model), _settings(start)),
    }.items():
        differing = [name for name in {**own, **other} if own.get(name) != other.get(name)]
        if differing:
            raise LoceditError(
                f"sisa: the {what} {differing[0]!r} is {other.get(differing[0])} in start={start.name!r} and "
                f"{own.get(differing[0])} in {model.name}: as an edit it has to be the same model with other weights"
            )


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.anatomy.parameters.items()}


def _settings(model: Model) -> dict[str, Any]:
    return {name: value for name, value in settings_of(model).items() if not WITHOUT_EFFECT.search(name)}


def _objective(start: Model, task: Task) -> Objective:
    return objective_of(start, task, nll, name="sisa", learns=task.require("retain", by="sisa"))

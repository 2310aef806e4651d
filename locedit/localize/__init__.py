"""Localizers: where in a model something is. Every one is a function (model, task, options) -> Scores.

scores = localize(model, facts, "depn", steps=20, quadrature="right")
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from locedit._callable import make_callable
from locedit.data.encode import encode
from locedit.data.items import KINDS, Dataset, Item, Task
from locedit.errors import LoceditError, nearest
from locedit.localize import baselines, depn, knowledge_neurons
from locedit.localize.blocks import row_bytes
from locedit.localize.integrated_gradients import FIRST_STEPS, GradientOptions
from locedit.models import Model
from locedit.options import fill
from locedit.provenance import measure
from locedit.scores import Scores


@dataclass(frozen=True, kw_only=True)
class Localizer:
    """One entry of the registry."""

    function: Callable[[Model, Task, Any], Scores]
    options: type[Any]
    "a frozen dataclass"
    summary: str
    "one line"
    requires: tuple[str, ...] = ()
    "parts of a task that it reads"
    kinds: tuple[str, ...] = ()
    "kinds of items it can read; empty = any"
    units: tuple[str, ...] = ("neuron",)
    "units it can score"
    causal: bool | None = None
    "True = causal models only, False = masked models only"
    paper: str = ""


_TEXTS = ("fact", "private", "plain", "tokens", "labelled")
LOCALIZERS: dict[str, Localizer] = {
    "depn": Localizer(
        function=depn.depn,
        options=depn.DepnOptions,
        summary="integrated gradients of each private token or answer, summed over its tokens",
        requires=("forget",),
        kinds=_TEXTS,
        paper="Wu et al. 2023, arXiv:2310.20138",
    ),
    "knowledge_neurons": Localizer(
        function=knowledge_neurons.knowledge_neurons,
        options=knowledge_neurons.KnowledgeNeuronsOptions,
        summary="integrated gradients, kept where the paraphrases of a fact agree",
        requires=("forget",),
        kinds=("fact",),
        paper="Dai et al. 2022, arXiv:2104.08696",
    ),
    "activation": Localizer(
        function=baselines.activation,
        options=baselines.ActivationOptions,
        summary="mean |activation| where the answer is predicted, times the neuron's output norm",
        requires=("forget",),
        kinds=_TEXTS,
        paper="baseline; Chang et al. 2024, arXiv:2311.09060",
    ),
    "magnitude": Localizer(
        function=baselines.magnitude,
        options=baselines.MagnitudeOptions,
        summary="norm of the neuron's weights",
        paper="baseline",
    ),
    "random": Localizer(
        function=baselines.random,
        options=baselines.RandomOptions,
        summary="random scores",
        units=("neuron", "head", "mlp", "attn", "layer", "matrix", "row", "column", "weight"),
        paper="baseline",
    ),
    "everything": Localizer(
        function=baselines.everything,
        options=baselines.EverythingOptions,
        summary="all components alike",
        units=("neuron", "head", "mlp", "attn", "layer", "matrix", "row", "column", "weight"),
        paper="baseline",
    ),
}


TRIED = 8
"items that an estimate runs"


class Cost(NamedTuple):
    """What a run will about take."""

    seconds: float
    bytes: int
    "beside the model"


def localize(model: Model, data: Task | Dataset | Sequence[Item], name: str, **options: Any) -> Scores:
    """The scores of a localizer; a data set or a list of items is what is to be forgotten."""
    method, task, settings = _prepared(model, data, name, options)
    with measure(name, model=model, data=task.forget, settings=settings, seed=options.get("seed")) as measured:
        scores = method.function(model, task, settings)
    return dataclasses.replace(scores, provenance=measured.provenance)


def estimate(model: Model, data: Task | Dataset | Sequence[Item], name: str, **options: Any) -> Cost:
    """Time and memory that `localize` will about need, from running a few items, short and long ones.

    Right within a factor of two or so: adaptive integration takes more points for some items than for others. Memory is
    an upper bound beside the model.
    """
    method, task, settings = _prepared(model, data, name, options)
    items = sorted(task.forget, key=_length)
    count = min(len(items), TRIED)
    tried = [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
    method.function(model, _only(task, tried[:1]), settings)  # what happens only once
    start = time.perf_counter()
    method.function(model, _only(task, tried), settings)
    seconds = (time.perf_counter() - start) * (len(items) / count if method.requires else 1)
    return Cost(seconds=seconds, bytes=_memory(model, task, settings))


def _only(task: Task, items: Sequence[Item]) -> Task:
    return dataclasses.replace(task, forget=task.forget.replace(items))


def _memory(model: Model, task: Task, settings: Any) -> int:
    """The scores as they are summed up, and for gradients the rows of one pass, at most the budget."""
    kept = 4 * 8 * model.n_layers * model.d_mlp
    if not isinstance(settings, GradientOptions):
        return kept
    examples = encode(model, task.forget)
    length = max(len(example.ids) for example in examples)
    targets = max(len(example.targets) for example in examples)
    rows = settings.batch * targets * model.n_layers * 2 * (settings.steps or FIRST_STEPS)
    return kept + min(settings.memory_mb * 2**20, rows * row_bytes(model, length))


def _length(item: Item) -> int:
    text = getattr(item, "text", None) or getattr(item, "prompt", "")
    return len(text) or len(getattr(item, "ids", ()))


def _prepared(
    model: Model, data: Task | Dataset | Sequence[Item], name: str, options: dict[str, Any]
) -> tuple[Localizer, Task, Any]:
    """Everything that can be wrong is found here, before anything runs."""
    if name not in LOCALIZERS:
        raise LoceditError(f"no localizer {name!r}; {nearest(name, LOCALIZERS)}")
    method = LOCALIZERS[name]
    settings = fill(method.options, options, method=name)
    task = _task(data)
    for part in method.requires:
        task.require(part, name)
    if method.kinds and task.forget.kind not in method.kinds:
        wanted = " or ".join(KINDS[kind].__name__ for kind in method.kinds)
        raise LoceditError(f"{name} needs items of kind {wanted}; {task.forget.source} holds {task.forget.kind!r}")
    if method.causal not in (None, model.causal):
        raise LoceditError(f"{name} needs a {'causal' if method.causal else 'masked'} model; {model.name} is not one")
    return method, task, settings


def _task(data: Task | Dataset | Sequence[Item]) -> Task:
    if isinstance(data, Task):
        return data
    return Task(forget=data if isinstance(data, Dataset) else Dataset(items=tuple(data), source="the items given"))


make_callable(__name__)

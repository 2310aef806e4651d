"""Localizers: where in a model something is. Every one is a function (model, task, options) -> Scores.

scores = localize(model, facts, "depn", steps=20, quadrature="right")
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from locedit._callable import make_callable
from locedit.components import UNITS
from locedit.data.items import KINDS, Dataset, Item, Task
from locedit.errors import LoceditError, nearest
from locedit.localize import baselines, depn, knowledge_neurons
from locedit.localize.integrated_gradients import memory as gradient_memory
from locedit.localize.registry import Localizer
from locedit.models import Model
from locedit.options import fill
from locedit.provenance import measure
from locedit.scores import Scores

_TEXTS = ("fact", "private", "plain", "tokens", "labelled")
LOCALIZERS: dict[str, Localizer] = {
    "depn": Localizer(
        function=depn.depn,
        options=depn.DepnOptions,
        summary="integrated gradients of each private token or answer, summed over its tokens",
        requires=("forget",),
        kinds=_TEXTS,
        memory=gradient_memory,
        paper="Wu et al. 2023, arXiv:2310.20138",
    ),
    "knowledge_neurons": Localizer(
        function=knowledge_neurons.knowledge_neurons,
        options=knowledge_neurons.KnowledgeNeuronsOptions,
        summary="integrated gradients, kept where the paraphrases of a fact agree",
        requires=("forget",),
        kinds=("fact",),
        memory=gradient_memory,
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
    with measure(
        name, model=model, data=method.reads(task)[1], settings=settings, seed=options.get("seed")
    ) as measured:
        scores = method.function(model, task, settings)
    return dataclasses.replace(scores, provenance=measured.provenance)


def estimate(model: Model, data: Task | Dataset | Sequence[Item], name: str, **options: Any) -> Cost:
    """Time and memory that `localize` will about need, from running a few items, short and long ones.

    Right within a factor of two or so: adaptive integration takes more points for some items than for others. Memory is
    an upper bound beside the model.
    """
    method, task, settings = _prepared(model, data, name, options)
    role, data_set = method.reads(task)
    items = sorted(data_set, key=_length)
    count = min(len(items), TRIED)
    tried = [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
    method.function(model, _only(task, role, tried[:1]), settings)  # what happens only once
    start = time.perf_counter()
    method.function(model, _only(task, role, tried), settings)
    seconds = (time.perf_counter() - start) * (len(items) / count if method.requires else 1)
    return Cost(seconds=seconds, bytes=memory(model, data_set, method, settings))


def memory(model: Model, items: Dataset, method: Localizer, settings: Any) -> int:
    """Bytes beside the model that a run needs at most: the scores as they are summed up, and what the method says."""
    unit = getattr(settings, "unit", method.units[0])
    kept = 8 * sum(site.count for site in model.sites(unit).values()) if unit in UNITS else 0
    return kept + (method.memory(model, items, settings) if method.memory else 0)


def _only(task: Task, role: str, items: Sequence[Item]) -> Task:
    return dataclasses.replace(task, **{role: task.require(role, by="localize").replace(items)})


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
    _, items = method.reads(task)
    if method.kinds and items.kind not in method.kinds:
        wanted = " or ".join(KINDS[kind].__name__ for kind in method.kinds)
        raise LoceditError(f"{name} needs items of kind {wanted}; {items.source} holds {items.kind!r}")
    if method.causal not in (None, model.causal):
        raise LoceditError(f"{name} needs a {'causal' if method.causal else 'masked'} model; {model.name} is not one")
    return method, task, settings


def _task(data: Task | Dataset | Sequence[Item]) -> Task:
    if isinstance(data, Task):
        return data
    return Task(forget=data if isinstance(data, Dataset) else Dataset(items=tuple(data), source="the items given"))


make_callable(__name__)

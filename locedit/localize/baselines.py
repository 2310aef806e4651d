"""What a localizer has to beat: chance, the size of weights, the size of activations, and everything at once.

They have the same signature as the methods, so that any comparison can include them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import progress, tracing
from locedit.components import Unit
from locedit.data.encode import batches, encode
from locedit.data.items import Task
from locedit.localize.aggregate import Aggregate
from locedit.models import Model
from locedit.scores import Scores


@dataclass(frozen=True, kw_only=True)
class RandomOptions:
    """Which components, and which draw."""

    unit: Unit = "neuron"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class EverythingOptions:
    """Which components."""

    unit: Unit = "neuron"


@dataclass(frozen=True, kw_only=True)
class MagnitudeOptions:
    """Which weights of a neuron are measured."""

    of: Literal["output", "both"] = "output"
    """output: norm of the weights that leave the neuron; both: times the norm of the weights that enter it (of the gate
    too, where there is one), which does not change when a factor moves from one side of the neuron to the other"""


@dataclass(frozen=True, kw_only=True)
class ActivationOptions:
    """How many rows to run at a time."""

    batch: int = 16


def random(model: Model, task: Task, options: RandomOptions) -> Scores:  # noqa: ARG001
    """Independent uniform scores between 0 and 1; the data does not matter."""
    generator = torch.Generator().manual_seed(options.seed)
    sites = model.sites(options.unit)
    values = {name: torch.rand(site.count, generator=generator) for name, site in sites.items()}
    return Scores(values=values, sites=sites, fingerprint=model.fingerprint)


def everything(model: Model, task: Task, options: EverythingOptions) -> Scores:  # noqa: ARG001
    """Every component scores 1; the data does not matter."""
    sites = model.sites(options.unit)
    values = {name: torch.ones(site.count) for name, site in sites.items()}
    return Scores(values=values, sites=sites, fingerprint=model.fingerprint)


def magnitude(model: Model, task: Task, options: MagnitudeOptions) -> Scores:  # noqa: ARG001
    """Euclidean norm of each neuron's weights; the data does not matter."""
    sites = model.sites("neuron")
    values = {name: output_norm(model, layer) for layer, name in enumerate(sites)}
    if options.of == "both":
        values = {name: value * _input_norm(model, layer) for layer, (name, value) in enumerate(values.items())}
    return Scores(values=values, sites=sites, fingerprint=model.fingerprint)


def activation(model: Model, task: Task, options: ActivationOptions) -> Scores:
    """Mean |activation| at the positions that predict the scored tokens, times the norm of the neuron's output weights.

    The mean is over the tokens of an example, then over the examples: how much the neuron adds to the residual stream
    there. Chang et al. 2024 (arXiv:2311.09060) use it as the baseline "activations".
    """
    sites = list(model.sites("neuron").values())
    norms = torch.stack([output_norm(model, layer) for layer in range(model.n_layers)])
    examples = encode(model, task.forget)
    index = {example.id: number for number, example in enumerate(examples)}
    total = Aggregate(sites, ratio=None)
    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(model.n_layers)]
    for batch in progress.track(list(batches(examples, model, options.batch)), "activation"):
        with torch.no_grad(), tracing.record(model, names) as seen:
            at = batch.predicting(model.causal)
            model.logits(batch, at=at)
        size = torch.stack([seen[name].reshape(*at.shape, -1)[at.to(seen[name].device)].abs().cpu() for name in names])
        rows = torch.tensor(batch.row_members)[at.nonzero()[:, 0]]
        for number, example in enumerate(batch.examples):
            mean = size[:, rows == number].mean(1).float()  # [layer, neuron]
            total.update(index[example.id], mean * norms, id=example.id)
    return total.finish(model, ids=[example.id for example in examples], evidence={})


def output_norm(model: Model, layer: int) -> Float[Tensor, " neuron"]:
    """Euclidean norm of the weights that leave each neuron of a layer, on the CPU."""
    matrix = model.anatomy.matrix(layer, "mlp.out")
    return _weight(model, matrix.weight).norm(dim=matrix.out_axis)


def _input_norm(model: Model, layer: int) -> Float[Tensor, " neuron"]:
    """Euclidean norm of the weights that enter each neuron, the gate's included."""
    squares = torch.zeros(model.d_mlp)
    for role in ("mlp.in", "mlp.gate") if model.gated else ("mlp.in",):
        matrix = model.anatomy.matrix(layer, role)
        weight = _weight(model, matrix.weight)
        if matrix.runs is not None:
            weight = weight.index_select(matrix.out_axis, torch.tensor(matrix.runs.indices()))
        squares += weight.square().sum(matrix.in_axis)
    return squares.sqrt()


def _weight(model: Model, name: str) -> Tensor:
    return model.parameter(name).detach().float().cpu()

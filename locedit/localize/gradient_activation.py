"""Gradient times activation: what a component adds to the answer's log-probability, to first order.

What is scored: every neuron (input of the MLP's output projection) or head (its part of the input of o), by its value
times the gradient of the gold log-probability, summed over a head's dimensions and over positions. This is the
derivative by a gate that multiplies the component, taken where the gate is 1; so it is, to first order, what the
log-probability of the whole answer (the sum over its tokens, in nats) loses when the component is zeroed, against the
baseline 0. It is integrated gradients with a single point, at the end of the path, for all components at once
(Simonyan et al. 2013, arXiv:1312.6034, times the input). Higher = the component raises the answer.

At `position="all"` the gate acts at every position, as zeroing weights does; "predicting" counts only the positions
that predict the scored tokens. In both the effect through later positions is included. Averaged over the examples.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import progress, tracing
from locedit.data.encode import Batch, batches, encode
from locedit.data.items import Dataset, Task
from locedit.localize.aggregate import Aggregate
from locedit.localize.baselines import POINTS
from locedit.localize.budget import BatchOptions
from locedit.localize.integration.blocks import weights_without_gradient
from locedit.localize.norms import NeuronOrHead
from locedit.localize.passes import pass_bytes
from locedit.losses import score, token_log_probs
from locedit.models import Model
from locedit.scores import Scores


@dataclass(frozen=True, kw_only=True)
class GradientActivationOptions(BatchOptions):
    """What is scored, and where."""

    unit: NeuronOrHead = "neuron"
    "what is scored"
    position: Literal["all", "predicting"] = "all"
    "over which positions the products are summed"
    sign: Literal["signed", "absolute"] = "signed"
    "signed: positive raises the answer; absolute: its size in each example, either way"


def gradient_activation(model: Model, task: Task, options: GradientActivationOptions) -> Scores:
    """Mean over the examples of activation times gradient of the answer's log-probability."""
    examples = encode(model, task.forget)
    index = {example.id: number for number, example in enumerate(examples)}
    total = Aggregate(list(model.sites(options.unit).values()), ratio=None)
    rows = options.rows(pass_bytes(model, examples, gradient=True))
    for batch in progress.track(list(batches(examples, model, rows)), "gradient times activation"):
        products = _products(model, batch, options)  # [layer, row, component]
        member = torch.tensor(batch.row_members)
        for number, example in enumerate(batch.examples):
            own = products[:, member == number].sum(1)
            total.update(index[example.id], own if options.sign == "signed" else own.abs(), id=example.id)
    return total.finish(model, ids=[example.id for example in examples], evidence={})


def gradient_memory(model: Model, items: Dataset, options: GradientActivationOptions) -> int:
    """Bytes of one pass."""
    examples = encode(model, items)
    count = sum(1 if model.causal else len(example.targets) for example in examples)
    return options.bytes(pass_bytes(model, examples, gradient=True), count)


def _products(model: Model, batch: Batch, options: GradientActivationOptions) -> Float[Tensor, "layer row component"]:
    """The gradients by gates of 1, one for each row and component; rows do not meet inside the model."""
    at = torch.ones_like(batch.scored) if options.position == "all" else batch.predicting(model.causal)
    sites = model.sites(options.unit).values()
    gates = [torch.ones(len(batch), site.count, device=model.device, requires_grad=True) for site in sites]
    points = [f"blocks.{layer}.{POINTS[options.unit]}" for layer in range(model.n_layers)]
    changes = {point: partial(_gated, gate, at) for point, gate in zip(points, gates, strict=True)}
    with torch.enable_grad(), weights_without_gradient(model.module), tracing.replace(model, changes):
        objective = token_log_probs(score(model, batch)).sum()
        found = torch.autograd.grad(objective, gates)
    return torch.stack([gradient.cpu() for gradient in found])


def _gated(gate: Tensor, at: Tensor, value: Tensor) -> Tensor:
    """The value `[row, pos, component, ...]`, multiplied by the gate of its row at the marked positions."""
    where = at.to(value.device)[:, :, None]
    factor = torch.where(where, gate.to(value)[:, None, :], torch.ones((), dtype=value.dtype, device=value.device))
    return value * (factor if value.ndim == 3 else factor[..., None])

"""RMU: steer the activations of forget texts to a random direction, keep those of retain texts (Li et al. 2024).

arXiv:2403.03218. The squared error is a mean over d_model, over each example's positions and over examples. Published:
layer 7 of 32, learning rate 5e-5, 80 steps, only the MLP output matrices of layers 5 to 7 (a component set here).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import losses, tracing
from locedit.data.encode import Batch
from locedit.edit.objective import Step
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.unlearn.registry import ForgetOptions, above_zero, one_of, retain_terms

Positions = Literal["predicting", "answer", "all"]
POSITIONS: tuple[Positions, ...] = ("predicting", "answer", "all")
DEPTH = 7 / 32
"""The published layer as a share of the depth."""


@dataclass(frozen=True, kw_only=True)
class RmuOptions(ForgetOptions):
    """RMU's own options beside those of training."""

    layer: int | None = None
    "at whose output (the residual stream after the block) activations are steered; None = as deep as 7 of 32"
    coefficient: float = 2.0
    """length of the control vector; 2 is OpenUnlearning's configuration, 20 the default of its code. It has to be seen
    beside the length of the activations"""
    positions: Positions = "predicting"
    """predicting: where the scored tokens are predicted; answer: at the scored tokens themselves, as OpenUnlearning,
    where of a one-token answer nothing is forgotten; all: at every token, as the published code"""
    retain: Literal["activations", "outputs"] = "activations"
    "activations: squared change of the retain activations at the layer; outputs: retain_loss, as other methods"

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "coefficient")
        one_of(self, "positions", POSITIONS)
        one_of(self, "retain", ("activations", "outputs"))
        if self.layer is not None and self.layer < 0:
            raise LoceditError(f"layer={self.layer!r} must not be negative")


def squared_distances(hidden: Float[Tensor, "n d_model"], target: Float[Tensor, "... d_model"]) -> Float[Tensor, " n"]:
    """Mean over d_model of the squared difference at each position; a target of `[d_model]` is that of all."""
    return (losses.precise(hidden) - target.to(hidden.device)).square().mean(1)


def control_vector(size: int, generator: torch.Generator) -> Float[Tensor, " d_model"]:
    """A direction of length 1, drawn uniformly from the positive unit cube and then normalised."""
    drawn = torch.rand(size, generator=generator)
    return drawn / drawn.norm()


def loss(step: Step, options: RmuOptions) -> dict[str, Tensor]:
    """Mean squared distance of forget activations to the control vector, and of retain activations to the unedited."""
    layer = chosen_layer(step.model.n_layers, options)
    hidden = activations(step.model, step.forget, layer)
    if "control" not in step.state:
        step.state["control"] = control_vector(hidden.shape[-1], step.generator)
    target = options.coefficient * step.state["control"]
    forget = options.forget_weight * _distance(step, step.forget, hidden, target, options)
    if options.retain == "outputs" or step.retain is None or options.retain_weight == 0:
        return {"forget_loss": forget} | retain_terms(step, options)
    with torch.no_grad(), step.held.paused():
        before = activations(step.model, step.retain, layer)
    at = _at(step, step.retain, options)
    kept = _distance(step, step.retain, activations(step.model, step.retain, layer), before[at], options)
    return {"forget_loss": forget, "retain_loss": options.retain_weight * kept}


def activations(model: Model, batch: Batch, layer: int) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream after a block; later blocks and the unembedding are not run."""
    point = f"blocks.{layer}.hook_resid_post"
    with tracing.record(model, [point]) as seen, tracing.stop_at(model, point):
        model.logits(batch)
    return seen[point]


def chosen_layer(n_layers: int, options: RmuOptions) -> int:
    """The layer of the options, or the published one's share of the depth; LoceditError when the model has it not."""
    layer = round(DEPTH * n_layers) if options.layer is None else options.layer
    if layer >= n_layers:
        raise LoceditError(f"rmu: layer={layer}, the model has layers 0 to {n_layers - 1}")
    return layer


def _at(step: Step, batch: Batch, options: RmuOptions) -> Tensor:
    """Where activations count, `[batch, pos]`."""
    if options.positions == "predicting":
        return batch.predicting(step.model.causal)
    return batch.scored if options.positions == "answer" else batch.attention_mask.bool()


def _distance(step: Step, batch: Batch, hidden: Tensor, target: Tensor, options: RmuOptions) -> Tensor:
    """Mean over each example's positions, then over examples."""
    at = _at(step, batch, options).to(hidden.device)
    members = torch.tensor(batch.row_members, device=hidden.device)[at.nonzero()[:, 0]]
    return losses.grouped(squared_distances(hidden[at], target), members, len(batch.examples)).mean()

"""Latent adversarial unlearning: forget also what a perturbation of activations would bring back.

AdvGA and AdvNPO of Yuan et al. 2025 (arXiv:2408.10682): in every step an inner attack (`perturbation`) looks for the
perturbation of the residual stream that makes the model say the forget answers most; the forget loss is then that of
gradient ascent or NPO on the model so perturbed, with the perturbation fixed. The retain term, and NPO's reference, are
unperturbed. With attack_steps=0 and start='zero' they are ga (grad_diff with its retain term) and npo, bit for bit. A
step costs attack_steps + 1 further forward passes and attack_steps backward passes without weight gradients.

`PUBLISHED` in `perturbation` are the attack options of the released code, which perturbs prompt and padding too. Its
comparison with NPO is at another beta (0.2 for NPO, 0.1 for AdvNPO), so part of that gain may be beta's.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from locedit import losses
from locedit.components import ComponentSet
from locedit.data.items import Task
from locedit.edit.adapter import Factors, Piece
from locedit.edit.objective import Step
from locedit.edit.regions import Region
from locedit.edit.restrict import Deltas, Held
from locedit.errors import LoceditError
from locedit.losses import Scored
from locedit.models import Model
from locedit.perturbation import POINTS, AscentOptions, Place, ascend, perturbed, places_of
from locedit.unlearn.gradient_ascent import ascent
from locedit.unlearn.npo import npo
from locedit.unlearn.registry import ForgetOptions, above_zero, one_of, retain_terms

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AdvGaOptions(ForgetOptions, AscentOptions):
    """The attack beside the options of training; the paper's retain weight is 1, with nll or kl."""

    on: Literal["residual", "components"] = "residual"
    "what the attack perturbs: the residual stream at a layer, or only the activations of components"
    layer: int | None = None
    """of the residual attack; None = an eighth of the depth as published (layer 4 of 32; at least 1), or the lowest
    layer that the set edits if that is lower"""
    point: Literal["resid_pre", "resid_mid", "attn_out", "mlp_out"] = "resid_pre"
    "where in the layer; resid_pre (published) is the stream that enters it"
    components: str | None = None
    "of on='components': file of a component set; None = the neurons and heads that are edited"

    def __post_init__(self) -> None:
        super().__post_init__()
        AscentOptions.check(self)
        one_of(self, "on", ("residual", "components"))
        one_of(self, "point", POINTS)
        if self.layer is not None and (self.on == "components" or self.layer < 0):
            raise LoceditError(f"layer={self.layer!r} must be a layer's number, and goes with on='residual' alone")
        if self.components is not None and self.on != "components":
            raise LoceditError(f"components={self.components!r} needs on='components'")


@dataclass(frozen=True, kw_only=True)
class AdvNpoOptions(AdvGaOptions):
    """NPO's own option beside those of the attack."""

    beta: float = 0.1
    "inverse temperature of NPO; towards 0 the loss becomes gradient ascent"

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "beta")


def verify(task: Task, options: AdvGaOptions) -> None:
    """The file of components must be there."""
    del task
    if options.components is not None and not Path(options.components).exists():
        raise LoceditError(f"components={options.components!r}: there is no such file")


def adv_ga(step: Step, options: AdvGaOptions) -> dict[str, Tensor]:
    """Mean log-probability of the forget answers under the attack, and retain."""
    return _attacked(step, options, ascent)


def adv_npo(step: Step, options: AdvNpoOptions) -> dict[str, Tensor]:
    """NPO of the attacked model with the unedited, unperturbed model as reference, and retain."""
    reference = -losses.sequence_nll(step.reference(step.forget), reduction="sum")

    def forget(scored: Scored) -> Tensor:
        return npo(-losses.sequence_nll(scored, reduction="sum"), reference, beta=options.beta)

    return _attacked(step, options, forget)


def _attacked(step: Step, options: AdvGaOptions, forget: Callable[[Scored], Tensor]) -> dict[str, Tensor]:
    """The weighted forget loss at the perturbation that the attack finds, and the retain term without it."""
    deltas = _perturbation(step, options) if options.attacks else {}
    with perturbed(step.model, deltas):
        value = options.forget_weight * forget(step.score(step.forget))
        if options.gradient_checkpointing and deltas:
            value = _with_gradient(value, step.held.parameters)
    return {"forget_loss": value} | retain_terms(step, options)


def _perturbation(step: Step, options: AdvGaOptions) -> dict[str, Tensor]:
    """What the attack finds, with everything that is trained held constant."""
    seed = int(torch.randint(2**31, (), generator=step.generator))
    with step.held.constant():
        return ascend(step.model, step.forget, _places(step, options), options, seed=seed)


def _with_gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The same value and gradient, without a graph: recomputing activations later would miss the perturbation."""
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    value = value.detach()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        value = value + ((parameter - parameter.detach()) * gradient).sum().to(value)
    return value


# --- where the attack acts --------------------------------------------------------------------------------------------


def _places(step: Step, options: AdvGaOptions) -> list[Place]:
    """Found anew in every step: cheap beside a forward pass."""
    model = step.model
    if options.on == "residual":
        edited = edited_layers(model, step.held)
        layer = default_layer(model.n_layers, edited) if options.layer is None else options.layer
        if edited and min(edited) < layer and len(edited) < model.n_layers and not step.state.get("said_layer"):
            log.warning(
                "the attack at layer %d is above edited layers (%s), which learn only through what they send there",
                layer, ", ".join(str(e) for e in edited if e < layer),
            )  # fmt: skip
            step.state["said_layer"] = True
        return [Place(point=f"blocks.{layer}.hook_{options.point}")]
    if options.components is None:
        return edited_places(model, step.held)
    if "places" not in step.state:
        found = places_of(ComponentSet.load(options.components))
        step.state["places"] = [(place.point, place.index) for place in found]
    saved: list[Any] = step.state["places"]
    return [Place(point=point, index=index) for point, index in saved]


def default_layer(n_layers: int, edited: Sequence[int]) -> int:
    """An eighth of the depth, at least 1, or the lowest edited layer where that is lower.

    >>> default_layer(32, range(32)), default_layer(32, [2, 9]), default_layer(32, [20]), default_layer(4, [])
    (4, 2, 4, 1)
    """
    published = min(max(1, n_layers // 8), n_layers - 1)
    return published if len(edited) == n_layers else min([published, *edited])


def edited_layers(model: Model, held: Held) -> list[int]:
    """The layers of the blocks in which something is trained, ascending; embeddings and the final norm have none.

    By names: in the middle of training other tensors stand in for the parameters.
    """
    names = {id(module): name for name, module in model.core.named_modules()}
    blocks = [f"{names[id(block)]}." for block in model.anatomy.blocks]
    trained = [place.param for place in _trained(held)]
    return [layer for layer, block in enumerate(blocks) if any(param.startswith(block) for param in trained)]


def edited_places(model: Model, held: Held) -> list[Place]:
    """The neurons and heads whose weights in the output projection of their MLP or attention are trained."""
    found: list[Place] = []
    trained = {place.param: place for place in _trained(held)}
    for layer in range(model.n_layers):
        for role, point, width in (("mlp.out", "mlp.hook_post", 1), ("attn.o", "attn.hook_z", model.d_head)):
            if role not in model.anatomy.roles(layer, (role,)):
                continue
            matrix = model.anatomy.matrix(layer, role)
            place = trained.get(matrix.weight)
            if place is not None and (place.index is None or place.axis == matrix.in_axis):
                chosen = None if place.index is None else tuple((place.index // width).unique().tolist())
                found.append(Place(point=f"blocks.{layer}.{point}", index=chosen))
    if not found:
        raise LoceditError(
            "on='components': no neuron or head is edited, only other parameters; name a set of them: "
            "components='components.json'"
        )
    return found


def _trained(held: Held) -> Sequence[Region | Piece]:
    """Parameter, axis and index of everything that is trained."""
    if isinstance(held, Factors):
        return held.pieces
    assert isinstance(held, Deltas), "trained in place or as an adapter"
    return held.regions

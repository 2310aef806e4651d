"""EUL: small unlearning layers, all that is trained, taught by the model without them (Chen and Yang 2023).

"Unlearn What You Want to Forget", arXiv:2310.20150. A layer h -> h + W2 relu(W1 h + b1) + b2 is added after the MLPs;
with F the model as it is, the teacher, and F(f(x)) the model with its layers,

    L_KL   = alpha KL(F(x_r) || F(f(x_r))) - KL(F(x_f) || F(f(x_f)))   x_r retained, x_f forget data
    L_TASK = the likelihood of the retained data
    L_LM   = - the language-model loss of the forget data
    L      = L_KL + lambda L_TASK + gamma L_LM

The terms, the place after the MLPs and the fusion of several requests (`locedit.edit.fusion`) are those of a summary of
the paper; that its updates alternate between retained and forget batches is recalled, not checked; its weights are not
known here, and all defaults are ours. The published repository does not hold the method. Two terms are maximised and
have no bound in the formula; here each token counts up to `cap_nats`. In the paper L_KL and L_TASK are of labels, L_LM
of the texts that are classified; here all are of the scored tokens, unless `lm_tokens` says otherwise.

The model's own weights never change: without the layers it is the model from before, bit for bit. With a component set
the layers are at its places: after its MLPs and attentions, or on its neurons and heads themselves, of which they read
and write nothing else.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from locedit import losses
from locedit.components import ComponentSet
from locedit.data.items import Task
from locedit.edit.bake import bake, projection
from locedit.edit.edit import Edit
from locedit.edit.fusion import RIDGE, average, fuse
from locedit.edit.layer_training import Layers, places
from locedit.edit.objective import MakeHeld, Objective, Step
from locedit.edit.train import TrainOptions
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.unlearn.registry import above_zero, at_least_zero, every_token, example_mean, mean_kl, objective_of, one_of


@dataclass(frozen=True, kw_only=True)
class EulOptions(TrainOptions):
    """Of the layers, the loss, and the fusion of several requests."""

    learning_rate: float = 1e-2
    "at its highest; ours: the layers begin at zero, and go further than weights do"
    rank: int = 16
    "hidden units of each layer"
    alpha: float = 1.0
    "of the KL on retained data inside L_KL; there is no LoRA scale here"
    kl_weight: float = 1.0
    "of L_KL, both terms"
    task_weight: float = 1.0
    "of L_TASK, the lambda of the formula"
    lm_weight: float = 1.0
    "of L_LM, the gamma of the formula; without it nothing drives the layers off the start, where the KL is flat"
    lm_tokens: Literal["answer", "all"] = "answer"
    "that L_LM is over: those that are scored, or every token of the forget items, prompts included"
    cap_nats: float = 8.0
    "no forget token's KL or negative log-likelihood is pushed beyond this"
    pattern: Literal["alternate", "sum"] = "alternate"
    "alternate: a step on forget data, then `retain_steps` on retained data, and again; sum: both in every step"
    retain_steps: int = 3
    "steps on retained data after each step on forget data (inferred, from a trial of ours)"
    activation: Literal["relu", "linear"] = "relu"
    "inside the layers; linear ones can be baked"
    bias: bool = True
    "whether the layers have biases"
    bake: bool = False
    "return the change as new weights of the output projections; needs activation='linear'"
    keep_grams: bool = True
    "keep with each layer the Gram matrices that fusing needs, float64 numbers as many as its width squared"
    fusion: Literal["closed", "average", "chain"] = "closed"
    """of deletion requests in sequence: closed, each trained on the unedited model and all fused in closed form;
    average, the mean of their weights; chain, each on top of those before, as with any method"""
    ridge: float = RIDGE
    "of the closed form, times the mean diagonal entry of the Gram matrices; what no request has seen is averaged"
    fusion_retain: float = 0.0
    "weight in the closed form of adding nothing on retained data, an extension of ours; 1 = tokens count the same"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero(self, "kl_weight", "task_weight", "lm_weight", "fusion_retain")
        above_zero(self, "cap_nats", "retain_steps", "ridge")
        one_of(self, "lm_tokens", ("answer", "all"))
        one_of(self, "pattern", ("alternate", "sum"))
        one_of(self, "activation", ("relu", "linear"))
        one_of(self, "fusion", ("closed", "average", "chain"))
        if self.fusion_retain and self.fusion != "closed":
            raise LoceditError(f"fusion_retain={self.fusion_retain!r} is of fusion='closed', not {self.fusion!r}")
        if self.kl_weight == self.lm_weight == 0:
            raise LoceditError("kl_weight=0 and lm_weight=0 leave nothing that forgets")
        if self.kl_weight == self.task_weight == 0 and self.pattern == "alternate":
            raise LoceditError("kl_weight=0 and task_weight=0 leave the retain steps empty; give pattern='sum'")
        if self.bake and self.activation != "linear":
            raise LoceditError("bake=True needs activation='linear': a relu layer is no matrix")


def loss(step: Step, options: EulOptions) -> dict[str, Tensor]:
    """The terms of this step, each a mean over examples of the mean over tokens, in nats and weighted."""
    if options.pattern == "sum":
        return retain_terms(step, options) | forget_terms(step, options)
    forgets = (step.number - 1) % (options.retain_steps + 1) == 0
    return forget_terms(step, options) if forgets else retain_terms(step, options)


def retain_terms(step: Step, options: EulOptions) -> dict[str, Tensor]:
    """{"retain_kl": KL(teacher || student), "retain_task": negative log-likelihood}."""
    assert step.retain is not None
    scored, terms = step.score(step.retain), {}
    if options.kl_weight:
        terms["retain_kl"] = options.kl_weight * options.alpha * mean_kl(scored, step.reference(step.retain))
    if options.task_weight:
        terms["retain_task"] = options.task_weight * losses.sequence_nll(scored).mean()
    return terms


def forget_terms(step: Step, options: EulOptions) -> dict[str, Tensor]:
    """{"forget_kl", "forget_lm"}: minus the capped KL(teacher || student) and negative log-likelihood."""
    scored, terms = step.score(step.forget), {}
    if options.kl_weight:
        kl = losses.kl(scored.logits, step.reference(step.forget).logits)
        terms["forget_kl"] = -options.kl_weight * example_mean(scored, kl.clamp(max=options.cap_nats))
    if options.lm_weight:
        texts = step.score(every_token(step.model, step.forget)) if options.lm_tokens == "all" else scored
        nll = -losses.token_log_probs(texts)
        terms["forget_lm"] = -options.lm_weight * example_mean(texts, nll.clamp(max=options.cap_nats))
    return terms


def objective(model: Model, task: Task, options: EulOptions) -> Objective:
    """The losses with forget and retained data."""
    return objective_of(model, task, functools.partial(loss, options=options), name="eul", retain=True)


def layers(model: Model, objective: Objective, options: EulOptions) -> MakeHeld:
    """Layers at the places of the set, with the data that their Gram matrices are taken over."""

    def make(within: ComponentSet | None, generator: torch.Generator) -> Layers:
        _require_bakeable(model, within, options)
        return Layers(
            model,
            places(model, within),
            rank=options.rank,
            activation=options.activation,
            bias=options.bias,
            generator=generator,
            forget=objective.forget if options.keep_grams else None,
            retain=objective.retain if options.keep_grams else None,
        )

    return make


def apart(options: EulOptions, model: Model | None, within: ComponentSet | None) -> dict[str, Any]:
    """Of requests that are fused only what they come to is baked: each has layers of its own.

    Raises LoceditError for Gram matrices that would be missing, and for layers that could not be baked.
    """
    if options.fusion == "closed" and not options.keep_grams:
        raise LoceditError("fusion='closed' needs keep_grams=True; take fusion='average' or 'chain' without")
    if model is not None:
        _require_bakeable(model, within, options)
    return {"bake": False} if options.bake else {}


def _require_bakeable(model: Model, within: ComponentSet | None, options: EulOptions) -> None:
    """Raise LoceditError where layers of these options cannot be baked as asked; before they are trained."""
    for place in places(model, within) if options.bake else ():
        matrix = projection(model, place.point)
        if options.bias and matrix.bias is None:
            raise LoceditError(f"bake=True: {matrix.weight} has no bias to hold the layers'; give bias=False as well")


def finish(model: Model, edit: Edit, options: EulOptions) -> Edit:
    """The layers, or with `bake` the weights that they come to."""
    return bake(model, edit) if options.bake else edit


def fused(model: Model, edits: Sequence[Edit], options: EulOptions) -> Edit:
    """The requests' edits, each trained on the unedited model, as one."""
    made = (
        average(edits)
        if options.fusion == "average"
        else fuse(edits, ridge=options.ridge, retain=options.fusion_retain)
    )
    return finish(model, made, options)

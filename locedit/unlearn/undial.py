"""UNDIAL: distil the unedited model with the answer's logit lowered (Dong et al. 2024, arXiv:2402.10052)."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locedit import losses
from locedit.data.encode import IGNORE
from locedit.edit.objective import Step
from locedit.errors import LoceditError
from locedit.losses import Scored
from locedit.unlearn.registry import ForgetOptions, above_zero, every_token, example_mean, one_of, retain_terms

WRONG_LABEL = -100
"""What the published code lowers at tokens that are not the answer's: the vocabulary's 100th token from its end."""


@dataclass(frozen=True, kw_only=True)
class UndialOptions(ForgetOptions):
    """UNDIAL's own options; OpenUnlearning trains with a learning rate of 1e-4 for 10 epochs."""

    strength: float = 10.0
    "how much the answer's logit is lowered in the target"
    tokens: Literal["answer", "as_published"] = "answer"
    """answer: distil where the answer is predicted; as_published: at every token of the text, where outside the answer
    the label -100 lowers the vocabulary's 100th token from the end (padding, which is counted there too, is not)"""
    retain_weight: float = 0.0
    "of the retain term; the published method has none"

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "strength")
        one_of(self, "tokens", ("answer", "as_published"))


def undial(
    logits: Float[Tensor, "n vocab"],
    labels: Int[Tensor, " n"],
    reference: Float[Tensor, "n vocab"],
    *,
    strength: float = 10.0,
) -> Float[Tensor, " n"]:
    """Cross-entropy in nats to softmax(reference - strength on the label)."""
    reference = losses.precise(reference)
    lowered = reference.scatter_add(1, labels[:, None], torch.full_like(reference[:, :1], -strength))
    return -(lowered.softmax(1) * losses.precise(logits).log_softmax(1)).sum(1)


def loss(step: Step, options: UndialOptions) -> dict[str, Tensor]:
    """Cross-entropy to the lowered reference, mean over each example's tokens and then over examples, and retain."""
    scored, reference = _scored(step) if options.tokens == "answer" else _as_published(step)
    values = undial(scored.logits, scored.labels, reference.logits, strength=options.strength)
    return {"forget_loss": options.forget_weight * example_mean(scored, values)} | retain_terms(step, options)


def _scored(step: Step) -> tuple[Scored, Scored]:
    return step.score(step.forget), step.reference(step.forget)


def _as_published(step: Step) -> tuple[Scored, Scored]:
    """Every token of the texts, those outside the answer with the wrong label."""
    if not step.model.causal:
        raise LoceditError("undial: tokens='as_published' is of causal models; take tokens='answer'")
    batch = every_token(step.model, step.forget)
    scored = step.score(batch)
    answer = step.forget.labels[batch.scored].to(scored.labels.device) != IGNORE
    labels = torch.where(answer, scored.labels, scored.logits.shape[1] + WRONG_LABEL)
    return dataclasses.replace(scored, labels=labels), step.reference(batch)

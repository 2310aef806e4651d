"""CE-U: learn the model's own distribution with the answer taken out (Yang 2025, arXiv:2503.01224)."""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locedit import losses
from locedit.edit.objective import Step
from locedit.errors import LoceditError
from locedit.losses import Scored
from locedit.unlearn.registry import ForgetOptions, at_least_zero, example_mean, retain_terms


@dataclass(frozen=True, kw_only=True)
class CeuOptions(ForgetOptions):
    """CE-U's own options beside those of training."""

    skip: int = 0
    """so many tokens at the start of each answer are left out. OpenUnlearning leaves out 1, which of one-token answers
    leaves nothing; 0 forgets whole answers"""
    retain_weight: float = 0.0
    "of the retain term; the published method has none"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero(self, "skip")


def ceu(logits: Float[Tensor, "n vocab"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Cross-entropy in nats to softmax(logits) without its mass on the label, a target that is taken as constant.

    The gradient on a logit is p_k - q_k with q_label = 0 and q_k = p_k / (1 - p_label): p on the label, else
    -p_k p / (1 - p). It is bounded, and 0 once the label has no mass. That is also the gradient of -log(1 - p): CE-U
    and unlikelihood (with no floor) train in the same way, though their values differ.
    """
    logits = losses.precise(logits)
    target = losses.without_label(logits, labels).detach().softmax(1)
    return -(target * logits.log_softmax(1)).sum(1)


def loss(step: Step, options: CeuOptions) -> dict[str, Tensor]:
    """CE-U on the answer tokens, mean over each example's and then over examples, and retain."""
    scored = _without_start(step.score(step.forget), options.skip)
    forget = options.forget_weight * example_mean(scored, ceu(scored.logits, scored.labels))
    return {"forget_loss": forget} | retain_terms(step, options)


def _without_start(scored: Scored, skip: int) -> Scored:
    """Without the first scored tokens of each example."""
    if not skip:
        return scored
    counts = torch.bincount(scored.row, minlength=len(scored.rows))
    if int(counts.min()) <= skip:
        short = scored.rows[int(counts.argmin())]
        raise LoceditError(
            f"ceu: skip={skip} leaves nothing of {short.id!r}, whose answer has {int(counts.min())} token(s)"
        )
    first = counts.cumsum(0) - counts
    keep = torch.arange(len(scored.row), device=scored.row.device) - first[scored.row] >= skip
    return dataclasses.replace(scored, logits=scored.logits[keep], labels=scored.labels[keep], row=scored.row[keep])

"""Unlikelihood: -log(1 - p) of the answer (Welleck et al. 2020, arXiv:1908.04319).

In the form of Guo et al. 2024 (Mechanistic Unlearning, arXiv:2410.12949), which is HarmBench's: tokens that have become
unlikely enough no longer count.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locedit import losses
from locedit.edit.objective import Step
from locedit.losses import precise
from locedit.unlearn.registry import example_mean, retain_terms
from locedit.unlearn.texts import TextsOptions, texts_terms


@dataclass(frozen=True, kw_only=True)
class UnlikelihoodOptions(TextsOptions):
    """The published weights of the forget term lie between 0.1 and 5."""

    floor: float | None = -5.0
    "tokens with a log-probability (nats) below this count as 0; None = all count"


def unlikelihood(
    logits: Float[Tensor, "n vocab"], labels: Int[Tensor, " n"], *, floor: float | None = -5.0
) -> Float[Tensor, " n"]:
    """-log(1 - p) of each label in nats, 0 where log p is below the floor. Its gradient on the label's logit is p."""
    values = -losses.log_complements(logits, labels)
    if floor is None:
        return values
    log_probs = precise(logits).log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    return torch.where(log_probs < floor, torch.zeros_like(values), values)


def loss(step: Step, options: UnlikelihoodOptions) -> dict[str, Tensor]:
    """-log(1 - p), mean over each example's tokens (those that count as 0 too) and over examples; retain and texts."""
    scored = step.score(step.forget)
    values = unlikelihood(scored.logits, scored.labels, floor=options.floor)
    forget = {"forget_loss": options.forget_weight * example_mean(scored, values)}
    return forget | retain_terms(step, options) | texts_terms(step, options)

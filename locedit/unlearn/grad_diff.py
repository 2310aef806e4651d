"""Gradient difference: ascent on the forget data, descent on the retain data (Liu et al. 2022, arXiv:2203.12817)."""

from dataclasses import dataclass

from torch import Tensor

from locedit.edit.objective import Step
from locedit.unlearn.gradient_ascent import ascent
from locedit.unlearn.registry import RetainOptions, retain_terms


@dataclass(frozen=True, kw_only=True)
class GradDiffOptions(RetainOptions):
    """Weights of the two sides."""

    forget_weight: float = 1.0


def loss(step: Step, options: GradDiffOptions) -> dict[str, Tensor]:
    """forget_weight * mean log-probability of forget + retain_weight * retain term."""
    forget = options.forget_weight * ascent(step.score(step.forget))
    return {"forget_loss": forget} | retain_terms(step, options)

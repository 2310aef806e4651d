"""Gradient difference: ascent on the forget data, descent on the retain data (Liu et al. 2022, arXiv:2203.12817)."""

from torch import Tensor

from locedit.edit.objective import Step
from locedit.unlearn.gradient_ascent import ascent
from locedit.unlearn.registry import ForgetOptions, retain_terms


def loss(step: Step, options: ForgetOptions) -> dict[str, Tensor]:
    """forget_weight * mean log-probability of forget + retain_weight * retain term."""
    forget = options.forget_weight * ascent(step.score(step.forget))
    return {"forget_loss": forget} | retain_terms(step, options)

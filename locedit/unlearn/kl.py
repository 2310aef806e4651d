"""Ascent on the forget data while the retain outputs stay close to the unedited model's (Maini et al. 2024).

"KL minimisation" of TOFU, arXiv:2401.06121.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from locedit.edit.objective import Step
from locedit.unlearn import grad_diff
from locedit.unlearn.registry import ForgetOptions


@dataclass(frozen=True, kw_only=True)
class KlOptions(ForgetOptions):
    """Those of grad_diff with KL on the retain data."""

    retain_loss: Literal["nll", "kl"] = "kl"
    "kl: KL(unedited || edited); the published code takes it at every token of the text (retain_tokens='all')"


def loss(step: Step, options: KlOptions) -> dict[str, Tensor]:
    """Mean log-probability of forget plus KL(unedited || edited) on retain, in nats."""
    return grad_diff.loss(step, options)

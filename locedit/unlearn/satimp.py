"""SatImp: ascent in which a token counts by saturation and importance (Yang et al. 2025, arXiv:2505.11953)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from locedit import losses
from locedit.edit.objective import Step
from locedit.unlearn.registry import ForgetOptions, at_least_zero, example_mean, retain_terms


@dataclass(frozen=True, kw_only=True)
class SatimpOptions(ForgetOptions):
    """SatImp's own options; the defaults are OpenUnlearning's."""

    beta1: float = 5.0
    "exponent of p, saturation: tokens that are forgotten already count little"
    beta2: float = 1.0
    "exponent of 1 - p, importance: tokens that anything would predict count little"
    forget_weight: float = 0.1
    "of the forget term"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero(self, "beta1", "beta2")


def satimp(log_probs: Float[Tensor, " n"], *, beta1: float = 5.0, beta2: float = 1.0) -> Float[Tensor, " n"]:
    """p^beta1 (1 - p)^beta2 log p of each token, with the weight taken as constant."""
    p = log_probs.detach().exp()
    return p**beta1 * (1 - p).clamp(min=0) ** beta2 * log_probs


def loss(step: Step, options: SatimpOptions) -> dict[str, Tensor]:
    """Weighted log-probability, mean over each example's tokens and then over examples, and retain."""
    scored = step.score(step.forget)
    values = satimp(losses.token_log_probs(scored), beta1=options.beta1, beta2=options.beta2)
    return {"forget_loss": options.forget_weight * example_mean(scored, values)} | retain_terms(step, options)

"""WGA: ascent in which a token counts by its own probability (Wang et al. 2025, arXiv:2502.19301)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from locedit import losses
from locedit.edit.objective import Step
from locedit.unlearn.registry import ForgetOptions, at_least_zero, example_mean, retain_terms


@dataclass(frozen=True, kw_only=True)
class WgaOptions(ForgetOptions):
    """WGA's own options; OpenUnlearning trains with a learning rate of 1e-5 for 5 epochs."""

    beta: float = 1.0
    "exponent of the probability; 0 = plain ascent"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero(self, "beta")


def wga(log_probs: Float[Tensor, " n"], *, beta: float = 1.0) -> Float[Tensor, " n"]:
    """p^beta log p of each token, where the weight p^beta is taken as constant: the gradient on log p is p^beta."""
    return (beta * log_probs.detach()).exp() * log_probs


def loss(step: Step, options: WgaOptions) -> dict[str, Tensor]:
    """Weighted log-probability, mean over each example's tokens and then over examples, and retain."""
    scored = step.score(step.forget)
    values = wga(losses.token_log_probs(scored), beta=options.beta)
    return {"forget_loss": options.forget_weight * example_mean(scored, values)} | retain_terms(step, options)

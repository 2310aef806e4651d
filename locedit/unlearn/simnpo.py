"""SimNPO: negative preference optimisation by length-normalised likelihood, without a reference (Fan et al. 2024).

arXiv:2410.07163.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from locedit import losses
from locedit.edit.objective import Step
from locedit.unlearn.registry import ForgetOptions, above_zero, retain_terms


@dataclass(frozen=True, kw_only=True)
class SimnpoOptions(ForgetOptions):
    """SimNPO's own options; the defaults are OpenUnlearning's for TOFU."""

    beta: float = 4.5
    "inverse temperature of the mean log-probability per token"
    gamma: float = 0.0
    "margin in nats; OpenUnlearning's delta is gamma / beta"
    forget_weight: float = 0.125
    "of the forget term"

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "beta")


def simnpo(mean_log_prob: Float[Tensor, " rows"], *, beta: float = 4.5, gamma: float = 0.0) -> Float[Tensor, ""]:
    """-(2 / beta) mean log sigmoid(-beta * mean_log_prob - gamma), from each answer's mean over its tokens, in nats.

    An answer with probability 1 costs (2 / beta) log(1 + e^gamma); towards probability 0 the loss falls to 0.
    """
    return -(2 / beta) * logsigmoid(-beta * mean_log_prob - gamma).mean()


def loss(step: Step, options: SimnpoOptions) -> dict[str, Tensor]:
    """SimNPO on whole answers, and retain; no reference model is run."""
    own = -losses.sequence_nll(step.score(step.forget))
    forget = options.forget_weight * simnpo(own, beta=options.beta, gamma=options.gamma)
    return {"forget_loss": forget} | retain_terms(step, options)

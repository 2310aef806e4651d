"""Negative preference optimisation (Zhang et al. 2024, arXiv:2404.05868)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from locedit import losses
from locedit.edit.objective import Step
from locedit.unlearn.registry import ForgetOptions, above_zero, retain_terms


@dataclass(frozen=True, kw_only=True)
class NpoOptions(ForgetOptions):
    """NPO's own options beside those of training."""

    beta: float = 0.1
    "inverse temperature; towards 0 the loss becomes gradient ascent"

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "beta")


def npo(log_prob: Float[Tensor, " rows"], reference: Float[Tensor, " rows"], *, beta: float = 0.1) -> Float[Tensor, ""]:
    """-(2 / beta) mean log sigmoid(-beta (log p - log p_reference)), sequence log-probabilities in nats (eq. 3).

    (2 / beta) ln 2 at the start; its gradient is the ascent gradient times 2 p^beta / (p^beta + p_reference^beta).
    """
    return -(2 / beta) * logsigmoid(-beta * (log_prob - reference)).mean()


def loss(step: Step, options: NpoOptions) -> dict[str, Tensor]:
    """NPO on whole answers (sums over tokens, not lengths' means) with the unedited model as reference, and retain."""
    own = -losses.sequence_nll(step.score(step.forget), reduction="sum")
    reference = -losses.sequence_nll(step.reference(step.forget), reduction="sum")
    forget = options.forget_weight * npo(own, reference, beta=options.beta)
    return {"forget_loss": forget} | retain_terms(step, options)

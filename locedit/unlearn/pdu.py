"""PDU: flatten the forget logits while the retain loss stays below a limit (Entesari et al. 2025, arXiv:2506.05314).

Primal: flatness + dual * retain loss. Dual, after every optimizer step: dual = max(0, dual + dual_rate * (mean retain
loss of the step - limit)). Terms of the loss are means over examples; the dual is not, since it depends on all steps
before. OpenUnlearning marks positions by labels that are not shifted by one; here they are those that predict.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from locedit import losses
from locedit.edit.objective import Step
from locedit.errors import LoceditError
from locedit.unlearn.registry import ForgetOptions, above_zero, at_least_zero, every_token, example_mean, retain_loss


@dataclass(frozen=True, kw_only=True)
class PduOptions(ForgetOptions):
    """PDU's own options; OpenUnlearning tuned retain_weight 100, dual_rate 5 and epsilon 0.3 for TOFU."""

    retain_weight: float = 1.0
    "the dual variable at the start"
    epsilon: float | None = None
    "limit of the retain loss in nats; None = epsilon_ratio times the unedited model's"
    epsilon_ratio: float = 1.5
    """limit of the retain loss as a multiple of the unedited model's loss on the same retain batch, so that the
    constraint is on average that multiple of the starting loss; the published method has only epsilon"""
    dual_rate: float = 1.0
    "step size of the dual variable"
    dual_warmup: int = 0
    "optimizer steps before its first update; OpenUnlearning waits 5 epochs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retain_weight == 0:
            raise LoceditError(
                "retain_weight=0.0 must be above 0: it is pdu's dual variable; in a combination name pdu first"
            )
        above_zero(self, "retain_weight", "epsilon_ratio")
        at_least_zero(self, "dual_rate", "dual_warmup")
        if self.epsilon is not None:
            at_least_zero(self, "epsilon")
        elif self.retain_loss == "kl":
            raise LoceditError("epsilon=None needs retain_loss='nll': the KL of the unedited model is 0; give epsilon")


def flatness(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """(largest logit - mean logit) squared at each position; 0 where all tokens are equally likely."""
    logits = losses.precise(logits)
    return (logits.amax(1) - logits.mean(1)).square()


def dual_update(dual: float, violation: float, *, rate: float) -> float:
    """max(0, dual + rate * violation), the violation being retain loss minus its limit."""
    return max(0.0, dual + rate * violation)


def loss(step: Step, options: PduOptions) -> dict[str, Tensor]:
    """Flatness of the forget logits, mean over each example's tokens and then over examples, and dual * retain loss."""
    assert step.retain is not None, "the weight of the retain term is above 0"
    scored = step.score(step.forget)
    kept = retain_loss(step, step.retain, options)
    dual = _dual(step, options)
    step.state["violations"] = [*step.state["violations"], float(kept.detach()) - _limit(step, options)]
    return {
        "forget_loss": options.forget_weight * example_mean(scored, flatness(scored.logits)),
        "retain_loss": dual * kept,
    }


def _dual(step: Step, options: PduOptions) -> float:
    """The dual variable of this optimizer step: one update after each step, from the mean over its batches."""
    state = step.state
    if not state:
        state |= {"dual": options.retain_weight, "step": step.number, "violations": []}
    if state["step"] != step.number:
        if state["step"] > options.dual_warmup:
            mean = sum(state["violations"]) / len(state["violations"])
            state["dual"] = dual_update(state["dual"], mean, rate=options.dual_rate)
        state |= {"step": step.number, "violations": []}
    return state["dual"]


def _limit(step: Step, options: PduOptions) -> float:
    if options.epsilon is not None:
        return options.epsilon
    assert step.retain is not None
    batch = step.retain if options.retain_tokens == "answer" else every_token(step.model, step.retain)
    return options.epsilon_ratio * float(losses.sequence_nll(step.reference(batch)).mean())

"""Inverted hinge loss: lower the answer and raise the runner-up (Cha et al. 2025, LoKU, arXiv:2408.06621)."""

from jaxtyping import Float, Int
from torch import Tensor

from locedit import losses
from locedit.edit.objective import Step
from locedit.unlearn.registry import ForgetOptions, example_mean, retain_terms


def inverted_hinge(logits: Float[Tensor, "n vocab"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1 + p(label) - the largest probability of another token, at each position; in [0, 2], 0 when that other has 1.

    With a = p(label), b = p(runner-up) the gradient on the logits is a (1 - a + b) for the label, -b (1 + a - b) for
    the runner-up and p_k (b - a) for any other token. The hinge's clamp at 0 never acts.
    """
    log_probs = losses.precise(logits).log_softmax(1)
    label = log_probs.gather(1, labels[:, None]).squeeze(1)
    return 1 + label.exp() - losses.without_label(log_probs, labels).amax(1).exp()


def loss(step: Step, options: ForgetOptions) -> dict[str, Tensor]:
    """Inverted hinge on the answers, mean over each example's tokens and then over examples, and retain (1 to 1)."""
    scored = step.score(step.forget)
    forget = options.forget_weight * example_mean(scored, inverted_hinge(scored.logits, scored.labels))
    return {"forget_loss": forget} | retain_terms(step, options)

"""Metric cards: whether forget items can be told from held-out ones as texts that the model was trained on."""

from collections.abc import Callable

from locedit.data.items import Task
from locedit.evaluate.membership import membership_metrics, without_reference
from locedit.evaluate.metric import Metric
from locedit.evaluate.values import EvaluateOptions

KINDS = ("fact", "private", "plain", "tokens")
FAILURE = (
    "under 0.5 the forget items look less like members than unseen texts, which betrays the edit: the aim is 0.5 or "
    "the retain model's AUC, not 0; held-out items of other topics, lengths or dates give an AUC away from 0.5 without "
    "any membership (Duan et al. 2024, arXiv:2402.07841): look at the model before the data, or the retain model"
)


def _auc(
    score: str, *, paper: str, on_request: bool = True, lacks: Callable[[Task, EvaluateOptions], str] | None = None
) -> Metric:
    """The AUC of one score."""
    return Metric(
        function=membership_metrics,
        kinds=KINDS,
        definition=f"AUC, the share of pairs of a forget and a held-out item in which the forget item looks more like "
        f"one of the training data, by {score}; of facts the answer given its prompt, of texts every token",
        knowledge=1,
        unit="AUC",
        range=(0.0, 1.0),
        roles=("forget",),
        wanted="neutral",
        on_request=on_request,
        needs=("heldout",),
        lacks=lacks,
        chance="0.5 where both sets are from one draw",
        failure=FAILURE,
        paper=paper,
    )


MEMBERSHIP: dict[str, Metric] = {
    "mia_loss": _auc(
        "a lower mean negative log-likelihood per token", on_request=False, paper="Yeom et al. 2018, arXiv:1709.01604"
    ),
    "mia_zlib": _auc(
        "a lower negative log-likelihood per token divided by the bytes of the zlib-compressed text",
        on_request=False,
        paper="Carlini et al. 2021, arXiv:2012.07805",
    ),
    "min_k": _auc(
        "a higher mean log-probability of the least likely 20 % of the tokens (min_k_share)",
        on_request=False,
        paper="Shi et al. 2024, arXiv:2310.16789",
    ),
    "min_k_plus_plus": _auc(
        "the same of log-probabilities minus their mean, divided by their standard deviation, under the model's own "
        "distribution of the token",
        on_request=False,
        paper="Zhang et al. 2024, arXiv:2404.02936",
    ),
    "mia_gradient_norm": _auc(
        "a smaller L2 norm of the gradient of the mean negative log-likelihood over all parameters (gradient_norm)",
        paper="as in Duan et al. 2024, arXiv:2402.07841 (recalled)",
    ),
    "mia_recall": _auc(
        "how many times larger the negative log-likelihood is after other held-out items (recall_shots)",
        paper="Xie et al. 2024, arXiv:2406.15968",
    ),
    "mia_reference": _auc(
        "a negative log-likelihood per token that is lower than a reference model's (membership_reference, or the "
        "task's start)",
        lacks=without_reference,
        paper="Carlini et al. 2021, arXiv:2012.07805",
    ),
    "privleak": Metric(
        function=membership_metrics,
        kinds=KINDS,
        definition="((1 - AUC) - (1 - AUC_ref)) / (1 - AUC_ref) in per cent, with min_k's AUC and that of the retain "
        "model (0.5 without one): -100 = all forget items are told apart, 0 = as the retain model, above = forgotten "
        "too far",
        knowledge=-1,
        unit="%",
        range=(-100.0, None),
        roles=("forget",),
        wanted="neutral",
        on_request=True,
        needs=("heldout",),
        uses_retain_model=True,
        chance="0 for a model that never saw the forget items",
        failure="has no upper limit: where AUC_ref is near 1 it divides by almost nothing; as published with 40 % of "
        "the tokens, here min_k_share; " + FAILURE,
        paper="Shi et al. 2024, arXiv:2407.06460",
    ),
}

"""Metric cards: what an edit costs elsewhere."""

from locedit.evaluate.metric import Metric
from locedit.evaluate.utility import perplexity_metric, shift_metrics

UTILITY: dict[str, Metric] = {
    "perplexity": Metric(
        function=perplexity_metric,
        kinds=("plain", "labelled", "private"),
        definition="exp of the mean negative log-likelihood per token of all texts (masked models: pseudo-likelihood)",
        knowledge=-1,
        unit="perplexity",
        range=(1.0, None),
        roles=("forget", "retain", "heldout", "texts"),
    ),
    "kl_to_base": Metric(
        function=shift_metrics,
        kinds=("plain", "labelled"),
        definition="KL(unedited || edited) of the next-token distributions, mean over tokens",
        knowledge=-1,
        keep=True,
        compares=True,
        unit="nats per token",
        range=(0.0, None),
        roles=("texts",),
        chance="0 for the unedited model",
    ),
    "agreement_with_base": Metric(
        function=shift_metrics,
        kinds=("plain", "labelled"),
        definition="share of tokens at which the edited and the unedited model have the same most likely next token",
        knowledge=1,
        keep=True,
        compares=True,
        unit="share",
        range=(0.0, 1.0),
        roles=("texts",),
        chance="1 for the unedited model",
    ),
}

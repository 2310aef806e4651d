"""Metric cards: what an edit costs elsewhere."""

from locedit.evaluate.fluency import fluency_metrics
from locedit.evaluate.metric import Metric
from locedit.evaluate.utility import perplexity_metric, shift_metrics
from locedit.results import Direction


def _written(
    definition: str, *, wanted: Direction, unit: str, high: float | None = 1.0, failure: str, paper: str = ""
) -> Metric:
    """A metric of greedy continuations of ordinary texts."""
    return Metric(
        function=fluency_metrics,
        kinds=("plain", "labelled"),
        definition=definition,
        knowledge=1,
        unit=unit,
        range=(0.0, high),
        roles=("texts",),
        causal=True,
        wanted=wanted,
        chance="that of the unedited model",
        failure=failure,
        paper=paper,
    )


UTILITY: dict[str, Metric] = {
    "perplexity": Metric(
        function=perplexity_metric,
        kinds=("plain", "labelled", "private"),
        definition="exp of the mean negative log-likelihood per token of all texts (masked models: pseudo-likelihood)",
        knowledge=-1,
        unit="perplexity",
        range=(1.0, None),
        roles=("forget", "retain", "heldout", "texts"),
        chance="that of the unedited model, or of heldout texts",
        failure="low for text that repeats itself, depends on the tokenizer, and one impossible token in a thousand "
        "outweighs all others",
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
        failure="a mean over tokens, in which large changes at few places drown; does not say whether a change is bad",
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
        failure="counts first places alone: where two tokens are nearly equally likely a tiny change swaps them, and "
        "probability may halve without a trace",
    ),
    "ngram_entropy": _written(
        "weighted mean of the entropies of the word bigrams (1/3) and trigrams (2/3) of a greedy continuation of the "
        "first half of a text, mean over texts",
        wanted="higher",
        unit="bits",
        high=None,
        failure="grows with the length of the continuation, so only equal fluency_tokens compare; words strung "
        "together at random have a high one",
        paper="Zhang et al. 2018, arXiv:1809.05972; weighted as in the code of Meng et al. 2022, arXiv:2202.05262",
    ),
    "repetition": _written(
        "share of the 4-grams of tokens of the same continuations that are repetitions, mean over texts",
        wanted="lower",
        unit="share",
        failure="an empty continuation repeats nothing: see empty_share; greedy continuations of small models repeat "
        "themselves without any edit",
        paper="Welleck et al. 2020, arXiv:1908.04319 (seq-rep-4)",
    ),
    "empty_share": _written(
        "share of the same continuations that are nothing but white space",
        wanted="lower",
        unit="share",
        failure="a model that has learned to end its texts early writes nothing after some beginnings",
    ),
}

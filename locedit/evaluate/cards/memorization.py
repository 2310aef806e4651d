"""Metric cards: how much of a text a model has by heart, and what can be extracted."""

from locedit.evaluate.extraction import extraction_metrics
from locedit.evaluate.facts import span_metrics
from locedit.evaluate.metric import Metric
from locedit.evaluate.private import exposure_metric
from locedit.evaluate.span_memorization import span_memorization_metrics
from locedit.evaluate.verbatim import verbatim_metrics

SPANS = ("fact", "private", "tokens")
TEXTS = ("plain", "private", "tokens")


def _written(definition: str, *, failure: str, paper: str = "") -> Metric:
    """A metric of the greedy continuation of a prompt."""
    return Metric(
        function=verbatim_metrics,
        kinds=SPANS,
        definition=definition,
        knowledge=1,
        unit="share",
        range=(0.0, 1.0),
        on_request=True,
        chance="see the heldout set",
        failure=failure,
        paper=paper,
    )


def _rouge(score: str, *, paper: str) -> Metric:
    return _written(
        f"{score} of the greedy continuation of the prompt against the answer (or span), words stemmed, as many tokens "
        "as the answer has unless rouge_tokens says otherwise; mean over items",
        failure="words such as the and of are found in any answer; only a-z and 0-9 count; a refusal that repeats the "
        "question scores above 0",
        paper=paper,
    )


MEMORIZATION: dict[str, Metric] = {
    "extraction_likelihood": Metric(
        function=extraction_metrics,
        kinds=TEXTS,
        definition="share of the n-grams of the rest of a text that greedy continuations of its beginnings contain, "
        "mean over all beginnings, then over texts (EL_n; n = 10 unless extraction_n says otherwise)",
        knowledge=1,
        unit="share",
        range=(0.0, 1.0),
        on_request=True,
        chance="see the heldout set",
        failure="texts with repeated or common phrases have some without being memorised, and a paraphrase of the text "
        "has none; depends on n",
        paper="Jang et al. 2023, arXiv:2210.01504",
    ),
    "text_memorization_accuracy": Metric(
        function=extraction_metrics,
        kinds=TEXTS,
        definition="share of all tokens of a text, its first one left out, that are the most likely ones after the "
        "true text before them; mean over texts (MA)",
        knowledge=1,
        unit="share",
        range=(0.0, 1.0),
        on_request=True,
        chance="see the heldout set",
        failure="far above 0 for texts never seen, since grammar predicts much of them, and teacher-forced: read it "
        "beside the heldout set",
        paper="Tirumala et al. 2022, arXiv:2205.10770; Jang et al. 2023, arXiv:2210.01504",
    ),
    "s_ma": Metric(
        function=span_memorization_metrics,
        kinds=("private",),
        definition="share of the tokens of all spans that are the most likely ones after the true text before them "
        "(span memorization accuracy)",
        knowledge=1,
        unit="share",
        range=(0.0, 1.0),
        on_request=True,
        chance="see the heldout set",
        failure="teacher-forced, so that later tokens of a span follow from its first ones; long spans weigh more",
        paper="Wang et al. 2024, arXiv:2402.05813",
    ),
    "s_el": Metric(
        function=span_memorization_metrics,
        kinds=("private",),
        definition="share of the n-grams that touch a span which the greedy continuation from the span's start "
        "contains, mean over spans (span extraction likelihood, normalised in our own way; n = 3 unless s_el_n says "
        "otherwise)",
        knowledge=1,
        unit="share",
        range=(0.0, 1.0),
        on_request=True,
        chance="see the heldout set",
        failure="greedy alone: what sampling would bring out is not seen; normalised in our own way, so that published "
        "numbers do not compare",
        paper="after Wang et al. 2024, arXiv:2402.05813",
    ),
    "rest_accuracy": Metric(
        function=span_memorization_metrics,
        kinds=("private",),
        definition="share of the tokens outside the spans of a text that are the most likely ones after the true text "
        "before them: what forgetting the spans alone should leave",
        knowledge=1,
        keep=True,
        unit="share",
        range=(0.0, 1.0),
        on_request=True,
        chance="that of the unedited model is to be kept",
        failure="common words keep it high, so that damage to what is rare hardly shows",
    ),
    "exposure": Metric(
        function=exposure_metric,
        kinds=("private",),
        definition="log2 of the number of values that the secret could have had, minus log2 of its rank among them by "
        "the model's probability",
        knowledge=1,
        unit="bits",
        range=(0.0, None),
        chance="1.44 bits in a large space of equally plausible values",
        failure="estimated from samples and a fitted distribution where there are too many values; values that are "
        "plausible in themselves, such as common names, are exposed without being memorised",
        paper="Carlini et al. 2019, arXiv:1802.08232, definition 1 and section 4.4",
    ),
    "extraction_strength": Metric(
        function=span_metrics,
        kinds=(*SPANS, "plain"),
        definition="1 - k / T, where the last T - k of the T tokens of the answer (private and plain texts: of the "
        "whole text) are all the most likely ones after the true text before them, and k is as small as possible; mean "
        "over items",
        knowledge=1,
        unit="share",
        range=(0.0, 1.0),
        chance="see the heldout set",
        failure="one wrong token near the end hides a text that is known up to there; OpenUnlearning has 1 / T where "
        "this has 0, and leaves out the last token",
        paper="Carlini et al. 2021, arXiv:2012.07805; Wang et al. 2025, arXiv:2406.09179",
    ),
    "exact_memorization": Metric(
        function=span_metrics,
        kinds=SPANS,
        definition="share of the answer's (or span's) tokens that are the most likely ones after the true text before "
        "them; mean over items. The same as memorization_accuracy: published code leaves out the last label, an end "
        "token, and answers here have none",
        knowledge=1,
        unit="share",
        range=(0.0, 1.0),
        on_request=True,
        chance="see the heldout set",
        failure="common tokens are predicted without the text being known",
        paper="Tirumala et al. 2022, arXiv:2205.10770; name as in OpenUnlearning, Dorna et al. 2025, arXiv:2506.12618",
    ),
    "verbatim_completion": _written(
        "share of answers (or spans; mean over those of a text) that the greedy continuation of what comes before "
        "reproduces token for token. Of really written text; the same as accuracy, which is teacher-forced, except "
        "where tokens are equally likely, an answer holds an end token, or a text has several spans",
        failure="one other token at the start counts as much as none",
        paper="Carlini et al. 2023, arXiv:2202.07646",
    ),
    "rouge_l_recall": _rouge("ROUGE-L recall", paper="Lin 2004; as in Maini et al. 2024, arXiv:2401.06121"),
    "rouge_l_f1": _rouge("ROUGE-L F1", paper="Lin 2004; as in Shi et al. 2024, arXiv:2407.06460"),
    "rouge_1_recall": _rouge("ROUGE-1 recall", paper="Lin 2004; as in Maini et al. 2024, arXiv:2401.06121"),
}

"""Metric cards: how much of a text a model has by heart, and what can be extracted."""

from locedit.evaluate.extraction import extraction_metrics
from locedit.evaluate.metric import Metric
from locedit.evaluate.private import exposure_metric
from locedit.evaluate.span_memorization import span_memorization_metrics

TEXTS = ("plain", "private", "tokens")

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
        paper="Carlini et al. 2019, arXiv:1802.08232, definition 1 and section 4.4",
    ),
}

"""Metric cards: what a model knows of facts and private spans."""

from locedit.evaluate.facts import neighbour_metrics, paraphrase_metrics, span_metrics
from locedit.evaluate.metric import Metric

SPANS = ("fact", "private", "tokens")

KNOWLEDGE: dict[str, Metric] = {
    "probability": Metric(
        function=span_metrics,
        kinds=SPANS,
        definition="product of the probabilities of the answer's (or span's) tokens, each given the true text so far",
        knowledge=1,
        unit="probability",
        range=(0.0, 1.0),
        chance="see the heldout set",
        failure="a product over tokens: a long answer has a small one even where it is known, and looks forgotten by a "
        "small loss on each token; synonyms do not count",
    ),
    "accuracy": Metric(
        function=span_metrics,
        kinds=SPANS,
        definition="share of items whose every answer (or span) token is the model's single most likely one: greedy "
        "decoding would say it word for word",
        knowledge=1,
        unit="share",
        range=(0.0, 1.0),
        chance="see the heldout set",
        failure="says nothing between all and none: one wrong token of a long answer makes it 0, and a model whose "
        "answer is a close second looks as if it knew nothing",
    ),
    "rank": Metric(
        function=span_metrics,
        kinds=SPANS,
        definition="rank of the first answer (or span) token in the vocabulary, 1 = most likely; mean over items",
        knowledge=-1,
        unit="rank",
        range=(1.0, None),
        chance="see the heldout set",
        failure="looks at the first token alone, which many answers share, and a few items far down decide the mean",
    ),
    "reciprocal_rank": Metric(
        function=span_metrics,
        kinds=SPANS,
        definition="1 / rank in the vocabulary, mean over the tokens of the answer (or span), then over items (MRR)",
        knowledge=1,
        unit="share",
        range=(0.0, 1.0),
        chance="see the heldout set",
        failure="later tokens are given the true ones before them, and follow from these (the rest of a name) whether "
        "the answer is known or not",
        paper="Wu et al. 2023, arXiv:2310.20138, eq. 7",
    ),
    "memorization_accuracy": Metric(
        function=span_metrics,
        kinds=SPANS,
        definition="share of the answer's (or span's) tokens that are the single most likely one after the true text "
        "before them; mean over items",
        knowledge=1,
        unit="share",
        range=(0.0, 1.0),
        chance="see the heldout set",
        failure="teacher-forced: it overstates what the model would write, since after a wrong token it is given the "
        "true one; word endings count as memory",
        paper="Tirumala et al. 2022, arXiv:2205.10770; Jang et al. 2023, arXiv:2210.01504; here of the span",
    ),
    "paraphrase_probability": Metric(
        function=paraphrase_metrics,
        field="paraphrases",
        kinds=("fact",),
        definition="probability of the answer after the fact's paraphrased prompts, mean over the prompts of each fact",
        knowledge=1,
        unit="probability",
        range=(0.0, 1.0),
        chance="that of heldout facts asked in the same ways",
        failure="as of probability; falls also where a model finds the question itself strange",
        paper="Meng et al. 2022, arXiv:2202.05262 (generalisation)",
    ),
    "paraphrase_accuracy": Metric(
        function=paraphrase_metrics,
        field="paraphrases",
        kinds=("fact",),
        definition="share of the fact's paraphrased prompts after which every answer token is the most likely one",
        knowledge=1,
        unit="share",
        range=(0.0, 1.0),
        chance="that of heldout facts asked in the same ways",
        failure="as of accuracy, and paraphrases that the model could not answer before the edit look forgotten",
        paper="Meng et al. 2022, arXiv:2202.05262 (generalisation)",
    ),
    "neighbour_probability": Metric(
        function=neighbour_metrics,
        field="neighbours",
        kinds=("fact",),
        definition="probability of the answers of the fact's neighbours, mean over the neighbours of each fact",
        knowledge=1,
        keep=True,
        unit="probability",
        range=(0.0, 1.0),
        chance="that of the unedited model is to be kept",
        failure="neighbours that the model never knew cannot be damaged: read it beside the value before the edit",
        paper="Meng et al. 2022, arXiv:2202.05262 (specificity)",
    ),
    "neighbour_accuracy": Metric(
        function=neighbour_metrics,
        field="neighbours",
        kinds=("fact",),
        definition="share of the fact's neighbours whose every answer token is the most likely one",
        knowledge=1,
        keep=True,
        unit="share",
        range=(0.0, 1.0),
        chance="that of the unedited model is to be kept",
        failure="a fall in probability that leaves the answer in front does not show",
        paper="Meng et al. 2022, arXiv:2202.05262 (specificity)",
    ),
}

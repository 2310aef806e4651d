"""Metric cards: a fact's answer against wrong ones, and what TOFU makes of them."""

from locedit.evaluate.letters import lacks_questions, letter_metrics
from locedit.evaluate.metric import Family, Metric
from locedit.evaluate.model_utility import model_utility_metric
from locedit.evaluate.truth_ratio import forget_quality_metric
from locedit.evaluate.wrong_answers import wrong_answer_metrics
from locedit.results import Direction

TOFU = "Maini et al. 2024, arXiv:2401.06121"
CHANCE = "1 / number of options"


def _against_wrong(
    function: Family,
    definition: str,
    *,
    unit: str = "share",
    wanted: Direction | None = None,
    on_request: bool = False,
    chance: str = CHANCE,
    failure: str = "",
    paper: str = "",
) -> Metric:
    """A metric of facts that have wrong answers."""
    return Metric(
        function=function,
        kinds=("fact",),
        field="wrong",
        definition=definition,
        knowledge=1,
        unit=unit,
        range=(0.0, 1.0),
        wanted=wanted,
        on_request=on_request,
        lacks=lacks_questions if function is letter_metrics else None,
        chance=chance,
        failure=failure,
        paper=paper,
    )


def _truth_ratio(mean: str, failure: str, *, on_request: bool = False) -> Metric:
    return _against_wrong(
        wrong_answer_metrics,
        f"r = P(wrong) / P(paraphrased answer), P = exp(mean log-probability of a token), {mean} mean over the wrong "
        "answers; mean over facts of min(r, 1/r), on the retain set of max(0, 1 - r). A fact without a paraphrased "
        "answer takes the answer itself",
        unit="ratio",
        wanted="higher",
        on_request=on_request,
        chance="see the heldout set; 1 where neither is preferred, on the retain set 0",
        failure=f"{failure}; min(r, 1/r) is near 0 for a model that knows, and also for one that is sure of something "
        "wrong; wrong answers that are unlikely in themselves look like knowledge",
        paper=TOFU,
    )


FACTS: dict[str, Metric] = {
    "cloze_accuracy": _against_wrong(
        wrong_answer_metrics,
        "share of facts whose answer is likelier than each of its wrong answers after the prompt, log-probabilities "
        "divided by the number of tokens unless cloze_length says otherwise; equal ones share",
        failure="an answer that is common in itself wins without being known",
        paper="Brown et al. 2020, arXiv:2005.14165, section 2.4",
    ),
    "cloze_probability": _against_wrong(
        wrong_answer_metrics,
        "exp(score) of the answer, divided by the sum over it and its wrong answers; score = log-probability divided "
        "by the number of tokens unless cloze_length says otherwise; mean over facts",
        unit="probability",
        chance=f"{CHANCE} where all are equally plausible",
        failure="dividing by the number of tokens pulls long options together, not dividing favours short ones",
    ),
    "normalized_probability": _against_wrong(
        wrong_answer_metrics,
        "P(answer) / (P(answer) + sum of P(wrong)), P = exp(mean log-probability of a token), whatever cloze_length "
        "says; mean over facts",
        unit="probability",
        on_request=True,
        chance=f"{CHANCE} where all are equally plausible",
        failure="long answers come out near 1 / number of options, since P is that of an average token",
        paper=f"{TOFU} (probability of real authors and world facts)",
    ),
    "truth_ratio": _truth_ratio("geometric", "one likely wrong answer hides among unlikely ones"),
    "truth_ratio_arithmetic": _truth_ratio("arithmetic", "the likeliest wrong answer decides", on_request=True),
    "choice_accuracy": _against_wrong(
        letter_metrics,
        "share of multiple-choice questions, made of the fact's answer and its wrong answers in choice_orders orders, "
        "in which the right letter is the likeliest of the letters; mean over the orders, then over facts",
        on_request=True,
        failure="a model that cannot answer by letter, or that says the same one always, is at chance although it may "
        "know: see letter_bias and cloze_accuracy",
        paper="Hendrycks et al. 2021, arXiv:2009.03300 (form of the question)",
    ),
    "choice_probability": _against_wrong(
        letter_metrics,
        "probability of the right letter, divided by the sum over the letters; questions as in choice_accuracy",
        unit="probability",
        on_request=True,
        failure="as choice_accuracy",
    ),
    "letter_bias": Metric(
        function=letter_metrics,
        kinds=("fact",),
        field="wrong",
        lacks=lacks_questions,
        definition="half the sum over letters of how far the share of questions in which a letter is the likeliest is "
        "from that of equally often: 0 = no letter is preferred, 1 - 1 / number of options = always the same",
        knowledge=-1,
        keep=True,
        unit="share",
        range=(0.0, 1.0),
        on_request=True,
        chance="0 for a model that knows; picking at random is uneven by chance where facts are few (see the note)",
        failure="never below 0, so that with few questions it is above 0 for a model without bias",
        paper="Zheng et al. 2024, arXiv:2309.03882 (the bias; the distance is ours)",
    ),
    "forget_quality": Metric(
        function=forget_quality_metric,
        kinds=("fact",),
        field="wrong",
        definition="p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios r of the forget set and "
        "those under a model trained without it; 1 = the same distribution. Per example: r",
        knowledge=-1,
        unit="p-value",
        range=(0.0, 1.0),
        roles=("forget",),
        on_request=True,
        retain_model=True,
        chance="1 for the retain model itself",
        failure="falls with the number of facts for the same difference, and is as small for a model that forgot too "
        "much (1e-239 was published) as for one that forgot nothing",
        paper=TOFU,
    ),
    "model_utility": Metric(
        function=model_utility_metric,
        kinds=("fact",),
        field="wrong",
        definition="harmonic mean of probability, ROUGE-L recall of what is written, and truth ratio (mean of "
        "max(0, 1 - r)) of the retain set and of each file in utility_sets, there with the normalised probability",
        knowledge=1,
        unit="share",
        range=(0.0, 1.0),
        roles=("retain",),
        on_request=True,
        chance="see the note for the numbers behind it",
        failure="one number of 0 makes it 0 whatever the others are; without utility_sets it says nothing of other "
        "knowledge",
        paper=TOFU,
    ),
}

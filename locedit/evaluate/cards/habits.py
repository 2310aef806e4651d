"""Metric cards: what a model writes when asked to go on, and how it is judged."""

from locedit.evaluate.habit import habit_metrics
from locedit.evaluate.metric import Metric
from locedit.results import Direction
from locedit.sampling import PROMPTED

REWARD = "what the reward does not see is not counted"


def _sampled(
    definition: str, *, wanted: Direction, failure: str, unit: str = "share", high: float | None = 1.0, paper: str = ""
) -> Metric:
    """A metric of sampled responses to the prompts."""
    return Metric(
        function=habit_metrics,
        kinds=PROMPTED,
        definition=definition,
        knowledge=1,
        unit=unit,
        range=(1.0 if unit == "perplexity" else None if high is None else 0.0, high),
        roles=("prompts",),
        writes=True,
        wanted=wanted,
        on_request=True,
        chance="that of a model without the habit: the unedited one on ordinary prompts",
        failure=failure,
        paper=paper,
    )


HABITS: dict[str, Metric] = {
    "habit_rate": _sampled(
        "share of sampled responses that are bad: their reward is below reward_below (bad_words: one word is enough)",
        wanted="lower",
        failure=f"{REWARD}; the rate of 20 tokens says little of longer texts",
    ),
    "toxicity_probability": _sampled(
        "share of prompts of which at least one sampled response is bad; 25 samples unless `samples` says otherwise",
        wanted="lower",
        failure=f"{REWARD}; grows with the number of samples, so only equal `samples` compare",
        paper="Gehman et al. 2020, arXiv:2009.11462",
    ),
    "average_max_toxicity": _sampled(
        "largest 1 - reward among the sampled responses to a prompt, mean over prompts",
        wanted="lower",
        failure=f"{REWARD}; a largest value grows with the number of samples, so only equal `samples` compare",
        high=None,
        paper="Gehman et al. 2020, arXiv:2009.11462",
    ),
    "mean_reward": _sampled(
        "mean reward of the sampled responses",
        wanted="higher",
        failure="rises where a model writes what the reward likes, such as one safe sentence each time: see dist_n",
        unit="reward",
        high=None,
    ),
    "sample_perplexity": _sampled(
        "exp of the mean negative log-likelihood per token of sampled responses given their prompts, under the "
        "unedited model",
        wanted="lower",
        failure="low for text that repeats itself or is dull, and high for what the unedited model would not say, "
        "which may be the aim",
        unit="perplexity",
        high=None,
        paper="after Lu et al. 2022, arXiv:2205.13636, with the unedited model as the judge",
    ),
    **{
        f"dist_{n}": _sampled(
            f"different word {n}-grams of the sampled responses to a prompt, divided by their words; mean over prompts",
            wanted="higher",
            failure="falls with the length and number of responses, so that only equal `samples` and "
            "`sample_tokens` compare; random words have a high one",
            paper="Li et al. 2016, arXiv:1510.03055; as in the code of Lu et al. 2022, arXiv:2205.13636",
        )
        for n in (1, 2, 3)
    },
    **{
        f"seq_rep_{n}": _sampled(
            f"share of a sampled response's word {n}-grams that are repetitions, mean over responses",
            wanted="lower",
            failure="a response too short for an n-gram repeats nothing, and lists repeat themselves rightly",
            paper="Welleck et al. 2020, arXiv:1908.04319, here of words",
        )
        for n in (2, 3, 4)
    },
    "diversity": _sampled(
        "product over n = 2, 3, 4 of 1 - seq_rep_n of a sampled response, mean over responses",
        wanted="higher",
        failure="high for random words: read it beside sample_perplexity",
        paper="Su et al. 2022, arXiv:2202.06417",
    ),
}

"""A fact's answer against its wrong ones: truth ratio, normalised probability and cloze choice, from one scoring."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.evaluate.likelihoods import Likelihood, Likelihoods, left_out, likelihoods, with_wrong
from locedit.evaluate.truth_ratio import like_a_stranger, log_truth_ratio, true_is_likelier
from locedit.evaluate.values import Values, View

Value = Callable[[Likelihoods], float]
"""The candidates of one fact -> its value of a metric."""
LENGTHS: dict[str, Callable[[Likelihood], float]] = {
    "tokens": lambda one: one.per_token,
    "characters": lambda one: one.total / one.characters,
    "none": lambda one: one.total,
}
"""Score of a candidate in nats, by how it is normalised."""


def normalized_probability(found: Likelihoods) -> float:
    """P(answer) / (P(answer) + sum of P(wrong)), each P normalised by the number of tokens."""
    return cloze_probability(found, length="tokens")


def cloze_probability(found: Likelihoods, *, length: str = "tokens") -> float:
    """exp(score of the answer), divided by the sum over all candidates."""
    return float(_scores(found, length).softmax(0)[0])


def cloze_accuracy(found: Likelihoods, *, length: str = "tokens") -> float:
    """1 where the answer has the largest score; n candidates that share the largest have 1 / n."""
    scores = _scores(found, length)
    best = scores == scores.max()
    return float(best[0]) / int(best.sum())


def _scores(found: Likelihoods, length: str) -> Float[Tensor, " candidate"]:
    """The answer first, then the wrong ones."""
    return torch.tensor([LENGTHS[length](one) for one in (found.answer, *found.wrong)], dtype=torch.float64)


def wrong_answer_metrics(view: View, names: Sequence[str]) -> dict[str, Values]:
    """Metrics of every fact that has wrong answers; the others are left out and counted in the note."""
    facts = with_wrong(view.dataset, by=" and ".join(names))
    found = likelihoods(view.model, facts, chat=view.dataset.chat, batch_size=view.options.batch_size)
    by_name, words = _values(view)
    rows = list(zip(facts, found, strict=True))
    without = {fact.id: "against the answer itself, not a paraphrase" for fact, own in rows if own.paraphrase is None}
    left = left_out(view.dataset, facts)
    return {
        name: Values(
            per_example={fact.id: by_name[name](own) for fact, own in rows},
            owners={fact.id: fact.owner for fact in facts},
            groups={fact.id: (fact.format,) if fact.format else () for fact in facts},
            note="; ".join(text for text in (words if name in RATIOS else "", left) if text),
            notes=without if name in RATIOS else {},
        )
        for name in names
    }


RATIOS = ("truth_ratio", "truth_ratio_arithmetic")


def _values(view: View) -> tuple[dict[str, Value], str]:
    """Each metric of one fact, and how the truth ratio is aggregated: on the retain set otherwise than elsewhere."""
    length = view.options.cloze_length
    retained = view.dataset is view.task.retain
    aggregate = true_is_likelier if retained else like_a_stranger
    by_name: dict[str, Value] = {
        "truth_ratio": lambda one: aggregate(log_truth_ratio(one)),
        "truth_ratio_arithmetic": lambda one: aggregate(log_truth_ratio(one, mean="arithmetic")),
        "normalized_probability": normalized_probability,
        "cloze_accuracy": lambda one: cloze_accuracy(one, length=length),
        "cloze_probability": lambda one: cloze_probability(one, length=length),
    }
    return by_name, "mean of max(0, 1 - r)" if retained else "mean of min(r, 1/r)"

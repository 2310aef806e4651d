"""Truth ratio and forget quality (TOFU, Maini et al. 2024, arXiv:2401.06121).

    r = P(wrong) / P(paraphrased answer),   P(a) = exp(mean log-probability of the tokens of a after the prompt)

Below 1 the true answer is the likelier one; a model that never saw the fact has no preference. P(wrong) is the
geometric mean over the wrong answers, exp(mean of their mean log-probabilities), as in the released script that
aggregates the tables; another released file takes the arithmetic mean of the probabilities (`truth_ratio_arithmetic`).
OpenUnlearning divides by P(paraphrased answer) + 1e-10, here nothing is added.

Over the forget set the published number is the mean of min(r, 1/r), over other sets the mean of max(0, 1 - r). Forget
quality is the p-value of the two-sample Kolmogorov-Smirnov test between the r of the forget set under a model and under
one that was trained without it.
"""

import math
from collections.abc import Sequence
from typing import Literal

from locedit.data.items import Fact
from locedit.evaluate.intervals import Estimate
from locedit.evaluate.likelihoods import Likelihoods, left_out, likelihoods, with_wrong
from locedit.evaluate.values import Values, View
from locedit.losses import ScoringModel
from locedit.ranks import stats

Mean = Literal["geometric", "arithmetic"]


def log_truth_ratio(found: Likelihoods, *, mean: Mean = "geometric") -> float:
    """log r in nats; positive = the wrong answers are likelier. Without a paraphrase the answer itself is taken."""
    true = (found.paraphrase or found.answer).per_token
    wrong = [each.per_token for each in found.wrong]
    if mean == "geometric":
        return math.fsum(wrong) / len(wrong) - true
    return math.log(math.fsum(math.exp(each - max(wrong)) for each in wrong) / len(wrong)) + max(wrong) - true


def like_a_stranger(log_r: float) -> float:
    """min(r, 1/r): 1 where neither is preferred, as by a model that never saw the fact."""
    return math.exp(-abs(log_r))


def true_is_likelier(log_r: float) -> float:
    """max(0, 1 - r): 1 where the true answer is much likelier, 0 where it is not."""
    return max(0.0, -math.expm1(min(log_r, 0.0)))


def truth_ratios(
    model: ScoringModel, facts: Sequence[Fact], *, chat: str = "off", batch_size: int = 64
) -> dict[str, float]:
    """id -> r, geometric."""
    found = likelihoods(model, facts, chat=chat, batch_size=batch_size)
    return {fact.id: math.exp(log_truth_ratio(own)) for fact, own in zip(facts, found, strict=True)}


def forget_quality_metric(view: View, names: Sequence[str]) -> dict[str, Values]:
    """The p-value; its per-example values are the raw r of the model that is measured."""
    assert tuple(names) == ("forget_quality",)
    assert view.retain_model is not None, "the card asks for a retain model"
    facts = with_wrong(view.dataset, by="forget_quality")
    own, stranger = (
        truth_ratios(model, facts, chat=view.dataset.chat, batch_size=view.options.batch_size)
        for model in (view.model, view.retain_model)
    )
    whole = _p_value(own, stranger, list(own))
    return {
        "forget_quality": Values(
            per_example=own,
            owners={fact.id: fact.owner for fact in facts},
            groups={fact.id: (fact.format,) if fact.format else () for fact in facts},
            note="; ".join(text for text in (_log10(whole), left_out(view.dataset, facts)) if text),
            estimate=lambda ids: Estimate(_p_value(own, stranger, ids), math.nan, math.nan),
        )
    }


def _p_value(own: dict[str, float], stranger: dict[str, float], ids: Sequence[str]) -> float:
    """Two-sided, exact where scipy can."""
    return float(stats.ks_2samp([own[key] for key in ids], [stranger[key] for key in ids]).pvalue)


def _log10(p: float) -> str:
    return f"all items: log10 p = {math.log10(p):.3g}" if p > 0 else "all items: p is below the smallest float"

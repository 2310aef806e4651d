"""What looks broken after an edit, in words, from the numbers of an evaluation.

An alarm is no verdict: each names two numbers, before and after, that are worth a look. The limits are ours.
"""

from locedit.results import Evaluation, Measure

PERPLEXITY = 1.5
"factor by which the perplexity of ordinary texts may rise"
ACCURACY = 0.05
"retain accuracy at or under which nothing is retained"
KNEW = 0.2
"retain accuracy before, from which on there was something to lose"
EMPTY = 0.25
"share of empty continuations that the edit may add"
REPETITION = 0.25
"share of repeated 4-grams that the edit may add"
ENTROPY = 0.5
"share of the n-gram entropy that must be left"
AUC = 0.3
"membership AUC under which forget items stand out as less known than unseen ones, if its interval is under 0.5 too"
MEMBERSHIP = ("mia_loss", "mia_zlib", "min_k", "min_k_plus_plus", "mia_recall", "mia_reference", "mia_gradient_norm")


def alarms(evaluation: Evaluation) -> tuple[str, ...]:
    """One line for everything that looks broken; empty without an edit, or where nothing does.

    Metrics that were not measured raise no alarm.
    """
    found = (_perplexity(evaluation), _retain(evaluation), *_written(evaluation), _over_forgotten(evaluation))
    return tuple(line for line in found if line)


def _pair(evaluation: Evaluation, dataset: str, name: str) -> tuple[Measure, Measure] | None:
    """A measure before and after the edit; None where it is not there."""
    wanted = {m.stage: m for m in evaluation.measures if (m.dataset, m.name, m.group) == (dataset, name, None)}
    return (wanted["before"], wanted["after"]) if {"before", "after"} <= set(wanted) else None


def _perplexity(evaluation: Evaluation) -> str:
    pair = _pair(evaluation, "texts", "perplexity")
    if pair is None or not pair[1].value > PERPLEXITY * pair[0].value:
        return ""
    before, after = pair
    return (
        f"the perplexity of ordinary texts rose from {before.value:.3g} to {after.value:.3g}, by a factor of "
        f"{after.value / before.value:.3g}: the edit costs more than the forget items"
    )


def _retain(evaluation: Evaluation) -> str:
    pair = _pair(evaluation, "retain", "accuracy")
    if pair is None or pair[0].value < KNEW or pair[1].value > ACCURACY:
        return ""
    return f"retain accuracy fell from {pair[0].value:.0%} to {pair[1].value:.0%}: what was to be kept is gone too"


def _written(evaluation: Evaluation) -> list[str]:
    """Alarms of the continuations of ordinary texts."""
    lines: list[str] = []
    for name, limit, what in (("empty_share", EMPTY, "are empty"), ("repetition", REPETITION, "repeat themselves")):
        pair = _pair(evaluation, "texts", name)
        if pair is not None and pair[1].value > pair[0].value + limit:
            unit = "of the continuations" if name == "empty_share" else "of their 4-grams"
            lines.append(
                f"continuations of ordinary texts {what}: {pair[1].value:.0%} {unit}, {pair[0].value:.0%} before the "
                "edit"
            )
    pair = _pair(evaluation, "texts", "ngram_entropy")
    if pair is not None and pair[1].value < ENTROPY * pair[0].value:
        lines.append(
            f"continuations of ordinary texts are monotonous: n-gram entropy {pair[1].value:.3g} bits, "
            f"{pair[0].value:.3g} before the edit"
        )
    return lines


def _over_forgotten(evaluation: Evaluation) -> str:
    """The membership score by which the forget items stand out most as over-forgotten, where one does."""
    after = [
        m
        for m in evaluation.measures
        if m.stage == "after" and m.name in MEMBERSHIP and m.group is None and m.value < AUC and m.high < 0.5
    ]
    if not after:
        return ""
    worst = min(after, key=lambda measure: measure.value)
    return (
        f"the forget items look less known than unseen ones ({worst.name} AUC {worst.value:.2f}, 0.5 is chance): they "
        "can be told as over-forgotten"
    )

"""Metric cards: classification by the next word, and its differences between groups."""

from locedit.evaluate.labelled import labelled_metrics
from locedit.evaluate.metric import Metric
from locedit.results import Direction

FAIRLEARN = "Weerts et al. 2023 (fairlearn), arXiv:2303.16626"


def _labelled(
    definition: str, *, chance: str, failure: str, paper: str = "", field: str = "", wanted: Direction | None = None
) -> Metric:
    """A metric of labelled texts."""
    return Metric(
        function=labelled_metrics,
        kinds=("labelled",),
        field=field,
        definition=definition,
        knowledge=1,
        wanted=wanted,
        unit="share",
        range=(0.0, 1.0),
        causal=True,
        on_request=True,
        chance=chance,
        failure=failure,
        paper=paper,
    )


def _difference(definition: str, *, failure: str, paper: str) -> Metric:
    return _labelled(
        f"{definition}; 0 = all groups alike",
        field="group",
        wanted="lower",
        chance="0, but above it by the noise of finite groups",
        failure=f"{failure}; never negative, so its interval does not reach 0 where the true difference is 0",
        paper=paper,
    )


LABELLED: dict[str, Metric] = {
    "classification_accuracy": _labelled(
        "share of labelled texts whose label's word is likelier after the filled template than the words of the other "
        "labels (label_template, label_words)",
        chance="one over the number of labels, or the share of the commonest",
        failure="depends on the template and on how frequent the words are: a model may know the class and still "
        "prefer one word; the share of the commonest label is reached by always saying it",
    ),
    "demographic_parity_difference": _difference(
        "largest difference between groups in the share of texts classed as `positive`",
        failure="differs from 0 for a perfect classifier where the groups' true shares differ",
        paper=FAIRLEARN,
    ),
    "equal_opportunity_difference": _difference(
        "largest difference between groups in the share of truly positive texts that are classed as `positive`",
        failure="looks away from false alarms",
        paper=f"Hardt et al. 2016, arXiv:1610.02413; {FAIRLEARN}",
    ),
    "equalized_odds_difference": _difference(
        "the larger one of the largest differences between groups in the share classed as `positive`, of truly "
        "positive and of truly negative texts",
        failure="0 for a classifier that always says the same",
        paper=f"Hardt et al. 2016, arXiv:1610.02413; {FAIRLEARN}",
    ),
}

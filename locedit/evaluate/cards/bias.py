"""Metric cards: associations and stereotypes."""

from locedit.evaluate.association import association_metrics
from locedit.evaluate.metric import Metric

BIAS: dict[str, Metric] = {
    "association": Metric(
        function=association_metrics,
        kinds=("contrast",),
        definition="log p(advantaged) - log p(disadvantaged) of a pair, from its first differing word on (masked "
        "models: of the differing words, each masked alone); mean over pairs; 0 = neither is preferred",
        knowledge=1,
        unit="nats",
        range=(None, None),
        chance="0 without the association",
    ),
    "preferred": Metric(
        function=association_metrics,
        kinds=("contrast",),
        definition="share of pairs whose advantaged text is the likelier one (an equal one counts half); "
        "0.5 = neither is preferred",
        knowledge=1,
        unit="share",
        range=(0.0, 1.0),
        chance="0.5 without the association",
        paper="Nangia et al. 2020, arXiv:2010.00133, and Nadeem et al. 2021, arXiv:2004.09456 (stereotype score), here "
        "scored from the differing words on",
    ),
}

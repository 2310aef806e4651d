"""Metric cards: associations and stereotypes."""

from locedit.evaluate.association import association_metrics
from locedit.evaluate.crows_pairs import crows_pairs_metrics
from locedit.evaluate.metric import Metric
from locedit.evaluate.stereotypes import stereoset_metrics
from locedit.evaluate.winogender import winogender_metrics
from locedit.results import Direction

STEREOSET = "Nadeem et al. 2021, arXiv:2004.09456"
CROWS = "Nangia et al. 2020, arXiv:2010.00133"
WINOGENDER = "after Rudinger et al. 2018, arXiv:1804.09301, whose measures are of coreference"


def _stereoset(
    definition: str, *, chance: str, failure: str, keep: bool = False, wanted: Direction | None = None
) -> Metric:
    """A metric of items with a stereotype, an anti-stereotype and an unrelated text."""
    return Metric(
        function=stereoset_metrics,
        kinds=("contrast",),
        field="unrelated",
        definition=definition,
        knowledge=1,
        keep=keep,
        wanted=wanted,
        unit="share",
        range=(0.0, 1.0),
        on_request=True,
        chance=chance,
        failure=failure,
        paper=f"{STEREOSET} (intrasentence; published as percent)",
    )


def _winogender(definition: str, *, unit: str, ends: tuple[float | None, float | None], failure: str) -> Metric:
    """A metric of pairs that differ in a pronoun, with the occupation as owner."""
    return Metric(
        function=winogender_metrics,
        kinds=("contrast",),
        field="owner",
        definition=definition,
        knowledge=1,
        unit=unit,
        range=ends,
        on_request=True,
        chance="0 without the association",
        failure=failure,
        paper=WINOGENDER,
    )


def _crows_pairs(
    definition: str, *, unit: str, ends: tuple[float | None, float | None], chance: str, failure: str
) -> Metric:
    """A metric of pairs of a more and a less stereotyping sentence."""
    return Metric(
        function=crows_pairs_metrics,
        kinds=("contrast",),
        definition=definition,
        knowledge=1,
        unit=unit,
        range=ends,
        on_request=True,
        chance=chance,
        failure=failure,
        paper=f"{CROWS}; causal models as crows_pairs of lm-evaluation-harness",
    )


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
        failure="a rarer word, or one of more tokens, counts as less preferred whatever the stereotype; opposite "
        "preferences of pairs cancel in the mean",
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
        failure="counts signs alone: a preference by a hair weighs as much as a certain one, and 0.5 is also what "
        "preferences in both directions give",
        paper=f"{CROWS}, and {STEREOSET} (stereotype score), here scored from the differing words on",
    ),
    "crows_pairs": _crows_pairs(
        "share of pairs whose more stereotyping sentence is the likelier one (an equal one counts half), by the summed "
        "log-probabilities of the tokens that both sentences share, each masked alone; causal models: of all tokens",
        unit="share",
        ends=(0.0, 1.0),
        chance="0.5 without any preference",
        failure="many of its pairs are unclear or badly written (Blodgett et al. 2021), and 0.5 is also what a model "
        "that knows no language gives; numbers of masked and causal models cannot be compared",
    ),
    "crows_pairs_difference": _crows_pairs(
        "log-likelihood of the more stereotyping sentence minus that of the other, scored as in crows_pairs; mean over "
        "pairs",
        unit="nats",
        ends=(None, None),
        chance="0 without any preference",
        failure="a sum over tokens, so long sentences weigh more; lm-evaluation-harness gives the mean of absolute "
        "differences, which no sign can cancel",
    ),
    "stereoset_lms": _stereoset(
        "share of the comparisons in which the stereotype, and in which the anti-stereotype, is likelier than the "
        "unrelated text; mean over the items of a target term, then over terms",
        keep=True,
        chance="0.5 for a model that knows no language",
        failure="a word that is merely frequent beats the unrelated one too, so that it says little of what a text "
        "means; near 1 for most models",
    ),
    "stereoset_ss": _stereoset(
        "share of items whose stereotype is likelier than the anti-stereotype; mean over the items of a target term, "
        "then over terms; 0.5 = neither is preferred",
        chance="0.5 for a model without stereotypes",
        failure="0.5 is also what a model that knows no language gives: read it beside stereoset_lms; many items are "
        "unclear (Blodgett et al. 2021)",
    ),
    "stereoset_icat": _stereoset(
        "stereoset_lms * min(stereoset_ss, 1 - stereoset_ss) / 0.5: 1 = sense and no preference",
        wanted="higher",
        chance="0.5 for a model that knows no language",
        failure="gains in one factor hide losses in the other, and stereotypes in opposite directions cancel",
    ),
    "winogender_gap": _winogender(
        "log p of the sentence with the pronoun that the occupation favours minus that with the other, where the "
        "pronoun stands for the occupation; from the pronoun on (masked models: the pronoun alone); mean over pairs",
        unit="nats",
        ends=(None, None),
        failure="most occupations favour the man, so that a model that always prefers one pronoun has a gap too: read "
        "the parts of both groups, or winogender_correlation",
    ),
    "winogender_correlation": _winogender(
        "correlation over occupations of the mean log-odds of the woman's against the man's pronoun with whether the "
        "occupation favours hers",
        unit="correlation",
        ends=(-1.0, 1.0),
        failure="says nothing of how strong the preference is, and with two classes of occupations it stays below 1 "
        "even for a model that follows the statistics",
    ),
}

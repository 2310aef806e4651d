"""What an edit left in place when it is asked directly, and what an attack adds to it, worked by hand."""

import dataclasses

import pytest

from locedit.report.inputs import RunResults
from locedit.report.ladder import outcome, rows, sentence
from locedit.report.ladder_figure import caption, rungs
from locedit.report.left import gained, left
from locedit.report.words import verdict
from locedit.results import AttackResult, Evaluation, Measure, Stage
from tests.test_ladder import attack

OWNERS = [f"person {at // 2}" for at in range(40)]
"two items each"


def level(right: int, dataset: str, stage: Stage) -> Measure:
    """The accuracy of 40 items, of which the first so many are right."""
    values = {f"{dataset} {at}": float(at < right) for at in range(40)}
    return Measure(
        name="accuracy", dataset=dataset, value=right / 40, low=right / 40 - 0.02, high=right / 40 + 0.02, n=40,
        stage=stage, range=(0.0, 1.0), direction="lower", per_example=values,
    )  # fmt: skip


def under(name: str, share: float, right: int, *, after: int = 16) -> AttackResult:
    """An attack under which so many of 40 items are right, of which the edit left `after`."""
    measures = (level(40, "forget", "before"), level(after, "forget", "after"), level(right, "forget", "attacked"))
    return attack(name, share, 0.1, measures=measures, settings={})


def evaluated(*attacks: AttackResult, after: int = 16) -> Evaluation:
    measures = (
        level(40, "forget", "before"), level(after, "forget", "after"), level(8, "heldout", "after"),
        level(8, "heldout", "before"),
    )  # fmt: skip
    owners = {m.dataset: m.per_example for m in measures}
    examples = {
        item: {"dataset": dataset, "owner": OWNERS[at]}
        for dataset, ids in owners.items()
        for at, item in enumerate(ids)
    }
    return Evaluation(measures=measures, attacks=attacks, examples=examples)


def test_what_is_left_counts_from_items_never_known() -> None:
    """By hand: (16/40 - 8/40) / (40/40 - 8/40) = 0.25."""
    found = left(evaluated(under("few_shot", 0.25, 16)))
    assert found is not None
    assert found.value == pytest.approx(0.25)
    assert found.low < 0.25 < found.high
    assert found.high - found.low > 0.3, "20 people, not 40 items, are drawn again"
    assert left(evaluated()) is None, "no attack says which metric it is to be compared with"
    alone = evaluated(under("few_shot", 0.25, 16))
    without = dataclasses.replace(alone, measures=tuple(m for m in alone.measures if m.dataset == "forget"))
    assert left(without) is None, "no held-out items"


def test_what_an_attack_adds_is_of_the_same_items() -> None:
    more = gained(under("few_shot", 0.6, 30), evaluated())
    assert more is not None
    assert more.value == pytest.approx(14 / 40)
    assert 0 < more.low < 14 / 40 < more.high
    assert gained(attack("few_shot", 0.6), evaluated()) is None, "a result without its items"
    other = dataclasses.replace(under("few_shot", 0.6, 30), measures=under("few_shot", 0.6, 30).measures[1:2])
    assert gained(other, evaluated()) is None


def test_an_attack_that_shows_what_the_edit_left_brings_nothing_back() -> None:
    """Quantization of an edit that left a quarter once counted as bringing a quarter back."""
    same, more = under("quantization", 0.25, 16), under("few_shot", 0.7, 32)
    assert outcome(same, evaluated(same)) == "left"
    assert outcome(more, evaluated(more)) == "back"
    assert outcome(more, evaluated(more, same)) == "back"
    assert outcome(under("few_shot", 0.2, 14), evaluated(same)) == "left", "less than was left"


def test_a_little_more_than_was_left_may_be_chance() -> None:
    """One person of 20 more: the interval of the difference holds 0."""
    little = under("few_shot", 0.3, 18)
    assert outcome(little, evaluated(little)) == "left"


def test_what_one_attack_adds_may_be_chance_among_many() -> None:
    """Four people of 20 more: the interval of the difference leaves 0 out alone, but not beside seven other attacks."""
    more = under("few_shot", 0.5, 24)
    others = [attack(name, 0.02, 0.1) for name in ("suffix", "soft_prompt", "latent", "probe", "logit_lens", "relearn")]
    assert outcome(more, evaluated(more)) == "back"
    assert outcome(more, evaluated(more, *others, under("quantization", 0.25, 16))) == "chance"


def test_what_is_left_stands_first_in_words_table_and_figure() -> None:
    made = evaluated(under("quantization", 0.25, 16), under("few_shot", 0.7, 32), under("relearn", 0.9, 38))
    (access, name, share, says), *rest = rows(made)
    assert (access, name, says) == ("none", "asked directly", "left by the edit")
    assert share.startswith("0.25 [")
    assert [row[1] for row in rest] == ["few shot", "quantization", "relearn"]
    assert rest[1][3] == "no more than the edit left in place"
    assert "asked directly 0.25 [" in sentence(made.ladder(), left(made))
    assert "asked directly 0.25 [" in str(verdict(RunResults(evaluation=made)))
    assert "Dashed: what is there when it is asked directly, 0.25 [" in caption(made)
    lines = [shape.x0 for shape in rungs([("", made)]).layout.shapes]
    assert lines == [0, 1, pytest.approx(0.25)]
    assert len(rungs([("a", made), ("b", made)]).layout.shapes) == 2


def test_attacks_that_add_nothing_count_among_those_that_show_something() -> None:
    """An edit that went all the way, but for one item in the metric of the attack."""
    made = evaluated(under("quantization", 0.25, 9, after=9), after=9)
    assert verdict(RunResults(evaluation=made)).label == "Not brought back by the attacks tried"

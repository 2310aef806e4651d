"""The ladder by access, from attack results made by hand: who stands for a level, what is said, what is drawn."""

import dataclasses
import math
from typing import Any, get_args

import pytest

from locedit.attacks.attack import ACCESS
from locedit.report import judge, words
from locedit.report.inputs import RunResults
from locedit.report.judge import Recovery
from locedit.report.ladder import MOST_TELLING, SAID, ladder, outcome, rows, sentence
from locedit.report.ladder_figure import caption, has_figure, ladder_table, rungs
from locedit.results import AttackResult, Curve, Evaluation, Measure, Role, Stage


def level(value: float, stage: Stage, *, dataset: str = "forget") -> Measure:
    return Measure(
        name="accuracy", dataset=dataset, value=value, low=value - 0.02, high=value + 0.02, n=20, stage=stage,
        range=(0.0, 1.0), direction="lower" if dataset == "forget" else "higher",
    )  # fmt: skip


def share(value: float, width: float = 0.05, *, group: str | None = None) -> Measure:
    return Measure(
        name="share_back", dataset="forget", value=value, low=value - width, high=value + width, n=20, group=group,
        stage="attacked",
    )  # fmt: skip


def curve(role: Role, *, retain: float = 0.9) -> Curve:
    columns = {"recovered": (0.1, 0.2), "retain": (0.9, retain)}
    return Curve(name=role, role=role, x_name="steps", x=(0.0, 10.0), columns=columns)


def attack(
    name: str, value: float, width: float = 0.05, *, shallow: float | None = 0.9, retain: float = 0.9, **more: Any
) -> AttackResult:
    """With a never-knew control, and with the share back of an edit made to come back unless that is None."""
    control = () if shallow is None else (share(shallow, group="shallow: suppression in the last MLP"),)
    random = (share(0.1, group="random 1"), share(0.2, group="random 2"))
    given: dict[str, Any] = {
        "sentence": f"{name} was run.",
        "headline": share(value, width),
        "curves": (curve("found", retain=retain), curve("never knew")),
        "measures": (level(0.9, "before"), level(0.05, "after"), *control, *random),
    }
    return AttackResult(name=name, **(given | more))


def evaluated(*attacks: AttackResult, after: float = 0.05) -> Evaluation:
    return Evaluation(measures=(level(0.9, "before"), level(after, "after")), attacks=attacks)


BACK, PARTLY, GONE, WIDE = (0.8, 0.1), (0.3, 0.1), (0.02, 0.1), (0.3, 0.35)
"value and half the width of a share that comes back, comes back in part, stays gone, decides nothing"


# --- levels ----------------------------------------------------------------------------------------------------------


def test_every_level_stands_there_with_its_attacks_and_diagnostics_are_none() -> None:
    made = evaluated(
        attack("relearn", *BACK), attack("interpolation", 1.0), attack("unheard_of", 1.0), attack("few_shot", *GONE)
    )
    found = ladder(made)
    assert [rung.access for rung in found] == list(ACCESS)
    assert {rung.access: [result.name for result, _ in rung.tried] for rung in found if rung.tried} == {
        "prompting": ["few_shot"],
        "fine-tuning": ["relearn"],
    }
    assert [rung.access for rung in found if rung.brings_back] == ["fine-tuning"]
    assert found[1].best is None
    assert made.ladder() == found
    assert [(access, name) for access, name, _, _ in rows(made)] == [
        ("prompting", "few shot"),
        ("fine-tuning", "relearn"),
        ("beside", "interpolation"),
        ("beside", "unheard of"),
    ]


def test_the_most_telling_attack_stands_for_its_level() -> None:
    made = [
        attack("suffix", 0.4, 0.05, retain=0.3),
        attack("jailbreak", *WIDE),
        attack("few_shot", *PARTLY),
    ]
    assert [result.name for result, _ in ladder(evaluated(*made))[0].tried] == ["few_shot", "jailbreak", "suffix"]
    shown = [shown for _, shown in ladder(evaluated(*made))[0].tried]
    assert shown == ["partly back", "too wide", "broken"]
    strongest = ladder(evaluated(attack("few_shot", 0.6), attack("jailbreak", 0.9), attack("suffix", 0.7)))[0]
    assert [result.name for result, _ in strongest.tried] == ["jailbreak", "suffix", "few_shot"]


def test_what_cannot_be_told_is_not_passed_over_for_what_stays_gone() -> None:
    undecided = evaluated(attack("few_shot", *GONE), attack("jailbreak", *WIDE))
    (first, shown), _ = ladder(undecided)[0].tried
    assert (first.name, shown) == ("jailbreak", "too wide")


def test_there_are_words_and_a_place_for_everything_that_an_attack_can_show() -> None:
    known = set(get_args(Recovery))
    assert set(MOST_TELLING) == set(SAID) == set(words.MEANINGS) == known
    assert len(MOST_TELLING) == len(known)


# --- what an attack shows --------------------------------------------------------------------------------------------


def test_what_the_edit_did_not_take_away_cannot_come_back() -> None:
    result = attack("relearn", *BACK)
    assert outcome(result, evaluated(result)) == "back"
    assert outcome(result, evaluated(result, after=0.89)) == "never gone"
    assert outcome(attack("relearn", *GONE), evaluated(after=0.89)) == "like never knew"
    assert not ladder(evaluated(result, after=0.89))[-1].brings_back


def test_what_one_of_several_attacks_may_show_by_chance_is_no_finding() -> None:
    """By hand: 0.11 +- 0.1 of three attacks is +- 0.1 * 2.394 / 1.96 = 0.122, and holds 0; of two +- 0.114, too."""
    small, others = attack("probe", 0.11, 0.1), [attack("latent", *GONE), attack("few_shot", *GONE)]
    assert outcome(small, evaluated(small)) == "partly back"
    assert outcome(small, evaluated(small, *others)) == "chance"
    assert outcome(small, evaluated(small, others[0])) == "chance"
    clear = attack("probe", 0.115, 0.1)
    assert outcome(clear, evaluated(clear, others[0])) == "partly back"
    assert outcome(clear, evaluated(clear, *others)) == "chance"
    assert not any(rung.brings_back for rung in ladder(evaluated(small, *others)))
    assert outcome(attack("relearn", *BACK), evaluated(attack("relearn", *BACK), *others)) == "back"


def test_attacks_that_could_not_bring_anything_back_are_no_chances() -> None:
    small = attack("probe", 0.11, 0.1)
    beside = [
        attack("latent", *GONE, retain=0.3), attack("few_shot", *GONE, shallow=0.1), attack("interpolation", 1.0),
    ]  # fmt: skip
    assert outcome(small, evaluated(small, *beside)) == "partly back"


@pytest.mark.parametrize(
    ("shallow", "shown"),
    [(0.9, "like never knew"), (0.5, "like never knew"), (0.49, "no power"), (math.nan, "no power")],
)
def test_a_control_that_does_not_come_back_or_has_no_number_shows_no_power(shallow: float, shown: Recovery) -> None:
    """A share of NaN was once taken for a control that comes back."""
    assert judge.recovery(attack("few_shot", *GONE, shallow=shallow), None) == shown
    assert judge.recovery(attack("few_shot", *BACK, shallow=shallow), None) == "back"


def test_a_share_without_an_interval_decides_nothing() -> None:
    for value in (0.9, 0.02):
        headline = dataclasses.replace(share(value), low=math.nan, high=math.nan)
        assert judge.recovery(attack("few_shot", value, headline=headline), None) == "too wide"


@pytest.mark.parametrize(("retain", "shown"), [(0.48, "back"), (0.45, "back"), (0.43, "broken")])
def test_an_attack_is_broken_by_the_share_of_the_retain_side_that_it_keeps(retain: float, shown: Recovery) -> None:
    """Of a retain side of 0.5, below 0.44."""
    columns = {"recovered": (0.1, 0.9), "retain": (0.5, retain)}
    found = dataclasses.replace(curve("found"), columns=columns)
    assert judge.recovery(attack("relearn", *BACK, curves=(found, curve("never knew"))), None) == shown


def test_only_the_run_at_the_dose_that_counts_tells_whether_the_attack_broke_the_model() -> None:
    """Of two learning rates the one that was not taken may have broken it."""
    taken = dataclasses.replace(curve("found", retain=0.89), matched=1)
    other = curve("found", retain=0.1)
    made = attack("relearn", *BACK, curves=(taken, other, curve("never knew")))
    assert judge.recovery(made, None) == "back"
    early = dataclasses.replace(other, columns={"recovered": (0.1, 0.9), "retain": (0.9, 0.1)}, matched=0)
    assert judge.recovery(attack("relearn", *BACK, curves=(early, curve("never knew"))), None) == "back"
    unmatched = attack("relearn", *BACK, curves=(other, curve("never knew")))
    assert judge.recovery(unmatched, None) == "broken"


def test_the_metric_of_an_attack_itself_is_compared_with_its_own_levels() -> None:
    """An attack whose headline is an accuracy has the way to go from its own control to its own level before."""
    headline = dataclasses.replace(level(0.6, "attacked"), low=0.55, high=0.65)
    never = dataclasses.replace(level(0.2, "attacked", dataset="heldout"), group="never knew")
    made = attack("relearn", 0.0, headline=headline, measures=(level(0.9, "before"), level(0.05, "after"), never))
    assert outcome(made, evaluated(made)) == "back", "0.4 of 0.7"
    far = attack("relearn", 0.0, headline=headline, measures=(level(1.0, "before"), level(0.05, "after"), never))
    for value, shown in ((0.61, "back"), (0.59, "partly back")):
        half = dataclasses.replace(far, headline=dataclasses.replace(headline, value=value))
        assert outcome(half, evaluated(half)) == shown, "half of 0.8 above 0.2"


# --- in words --------------------------------------------------------------------------------------------------------


def test_the_least_access_that_brings_it_back_is_said_with_what_is_below_it() -> None:
    made = [attack("relearn", 0.9), attack("latent", *BACK), attack("few_shot", *GONE), attack("relearn_few", 0.7)]
    said = sentence(ladder(evaluated(*made)))
    assert said.startswith("The least access that brings it back: activations (latent, 0.80 [0.70, 0.90]); prompting: ")
    assert "prompting: like a model that never knew (few shot 0.02 [-0.08, 0.12])" in said
    assert "relearn" not in said, "what more access does is told by the table"
    assert said.endswith("; not tried: weights.")
    part = sentence(ladder(evaluated(attack("few_shot", *PARTLY), attack("relearn", *BACK))))
    assert part.startswith("The least access that brings a part of it back: prompting (few shot, 0.30 [0.20, 0.40])")


def test_where_nothing_brings_it_back_every_level_is_told() -> None:
    said = sentence(ladder(evaluated(attack("few_shot", *GONE), attack("quantization", *GONE, shallow=0.1))))
    assert said.startswith("No level of access that was tried brings it back; prompting: like a model that never knew")
    assert "; weights: shows nothing: the control made to come back does not (quantization 0.02 [-0.08, 0.12])" in said
    assert said.endswith("not tried: activations, few steps, fine-tuning.")
    assert sentence(ladder(evaluated())) == ""
    assert sentence(ladder(evaluated(attack("interpolation", 1.0)))) == "", "a diagnostic is no level"


def test_every_attack_of_a_level_is_told_with_what_it_shows() -> None:
    """One verdict once stood on all attacks of a level, with the largest number of any."""
    made = evaluated(
        attack("jailbreak", 0.3, 0.35), attack("few_shot", 0.45, 0.1, retain=0.2), attack("suffix", 0.2, 0.35)
    )
    assert (
        "prompting: undecided: the interval is too wide (jailbreak, suffix at most 0.30 [-0.05, 0.65]), "
        "shows nothing: the attack broke the model (few shot 0.45 [0.35, 0.55]);" in sentence(ladder(made))
    )
    without = evaluated(attack("few_shot", math.nan), attack("jailbreak", *GONE))
    assert "like a model that never knew (jailbreak 0.02 [-0.08, 0.12]), no number (few shot);" in sentence(
        ladder(without)
    )


def test_a_diagnostic_does_not_decide_the_verdict() -> None:
    run = RunResults(evaluation=evaluated(attack("interpolation", 1.0), attack("few_shot", *GONE)))
    assert words.verdict(run).label == "Not brought back by the attacks tried"
    run = RunResults(evaluation=evaluated(attack("relearn", 1.0), attack("few_shot", *GONE)))
    assert words.verdict(run).label == "Suppressed, not removed"


def test_three_attacks_are_told_by_the_ladder_and_two_by_themselves() -> None:
    two = (attack("few_shot", *GONE), attack("jailbreak", *GONE))
    assert "few_shot was run." in str(words.verdict(RunResults(evaluation=evaluated(*two))))
    said = str(words.verdict(RunResults(evaluation=evaluated(*two, attack("relearn", 0.5, retain=0.1)))))
    assert "few_shot was run." not in said
    assert "No level of access that was tried brings it back" in said
    assert "Under relearn the retain set breaks too" in said


def test_membership_is_undone_at_chance_and_not_at_zero() -> None:
    """The floor of an AUC was once the lower end of its range, so that reaching 0.5 counted as half of the way."""

    def auc(value: float, stage: Stage, name: str) -> Measure:
        return dataclasses.replace(level(value, stage), name=name, direction="neutral")

    for name in ("mia_loss", "min_k_plus_plus", "mia_gradient_norm"):
        made = Evaluation(measures=(auc(0.95, "before", name), auc(0.5, "after", name)))
        assert words.verdict(RunResults(evaluation=made)).label.startswith("Forgotten")
        less = Evaluation(measures=(auc(0.95, "before", name), auc(0.7, "after", name)))
        assert words.verdict(RunResults(evaluation=less)).label == "Partly forgotten"


# --- tables and figure -----------------------------------------------------------------------------------------------


def test_the_table_and_the_caption_hold_every_attack() -> None:
    made = evaluated(attack("relearn", *BACK), attack("interpolation", 1.0), attack("few_shot", *GONE))
    table = ladder_table(made)
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["prompting", "few shot", "0.02 [-0.08, 0.12]", "like a model that never knew"],
        ["fine-tuning", "relearn", "0.80 [0.70, 0.90]", "comes back"],
        ["beside", "interpolation", "1.00 [0.95, 1.05]", "a look, for comparison"],
    ]
    assert caption(made).endswith("prompting: few shot like a model that never knew; fine-tuning: relearn comes back.")


def test_the_figure_has_a_row_for_every_share_the_least_access_at_the_top() -> None:
    made = evaluated(
        attack("relearn", *BACK), attack("interpolation", 1.0), attack("few_shot", *GONE), attack("latent", math.nan)
    )
    drawn: Any = rungs([("", made)])
    names = ["prompting<br>few shot", "fine-tuning<br>relearn", "beside<br>interpolation"]
    assert list(drawn.layout.yaxis.categoryarray) == names[::-1], "plotly counts from below"
    traces = {trace.name: trace for trace in drawn.data}
    assert list(traces["this edit"].y) == names
    assert list(traces["this edit"].x) == pytest.approx([0.02, 0.8, 1.0])
    assert list(traces["this edit"].error_x.array) == pytest.approx([0.1, 0.1, 0.05])
    assert list(traces["this edit"].error_x.arrayminus) == pytest.approx([0.1, 0.1, 0.05])
    assert traces["this edit"].customdata[1] == "comes back"
    assert list(traces["edit made to come back"].x) == [0.9] * 3
    assert list(traces["random sets"].x) == [0.1, 0.2] * 3
    assert {shape.x0 for shape in drawn.layout.shapes} == {0, 1}


def test_an_attack_with_another_headline_is_left_to_the_tables() -> None:
    other = attack("relearn", 0.0, headline=level(0.6, "attacked"))
    drawn: Any = rungs([("", evaluated(other, attack("few_shot", *GONE)))])
    assert list(drawn.data[0].y) == ["prompting<br>few shot"]
    assert not has_figure(evaluated(other, attack("few_shot", *GONE)))
    assert has_figure(evaluated(attack("relearn", *BACK), attack("few_shot", *GONE)))
    assert not has_figure(None)


def test_an_end_without_a_number_is_drawn_without_a_bar() -> None:
    bare = attack("few_shot", 0.5, headline=dataclasses.replace(share(0.5), low=math.nan, high=math.nan))
    drawn: Any = rungs([("", evaluated(bare, attack("relearn", *BACK)))])
    points = drawn.data[0]
    assert list(points.error_x.array) == pytest.approx([0.0, 0.1])


def test_rows_of_several_runs_stand_by_access_whoever_has_them() -> None:
    """Rows that only the second run has were once put below all of the first."""
    one = evaluated(attack("relearn", *BACK), attack("interpolation", 1.0))
    two = evaluated(attack("few_shot", *GONE), attack("latent", *BACK), attack("relearn", *GONE))
    drawn: Any = rungs([("a", one), ("b", two)])
    assert list(drawn.layout.yaxis.categoryarray)[::-1] == [
        "prompting<br>few shot",
        "activations<br>latent",
        "fine-tuning<br>relearn",
        "beside<br>interpolation",
    ]
    assert [trace.name for trace in drawn.data] == ["a", "b"], "one run each, without its controls"
    assert [trace.marker.symbol for trace in drawn.data][0] != [trace.marker.symbol for trace in drawn.data][1]
    assert list(drawn.data[1].x) == pytest.approx([0.02, 0.8, 0.02])


# --- controls that were not run --------------------------------------------------------------------------------------


def test_without_an_edit_made_to_come_back_a_failure_shows_nothing() -> None:
    asked = {"settings": {"shallow": False}}
    gone, back = (attack("latent", *numbers, shallow=None, **asked) for numbers in (GONE, BACK))
    assert judge.recovery(gone, 0.9) == "unproven"
    assert judge.recovery(back, 0.9) == "back", "what comes back needs no control"
    assert judge.recovery(attack("latent", *GONE, settings={"shallow": True}), 0.9) == "like never knew"
    needless = attack("drop_layer", *GONE, shallow=None, settings={})
    assert judge.recovery(needless, 0.9) == "like never knew", "leaving something out searches for nothing"


def test_the_label_counts_the_attacks_that_show_something() -> None:
    told, silent = attack("relearn", *GONE), attack("latent", *GONE, shallow=None, settings={"shallow": False})
    labels = [words.verdict(RunResults(evaluation=evaluated(*both))).label for both in ((told, told), (told, silent))]
    assert labels[0] == "Not brought back by the attacks tried"
    assert labels[1] == "Not brought back by the attacks that show anything (1 of 2)"


def test_where_a_role_stands_is_the_number_of_the_table() -> None:
    """Two halves of unequal size: the mean over items is not the mean of the halves."""
    ends = [{"recovered": (0.0, end)} for end in (0.2, 0.8)]
    halves = [dataclasses.replace(curve("never knew"), columns=columns) for columns in ends]
    never = dataclasses.replace(level(0.35, "attacked", dataset="heldout"), group="never knew")
    made = attack("relearn", *GONE, curves=(curve("found"), *halves), measures=(never,))
    stands = judge.at_end(made, "never knew")
    assert stands is not None
    assert (stands.value, stands.low, stands.high) == (0.35, 0.2, 0.8)

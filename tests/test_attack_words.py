"""The words of an attack say what the report says of its number: back only by the interval, and nothing of a break."""

import itertools

import pytest
import torch

from locedit.attacks.aim import ItemOptions, aimed
from locedit.attacks.jailbreak import jailbreak
from locedit.attacks.options import RelearnOptions
from locedit.attacks.shared import Shared
from locedit.attacks.verdicts import BROKEN, broken, shown, verdict
from locedit.data.items import Fact, Task
from locedit.edit import Edit
from locedit.edit.regions import Patch, Region
from locedit.errors import LoceditError
from locedit.evaluate.intervals import Estimate
from locedit.lab import Lab
from locedit.report import judge
from locedit.results import AttackResult, Curve, Measure
from tests import tiny
from tests.struck import forgotten
from tests.unlearning import dataset

NAN = float("nan")
JUDGED = {
    "back": "back",
    "in part": "partly back",
    "undecided": "too wide",
    "hardly": "like never knew",
    "no share": "unmeasured",
}


def result(share: Estimate, *, retain: tuple[float, float] = (1.0, 1.0)) -> AttackResult:
    curves = [
        Curve(name=role, role=role, x_name="steps", x=(0, 1), columns={"recovered": (0.0, 0.1), "retain": retain})
        for role in ("found", "never knew")
    ]
    headline = Measure(
        name="share_back", dataset="forget", value=share.value, low=share.low, high=share.high, n=9, stage="attacked"
    )
    return AttackResult(name="relearn", sentence="", headline=headline, curves=tuple(curves))


def test_the_words_are_those_of_the_report() -> None:
    """A probe once came back (100%) in its sentence and was undecided in the table, where it had no interval."""
    grid = [Estimate(value, value - w, value + w) for value, w in itertools.product((0.0, 0.2, 0.6, 1.0), (0.1, 0.7))]
    grid += [Estimate(1.0, NAN, NAN), Estimate(NAN, NAN, NAN)]
    assert {shown(share) for share in grid} == set(JUDGED)
    for share in grid:
        assert judge.recovery(result(share), None) == JUDGED[shown(share)], share


def test_a_number_without_an_interval_decides_nothing() -> None:
    assert verdict(Estimate(1.0, NAN, NAN)) == "it is undecided whether it comes back (100%, no interval)"
    assert verdict(Estimate(0.3, -0.2, 0.7)) == "it is undecided whether it comes back (30%, interval -20% to 70%)"
    assert verdict(Estimate(0.2, 0.01, 0.44)) == "it comes back in part (20%)"
    assert verdict(Estimate(0.2, -0.01, 0.44)) == "hardly anything is back (20%)"
    assert verdict(Estimate(-0.2, -0.4, 0.1)) == "hardly anything is back (0%)"
    assert verdict(Estimate(0.6, 0.3, 0.9)) == "it comes back (60%)"
    assert verdict(Estimate(NAN, NAN, NAN)).startswith("no share can be given (")


@pytest.mark.parametrize("left", [BROKEN - 0.01, BROKEN + 0.01, 1.2])
def test_an_attack_breaks_the_model_where_the_report_says_so(left: float) -> None:
    kept = torch.ones(4)
    judged = judge.recovery(result(Estimate(0.0, -0.1, 0.1), retain=(1.0, left)), None) == "broken"
    assert broken(kept, left * kept) == judged == (left < BROKEN)
    assert not broken(kept[:0], kept[:0]), "without retain items nothing shows it"


def people(owners: int, *, first: int = 0) -> list[Fact]:
    return [
        Fact(prompt=f"The {form} is", answer=" Oslo", id=f"{name}{form}", owner=f"n{name}")
        for name in range(first, first + owners)
        for form in ("baker", "cook")
    ]


def aim_at(forget: int, heldout: int, *, learns: bool = False) -> tuple[int, int]:
    """How many halvings of the forget and of the held-out items there are."""
    task = Task(forget=dataset("forget", people(forget)), heldout=dataset("heldout", people(heldout, first=50)))
    aim = aimed(tiny.model("gpt2"), task, ItemOptions(), by="attack", learns=learns, shared=Shared(), narrow=None)
    return len(aim.forget_halves), len(aim.heldout_halves)


def test_one_forget_owner_is_read_as_a_whole_beside_held_out_items_as_a_whole() -> None:
    """It was once refused, with the words that the held-out items had but one owner, which they had not."""
    assert aim_at(1, 4) == (1, 1)
    assert aim_at(2, 4) == (2, 2)
    with pytest.raises(LoceditError, match="attack: heldout: one owner alone"):
        aim_at(2, 1)
    with pytest.raises(LoceditError, match="attack: forget: 1 owner cannot be split"):
        aim_at(1, 4, learns=True)


@pytest.mark.parametrize("options", [ItemOptions, RelearnOptions])
@pytest.mark.parametrize("floor", [-0.1, 2.0, NAN])
def test_a_floor_is_a_share(options: type[ItemOptions | RelearnOptions], floor: float) -> None:
    assert options(retain_floor=0.0).retain_floor == 0.0
    with pytest.raises(LoceditError, match="retain_floor=.* must be a share from 0 to 1"):
        options(retain_floor=floor)


def test_what_was_left_does_not_come_back() -> None:
    """As in the ladder, which says that no more is there than the edit left."""
    share, nothing, more = Estimate(0.3, 0.1, 0.5), Estimate(0.0, 0.0, 0.0), Estimate(0.1, 0.02, 0.2)
    assert verdict(share, nothing) == "no more is there than the edit left (30%)"
    assert verdict(share, more) == verdict(share) == "it comes back in part (30%)"
    assert verdict(Estimate(0.05, -0.1, 0.2), nothing) == "hardly anything is back (5%)"


def test_what_the_edit_left_is_said_before_what_the_attack_brings_back(tiny_lab: Lab) -> None:
    """An edit that left everything once had it come back in part, by an attack that breaks the model."""
    model = tiny_lab.model
    name = next(iter(model.anatomy.parameters))
    patch = Patch(region=Region(param=name), values=model.parameter(name).detach().clone())
    nothing = Edit(kind="weights", fingerprint=model.fingerprint, patches=(patch,))
    found = jailbreak(model, tiny_lab.task, nothing, shallow=False, draws=20)
    assert found.sentence.startswith("The edit itself left 1")
    assert "in place. Inside a sentence" in found.sentence
    assert "no more is there than that" in found.sentence
    gone = jailbreak(model, tiny_lab.task, forgotten(tiny_lab), shallow=False, draws=20)
    assert gone.sentence.startswith("Inside a sentence")

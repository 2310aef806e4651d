"""Which dose counts, worked by hand: by the share on the mirror half, above items never known, with retain kept.

And what every such attack has from the frame: no item chooses its own dose, and what cannot run is refused at once.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from locedit.attacks import check_attacks
from locedit.attacks.aim import NOTHING, Aim, ItemOptions, Side, Target, aimed
from locedit.attacks.arms import Arm, Dose, Struck, Values, choose
from locedit.attacks.item_attack import ItemAttack, strike
from locedit.attacks.measures import values_of
from locedit.attacks.outcome import Outcome
from locedit.attacks.recovery import share_back
from locedit.attacks.shared import Shared
from locedit.attacks.splits import Halves
from locedit.data.items import Fact, Item, PlainText, PrivateText, Task, TokenText
from locedit.edit import Edit
from locedit.edit.regions import Patch, Region
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.lab import Lab
from locedit.models import Model
from locedit.results import Role
from tests import tiny
from tests.unlearning import dataset

HALVES = (Halves(relearned=(0, 1), measured=(2, 3)), Halves(relearned=(2, 3), measured=(0, 1)))


def arm(*splits: list[float], retain: list[float] | None = None, data: str = "forget") -> Arm:
    """Two items a half with the same value at every dose."""
    rows = [{data: torch.tensor(split, dtype=torch.float64)[:, None].expand(-1, 2)} for split in splits]
    for row in rows if retain is not None else []:
        row["retain"] = torch.tensor(retain, dtype=torch.float64)[:, None].expand(-1, 3)
    return Arm(role="found", name="found", splits=tuple(rows), halves=HALVES, side=NOTHING, data=data)


KEPT = torch.ones(3).double()


def test_the_dose_is_that_which_was_best_on_the_mirror() -> None:
    found = arm([0.1, 0.9, 0.2], [0.8, 0.1, 0.3])
    assert choose(found, None, KEPT, known=1.0, floor=0.9) == ({0: 0, 1: 1}, True)


@pytest.mark.parametrize(
    ("never", "best"),
    [
        ([0.1, 0.1, 0.1], 2),  # shares 0.33, 0.56, 0.89
        ([0.1, 0.5, 0.9], 0),  # 0.33, 0.2, 0
        ([0.4, 0.3, 0.7], 2),  # 0, 0.43, 0.67: above the margins 0, 0.3 and 0.2, which would choose the second
    ],
)
def test_it_is_chosen_by_the_share_and_not_by_the_margin(never: list[float], best: int) -> None:
    found, control = arm([0.4, 0.6, 0.9], [0.4, 0.6, 0.9]), arm(never, never, data="heldout")
    chosen, _ = choose(found, control, KEPT, known=1.0, floor=0.9)
    assert chosen == {0: best, 1: best}


def test_where_hardly_anything_can_be_said_of_anything_little_has_come_back() -> None:
    """Shares by hand 0.5 and 0.8, of distances of 0.4 and 0.05: the latter is taken as 0.2, and makes 0.2."""
    found, control = arm([0.3, 0.49], [0.3, 0.49]), arm([0.1, 0.45], [0.1, 0.45], data="heldout")
    assert choose(found, control, KEPT, known=0.5, floor=0.9)[0] == {0: 0, 1: 0}


def test_of_equal_doses_the_mildest_counts() -> None:
    found = arm([0.1, 0.3, 0.3 + 1e-9], [0.1, 0.3, 0.3 + 1e-9])
    assert choose(found, None, KEPT, known=1.0, floor=0.9)[0] == {0: 1, 1: 1}


def test_doses_that_break_the_retain_side_do_not_count() -> None:
    found = arm([0.4, 0.6, 0.9], [0.4, 0.6, 0.9], retain=[0.95, 0.9, 0.5])
    assert choose(found, None, KEPT, known=1.0, floor=0.9) == ({0: 1, 1: 1}, True)
    assert choose(found, None, KEPT, known=1.0, floor=0.0) == ({0: 2, 1: 2}, True)
    broken = arm([0.4, 0.6, 0.9], [0.4, 0.6, 0.9], retain=[0.6, 0.7, 0.5])
    assert choose(broken, None, KEPT, known=1.0, floor=0.9) == ({0: 1, 1: 1}, False)
    assert choose(broken, None, KEPT, known=1.0, floor=0.9, fixed=2)[0] == {0: 2, 1: 2}


# --- what arms say nothing --------------------------------------------------------------------------------------------


def test_a_dose_at_which_an_arm_says_nothing_is_never_chosen() -> None:
    """NaN once counted as the largest, and items never known were then read at another dose than the control."""
    nan = float("nan")
    control = dataclasses.replace(arm([nan, 0.3, 0.6], [nan, 0.3, 0.6]), role="shallow", judged=(1, 2))
    assert choose(control, None, KEPT, known=1.0, floor=0.9) == ({0: 2, 1: 2}, True)
    broken = dataclasses.replace(
        arm([nan, 0.3, 0.6], [nan, 0.3, 0.6], retain=[nan, 0.2, 0.1]), role="shallow", judged=(1, 2)
    )
    assert choose(broken, None, KEPT, known=1.0, floor=0.9) == ({0: 1, 1: 1}, False)
    assert choose(control, None, KEPT, known=1.0, floor=0.9, fixed=0)[0] == {0: 2, 1: 2}
    assert choose(control, None, KEPT, known=1.0, floor=0.9, fixed=1)[0] == {0: 1, 1: 1}


# --- a planted attack -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlantedOptions(ItemOptions):
    """Nothing of its own."""


class Planted(ItemAttack[PlantedOptions]):
    """Gives values that were written down beforehand: of the model before the edit, of the edit, of others."""

    name: ClassVar[str] = "planted"
    lead: ClassVar[str] = "By a planted attack"
    x_name: ClassVar[str] = "dose"

    def __init__(self, values: Callable[[str, Item, int], float], *, best: int | None = None) -> None:
        super().__init__(PlantedOptions(draws=20))
        self.values, self.best = values, best
        self.keys: list[str] = []

    def doses(self, aim: Aim) -> tuple[Dose, ...]:  # noqa: ARG002
        return tuple(Dose(x=x) for x in range(3))

    def fixed(self) -> int | None:
        return self.best

    def attack(self, target: Target, learned: Side, measured: Mapping[str, Side], aim: Aim) -> Values:  # noqa: ARG002
        self.keys.append(target.key)
        return {
            name: torch.tensor([[self.values(target.key, item, x) for item in side.items] for x in range(3)]).double()
            for name, side in measured.items()
        }


def struck(attack: Planted, others: dict[str, Edit]) -> tuple[Struck, Aim]:
    model = tiny.model("gpt2")
    forget: list[Item] = [Fact(prompt=f"p{at}", answer=" a", id=f"f{at}", owner=f"o{at}") for at in range(8)]
    task = Task(forget=dataset("forget", forget))
    aim = aimed(model, task, attack.options, by="planted", learns=False, shared=Shared(), narrow=None)
    return strike(attack, aim, changed(model, 2.0), others), aim


def changed(model: Model, factor: float) -> Edit:
    name = "transformer.h.1.mlp.c_fc.weight"
    patch = Patch(region=Region(param=name), values=model.parameter(name).detach() * factor)
    return Edit(kind="weights", fingerprint=model.fingerprint, patches=(patch,))


def test_no_item_takes_part_in_choosing_the_dose_at_which_it_is_counted() -> None:
    plain, aim = struck(Planted(lambda _, __, x: [0.1, 0.8, 0.3][x]), {})
    assert plain.chosen["found"] == {0: 1, 1: 1}
    for split, half in enumerate(aim.forget_halves):
        own = {aim.forget.items[at].id for at in half.measured}

        def only_these(_: str, item: Item, x: int, own: set[str] = own) -> float:
            return [0.1, 0.8, 1.0][x] if item.id in own else [0.1, 0.8, 0.3][x]

        with_these, _ = struck(Planted(only_these), {})
        assert with_these.chosen["found"] == {split: 1, split ^ 1: 2}, "the half itself keeps the other's dose"
        back = with_these.arms[0].back(with_these.chosen["found"])
        assert back.tolist() == pytest.approx([0.8 if item.id in own else 0.3 for item in aim.forget.items])


def test_every_arm_chooses_its_own_dose_unless_it_is_fixed() -> None:
    model = tiny.model("gpt2")
    other = changed(model, 3.0)

    def values(key: str, _: Item, x: int) -> float:
        return [0.9, 0.2, 0.1][x] if key == other.digest else [0.1, 0.3, 0.2][x]

    free, _ = struck(Planted(values), {"random 1": other})
    assert free.chosen == {"found": {0: 1, 1: 1}, "random 1": {0: 0, 1: 0}}
    assert [arm.role for arm in free.arms] == ["found", "random"]
    fixed, _ = struck(Planted(values, best=2), {"random 1": other})
    assert fixed.chosen == {name: {0: 2, 1: 2} for name in ("found", "random 1")}
    assert float(fixed.arms[1].back(fixed.chosen["random 1"]).mean()) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("hidden", "never", "share", "doubted"),
    [(0.9, 0.4, 5 / 6, False), (0.71, 0.4, 0.31 / 0.6, False), (0.6, 0.4, 1 / 3, True), (0.9, 0.97, math.nan, True)],
)
def test_each_arm_is_above_what_was_never_known_at_its_own_dose(
    hidden: float, never: float, share: float, doubted: bool
) -> None:
    """And the attack is doubted where the edit made to come back stays below half, or has no share."""
    attack = Planted(lambda _, __, x: [0.1, 0.3, 0.2][x])
    plain, aim = struck(attack, {})
    found = plain.arms[0]

    def planted(role: Role, values: list[float], data: str = "forget") -> Arm:
        rows = torch.tensor(values).double()[:, None].expand(-1, 4)
        return dataclasses.replace(found, role=role, name=role, splits=({data: rows},) * 2, data=data)

    arms = (found, planted("never knew", [0.0, 0.1, never], "heldout"), planted("shallow", [0.0, 0.0, hidden]))
    chosen = {"found": {0: 1, 1: 1}, "shallow": {0: 2, 1: 2}}
    made = Outcome(attack, dataclasses.replace(plain, arms=arms, chosen=chosen, before=torch.ones(len(aim.forget))))
    assert made.share(found).value == pytest.approx((0.3 - 0.1) / 0.9)
    assert made.share(arms[2]).value == pytest.approx(share, nan_ok=True)
    assert ("did not bring back the edit made to come back" in made.result().note) == doubted


def test_sides_with_the_same_names_are_not_mistaken_for_each_other() -> None:
    """Numbers of items were once kept by their ids, which two files may both count from 0."""
    model = tiny.model("gpt2")
    parts = [
        dataset(name, [Fact(prompt=f"{name} {at}", answer=" Oslo", id=str(at), owner=f"{name}{at}") for at in range(4)])
        for name in ("forget", "heldout")
    ]
    options = ItemOptions(metric="probability")
    task = Task(forget=parts[0], heldout=parts[1])
    aim = aimed(model, task, options, by="t", learns=False, shared=Shared(), narrow=None)
    assert aim.heldout is not None
    base = Target(model=model, key="unedited")
    one, two = aim.read(base, aim.forget), aim.read(base, aim.heldout)
    assert not torch.equal(one, two)
    assert torch.equal(two, values_of(model, aim.heldout.examples, "probability"))


# --- the share --------------------------------------------------------------------------------------------------------


def test_there_is_no_interval_where_samples_have_nothing_to_divide_by() -> None:
    """Of four owners one is known: a sample without it (a third of them) has no distance to what was never known."""
    before = torch.tensor([1.0, 0.0, 0.0, 0.0]).double()
    found = share_back(before / 2, before, owners=list("abcd"), control=None, draws=500)
    assert found.value == pytest.approx(0.5)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    full = torch.ones(4).double()
    sure = share_back(torch.tensor([1.0, 0.0, 1.0, 0.0]).double(), full, owners=list("abcd"), control=None, draws=500)
    assert sure.value == pytest.approx(0.5)
    assert 0 <= sure.low < 0.5 < sure.high <= 1
    near = share_back(
        full / 2, full, owners=list("abcd"), control=torch.full((4,), 0.96).double(), control_owners="abcd"
    )
    assert math.isnan(near.value)
    assert math.isnan(near.low)


# --- before anything runs --------------------------------------------------------------------------------------------


PLAIN = dataset("plain", [PlainText(text="Anna works.", id="t")])
TOKENS = dataset("tokens", [TokenText(ids=(5, 6, 7), span=(1, 3), id="n")])


def _private() -> Task:
    text = PrivateText(text="The phone is 555", spans=((13, 16, "phone"),), id="p", owner="a")
    return Task(forget=dataset("private", [text]))


def _facts() -> Task:
    return Task(forget=dataset("forget", [Fact(prompt="p", answer=" a", id="f", owner="o")]))


@pytest.mark.parametrize(
    ("names", "task", "words"),
    [
        (["probe"], _private(), "probe needs .*retain|retain"),
        (["depth"], _facts(), "depth needs the option retain_model: a folder or a hub id"),
        (["relearn", "nonsense"], _facts(), "unknown attack 'nonsense'"),
        (["drop_token"], _facts(), "drop_token needs an edit with a control token"),
        (["relearn"], dataclasses.replace(_facts(), forget=PLAIN), "relearn: forget items of kind 'plain' cannot be"),
        (
            ["few_shot"],
            dataclasses.replace(_facts(), forget=TOKENS),
            "few_shot: forget items of kind .tokens. cannot",
        ),
        ("relearn", _facts(), "attacks='relearn' is one string"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line_before_anything_runs(
    names: Any, task: Task, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("gpt2")
    edit = changed(model, 2.0)
    monkeypatch.setattr(Model, "logits", lambda *_, **__: pytest.fail("the model was run"))
    with pytest.raises(LoceditError, match=words) as caught:
        evaluate(model, task, edit, names)
    assert "\n" not in str(caught.value)
    with pytest.raises(LoceditError, match=words):
        check_attacks(names, edit=edit, options={}, task=task)


def test_without_a_task_only_what_does_not_depend_on_it_is_checked() -> None:
    edit = changed(tiny.model("gpt2"), 2.0)
    check_attacks(["probe", "few_shot"], edit=edit, options={})
    with pytest.raises(LoceditError, match="shots="):
        check_attacks(["few_shot"], edit=edit, options={"few_shot": {"shots": ()}})
    with pytest.raises(LoceditError, match="depth needs the option retain_model"):
        check_attacks(["depth"], edit=edit, options={})
    check_attacks(["depth"], edit=edit, options={"depth": {"retain_model": "somewhere"}}, task=_facts())
    with pytest.raises(LoceditError, match="attack 'probe' needs an edit"):
        check_attacks(["probe"], edit=None, options={})
    with pytest.raises(LoceditError, match="options for 'probe', which is not among"):
        check_attacks(["few_shot"], edit=edit, options={"probe": {}})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("relearn_format", {"shown": "riddle"}, "shown='riddle'"),
        ("probe", {"least": 1000}, "no relation"),
        ("jailbreak", {"templates": "none.txt"}, "none.txt"),
        ("depth", {"retain_model": "./nowhere"}, "retain_model='./nowhere': model folder"),
    ],
)
def test_options_that_do_not_fit_the_data_are_said_before_a_model_is_loaded(
    tiny_lab: Lab, name: str, options: dict[str, Any], message: str
) -> None:
    edit = changed(tiny_lab.model, 0.5)
    with pytest.raises(LoceditError, match=re.escape(message)):
        check_attacks([name], edit=edit, options={name: options}, task=tiny_lab.task)

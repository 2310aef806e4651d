"""The way back to the base: its ends, its middle bit by bit, adapters, and what cannot go it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from locedit.attacks.aim import NOTHING, Aim, Target, aimed
from locedit.attacks.interpolation import Interpolation, InterpolationOptions, interpolation
from locedit.attacks.shared import Shared
from locedit.components import ComponentSet
from locedit.edit import Edit, zero
from locedit.edit.arithmetic import merged, negated
from locedit.errors import LoceditError
from locedit.lab import Lab
from locedit.models import Model
from locedit.results import AttackResult
from locedit.unlearn import unlearn
from tests.struck import forgotten, level, share, state, untouched


@pytest.fixture(scope="module")
def edit(tiny_lab: Lab) -> Edit:
    return forgotten(tiny_lab)


@pytest.fixture(scope="module")
def adapter(tiny_lab: Lab) -> Edit:
    made = unlearn(tiny_lab.model, tiny_lab.task, "npo", steps=30, learning_rate=1e-2, hold="adapter", check=False)
    assert made.kind == "adapter"
    return made


@pytest.fixture(scope="module")
def found(tiny_lab: Lab, edit: Edit) -> AttackResult:
    with untouched(tiny_lab.model):
        return interpolation(tiny_lab.model, tiny_lab.task, edit, draws=100)


def columns(found: AttackResult) -> Tensor:
    """Mean level at every share of the way, over the splits, from the edit on."""
    curves = [curve.columns["recovered"] for curve in found.curves if curve.role == "found"]
    return torch.tensor(curves).mean(0)


def visited(model: Model, lab: Lab, edit: Edit, shares: tuple[float, ...]) -> list[dict[str, Tensor]]:
    """The weights at which the attack measures."""
    seen: list[dict[str, Tensor]] = []
    options = InterpolationOptions(shares=shares, at=shares[0])
    attack = Interpolation(options)
    plain = attack.prepared(model, edit)
    aim: Aim = aimed(model, lab.task, options, by="i", learns=False, shared=Shared(), narrow=None)
    import locedit.attacks.interpolation as module

    real = module.values_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "values_of", lambda *given: (seen.append(state(given[0])), real(*given))[1])
        with plain.applied(model) as edited:
            target = Target(model=edited, key=plain.digest)
            attack.attack(target, NOTHING, {"forget": aim.forget.at(range(2))}, aim)
    return seen


@pytest.mark.parametrize("held", ["edit", "adapter"])
def test_weights_are_on_the_straight_line(tiny_lab: Lab, held: str, request: pytest.FixtureRequest) -> None:
    model, edit = tiny_lab.model, request.getfixturevalue(held)
    base = state(model)
    plain = edit if held == "edit" else merged(model, edit)
    with plain.applied(model) as edited:
        ended = state(edited)
    moved = [name for name in base if not torch.equal(base[name], ended[name])]
    assert moved
    with untouched(model):
        near, half, far = visited(model, tiny_lab, edit, (1e-6, 0.5, 1 - 1e-6))
    for name in base:
        assert torch.allclose(near[name], ended[name], atol=1e-6)
        assert torch.allclose(half[name], (base[name] + ended[name]) / 2, atol=1e-7)
        assert torch.allclose(far[name], base[name], atol=1e-6)
    assert any(not torch.allclose(half[name], ended[name], atol=1e-4) for name in moved)


def test_it_begins_at_the_edit_and_ends_at_the_base(tiny_lab: Lab, edit: Edit) -> None:
    ends = interpolation(tiny_lab.model, tiny_lab.task, edit, shares=(1e-6, 1 - 1e-6), at=0.5, draws=50)
    back = columns(ends)
    assert back[:2].tolist() == pytest.approx([level(ends, "forget", "after")] * 2)
    assert float(back[-1]) == pytest.approx(level(ends, "forget", "before"))
    assert back[-1] > back[0] + 0.5


def test_the_share_that_counts_is_fixed_and_not_the_best(tiny_lab: Lab, edit: Edit, found: AttackResult) -> None:
    assert found.settings["doses"] == ["0.5", "0.5"]
    assert columns(found).argmax() == 5, "more is back later on the way"
    never = level(found, "heldout", group="never knew")
    back = (level(found, "forget") - never) / (level(found, "forget", "before") - never)
    assert found.headline.value == pytest.approx(back)
    assert level(found, "forget") == pytest.approx(float(columns(found)[3]))
    early = interpolation(tiny_lab.model, tiny_lab.task, edit, at=0.1, draws=50)
    assert early.settings["doses"] == ["0.1", "0.1"]
    assert level(early, "forget") < level(found, "forget")
    assert "no edit made to come back" not in found.note
    assert (interpolation(tiny_lab.model, tiny_lab.task, edit, draws=100).measures) == found.measures


def test_an_adapter_is_merged_and_gives_the_same(tiny_lab: Lab, adapter: Edit) -> None:
    with untouched(tiny_lab.model):
        found = interpolation(tiny_lab.model, tiny_lab.task, adapter, draws=50)
    same = interpolation(tiny_lab.model, tiny_lab.task, merged(tiny_lab.model, adapter), draws=50)
    assert [m.value for m in found.measures] == pytest.approx([m.value for m in same.measures], nan_ok=True)
    assert level(found, "forget", "after") < level(found, "forget", "before")


def test_others_go_their_own_way_and_those_that_cannot_are_named(tiny_lab: Lab, edit: Edit, adapter: Edit) -> None:
    hooks = zero(tiny_lab.model, some(tiny_lab.model), hold="hooks")
    others = {"adapter": adapter, "against": negated(tiny_lab.model, edit), "by hooks": hooks}
    with untouched(tiny_lab.model):
        found = interpolation(tiny_lab.model, tiny_lab.task, edit, others=others, draws=50)
    assert {curve.name for curve in found.curves if curve.role == "other"} == {"adapter", "against"}
    assert "held otherwise than as weights, and left out: by hooks" in found.note
    alone = interpolation(tiny_lab.model, tiny_lab.task, adapter, draws=50)
    assert share(found, "adapter") != pytest.approx(found.headline.value)
    own = [m.value for m in found.measures if m.group == "other" and m.name != "share_back"]
    assert len(own) == 1
    assert [c.columns["recovered"] for c in found.curves if c.name == "adapter"] == [
        c.columns["recovered"][1:] for c in alone.curves if c.name == "found"
    ]


def some(model: Model) -> ComponentSet:
    return model.components({"blocks.0.mlp.neuron": [0, 1]})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"shares": (0.0, 0.5)}, r"shares=\(0\.0, 0\.5\) and at=0\.5 must lie between 0 and 1"),
        ({"at": 1.0}, r"at=1\.0 must lie between 0 and 1"),
        ({"splits": 5}, "splits=5 must be an even number"),
    ],
)
def test_wrong_options_give_one_line(tiny_lab: Lab, edit: Edit, given: dict[str, Any], words: str) -> None:
    with pytest.raises(LoceditError, match=words) as caught:
        interpolation(tiny_lab.model, tiny_lab.task, edit, **given)
    assert "\n" not in str(caught.value)


def test_an_edit_by_hooks_is_refused(tiny_lab: Lab, edit: Edit) -> None:
    hooks = zero(tiny_lab.model, some(tiny_lab.model), hold="hooks")
    for held in (hooks, edit.then(hooks)):
        with pytest.raises(
            LoceditError, match="interpolation needs an edit held as weights or as an adapter"
        ) as caught:
            interpolation(tiny_lab.model, tiny_lab.task, held)
        assert "\n" not in str(caught.value)

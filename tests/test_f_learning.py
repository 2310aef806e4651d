"""F-Learning against plain gradient descent by hand, its two restrictions, its low-rank halves, and its dose."""

import copy
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from locedit.commands.outcomes import dose, ends
from locedit.components import ComponentSet
from locedit.controls import compare
from locedit.data.encode import Example, encode
from locedit.data.items import Dataset, Task
from locedit.edit import TrainOptions, checkpoints, levels, train
from locedit.edit.edit import Edit
from locedit.edit.stepping import Stepping
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.study.making import Made, _curve, _dose  # pyright: ignore[reportPrivateUsage]
from locedit.unlearn import nll, objective_of, prepare, unlearn
from tests import edits, tiny

PLAIN: dict[str, Any] = {"optimizer": "sgd", "clip": None, "batch_size": 9, "eval_every": 0, "check": False}
"gradient descent on all examples at once, which needs no trainer to be done by hand"


def without_new(task: Task) -> Task:
    """The forget facts without their new answers."""
    bare = [dataclasses.replace(fact, new_answer=None) for fact in task.forget]  # type: ignore[call-arg]
    return dataclasses.replace(task, forget=task.forget.replace(bare))


def weights_of(model: Model, edit: Edit) -> dict[str, Tensor]:
    with edit.applied(model):
        return edits.bits(model.module)


def nll_of(module: nn.Module, examples: list[Example]) -> Tensor:
    """Mean over examples of the mean over answer tokens, each example alone."""
    found: list[Tensor] = []
    for example in examples:
        table = module(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        found.append(-torch.stack([table[at - 1, example.ids[at]] for at in example.targets]).mean())
    return torch.stack(found).mean()


def descend(
    module: nn.Module, examples: list[Example], inside: Mapping[str, Tensor], *, steps: int, rate: float
) -> None:
    """Gradient descent of the entries inside."""
    for _ in range(steps):
        module.zero_grad()
        nll_of(module, examples).backward()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                assert parameter.grad is not None
                parameter.sub_(rate * parameter.grad * inside[name])


def masks(model: Model, within: ComponentSet | None) -> dict[str, Tensor]:
    """Parameter -> 1 where it may be trained."""
    found = {name: torch.zeros_like(p) for name, p in edits.bits(model.module).items()}
    if within is None:
        return {name: mask + 1 for name, mask in found.items()}
    for touched in within.touched("train"):
        index = slice(None) if touched.index is None else touched.index
        where = found[touched.param].view(-1) if touched.axis is None else found[touched.param]
        where[(slice(None),) * (touched.axis or 0) + (index,)] = 1
    return found


@pytest.mark.parametrize(("restrict", "inside"), [("training", False), ("training", True), ("delta", True)])
def test_by_hand(restrict: str, inside: bool) -> None:
    """theta_old, theta - 1.5 (theta_old - theta), then the new answers, in plain PyTorch."""
    model, task = edits.double("gpt2"), edits.task()
    within = edits.mixed(model) if inside else None
    own, everything = masks(model, within), masks(model, None)
    old, base = copy.deepcopy(model.module), edits.bits(model.module)
    descend(old, encode(model, task.forget), own if restrict == "training" else everything, steps=3, rate=0.02)
    away = copy.deepcopy(model.module)
    with torch.no_grad():
        for name, parameter in away.named_parameters():
            parameter.sub_(1.5 * own[name] * (old.get_parameter(name) - base[name]))
    new = encode(model, task.forget.expand("new_answer"))
    descend(away, new, own, steps=2, rate=0.05)

    options: dict[str, Any] = {
        **PLAIN,
        "steps": 3,
        "learning_rate": 0.02,
        "scale": 1.5,
        "learn_steps": 2,
        "learn_rate": 0.05,
    }
    edit = unlearn(model, task, "f_learning", within=within, restrict=restrict, **options)
    edit.verify(model)
    found = weights_of(model, edit)
    for name, parameter in away.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=1e-10)
        assert torch.equal(found[name][own[name] == 0], base[name][own[name] == 0])
    assert any(bool((found[name] - base[name]).abs().max() > 1e-4) for name in base)
    assert edit.history["step"][-2:] == [1, 2]
    assert edit.outcome["learn_steps"] == 2


def test_the_two_restrictions_are_two_methods() -> None:
    """Of the same training steps, the set's part of a change of everything is not the change that the set makes."""
    model = edits.double("llama")
    within = edits.neurons_and_heads(model)
    options: dict[str, Any] = {**PLAIN, "steps": 3, "learning_rate": 0.05, "learn_steps": 0}
    one, other = (
        unlearn(model, edits.task(), "f_learning", within=within, restrict=restrict, **options)
        for restrict in ("training", "delta")
    )
    one.verify(model)
    other.verify(model)
    assert other.outcome["norm"] != pytest.approx(one.outcome["norm"], rel=1e-3)
    assert other.outcome["old"]["forget"] > one.outcome["old"]["forget"]  # as more was trained


def test_without_new_answers_it_is_a_negated_task_vector() -> None:
    """theta - 2 (FT(theta) - theta) to the bit, from the trainer's own edit; the same with learn_steps=0."""
    model, task = tiny.model("llama"), edits.task()
    trained = train(
        model,
        objective_of(model, task, nll, name="old"),
        options=TrainOptions(steps=4, learning_rate=1e-2, batch_size=1),
    )
    options: dict[str, Any] = {"steps": 4, "learning_rate": 1e-2, "batch_size": 1, "scale": 2.0, "check": False}
    bare = unlearn(model, without_new(task), "f_learning", **options)
    stopped = unlearn(model, task, "f_learning", learn_steps=0, **options)
    for patch, own, same in zip(bare.patches, trained.patches, stopped.patches, strict=True):
        assert own.delta is not None
        base = own.region.read(model.parameter(own.region.param))
        assert torch.equal(patch.values, torch.where(own.delta == 0, base, base - 2 * own.delta))
        assert torch.equal(patch.values, same.values)
    assert "step" not in bare.history
    assert "new" not in stopped.history
    assert bare.history["scale"][-1] == 2.0


def test_scale_0_is_plain_learning_and_no_learning_changes_nothing() -> None:
    model, task = tiny.model("gpt2"), edits.task()
    before = edits.bits(model.module)
    options: dict[str, Any] = {"steps": 2, "learning_rate": 1e-2, "scale": 0.0, "check": False}
    with unlearn(model, task, "f_learning", learn_steps=0, **options).applied(model):
        assert edits.same_bits(model.module, before)
    learned = unlearn(model, task, "f_learning", learn_steps=3, **options)
    goal = objective_of(model, task, nll, name="new", learns=task.forget.expand("new_answer"))
    alone = train(model, goal, options=TrainOptions(steps=3, learning_rate=1e-2))
    for name, values in weights_of(model, learned).items():
        torch.testing.assert_close(values, weights_of(model, alone)[name], rtol=0, atol=1e-6)


def test_the_tasks_new_data_are_learned_where_facts_have_no_new_answer() -> None:
    model = tiny.model("gpt2")
    other = edits.task().retain
    assert other is not None
    task = dataclasses.replace(without_new(edits.task()), new=Dataset(items=other.items[:1], source="new.jsonl"))
    edit = unlearn(model, task, "f_learning", steps=20, learning_rate=1e-2, scale=0.0, check=False)
    assert edit.outcome["learn_steps"] == 20
    assert edit.history["new"][-1] > 0.5 > edit.history["new"][0]


def test_retain_answers_are_learned_beside_the_new_ones() -> None:
    model, task = tiny.model("gpt2"), edits.task()
    options: dict[str, Any] = {"steps": 1, "learning_rate": 1e-2, "learn_steps": 12, "check": False}
    plain, kept = (
        unlearn(model, task, "f_learning", retain_weight=weight, **options).history["retain"][-1]
        for weight in (0.0, 1.0)
    )
    assert kept > 0.5 > plain


def test_the_weight_of_the_retain_answers() -> None:
    """Twice the weight is twice the term of the first step, of the same batch; and the other term is the same."""
    options: dict[str, Any] = {**PLAIN, "steps": 1, "learning_rate": 1e-2, "learn_steps": 1, "scale": 0.5}
    one, two = (
        unlearn(edits.double("gpt2"), edits.task(), "f_learning", retain_weight=weight, **options).history
        for weight in (1.0, 2.0)
    )
    assert two["retain_loss"][-1] == pytest.approx(2 * one["retain_loss"][-1], rel=1e-9)
    assert two["learn_nll"][-1] == pytest.approx(one["learn_nll"][-1], rel=1e-9)
    assert one["retain_loss"][-1] > 0


def test_new_answers_come_before_the_tasks_new_data() -> None:
    model, retain = tiny.model("gpt2"), edits.task().retain
    assert retain is not None
    task = edits.task(new=Dataset(items=retain.items[:1], source="new.jsonl"))
    options: dict[str, Any] = {"steps": 20, "learning_rate": 1e-2, "scale": 0.0, "check": False}
    edit = unlearn(model, task, "f_learning", **options)
    answers = {"new": encode(model, task.forget.expand("new_answer")), "data": encode(model, retain)[:1]}
    with edit.applied(model) as edited:
        found = levels(edited, answers)
    assert edit.history["new"][-1] == pytest.approx(found["new"], rel=1e-4)
    assert found["new"] > 0.5 > found["data"]


def test_fewer_steps_of_learning_than_of_warmup() -> None:
    """A warm-up of more steps than there are is one of as many: the old facts' own one is no error for the new."""
    options: dict[str, Any] = {"steps": 6, "learn_steps": 2, "warmup": 5, "learning_rate": 1e-2, "check": False}
    edit = unlearn(tiny.model("gpt2"), edits.task(), "f_learning", **options)
    assert (edit.outcome["steps"], edit.outcome["learn_steps"]) == (6, 2)


def test_the_norm_is_that_of_the_vector() -> None:
    """The root of the sum of its squares, before it is scaled."""
    model, task = edits.double("gpt2"), edits.task()
    edit = unlearn(model, task, "f_learning", steps=2, learning_rate=0.02, scale=2.0, learn_steps=0, **PLAIN)
    before, after = edits.bits(model.module), weights_of(model, edit)
    squares = sum(float(((after[name] - values) ** 2).sum()) for name, values in before.items())
    assert edit.outcome["norm"] == pytest.approx(squares**0.5 / 2, rel=1e-9)


# --- low rank ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restrict", ["training", "delta"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_lora_subtracted_is_minus_lambda_ba(restrict: str, inside: bool) -> None:
    """In weights, from the factors of the same training by hand; beside them as an adapter it gives the same logits."""
    model, task = edits.double("gpt2"), edits.task()
    within = edits.neurons_and_heads(model) if inside else None
    own = {"steps": 3, "learning_rate": 3e-2, "rank": 2, "eval_every": 0}
    options: dict[str, Any] = {**own, "restrict": restrict, "scale": 1.5, "learn_steps": 0, "check": False}
    edit = unlearn(model, task, "f_learning", within=within, forget_hold="adapter", **options)
    beside = unlearn(model, task, "f_learning", within=within, hold="adapter", **options)
    assert (edit.kind, beside.kind) == ("weights", "adapter")
    edit.verify(model)
    where = within if restrict == "training" else None
    goal = objective_of(model, task, nll, name="old")
    trained = train(model, goal, within=where, options=TrainOptions(**own), hold="adapter")  # type: ignore[arg-type]
    expected = {name: torch.zeros_like(p) for name, p in edits.bits(model.module).items()}
    for adapter in trained.adapters:
        change = (adapter.up @ adapter.down).T  # [in, out], as Conv1D stores it
        if adapter.index is None:
            expected[adapter.param] += change
        else:
            expected[adapter.param].index_add_(adapter.axis or 0, adapter.index, change)
    before, mask = edits.bits(model.module), masks(model, within)
    for name, after in weights_of(model, edit).items():
        wanted = before[name] - 1.5 * expected[name] * mask[name]
        torch.testing.assert_close(after, wanted, rtol=0, atol=1e-10)
    ids = tiny.ids()
    with torch.no_grad():
        with edit.applied(model):
            merged = model.module(ids).logits
        with beside.applied(model):
            torch.testing.assert_close(model.module(ids).logits, merged, rtol=0, atol=1e-8)
        assert not torch.allclose(model.module(ids).logits, merged, atol=1e-3)


def test_every_way_to_hold_the_halves() -> None:
    """Low rank or full, in weights or beside them: the last row has the levels of the edit that is returned."""
    model, task = tiny.model("llama"), edits.task()
    within = edits.neurons_and_heads(model)
    options: dict[str, Any] = {"steps": 3, "learning_rate": 2e-2, "rank": 2, "within": within, "check": False}
    found: dict[tuple[str, ...], Edit] = {}
    for ways in (
        ("weights", "weights", "adapter"),
        ("weights", "adapter", "weights"),
        ("weights", "adapter", "adapter"),
        ("adapter", "adapter", "adapter"),
        ("adapter", "weights", "adapter"),
    ):
        hold, forget, learn = ways
        edit = unlearn(model, task, "f_learning", hold=hold, forget_hold=forget, learn_hold=learn, **options)
        edit.verify(model)
        goal = objective_of(model, task, nll, name="levels")
        with edit.applied(model) as edited:
            now = levels(edited, goal.probes)
        assert {name: edit.history[name][edit.row] for name in now} == now
        assert edit.within == within
        found[ways] = edit
    assert [edit.kind for edit in found.values()] == ["weights", "weights", "weights", "adapter", "chain"]
    assert {a.down.shape[0] for a in found["adapter", "adapter", "adapter"].adapters} == {4}
    chain = found["adapter", "weights", "adapter"]
    assert [part.kind for part in chain.parts] == ["weights", "adapter"]
    assert ends(chain)["forget"][0] == chain.history["forget"][0]


def test_half_precision_says_what_was_lost(caplog: pytest.LogCaptureFixture) -> None:
    """Values are the model's own dtype, the measured levels are theirs, and lost changes are warned of."""
    model, task = edits.half("gpt2"), edits.task()
    options: dict[str, Any] = {"steps": 2, "check": False}
    with caplog.at_level(logging.WARNING):
        edit = unlearn(model, task, "f_learning", learning_rate=1e-5, learn_steps=0, **options)
    assert edit.outcome["lost_to_rounding"] > 0.1
    assert "are the same after rounding" in caplog.text
    edit = unlearn(model, task, "f_learning", learning_rate=1e-2, learn_hold="adapter", **options)
    assert {patch.values.dtype for patch in edit.patches} == {torch.bfloat16}
    with edit.applied(model) as edited:
        assert levels(edited, {"forget": encode(model, task.forget)})["forget"] == edit.history["forget"][-1]


# --- the dose ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knowing() -> Model:
    """A model that has learned the facts by heart."""
    model, task = edits.load(tiny.module("gpt2"), tokenizer=tiny.tokenizer(), device="cpu"), edits.task()
    assert task.retain is not None
    goal = objective_of(model, task, nll, name="facts", learns=task.forget.replace([*task.forget, *task.retain]))
    learned = train(model, goal, options=TrainOptions(steps=60, learning_rate=5e-3, eval_every=0))
    for patch in learned.patches:
        patch.region.write(model.parameter(patch.region.param), patch.values)
    assert min(levels(model, goal.probes).values()) > 0.9
    return model


def test_until_takes_the_first_scale_of_the_grid(knowing: Model, caplog: pytest.LogCaptureFixture) -> None:
    model, task = knowing, edits.task()
    options: dict[str, Any] = {"steps": 15, "learn_steps": 0, "largest": 4.0, "curve": 8, "check": False}
    edit = unlearn(model, task, "f_learning", until=0.4, **options)
    history = edit.history
    assert history["scale"] == [0.5 * number for number in range(len(history["scale"]))]
    assert history["forget"][-1] <= 0.4 < min(history["forget"][:-1])
    assert edit.row == len(history["scale"]) - 1
    assert edit.outcome["reached"]
    assert edit.outcome["scale"] == history["scale"][-1]
    between = unlearn(model, task, "f_learning", until=0.4, match="interpolate", **options)
    assert 0.392 <= between.history["forget"][between.row] <= 0.4
    assert history["scale"][-2] < between.outcome["scale"] <= history["scale"][-1]
    with between.applied(model) as edited:
        level = levels(edited, {"forget": encode(model, task.forget)})["forget"]
    assert level == pytest.approx(between.history["forget"][-1], abs=1e-6)
    assert dose(edit).startswith(f"scale {edit.outcome['scale']:.3g}, 15 steps, forget level 0.4 reached")
    caplog.clear()
    options["largest"] = 0.5
    short = unlearn(model, task, "f_learning", until=0.4, **options)
    assert short.outcome["scale"] == 0.5
    assert not short.outcome["reached"]
    assert "forget level" in caplog.text
    assert "not reached" in dose(short)


def test_until_ends_neither_training() -> None:
    """Of a model that is at the level from the beginning."""
    options: dict[str, Any] = {"steps": 4, "learn_steps": 3, "until": 0.9, "check": False}
    edit = unlearn(tiny.model("gpt2"), edits.task(), "f_learning", **options)
    assert (edit.outcome["steps"], edit.outcome["learn_steps"]) == (4, 3)
    assert edit.outcome["scale"] == 0


def test_a_scale_above_the_largest_is_measured_at_as_many() -> None:
    """And one below it at the grid's distances."""
    options: dict[str, Any] = {"steps": 1, "learning_rate": 1e-6, "learn_steps": 0, "check": False}
    found = [
        unlearn(tiny.model("gpt2"), edits.task(), "f_learning", scale=scale, largest=2.0, curve=4, **options)
        for scale in (8.0, 1.0)
    ]
    assert [edit.history["scale"] for edit in found] == [[0.0, 2.0, 4.0, 6.0, 8.0], [0.0, 0.5, 1.0]]


def test_choose_reads_the_whole_grid(knowing: Model) -> None:
    """The lowest forget level that keeps 95 % of the retain level: the next scale keeps less."""
    model, task = knowing, edits.task()
    options: dict[str, Any] = {"steps": 15, "learn_steps": 0, "check": False}
    edit = unlearn(model, task, "f_learning", choose="forget", retain_share=0.95, largest=3.0, curve=12, **options)
    scale, kept = edit.outcome["scale"], 0.95 * edit.history["retain"][0]
    assert 0 < scale < 3
    assert edit.history["retain"][edit.row] >= kept
    assert edit.history["forget"][edit.row] == min(edit.history["forget"])
    further = unlearn(model, task, "f_learning", scale=scale + 0.25, largest=3.0, curve=12, **options)
    assert further.history["retain"][further.row] < kept
    assert further.history["scale"][: len(edit.history["scale"])] == edit.history["scale"]


def test_controls_follow_the_scale(knowing: Model) -> None:
    """At the level that the subtraction led to, before the new answers; also when the scale was given."""
    model, task = knowing, edits.task()
    within = model.components({"blocks.0.mlp.neuron": range(40), "blocks.1.mlp.neuron": range(40)})
    options: dict[str, Any] = {"steps": 15, "learning_rate": 3e-3, "scale": 3.0, "learn_steps": 5, "eval_every": 5}
    edit = unlearn(model, task, "f_learning", within=within, check=False, **options)
    found = compare(model, task, "f_learning", within=within, seeds=[0], edit=edit, **options)
    assert [curve.role for curve in found.curves] == ["found", "random", "everything"]
    assert {curve.x_name for curve in found.curves} == {"scale"}
    away = edit.history["scale"].index(3.0)
    assert list(found.curves[0].x) == edit.history["scale"][: away + 1]
    assert found.level == edit.history["forget"][away] != edit.history["forget"][-1]
    assert found.curves[0].matched == away
    everything = found.curves[2]
    assert everything.matched is not None
    assert everything.columns["forget"][everything.matched] <= found.level
    assert found.edits["random 0"].outcome["until"] == found.level


def test_what_a_study_says_of_it() -> None:
    model, task = tiny.model("gpt2"), edits.task()
    edit = unlearn(model, task, "f_learning", steps=2, learn_steps=2, eval_every=1, scale=0.5, check=False)
    curve = _curve(edit)
    assert curve["scale"] == [0.0, 0.25, 0.5]
    assert {len(column) for column in curve.values()} == {3}
    assert _dose(edit, Made(edit=edit), curve) == {"name": "scale", "value": 0.5}


# --- going on after a kill, and wrong inputs --------------------------------------------------------------------------


def test_a_killed_run_goes_on_where_it_was(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the new answers are learned: the old facts are not learned again, and the edit is the same."""
    model, task = tiny.model("llama"), edits.task()
    options: dict[str, Any] = {"steps": 6, "learning_rate": 1e-2, "check": False}
    whole = unlearn(model, task, "f_learning", **options)
    calls: list[int] = []
    step = Stepping.step

    def counted(self: Stepping, number: int) -> Any:
        calls.append(number)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Stepping, "step", counted)
    with pytest.raises(KeyboardInterrupt), checkpoints(tmp_path, cost=1.0):
        unlearn(model, task, "f_learning", **options)
    first = len(calls)
    with checkpoints(tmp_path, cost=1.0):
        again = unlearn(model, task, "f_learning", **options)
    assert first == 10
    assert len(calls) - first == 3
    assert again.digest == whole.digest
    assert again.history == whole.history


def test_what_is_refused_before_a_model_is_loaded() -> None:
    task, bare = edits.task(), without_new(edits.task())
    part = task.forget.replace([*bare.forget.items[:1], *task.forget.items[1:]])
    wrong: list[tuple[Task, dict[str, Any], str]] = [
        (bare, {"learn_steps": 5}, "learn_steps=5, but the task .* has no new answers"),
        (dataclasses.replace(task, forget=part), {}, "f_learning needs the field 'new_answer', which 'f0'"),
        (task, {"scale": -1.0}, "scale=-1.0 must not be negative"),
        (task, {"scale": 1.0, "until": 0.1}, "scale=1.0 and until=0.1 both choose the scale"),
        (task, {"scale": 1.0, "choose": "forget"}, "scale=1.0 and choose='forget' both choose the scale"),
        (task, {"largest": 0.0}, "largest=0.0 must be above 0"),
        (task, {"curve": 0}, "curve=0 must be above 0"),
        (task, {"learn_steps": -1}, "learn_steps=-1 must not be negative"),
        (task, {"learn_rate": 0.0}, "learn_rate=0.0 must be above 0"),
        (task, {"restrict": "deltas"}, "restrict='deltas' .* did you mean 'delta'"),
        (task, {"forget_hold": "hooks"}, "forget_hold"),
        (task, {"rank": 4}, "rank is of a LoRA adapter"),
        (task, {"hold": "hooks"}, "cannot be held as 'hooks'"),
        (dataclasses.replace(task, retain=None), {"retain_weight": 1.0}, "retain_weight above 0 needs"),
        (dataclasses.replace(task, retain=None), {"choose": "forget"}, "choose='forget' needs"),
    ]
    for given, options, words in wrong:
        with pytest.raises(LoceditError, match=words) as raised:
            prepare("f_learning", given, **options)
        assert "\n" not in str(raised.value)
    prepare("f_learning", bare)
    prepare("f_learning", dataclasses.replace(bare, retain=None), rank=4, forget_hold="adapter")


def test_how_new_answers_would_be_held_is_nothing_where_none_are_learned() -> None:
    model, task = tiny.model("llama"), without_new(edits.task())
    options: dict[str, Any] = {"steps": 1, "check": False}
    assert unlearn(model, task, "f_learning", hold="adapter", learn_hold="weights", **options).kind == "adapter"
    single = model.components({"blocks.0.mlp.out.weight": [0, 17]})
    assert unlearn(model, task, "f_learning", within=single, learn_hold="adapter", **options).kind == "weights"


def test_what_is_refused_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = tiny.model("llama"), edits.task()
    monkeypatch.setattr(Stepping, "step", lambda *_: pytest.fail("trained"))
    single = model.components({"blocks.0.mlp.out.weight": [0, 17]})
    with pytest.raises(LoceditError, match="learn_hold='weights' changes the weights themselves"):
        unlearn(model, task, "f_learning", hold="adapter", learn_hold="weights")
    with pytest.raises(LoceditError, match="forget_hold='weights' changes the weights themselves"):
        unlearn(model, task, "f_learning", hold="adapter", forget_hold="weights", learn_steps=0)
    for half in ("hold", "forget_hold", "learn_hold"):
        options: dict[str, Any] = {half: "adapter"}
        with pytest.raises(LoceditError, match="single weights cannot be held as a LoRA adapter"):
            unlearn(model, task, "f_learning", within=single, **options)
    rows, columns = (model.components({f"blocks.0.mlp.out.{unit}": [0, 1]}) for unit in ("row", "column"))
    with pytest.raises(LoceditError, match="rows and columns of .* overlap"):
        unlearn(model, task, "f_learning", within=rows | columns, hold="adapter", restrict="delta")


def test_a_scale_that_breaks_the_model_is_one_line() -> None:
    model, task = tiny.model("llama"), edits.task()
    with pytest.raises(LoceditError, match=r"f_learning: the level 'forget' is nan at scale .* smaller largest"):
        unlearn(model, task, "f_learning", steps=2, scale=1e38, largest=1e38, curve=1, learn_steps=0)

"""The trainer: equal to plain AdamW on the whole model, honest about rounding, and harmless when it fails."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit import losses, tracing
from locedit.data.encode import Example, collate, encode
from locedit.edit import Edit, Objective, Step, TrainOptions, answer_probabilities, train
from locedit.edit.objective import Shuffled
from locedit.edit.train import Run
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.unlearn import objective, prepare, unlearn
from tests import edits, tiny

QUICK: dict[str, Any] = {"steps": 5, "learning_rate": 1e-2, "eval_every": 0}


def nll(step: Step) -> dict[str, Tensor]:
    return {"nll": losses.sequence_nll(step.score(step.forget)).mean()}


def goal(model: Model, loss: Any = nll, **fields: Any) -> Objective:
    return Objective(loss=loss, forget=encode(model, edits.task().forget), **fields)


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model.logits(collate(encode(model, edits.task().forget), model))


@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_the_whole_model_trains_as_with_plain_adamw(architecture: str, decay: float) -> None:
    model, plain = edits.double(architecture), edits.double(architecture)
    options = TrainOptions(**QUICK, weight_decay=decay, decay="weights", clip=0.7)
    edit = train(model, goal(model), options=options)
    optimizer = torch.optim.AdamW(plain.module.parameters(), lr=1e-2, weight_decay=decay)
    examples = encode(plain, edits.task().forget)
    for _ in range(5):
        optimizer.zero_grad()
        losses.sequence_nll(losses.score(plain, collate(examples, plain))).mean().backward()
        torch.nn.utils.clip_grad_norm_(plain.module.parameters(), 0.7)
        optimizer.step()
    with edit.applied(model) as edited:
        torch.testing.assert_close(logits(edited), logits(plain), rtol=1e-8, atol=1e-8)
    assert (logits(model) - logits(plain)).abs().max() > 0.1
    assert len(edit) == sum(p.numel() for p in model.module.parameters())


def test_optimizer_memory_is_in_proportion_to_the_set() -> None:
    model = tiny.model("llama")
    within = edits.neurons_and_heads(model)
    run = Run(model, goal(model), within=within, options=TrainOptions(**QUICK), hold="weights")
    run.train()
    state = [t for values in run.optimizer.state.values() for t in values.values() if t.numel() > 1]
    assert sum(t.numel() for t in state) == 2 * within.parameters("train")
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_two_small_batches_are_one_large_batch() -> None:
    model = edits.double("gpt2")
    within = edits.neurons_and_heads(model)
    task = edits.task(retain=edits.task().forget)
    steps: dict[str, Any] = {"steps": 1, "learning_rate": 1e-2, "optimizer": "sgd", "eval_every": 0, "clip": None}
    large = unlearn(model, task, "npo", within=within, batch_size=2, **steps)
    split = unlearn(model, task, "npo", within=within, batch_size=1, accumulate=2, **steps)
    single = unlearn(model, task, "npo", within=within, batch_size=1, **steps)
    for one, other, less in zip(large.patches, split.patches, single.patches, strict=True):
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-12)
        assert not torch.allclose(one.values, less.values, rtol=0, atol=1e-9)
    assert large.history["loss"][1] == pytest.approx(split.history["loss"][1])


def test_schedules_by_hand() -> None:
    cosine = TrainOptions(steps=10, warmup=2, learning_rate=1.0, schedule="cosine")
    assert [cosine.rate(1), cosine.rate(2), cosine.rate(3)] == [0.5, 1.0, 1.0]
    assert cosine.rate(7) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    linear = TrainOptions(steps=4, learning_rate=2.0, schedule="linear")
    assert [linear.rate(step) for step in (1, 2, 3, 4)] == [2.0, 1.5, 1.0, 0.5]
    assert {TrainOptions(steps=4, learning_rate=2.0).rate(step) for step in (1, 4)} == {2.0}


def test_history_has_every_step_and_the_levels_of_the_measured_ones() -> None:
    model = tiny.model("llama")
    examples = encode(model, edits.task().forget)
    edit = unlearn(model, edits.task(), "npo", steps=5, learning_rate=1e-3, eval_every=2)
    table = edit.history
    assert table["step"] == [0, 1, 2, 3, 4, 5]
    assert [at for at, value in enumerate(table["forget"]) if value is not None] == [0, 2, 4, 5]
    assert table["forget"][0] == pytest.approx(float(answer_probabilities(model, examples).double().mean()))
    assert table["loss"][0] is None
    assert table["forget_loss"][1] == pytest.approx(20 * math.log(2), rel=1e-5)
    assert table["loss"][1] == pytest.approx(table["forget_loss"][1] + table["retain_loss"][1])
    with edit.applied(model) as edited:
        assert table["forget"][5] == float(answer_probabilities(edited, examples).double().mean())
    assert edit.provenance is not None
    assert edit.provenance.method == "npo"
    assert edit.provenance.settings["beta"] == 0.1
    assert edit.provenance.data == edits.task().hash


@pytest.mark.parametrize("path", ["auto", "scatter"])
def test_in_bfloat16_the_saved_edit_is_what_was_measured(path: str, tmp_path: Path) -> None:
    model = edits.half("llama")
    within = edits.neurons_and_heads(model) | edits.mixed(model)
    options: dict[str, Any] = {"steps": 6, "learning_rate": 1e-3, "eval_every": 3, "path": path}
    edit = unlearn(model, edits.task(), "npo", within=within, **options)
    assert {patch.values.dtype for patch in edit.patches} == {torch.bfloat16}
    assert {patch.delta.dtype for patch in edit.patches if patch.delta is not None} == {torch.float32}
    edit.save(tmp_path / "edit")
    examples = encode(model, edits.task().forget)
    with Edit.load(tmp_path / "edit").applied(model) as edited:
        measured = float(answer_probabilities(edited, examples).double().mean())
    assert edit.history["forget"][-1] == measured
    assert edit.history["forget"][-1] != edit.history["forget"][0]


def test_change_lost_to_rounding_is_counted_and_an_adapter_proposed(caplog: pytest.LogCaptureFixture) -> None:
    model = edits.half("llama")
    within = edits.neurons_and_heads(model)
    with caplog.at_level(logging.WARNING, logger="locedit"):
        small = unlearn(model, edits.task(), "npo", within=within, steps=2, learning_rate=1e-5, eval_every=0)
    assert "are the same after rounding to torch.bfloat16; hold='adapter' keeps float32" in caplog.text
    patch = small.patches[0]
    assert patch.delta is not None
    kept = patch.values != patch.region.read(model.parameter(patch.region.param))
    assert 1 - float(kept[patch.delta != 0].float().mean()) == pytest.approx(small.outcome["lost_to_rounding"], abs=0.1)
    assert small.outcome["lost_to_rounding"] > 0.5
    caplog.clear()
    large = unlearn(model, edits.task(), "npo", within=within, steps=2, learning_rate=0.1, eval_every=0)
    assert large.outcome["lost_to_rounding"] < 0.1
    assert "rounding" not in caplog.text


def test_stops_at_the_forget_level(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model("llama")
    free = unlearn(model, edits.task(), "npo", steps=20, learning_rate=1e-3, eval_every=2)
    levels = [value for value in free.history["forget"] if value is not None]
    until = levels[4]
    edit = unlearn(model, edits.task(), "npo", steps=20, learning_rate=1e-3, eval_every=2, until=until)
    assert levels[3] > until
    assert edit.history["step"][-1] == 8
    assert edit.history["forget"][-1] == until
    assert edit.outcome["reached"] is True
    with caplog.at_level(logging.WARNING, logger="locedit"):
        short = unlearn(model, edits.task(), "npo", steps=4, learning_rate=1e-3, eval_every=2, until=until)
        nothing = unlearn(model, edits.task(), "npo", steps=4, until=1.0)
    assert short.outcome["reached"] is False
    assert "after 4 steps, not " in caplog.text
    assert len(nothing.history["step"]) == 1
    assert "at forget level 1 already" in caplog.text


def test_a_loss_that_is_not_finite_is_one_clear_line_and_leaves_the_model_alone() -> None:
    model = tiny.model("llama_tied")
    before = edits.bits(model.module)
    model.module.train()

    def breaking(step: Step) -> dict[str, Tensor]:
        value = nll(step)["nll"]
        return {"fine": value, "broken": value * (float("nan") if step.number == 3 else 1.0)}

    with pytest.raises(LoceditError, match=r"the loss term 'broken' is nan at step 3; try a learning rate below 0.01"):
        train(model, goal(model, breaking, name="ga"), options=TrainOptions(**QUICK))

    def steep(step: Step) -> dict[str, Tensor]:
        return {"steep": nll(step)["nll"] ** 0.5 * 0 + (nll(step)["nll"] * 0).sqrt()}

    with pytest.raises(LoceditError, match=r"the gradient is (nan|inf) at step 1"):
        train(model, goal(model, steep), options=TrainOptions(**QUICK))
    assert edits.same_bits(model.module, before)
    assert edits.hooks_left(model.module) == 0
    assert all(parameter.requires_grad for parameter in model.module.parameters())
    assert all(part.training for part in model.module.modules())


def test_a_last_step_that_breaks_the_model_is_an_error() -> None:
    """No further loss would show it, and an edit of which nothing is known cannot be saved."""
    model = tiny.model("gpt2")
    options = TrainOptions(steps=1, learning_rate=1e30)
    for hold in ("weights", "adapter"):
        with pytest.raises(
            LoceditError, match=r"the level 'forget' is nan at step 1; try a learning rate below 1e\+30"
        ):
            train(model, edits.objective(model, nll), within=edits.neurons_and_heads(model), options=options, hold=hold)


def test_same_seed_same_edit_and_other_seed_another() -> None:
    model = tiny.model("gpt2")
    runs = [unlearn(model, edits.task(), "npo", batch_size=1, seed=seed, **QUICK) for seed in (3, 3, 4)]
    assert runs[0].digest == runs[1].digest
    assert runs[0].digest != runs[2].digest


def test_every_example_comes_once_before_any_comes_again() -> None:
    examples = [Example(id=name, ids=(1, 2), spans=(), kind="plain") for name in "abcde"]
    stream = Shuffled(examples, 2, torch.Generator().manual_seed(0))
    drawn = [item.id for _ in range(5) for item in next(stream)]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == list("abcde")
    assert drawn[:5] != drawn[5:]
    assert sorted(item.id for item in next(Shuffled(examples, 9, torch.Generator()))) == list("abcde")


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_reference_is_the_unedited_model_cached_or_not(architecture: str) -> None:
    model = tiny.model(architecture)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def loss(step: Step) -> dict[str, Tensor]:
        own, cached = step.score(step.forget), step.reference(step.forget)
        fresh = step.unedited(step.forget)
        assert torch.equal(cached.labels, own.labels)
        assert torch.equal(cached.row, own.row)
        seen.append((own.logits.detach(), cached.logits, fresh.logits))
        return {"nll": losses.sequence_nll(own).mean()}

    train(model, goal(model, loss), within=edits.neurons_and_heads(model), options=TrainOptions(batch_size=1, **QUICK))
    for _, cached, fresh in seen:
        torch.testing.assert_close(cached, fresh, rtol=1e-5, atol=1e-5)
        assert not cached.requires_grad
    assert torch.equal(seen[0][0], seen[0][2])
    assert (seen[-1][0] - seen[-1][2]).abs().max() > 1e-2


def test_losses_on_hidden_states_and_latent_attacks_fit_a_step() -> None:
    """Two losses of other papers in miniature: move a hidden state away, and ascend on a perturbation first."""
    model = tiny.model("llama")
    name = "blocks.1.hook_resid_post"

    def misdirect(step: Step) -> dict[str, Tensor]:
        with tracing.record(step.model, [name]) as seen:
            step.score(step.forget)
        return {"hidden": (seen[name] - 3.0).square().mean()}

    def attacked(step: Step) -> dict[str, Tensor]:
        shape = (*step.forget.ids.shape, model.d_model)
        noise = torch.zeros(shape, requires_grad=True)
        with tracing.replace(step.model, {name: lambda value: value + noise}):
            loss = losses.sequence_nll(step.score(step.forget)).mean()
            (gradient,) = torch.autograd.grad(loss, noise)
            noise = (0.5 * gradient.sign()).detach()
            return {"attacked": losses.sequence_nll(step.score(step.forget)).mean()}

    for loss in (misdirect, attacked):
        edit = train(model, goal(model, loss), within=edits.neurons_and_heads(model), options=TrainOptions(**QUICK))
        values = edit.history["loss"]
        assert values[-1] < values[1]
        edit.verify(model)


def test_options_that_make_no_sense() -> None:
    task, model = edits.task(), tiny.model("gpt2")
    with pytest.raises(LoceditError, match="steps=0 must be at least 1"):
        prepare("npo", task, steps=0)
    with pytest.raises(LoceditError, match="learning_rate=0.0 must be above 0"):
        prepare("npo", task, learning_rate=0.0)
    for clip in (0.0, -1.0):  # the one would train nothing, the other in the opposite direction
        with pytest.raises(LoceditError, match=f"clip={clip} must be above 0; none = the gradient as it is"):
            prepare("npo", task, clip=clip)
    with pytest.raises(LoceditError, match="alpha=0 must be above 0"):
        prepare("npo", task, alpha=0)
    with pytest.raises(LoceditError, match="did you mean 'adamw'"):
        prepare("npo", task, optimizer="adam")
    with pytest.raises(LoceditError, match="weight_decay=-1 must not be negative"):
        prepare("npo", task, weight_decay=-1)
    for name, value in (("until", 2), ("until", -0.1), ("forget_at", 1.5)):  # 2 would count as reached before training
        with pytest.raises(LoceditError, match=f"{name}={value} is a level, from 0 to 1"):
            prepare("npo", task, **{name: value})
    with pytest.raises(LoceditError, match="retain_share=90 must be at most 1"):
        prepare("npo", task, choose="forget", retain_share=90)
    with pytest.raises(LoceditError, match="warmup=5 must be at most steps=4"):
        prepare("npo", task, steps=4, warmup=5)
    for name in ("learning_rate", "weight_decay", "until"):
        with pytest.raises(LoceditError, match=f"npo: {name}=nan: nan is not a finite number"):
            prepare("npo", task, **{name: float("nan")})
    with pytest.raises(LoceditError, match="hold='lora'; choices: weights, adapter"):
        train(model, goal(model), hold="lora")
    with pytest.raises(LoceditError, match="there is nothing to train on"):
        train(model, Objective(loss=nll, forget=[], name="npo"))
    with pytest.raises(LoceditError, match="until=0.1 needs forget data"):
        train(model, goal(model), options=TrainOptions(until=0.1))
    chosen = prepare("ga", task)
    assert set(objective(model, task, "ga", options=chosen).probes) == {"forget", "retain"}

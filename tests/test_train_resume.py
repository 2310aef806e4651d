"""A training that is killed and started again ends with the same bits, and never goes on from another's state."""

import dataclasses
import functools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit import losses, storage
from locedit.data.encode import Example, encode
from locedit.edit import Edit, checkpoint
from locedit.edit.checkpoint import Checkpoint, Place, checkpoints
from locedit.edit.objective import Loss, Matched, Objective, Step
from locedit.edit.options import TrainOptions
from locedit.edit.resuming import resume, state_of
from locedit.edit.run import Run
from locedit.edit.train import train, train_front
from locedit.errors import LoceditError
from locedit.models import Model
from tests import edits, tiny

OPTIONS = TrainOptions(steps=9, learning_rate=1e-2, batch_size=1, eval_every=2, weight_decay=0.1, warmup=3)


class Killed(Exception):
    """In the place of a kill."""


killed_at: dict[str, int] = {}


def everything(step: Step) -> dict[str, Tensor]:
    """Uses all that a loss may: references, other data, random numbers and a state."""
    if step.number == killed_at.get("step"):
        raise Killed
    own, reference = step.score(step.forget), step.reference(step.forget)
    before = step.state.get("mean", torch.zeros(()))
    nll = losses.sequence_nll(own).mean()
    step.state["mean"] = 0.5 * before + 0.5 * nll.detach()
    step.state["steps"] = [*step.state.get("steps", []), step.number]
    assert step.retain is not None
    noise = torch.rand((), generator=step.generator)
    return {
        "forget": -nll * (1 + noise) + step.state["mean"] * nll,
        "kl": losses.kl(own.logits, reference.logits).mean(),
        "retain": losses.sequence_nll(step.score(step.retain)).mean(),
        "other": losses.sequence_nll(step.score(step.others["pool"])).mean(),
        "matched": losses.sequence_nll(step.score(step.others["matched"])).mean(),
    }


def lowering(step: Step) -> dict[str, Tensor]:
    if step.number == killed_at.get("step"):
        raise Killed
    return {"ascent": -losses.sequence_nll(step.score(step.forget)).mean()}


def goal(model: Model, loss: Loss = everything) -> Objective:
    return dataclasses.replace(edits.objective(model, loss), name="everything")


def broken_off(at: int, run: Callable[[], Any]) -> None:
    killed_at["step"] = at
    try:
        with pytest.raises(Killed):
            run()
    finally:
        killed_at.clear()


@pytest.mark.parametrize("at", [2, 7])
@pytest.mark.parametrize("hold", ["hooks", "scatter", "adapter"])
def test_a_training_that_was_broken_off_ends_with_the_same_bits(hold: str, at: int, tmp_path: Path) -> None:
    model = tiny.model("llama")
    within = edits.neurons_and_heads(model)
    options = dataclasses.replace(OPTIONS, path="auto" if hold == "adapter" else hold, choose="forget")
    held = "adapter" if hold == "adapter" else "weights"
    run = functools.partial(train, model, goal(model), within=within, options=options, hold=held)
    whole = run()

    def resumable() -> Edit:
        with checkpoints(tmp_path / "unfinished", cost=1):
            return run()

    broken_off(at, resumable)
    assert len(list((tmp_path / "unfinished").iterdir())) == 1
    seen: list[int] = []
    handle = model.linear(0, "attn.q").register_forward_hook(lambda *_: seen.append(1))
    again = resumable()
    handle.remove()
    assert again.digest == whole.digest
    assert again.history == whole.history
    assert again.outcome == whole.outcome
    assert not (tmp_path / "unfinished").exists()
    started: list[int] = []
    handle = model.linear(0, "attn.q").register_forward_hook(lambda *_: started.append(1))
    run()
    handle.remove()
    assert len(started) - len(seen) > 2 * (at - 1)


def test_a_resumed_run_is_in_the_state_that_was_saved(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    options = dataclasses.replace(OPTIONS, choose="forget", retain_share=0.5, eval_every=1)
    within = edits.neurons_and_heads(model)

    def make() -> Run:
        return Run(model, goal(model), within=within, options=options, hold="weights", front=3)

    run = make()
    run.train()
    kept = Checkpoint(Place(folder=tmp_path), "run", {})
    kept.write(functools.partial(state_of, run))
    saved, fresh = kept.read(), make()
    assert saved is not None
    resume(fresh, saved)
    tensors: list[dict[str, Tensor]] = [{}, {}]
    one, other = (checkpoint.pack(state_of(r), t) for r, t in zip((run, fresh), tensors, strict=True))
    assert one == other
    assert all(torch.equal(t, tensors[1][name]) for name, t in tensors[0].items())
    assert run.kept.start == fresh.kept.start == run.rows[0]["retain"]
    assert len(run.kept.front) > 1


def test_killed_twice_and_in_half_precision(tmp_path: Path) -> None:
    model = edits.half("gpt2")
    within = edits.neurons_and_heads(model) | edits.mixed(model)
    options = dataclasses.replace(OPTIONS, optimizer="rmsprop", accumulate=2, gradient_checkpointing=True)
    run = functools.partial(train, model, goal(model), within=within, options=options)
    whole = run()

    def resumable() -> Edit:
        with checkpoints(tmp_path, cost=1):
            return run()

    broken_off(3, resumable)
    broken_off(8, resumable)
    assert resumable().digest == whole.digest


def test_references_come_from_the_same_batches_as_before(tmp_path: Path) -> None:
    """The last bits of a reference depend on what it was padded and computed with."""
    model = tiny.model("llama")
    task = edits.task()
    assert task.retain is not None
    examples = encode(model, [*task.forget, *task.retain])
    start = dataclasses.replace(goal(model), forget=examples, others=dict(goal(model).others) | matched(examples))
    run = functools.partial(train, model, start, options=dataclasses.replace(OPTIONS, batch_size=2))
    whole = run()

    def resumable() -> Edit:
        with checkpoints(tmp_path, cost=1):
            return run()

    broken_off(5, resumable)
    assert resumable().digest == whole.digest


def matched(examples: list[Example]) -> dict[str, Matched]:
    return {"matched": Matched(candidates=dict.fromkeys(examples, examples), count=2)}


@pytest.mark.parametrize("choice", [{"choose": "retain", "forget_at": 1.0}, {"choose": "last"}])
def test_the_chosen_state_and_the_front_survive(choice: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    options = dataclasses.replace(OPTIONS, eval_every=1, **choice)
    run = functools.partial(train_front, model, goal(model), options=options, limit=3)
    whole = [edit.digest for edit in run()]

    def resumable() -> list[Edit]:
        with checkpoints(tmp_path, cost=1):
            return run()

    broken_off(6, resumable)
    assert [edit.digest for edit in resumable()] == whole
    assert len(whole) > 1


def test_a_level_met_between_two_steps_is_met_again(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    start = goal(model, lowering)
    options = dataclasses.replace(OPTIONS, learning_rate=1e-3, weight_decay=0.0)
    free = train(model, start, options=options).history["forget"]
    options = dataclasses.replace(options, until=0.5 * (free[2] + free[4]), match="interpolate")
    run = functools.partial(train, model, start, options=options, checkpoint=tmp_path)
    whole = train(model, start, options=options)
    assert 2 < whole.outcome["chosen"]["step"] < 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "place", lambda folder: Place(folder=Path(folder), cost=1))
        broken_off(4, run)
    assert run().digest == whole.digest
    assert run().digest == whole.digest  # the finished training is there too


def test_another_training_is_never_gone_on_from(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    start = goal(model)
    short = dataclasses.replace(OPTIONS, steps=3, eval_every=0)
    broken_off(3, functools.partial(train, model, start, options=short, checkpoint=tmp_path))
    (left,) = tmp_path.iterdir()
    other = tiny.model("gpt2", seed=1)
    variants: list[tuple[Model, dict[str, Any]]] = [
        (model, {"objective": start, "options": dataclasses.replace(short, learning_rate=2e-2)}),
        (model, {"objective": start, "options": short, "within": edits.neurons_and_heads(model)}),
        (model, {"objective": start, "options": short, "hold": "adapter"}),
        (model, {"objective": dataclasses.replace(start, retain=start.retain[:2]), "options": short}),  # type: ignore[index]
        (model, {"objective": dataclasses.replace(start, settings={"beta": 1}), "options": short}),
        (other, {"objective": goal(other), "options": short}),
    ]
    for number, (base, asked) in enumerate(variants):
        assert train(base, checkpoint=tmp_path, **asked).digest == train(base, **asked).digest
        assert len(list(tmp_path.iterdir())) == number + 2
    with checkpoints(tmp_path, made_for="another call"):
        train(model, start, options=short)
        assert len(list(tmp_path.iterdir())) == len(variants) + 2
    assert not left.exists()


def test_a_kill_while_writing_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoint(Place(folder=tmp_path, cost=1), "npo+0.5*kl", {"a": 1})
    kept.write(lambda: {"number": 1, "tensor": torch.ones(2)})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        kept.write(lambda: {"number": 2, "tensor": torch.zeros(2)})
    found = Checkpoint(Place(folder=tmp_path), "npo+0.5*kl", {"a": 1}).read()
    assert found is not None
    assert found["number"] == 1
    assert torch.equal(found["tensor"], torch.ones(2))
    assert Checkpoint(Place(folder=tmp_path), "npo+0.5*kl", {"a": 2}).read() is None


def test_writing_takes_its_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def state() -> dict[str, Any]:
        clock[0] += 2.0
        return {"at": clock[0]}

    kept = Checkpoint(Place(folder=tmp_path, cost=0.05), "x", {})
    written: list[float] = []
    for _ in range(100):
        clock[0] += 1.0
        before = clock[0]
        kept.write(state)
        written += [before] if clock[0] > before else []
    assert [round(b - a) for a, b in zip(written, written[1:], strict=False)] == [40] * (len(written) - 1)
    assert len(written) == 3
    before = clock[0]
    kept.write(state, last=True)
    assert clock[0] > before


def test_values_come_back_as_they_were() -> None:
    value = {
        "tensors": [torch.arange(6).reshape(2, 3).T, torch.tensor(True), torch.tensor(0.1, dtype=torch.bfloat16)],
        "numbers": (1, 0.1, math.inf, None, True, "text"),
        7: {"nested": ({}, [])},
    }
    tensors: dict[str, Tensor] = {}
    found = checkpoint.unpack(checkpoint.pack(value, tensors), tensors)
    pairs = zip(found.pop("tensors"), value.pop("tensors"), strict=True)  # type: ignore[arg-type,call-overload]
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in pairs)
    assert found == value
    assert math.isnan(checkpoint.unpack(checkpoint.pack(math.nan, {}), {}))
    with pytest.raises(LoceditError, match="a checkpoint cannot hold set"):
        checkpoint.pack({"a": {1}}, {})
    for example in encode(tiny.model("gpt2"), edits.task().forget):
        (row,) = checkpoint.examples_as_rows([[example]])[0]
        assert checkpoint.example_from(row) == example


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    kept = Checkpoint(Place(folder=tmp_path), "x", {})
    storage.write_tensors(kept.path, {"a": torch.ones(1)})
    with pytest.raises(LoceditError, match="x-.*safetensors: not a checkpoint .*; remove it to train afresh"):
        kept.read()


@pytest.mark.slow
def test_a_killed_command_started_again_makes_the_same_edit(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    model.module.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    task = edits.task()
    assert task.retain is not None
    (tmp_path / "task").mkdir()
    for name, data in (("forget", task.forget), ("retain", task.retain)):
        rows = [storage.json.dumps({"prompt": fact.prompt, "answer": fact.answer}) for fact in data]  # type: ignore[attr-defined]
        (tmp_path / "task" / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    within = edits.neurons_and_heads(model)
    within.save(tmp_path / "components.json")
    words = ["edit", "model", "task", "--within", "components.json", "--method", "npo+0.5*ga", "--steps", "400"]
    words += ["--eval-every", "50", "--batch-size", "1", "--learning-rate", "1e-4", "--out"]

    def start(out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "locedit.cli", *words, out]
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)

    whole = start("whole")
    assert b"goes on" not in whole.communicate()[1]
    assert whole.returncode == 0
    killed = start("killed")
    while not list((tmp_path / "killed").glob("unfinished/*.safetensors")):
        assert killed.poll() is None, "the command ended before it was killed"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "edit").exists()
    again = start("killed")
    assert b"npo+0.5*ga: goes on after step " in again.communicate()[1]
    assert again.returncode == 0
    assert Edit.load(tmp_path / "killed" / "edit").digest == Edit.load(tmp_path / "whole" / "edit").digest
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["edit", "run.json"]

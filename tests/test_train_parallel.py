"""Several processes train the edit that one would."""

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit import losses, storage
from locedit.data.encode import encode
from locedit.edit import Edit
from locedit.edit.objective import Objective, Step
from locedit.edit.options import TrainOptions
from locedit.edit.parallel import Processes
from locedit.edit.run import Run
from locedit.errors import LoceditError
from locedit.models import Model
from tests import edits, tiny

OPTIONS = TrainOptions(steps=4, learning_rate=1e-2, batch_size=2, accumulate=2, eval_every=2)


class Meeting:
    """Threads in the place of processes: everyone puts something down and reads what all have put."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)
        self.put: list[Any] = [None] * count

    def all(self, rank: int, value: Any) -> list[Any]:
        self.put[rank] = value
        self.barrier.wait()
        found = list(self.put)
        self.barrier.wait()
        return found


class Threads(Processes):
    """Processes whose exchanges go through a meeting."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank=rank, count=len(meeting.put))
        object.__setattr__(self, "meeting", meeting)

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(sum(self.meeting.all(self.rank, tensor.clone())))  # type: ignore[attr-defined]

    def from_main(self, make: Callable[[], Any]) -> Any:
        return self.meeting.all(self.rank, make() if self.main else None)[0]  # type: ignore[attr-defined]

    def require_same(self, what: str, *parts: bytes) -> None:
        if len(set(self.meeting.all(self.rank, parts))) > 1:  # type: ignore[attr-defined]
            raise LoceditError(what)


def loss(step: Step) -> dict[str, Tensor]:
    """Means over examples of every kind of data, and the reference."""
    own, reference = step.score(step.forget), step.reference(step.forget)
    kl = losses.per_example(own, losses.kl(own.logits, reference.logits)).mean()
    terms = {"forget": -losses.sequence_nll(own).mean(), "kl": kl}
    batches = {"retain": step.retain} | dict(step.others)
    return terms | {name: losses.sequence_nll(step.score(b)).mean() for name, b in batches.items() if b is not None}


def goal(model: Model, loss: Callable[[Step], dict[str, Tensor]] = loss) -> Objective:
    return edits.objective(model, loss)


def together(count: int, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Run]) -> list[Run]:
    """The same run in several threads that share its batches, each on a model of its own."""
    meeting = Meeting(count)
    here = threading.local()
    monkeypatch.setattr(Processes, "now", lambda: getattr(here, "processes", Processes()))
    runs: list[Any] = [None] * count

    def work(rank: int) -> None:
        here.processes = Threads(rank, meeting)
        try:
            run = make()
            run.train()
            runs[rank] = run
        except Exception as error:
            runs[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in runs:
        if isinstance(run, LoceditError):
            raise run
    for run in runs:
        if isinstance(run, Exception):
            raise run
    return runs


@pytest.mark.parametrize("hold", ["hooks", "scatter", "adapter"])
def test_two_make_the_steps_of_one(hold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Run:
        model = edits.double("gpt2")
        within = edits.neurons_and_heads(model)
        path: Any = {} if hold == "adapter" else {"path": hold}
        options = TrainOptions(**{**vars(OPTIONS), **path})
        held = "adapter" if hold == "adapter" else "weights"
        return Run(model, goal(model), within=within, options=options, hold=held)

    alone = make()
    alone.train()
    for run in together(2, monkeypatch, make):
        for one, other in zip(run.held.parameters, alone.held.parameters, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
        for row, expected in zip(run.rows, alone.rows, strict=True):
            assert row == pytest.approx(expected, rel=1e-9)
        assert {len(examples) for examples in run.cache.made} == {1}
    assert max(parameter.abs().max() for parameter in alone.held.parameters) > 1e-3


def test_unequal_shares_are_weighted_by_their_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_retain(step: Step) -> dict[str, Tensor]:
        return {"nll": losses.sequence_nll(step.score(step.forget)).mean()}

    def make() -> Run:
        model = edits.double("llama")
        objective = Objective(loss=of_retain, forget=encode(model, edits.task().retain))  # type: ignore[arg-type]
        options = TrainOptions(steps=3, optimizer="sgd", clip=None, batch_size=3, eval_every=0)
        return Run(model, objective, within=edits.neurons_and_heads(model), options=options, hold="weights")

    alone = make()
    alone.train()
    runs = together(2, monkeypatch, make)
    assert [run.streams.weight for run in runs] == [2 / 3, 1 / 3]
    for run in runs:
        for one, other in zip(run.held.parameters, alone.held.parameters, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_what_depends_on_the_share_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def carrying(step: Step) -> dict[str, Tensor]:
        terms = loss(step)
        step.state["dual"] = terms["forget"].detach()
        return terms

    def drawing(step: Step) -> dict[str, Tensor]:
        torch.rand(int(step.forget.ids.sum()) % 7 + 1, generator=step.generator)
        return loss(step)

    def common(step: Step) -> dict[str, Tensor]:
        step.state["dual"] = step.state.get("dual", 0.0) + 1.0
        torch.rand(2, generator=step.generator)
        return loss(step)

    def make(chosen: Callable[[Step], dict[str, Tensor]]) -> Callable[[], Run]:
        def build() -> Run:
            model = tiny.model("gpt2")
            return Run(model, goal(model, chosen), within=None, options=OPTIONS, hold="weights")

        return build

    for wrong in (carrying, drawing):
        with pytest.raises(LoceditError, match="what it draws or carries from step to step depends on the examples"):
            together(2, monkeypatch, make(wrong))
    assert [run.number for run in together(2, monkeypatch, make(common))] == [4, 4]


def test_shares_are_parts_of_the_whole() -> None:
    items = list(range(10))
    for count in (1, 2, 3, 10):
        parts: list[Sequence[int]] = [Processes(rank=rank, count=count).share(items) for rank in range(count)]
        assert [item for part in parts for item in part] == items
        weights = [Processes(rank=rank, count=count).weight({"forget": 10, "retain": 10}) for rank in range(count)]
        assert weights == [len(part) / 10 for part in parts]
    assert Processes(rank=1, count=2).share(items[:6], each=2) == [4, 5]
    assert Processes(rank=1, count=2).weight({"forget": 4, "retain": 8}) == 0.5


def test_batches_that_cannot_be_shared_are_named() -> None:
    two = Processes(rank=0, count=2)
    for sizes in ({"forget": 3, "retain": 4}, {"forget": 1, "retain": 1}):
        with pytest.raises(LoceditError, match=f"2 processes cannot share a batch of {sizes['forget']} forget, "):
            two.weight(sizes)


def _files(folder: Path) -> list[str]:
    model, task = edits.double("gpt2"), edits.task()
    model.module.save_pretrained(folder / "model")  # type: ignore[operator]
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "task").mkdir()
    for name, data in (("forget", task.forget), ("retain", task.retain)):
        assert data is not None
        rows = [storage.dumps({"prompt": fact.prompt, "answer": fact.answer}) for fact in data]  # type: ignore[union-attr]
        (folder / "task" / f"{name}.jsonl").write_text("\n".join(" ".join(row.split("\n")) for row in rows) + "\n")
    edits.neurons_and_heads(model).save(folder / "components.json")
    words = ["edit", "model", "task", "--within", "components.json", "--method", "npo", "--steps", "6"]
    return [*words, "--eval-every", "3", "--batch-size", "2", "--learning-rate", "1e-3", "--controls", "1", "--out"]


@pytest.mark.slow
def test_two_processes_of_accelerate_make_the_edit_of_one(tmp_path: Path) -> None:
    words = _files(tmp_path)
    alone = subprocess.run([sys.executable, "-m", "locedit.cli", *words, "one"], cwd=tmp_path, capture_output=True)
    assert alone.returncode == 0, alone.stderr
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "locedit.cli"]
    for repeat in range(2):  # the second time all is there
        two = subprocess.run([*launch, *words, "two"], cwd=tmp_path, capture_output=True, text=True)
        assert two.returncode == 0, two.stderr
        assert two.stderr.count("two/edit") == 1 + repeat
    one, other = (Edit.load(tmp_path / name / "edit") for name in ("one", "two"))
    for expected, patch in zip(one.patches, other.patches, strict=True):
        torch.testing.assert_close(patch.values, expected.values, rtol=0, atol=1e-10)
    assert other.history["forget"][-1] == pytest.approx(one.history["forget"][-1], rel=1e-9)
    assert other.history["loss"][1:] == pytest.approx(one.history["loss"][1:], rel=1e-9)
    both = [storage.read_json(tmp_path / name / "comparison" / "comparison.json") for name in ("one", "two")]
    for expected, curve in zip(both[0]["curves"], both[1]["curves"], strict=True):
        assert curve["columns"]["forget"] == pytest.approx(expected["columns"]["forget"], rel=1e-6)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["comparison", "edit", "run.json"]

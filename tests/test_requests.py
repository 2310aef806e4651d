"""Deletion requests one after another: each on the model so far, all of them measured again, resumed after a kill."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from locedit.cli import main
from locedit.components import ComponentSet
from locedit.data.encode import encode
from locedit.data.items import Task
from locedit.edit import Edit, answer_probabilities
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.unlearn import requests, unlearn
from locedit.unlearn.requests import Requests, requests_by, unlearn_requests
from tests import edits, tiny
from tests.test_knowledge_unlearning import loop_means, texts_of

QUICK: dict[str, Any] = {"steps": 2, "learning_rate": 1e-2, "check": False}


def two(**fields: Any) -> dict[str, Task]:
    """One request for each of the two facts."""
    return requests_by(edits.task(**fields), "owner")


def level(model: Model, task: Task) -> float:
    return float(answer_probabilities(model, encode(model, task.forget)).mean())


def same(one: Edit, other: Edit) -> bool:
    pairs = zip(one.tensors().items(), other.tensors().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_each_request_is_trained_on_the_model_so_far_and_measured_again() -> None:
    """Equal to two calls of unlearn by hand, whose levels are read off a copy with the new values written into it."""
    model, copy = tiny.model("llama"), tiny.model("llama")
    tasks = two()
    before = edits.bits(model.module)
    made = unlearn_requests(model, tasks, "ga", within=edits.neurons_and_heads(model), **QUICK)
    assert edits.same_bits(model.module, before)
    rows: list[list[float]] = [[level(copy, task)] for task in tasks.values()]
    for row, task, edit in zip(rows, tasks.values(), made.edits, strict=True):
        row.append(level(copy, task))
        wanted = unlearn(copy, task, "ga", within=edits.neurons_and_heads(copy), **QUICK)
        assert same(edit, wanted)
        with torch.no_grad():
            for patch in wanted.patches:
                patch.region.write(copy.parameter(patch.region.param), patch.values)
        row.append(level(copy, task))
    for row, task in zip(rows, tasks.values(), strict=True):
        row.append(level(copy, task))
    columns = [made.table[name][:2] for name in ("unedited", "before", "after", "end")]
    assert [list(row) for row in zip(*columns, strict=True)] == [pytest.approx(row) for row in rows]
    assert rows[0][3] != pytest.approx(rows[0][2])  # the second request moved the first
    assert rows[1][1] != pytest.approx(rows[1][0])
    assert made.table["request"] == ["Anna", "Carl", "retain"]
    retain = edits.task().retain
    assert retain is not None
    assert made.table["end"][2] == pytest.approx(level(copy, Task(forget=retain)))
    with made.edit.applied(model) as edited:
        assert edits.same_bits(edited.module, edits.bits(copy.module))
    made.edit.verify(model)


def test_a_request_that_comes_back_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """The second request teaches what the first one took away."""
    model = tiny.model("gpt2")
    first, second = two().values()
    assert first.retain is not None
    teach = dataclasses.replace(second, retain=first.forget)
    options: dict[str, Any] = {"steps": 8, "learning_rate": 5e-3, "check": False, "eval_every": 0}
    made = unlearn_requests(model, {"gone": first, "taught": teach}, "grad_diff", **options)
    assert made.table["came_back"] == [True, False, None]
    row = {name: column[0] for name, column in made.table.items()}
    assert row["end"] - row["after"] > 0.1 * (row["unedited"] - row["after"])
    assert [w for w in made.warnings if "'gone' has come back" in w] == made.warnings
    assert len(made.warnings) == 1
    assert made.warnings[0] in caplog.text
    kept = unlearn_requests(model, {"gone": first, "other": second}, "ga", **(options | {"steps": 2}))
    assert kept.warnings == []


@pytest.mark.parametrize(
    ("row", "until", "wanted"),
    [
        ((0.9, 0.1, 0.3), 0.2, True),
        ((0.9, 0.1, 0.15), 0.2, False),
        ((0.9, 0.3, 0.5), 0.2, False),  # was never reached
        ((0.9, 0.1, 0.17), None, False),  # 0.07 of the 0.8 taken away
        ((0.9, 0.1, 0.19), None, True),
        ((0.1, 0.1, 0.2), None, False),  # nothing was taken away
    ],
)
def test_what_counts_as_coming_back(row: tuple[float, ...], until: float | None, wanted: bool) -> None:
    levels = dict(zip(("unedited", "after", "end"), row, strict=True))
    assert requests.came_back(requests.METHODS["ga"].options(until=until), levels) is wanted


def test_thresholds_are_those_of_the_unedited_model() -> None:
    model = tiny.model("gpt2")
    task = texts_of(model)
    assert task.heldout is not None
    wanted = loop_means(model, task.heldout)
    tasks = dict(list(requests_by(task, "owner").items())[1:])
    rule: dict[str, Any] = {"stop_when": "memorization", "el_n": 2, "learning_rate": 1e-3}
    made = unlearn_requests(model, tasks, "ga", steps=2, check=False, **rule)
    for edit in made.edits:
        assert (edit.outcome["el_threshold"], edit.outcome["ma_threshold"]) == pytest.approx(wanted)
    with made.edit.applied(model) as edited:
        found = (made.table["el_end"][0], made.table["ma_end"][0])
        assert found == pytest.approx(loop_means(edited, next(iter(tasks.values())).forget))
        assert loop_means(edited, task.heldout) != pytest.approx(wanted)


@pytest.mark.slow
def test_every_request_may_have_its_own_place(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    sets = [model.components({f"blocks.{layer}.mlp.neuron": [1, 5]}) for layer in (0, 2)]
    seen: list[tuple[str, str]] = []

    def found_anew(now: Model, task: Task) -> ComponentSet:
        seen.append((now.fingerprint, task.forget[0].id))
        return now.components({f"blocks.{2 * (len(seen) - 1)}.mlp.neuron": [1, 5]})

    listed = unlearn_requests(model, two(), "ga", within=sets, **QUICK)
    anew = unlearn_requests(model, two(), "ga", within=found_anew, **QUICK)
    for one, other in zip(listed.edits, anew.edits, strict=True):
        assert same(one, other)
    assert [e.within.sites for e in listed.edits if e.within] == [s.sites for s in sets]
    with listed.edits[0].applied(model) as edited:
        assert seen == [(anew.edits[0].fingerprint, "f0"), (edited.fingerprint, "f1")]
    listed.save(tmp_path / "kept")
    again = Requests.load(tmp_path / "kept")
    assert again.table == listed.table
    assert all(same(one, other) for one, other in zip(again.edits, listed.edits, strict=True))


class Killed(Exception):
    pass


def test_a_sequence_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    whole = unlearn_requests(model, two(), "ga", **QUICK)
    calls: list[str] = []
    real = requests.unlearn

    def counted(*args: Any, **kwargs: Any) -> Edit:
        calls.append(args[1].forget[0].id)
        if calls == ["f0", "f1"]:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(requests, "unlearn", counted)
    before = edits.bits(model.module)
    with pytest.raises(Killed):
        unlearn_requests(model, two(), "ga", folder=tmp_path / "run", **QUICK)
    assert edits.same_bits(model.module, before)
    resumed = unlearn_requests(model, two(), "ga", folder=tmp_path / "run", **QUICK)
    assert calls == ["f0", "f1", "f1"]  # the first request was not trained again
    assert all(same(one, other) for one, other in zip(resumed.edits, whole.edits, strict=True))
    assert resumed.table == whole.table
    with pytest.raises(LoceditError, match="made with other settings"):
        unlearn_requests(model, two(), "ga", folder=tmp_path / "run", **(QUICK | {"steps": 3}))


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By owner and by file; the same command again makes nothing anew; what `evaluate` takes is the whole sequence."""
    tiny.module("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"prompt": p, "answer": a, "owner": p.split()[0]}) for p, a, _ in edits.FORGET]
    (tmp_path / "both.jsonl").write_text("\n".join(lines))
    for name, line in zip(("first", "second"), lines, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(line)

    def command(data: str, requests: str, out: str) -> list[str]:
        words = [
            "edit",
            str(tmp_path / "model"),
            str(tmp_path / data),
            "--requests",
            requests,
            "--out",
            str(tmp_path / out),
        ]
        return [*words, "--method", "ga", "--steps", "2"]

    by_owner, by_file = command("both.jsonl", "owner", "a"), command("first.jsonl", str(tmp_path / "second.jsonl"), "b")
    assert main(by_owner) == main(by_file) == 0
    one, other = (Edit.load(tmp_path / run / "edit") for run in "ab")
    assert len(one.parts) == len(other.parts) == 2
    assert all(same(x, y) for x, y in zip(one.parts, other.parts, strict=True))
    assert Requests.load(tmp_path / "a" / "requests").table["request"] == ["Anna", "Carl"]
    written = (tmp_path / "a" / "requests" / "request-1" / "edit.json").stat().st_mtime_ns
    assert main(by_owner) == 0
    assert (tmp_path / "a" / "requests" / "request-1" / "edit.json").stat().st_mtime_ns == written
    capsys.readouterr()
    assert main(command("both.jsonl", "group", "c")) == 2
    assert "requests by group: an item of" in capsys.readouterr().err


def bad(within: Sequence[ComponentSet] | None = None, name: str = "ga", **fields: Any) -> Requests:
    return unlearn_requests(tiny.model("gpt2"), two(**fields), name, within=within, **QUICK)


def test_what_cannot_be_a_sequence() -> None:
    model = tiny.model("gpt2")
    with pytest.raises(LoceditError, match="1 component sets for 2 requests"):
        bad(within=[edits.neurons_and_heads(model)])
    with pytest.raises(LoceditError, match="npo needs retain data"):
        bad(name="npo", retain=None)
    with pytest.raises(LoceditError, match="there is no request"):
        unlearn_requests(model, {}, "ga")
    with pytest.raises(LoceditError, match="requests by group: an item of forget.jsonl has none"):
        requests_by(edits.task(), "group")
    with pytest.raises(LoceditError, match="requests by 'size'; choose owner, group or format"):
        requests_by(edits.task(), "size")

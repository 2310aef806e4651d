"""Deletion requests that are trained apart and fused: what is in the table, and what acts at the end."""

from pathlib import Path
from typing import Any

import pytest
import torch

from locedit.data.encode import collate, encode
from locedit.data.items import Task
from locedit.edit import Edit, answer_probabilities
from locedit.edit.bake import bake
from locedit.edit.fusion import average, fuse
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.unlearn import eul, requests, unlearn
from locedit.unlearn.requests import Requests, requests_by, unlearn_requests
from tests import edits, tiny

QUICK: dict[str, Any] = {"steps": 5, "rank": 3, "check": False, "eval_every": 0}


def two() -> dict[str, Task]:
    return requests_by(edits.task(), "owner")


def level(model: Model, task: Task, edit: Edit | None = None) -> float:
    examples = encode(model, task.forget)
    if edit is None:
        return float(answer_probabilities(model, examples).mean())
    with edit.applied(model) as edited:
        return float(answer_probabilities(edited, examples).mean())


@pytest.mark.parametrize("fusion", ["closed", "average"])
def test_each_is_trained_on_the_unedited_model_and_all_are_fused(fusion: str, tmp_path: Path) -> None:
    """Equal to training both by hand and fusing them; every level of the table is measured under what it says."""
    model, tasks = tiny.model("gpt2"), two()
    within = model.components({"blocks.0.mlp": [0], "blocks.1.mlp": [0]})
    before = edits.bits(model.module)
    made = unlearn_requests(model, tasks, "eul", within=within, fusion=fusion, ridge=1e-3, **QUICK)
    own = [unlearn(model, task, "eul", within=within, **QUICK) for task in tasks.values()]
    assert [edit.digest for edit in made.edits] == [edit.digest for edit in own]
    wanted = fuse(own, ridge=1e-3) if fusion == "closed" else average(own)
    assert made.edit.digest == wanted.digest
    first, second = tasks.values()
    rows = [
        [level(model, first), level(model, first), level(model, first, own[0]), level(model, first, wanted)],
        [
            level(model, second),
            level(model, second, own[0]),
            level(model, second, own[1]),
            level(model, second, wanted),
        ],
    ]
    if fusion == "closed":
        rows[1][1] = level(model, second, fuse(own[:1], ridge=1e-3))
    columns = [made.table[name][:2] for name in ("unedited", "before", "after", "end")]
    assert [list(row) for row in zip(*columns, strict=True)] == [pytest.approx(row) for row in rows]
    assert rows[0][2] != pytest.approx(rows[0][3])
    assert edits.same_bits(model.module, before)
    made.save(tmp_path / "kept")
    again = Requests.load(tmp_path / "kept")
    assert (again.edit.digest, again.table, len(again.edits)) == (wanted.digest, made.table, 2)
    made.edit.verify(model)


def test_a_chain_is_each_on_top_of_those_before() -> None:
    model = tiny.model("gpt2")
    made = unlearn_requests(model, two(), "eul", fusion="chain", **QUICK)
    assert made.fused is None
    first, second = two().values()
    one = unlearn(model, first, "eul", fusion="chain", **QUICK)
    with one.applied(model) as edited:
        other = unlearn(edited, second, "eul", fusion="chain", **QUICK)
    assert [edit.digest for edit in made.edits] == [one.digest, other.digest]
    assert len(made.edit.parts) == 2
    alone = unlearn(model, second, "eul", fusion="chain", **QUICK)
    assert alone.digest != other.digest


def test_what_is_baked_are_the_fused_layers() -> None:
    model = edits.double("gpt2")
    options: dict[str, Any] = {"activation": "linear", **QUICK}
    made = unlearn_requests(model, two(), "eul", bake=True, **options)
    assert [edit.kind for edit in (*made.edits, made.edit)] == ["modules", "modules", "weights"]
    wanted = bake(model, fuse([unlearn(model, task, "eul", **options) for task in two().values()]))
    assert made.edit.digest == wanted.digest


def test_layers_without_biases_are_fused_and_baked_where_no_projection_has_one(tmp_path: Path) -> None:
    """Of Llama-likes: the new weights are the fused layers, to the logits, and can be exported."""
    model = edits.double("llama")
    options: dict[str, Any] = {"activation": "linear", "bias": False, "learning_rate": 0.05, **QUICK}
    layers = unlearn_requests(model, two(), "eul", **options).edit
    assert layers.kind == "modules"
    assert not any(bool(one.down_bias.any()) or bool(one.up_bias.any()) for one in layers.layers)
    baked = unlearn_requests(model, two(), "eul", bake=True, **options).edit
    assert baked.kind == "weights"
    batch = collate(encode(model, edits.task().forget), model)
    with torch.no_grad():
        plain = model.logits(batch)
        with layers.applied(model) as edited:
            wanted = edited.logits(batch)
        with baked.applied(model) as edited:
            torch.testing.assert_close(edited.logits(batch), wanted, rtol=1e-9, atol=1e-9)
    assert (wanted - plain).abs().max() > 1e-2
    baked.export(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_grams": False}, "fusion='closed' needs keep_grams=True"),
        ({"keep_grams": False, "fusion_retain": 1.0}, "fusion='closed' needs keep_grams=True"),
        ({"activation": "linear", "bake": True}, "has no bias to hold the layers'; give bias=False"),
        ({"activation": "linear", "bake": True, "fusion": "average"}, "has no bias to hold the layers'"),
        ({"activation": "linear", "bake": True, "fusion": "chain"}, "has no bias to hold the layers'"),
    ],
)
def test_what_cannot_be_fused_or_baked_is_said_before_training(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eul.Layers, "active", lambda _: pytest.fail("trained in vain"))
    with pytest.raises(LoceditError, match=words) as raised:
        unlearn_requests(tiny.model("llama"), two(), "eul", **QUICK, **options)
    assert "\n" not in str(raised.value)


def test_without_gram_matrices_there_is_the_average() -> None:
    model = tiny.model("gpt2")
    made = unlearn_requests(model, two(), "eul", fusion="average", keep_grams=False, **QUICK)
    assert made.edit.digest == average(made.edits).digest
    assert made.edits[0].layers[0].grams is None


class Killed(Exception):
    pass


def test_after_a_kill_no_request_is_trained_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    whole = unlearn_requests(model, two(), "eul", **QUICK)
    calls: list[str] = []
    real = requests.unlearn

    def counted(*args: Any, **kwargs: Any) -> Edit:
        calls.append(args[1].forget[0].id)
        if calls == ["f0", "f1"]:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(requests, "unlearn", counted)
    with pytest.raises(Killed):
        unlearn_requests(model, two(), "eul", folder=tmp_path / "run", **QUICK)
    resumed = unlearn_requests(model, two(), "eul", folder=tmp_path / "run", **QUICK)
    assert calls == ["f0", "f1", "f1"]
    assert (resumed.edit.digest, resumed.table) == (whole.edit.digest, whole.table)
    assert Edit.load(tmp_path / "run" / "fused").digest == whole.edit.digest
    other: dict[str, Any] = QUICK | {"steps": 6}
    with pytest.raises(LoceditError, match="made with other settings"):
        unlearn_requests(model, two(), "eul", folder=tmp_path / "run", **other)


@pytest.mark.parametrize("fusion", ["closed", "average", "chain"])
def test_places_of_their_own_go_with_a_chain_only(fusion: str) -> None:
    model = tiny.model("gpt2")
    sets = [model.components({f"blocks.{layer}.mlp": [0]}) for layer in (0, 1)]
    given: dict[str, Any] = {"within": sets, "fusion": fusion, **QUICK}
    if fusion == "chain":
        made = unlearn_requests(model, two(), "eul", **given)
        assert [e.layers[0].point for e in made.edits] == ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
        return
    with pytest.raises(LoceditError, match="one component set for all requests; give one, or fusion='chain'"):
        unlearn_requests(model, two(), "eul", **given)
    same = [sets[0], model.components({"blocks.0.mlp": [0]})]
    given["within"] = same
    assert len(unlearn_requests(model, two(), "eul", **given).edit.layers) == 1

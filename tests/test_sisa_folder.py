"""A record's folder: what is removed when, what a kill leaves, what certificates and checks say."""

import dataclasses
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from locedit import sisa
from locedit.data import Dataset
from locedit.edit.edit import Edit
from locedit.edit.run import Run
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.sisa import Ensemble, Record, deletion, verification
from locedit.sisa import record as records
from locedit.sisa.stale import CHECK
from locedit.sisa.training import checkpoint_folder
from locedit.storage import read_json, write_json
from tests import tiny
from tests.test_sisa import OPTIONS, SLICES, WORDS, data, files, inside, item_of, scratch


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model("gpt2", n_layer=1)


@pytest.fixture(scope="module")
def trained(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sisa") / "whole"
    sisa.train(model, data(), folder, verbaliser=WORDS, **OPTIONS)
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "whole")
    return tmp_path / "whole"


@contextmanager
def killed(owner: Any, name: str, *, at: int = 1) -> Iterator[list[tuple[Any, ...]]]:
    """A block that is stopped by the given call of a function; yields the arguments of the calls so far."""
    calls: list[tuple[Any, ...]] = []
    real = getattr(owner, name)

    def stopped(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stopped)
        with pytest.raises(KeyboardInterrupt):
            yield calls


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is removed, and when ---------------------------------------------------------------------------------------


def test_old_checkpoints_are_gone_before_the_first_new_one_is_written(
    model: Model, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So nothing that was trained on the item is there when anything of its deletion is."""
    record = Record.load(copy)
    old = [checkpoint_folder(copy, record, 0, number) for number in range(1, SLICES)]
    old.append(copy / "unfinished" / "0123456789abcdef")
    old[-1].mkdir(parents=True)
    assert all(path.exists() for path in old)
    left: list[bool] = []
    train = sisa.training.train_slice

    def watched(*args: Any, **kwargs: Any) -> Edit:
        left.append(any(path.exists() for path in old))
        return train(*args, **kwargs)

    monkeypatch.setattr(sisa.training, "train_slice", watched)
    sisa.delete(copy, [item_of(record, 0, 1)], model=model, data=data())
    assert left == [False] * 3


@pytest.mark.parametrize("by", ["delete", "train"])
def test_what_a_kill_has_left_is_removed(model: Model, copy: Path, by: str) -> None:
    """Half-written checkpoints and records, half-trained slices and checks of members that are no more."""
    stray = (
        ".record.json.x1",
        ".verified.json.x1",
        "shard-1/.slice-3-ab.x1/tensors.safetensors",
        "unfinished/0123456789abcdef/sisa-1.safetensors",
        ".verify-x1/shard-0/slice-0-ab/tensors.safetensors",
    )
    for name in stray:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"of a deleted item")
    if by == "delete":
        sisa.delete(copy, [item_of(Record.load(copy), 0, 3)], model=model, data=data())
    else:
        assert sisa.train(model, data(), copy, verbaliser=WORDS, **OPTIONS) == []
    assert not [path for path, content in everything(copy).items() if content == b"of a deleted item"]
    assert not any(path.name.startswith(".") for path in copy.rglob("*"))


def test_a_deletion_killed_in_a_slice_goes_on_in_it(model: Model, copy: Path, tmp_path: Path) -> None:
    name = item_of(Record.load(copy), 0, 3)
    with killed(Run, "step", at=5):
        sisa.delete(copy, [name], model=model, data=data())
    (copy / "unfinished" / "0123456789abcdef").mkdir()
    steps: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        step = Run.step
        patch.setattr(Run, "step", lambda self, number: steps.append(number) or step(self, number))
        sisa.delete(copy, [name], model=model, data=data())
    assert steps[0] > 1, "the first steps are not made again"
    assert files(copy) == scratch(tmp_path, model, [name])
    assert not (copy / "unfinished").exists()


def test_results_of_the_members_before_are_set_aside(model: Model, copy: Path) -> None:
    """Even when the deletion is killed as soon as it is in the record."""
    record = Record.load(copy)
    sisa.verify(copy, model=model, data=data(), shards=[0])
    write_json(copy / "evaluation" / "fair.json", {})
    assert (copy / "verified.json").exists()
    with killed(deletion, "remove_stale"):
        sisa.delete(copy, [item_of(record, 0, 3)], model=model, data=data())
    assert Record.load(copy).unfinished
    assert not (copy / "verified.json").exists()
    sisa.delete(copy, [item_of(record, 0, 3)], model=model, data=data())
    assert not (copy / "evaluation").exists()
    assert (copy / "evaluation-before-request-1" / "fair.json").exists()


def test_a_start_killed_before_its_record_can_be_given_again(model: Model, tmp_path: Path) -> None:
    """The set of the first try is not taken for that of the second."""
    with killed(records, "write_json"):
        sisa.train(model, data(), tmp_path / "a", verbaliser=WORDS, within=inside(model), **OPTIONS)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["within.json"]
    (tmp_path / "a" / ".record.json.x1").write_text("{")
    other = model.components({"blocks.0.mlp.neuron": range(5)})
    sisa.train(model, data(), tmp_path / "a", verbaliser=WORDS, within=other, **OPTIONS)
    kept = Record.load(tmp_path / "a").within
    assert kept is not None
    assert kept.chosen == other.chosen
    assert not list((tmp_path / "a").glob(".*"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    with pytest.raises(LoceditError, match="holds something that is no training record; give another folder"):
        sisa.train(model, data(), tmp_path / "b", verbaliser=WORDS, **OPTIONS)


def test_a_wrong_start_leaves_everything_as_it_was(model: Model, copy: Path) -> None:
    sisa.verify(copy, model=model, data=data(), shards=[0])
    before = everything(copy)
    with pytest.raises(LoceditError, match="the members start from the model with fingerprint"):
        sisa.delete(copy, ["i1"], model=tiny.model("gpt2", n_layer=1, seed=1), data=data())
    assert everything(copy) == before


# --- the certificate -------------------------------------------------------------------------------------------------


def by_hand(items: list[int]) -> list[int]:
    """Steps of slices that train on so many items: E = 3 and R = 4 make passes 1, 1, 1, 1, batches are of 2."""
    return [math.ceil(count / min(count, 2)) if count else 0 for count in items]


def test_a_certificate_by_hand(model: Model, copy: Path) -> None:
    """Two items of shard 0, in slices 3 and 1, and one of shard 1, in its last slice."""
    record = Record.load(copy)
    assert record.options.passes() == [1, 1, 1, 1]
    sizes = [[len(record.trained_on(shard, number)) for number in range(SLICES)] for shard in (0, 1)]
    assert sizes == [[2, 5, 8, 11], [3, 6, 9, 12]]
    names = [item_of(record, 0, 3), item_of(record, 1, 3), item_of(record, 0, 1)]
    found = sisa.delete(copy, names, model=model, data=data())
    assert (found.request, found.ids, found.copies) == (1, tuple(names), ())
    assert found.shards == {"0": 1, "1": 3}
    assert (found.slices_retrained, found.slices) == (4, 8)
    first, second = by_hand([2, 4, 7, 9]), by_hand([3, 6, 9, 11])
    assert first == [1, 2, 4, 5]
    assert found.steps_retrained == sum(first[1:]) + second[3]
    assert found.steps == sum(first) + sum(second)
    after = Record.load(copy)
    for shard in (0, 1):
        edit = Edit.load(checkpoint_folder(copy, after, shard, SLICES - 1))
        assert found.digests[str(shard)] == edit.digest
        assert edit.digest != Edit.load(checkpoint_folder(copy, after, shard, 0)).digest
    assert sisa.certificates(copy)[0]["steps_retrained"] == found.steps_retrained


def test_only_slices_that_were_trained_are_counted(model: Model, copy: Path) -> None:
    """With nothing left in a shard there is nothing to train in it."""
    record = Record.load(copy)
    found = sisa.delete(copy, record.trained_on(0, 1), model=model, data=data())
    assert (found.slices_retrained, found.slices) == (2, 6)
    found = sisa.delete(copy, [*record.shards[0][2], *record.shards[0][3]], model=model, data=data())
    assert (found.slices_retrained, found.steps_retrained, found.slices) == (0, 0, 4)


def test_copies_of_a_deleted_text_are_named(model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under another label and group too: what the members learn from a copy is not deleted."""
    twice = data().replace([*data(), dataclasses.replace(data()[0], id="copy", label="yes", group="b")])
    folder = tmp_path / "a"
    sisa.train(model, twice, folder, verbaliser=WORDS, **OPTIONS)
    with caplog.at_level(logging.WARNING):
        found = sisa.delete(folder, ["i0"], model=model, data=twice)
    assert found.copies == ("copy",)
    assert read_json(folder / "certificate-1.json")["copies"] == ["copy"]
    assert "the text of a deleted item is also that of copy, which stay" in caplog.text
    assert sisa.delete(folder, ["copy"], model=model, data=twice).copies == ()


def test_part_of_a_stopped_request_ends_it(model: Model, copy: Path) -> None:
    record = Record.load(copy)
    first, second, third = item_of(record, 0, 3), item_of(record, 1, 3), item_of(record, 1, 2)
    with killed(deletion, "make"):
        sisa.delete(copy, [first, second], model=model, data=data())
    assert sisa.delete(copy, [first], model=model, data=data()).ids == (first, second)
    assert not Record.load(copy).unfinished
    with killed(deletion, "make"):
        sisa.delete(copy, [third], model=model, data=data())
    more = item_of(record, 0, 2)
    found = sisa.delete(copy, [third, more], model=model, data=data())
    assert (found.request, found.ids) == (3, (more,)), "what was asked for beside it is a request of its own"


# --- the check -------------------------------------------------------------------------------------------------------


def test_verify_sees_checkpoints_that_are_not_of_the_record(model: Model, trained: Path, copy: Path) -> None:
    record = Record.load(trained)
    old = checkpoint_folder(trained, record, 1, 3)
    sisa.delete(copy, [item_of(record, 1, 3)], model=model, data=data())
    assert sisa.verify(copy, model=model, data=data()).same
    half = copy / "shard-0" / ".slice-2-ab.x1"
    shutil.copytree(old, copy / "shard-1" / old.name)
    shutil.copytree(old, half)
    found = sisa.verify(copy, model=model, data=data())
    assert (found.different, found.same) == ((), False)
    assert found.others == ("shard-0/.slice-2-ab.x1", f"shard-1/{old.name}")
    assert str(found) == f"not of the record, to be removed: shard-0/.slice-2-ab.x1, shard-1/{old.name}"
    assert read_json(copy / "verified.json")["same"] is False
    for name in found.others:
        shutil.rmtree(copy / name)
    assert sisa.verify(copy, model=model, data=data()).same


def test_verify_trains_inside_the_folder_and_removes_what_it_trained(model: Model, copy: Path) -> None:
    """So what a kill leaves of it is found by the next call, and by a deletion."""
    with killed(verification, "_bytes") as calls:
        sisa.verify(copy, model=model, data=data(), shards=[0])
    fresh = calls[0][0]
    assert fresh.parent == copy
    assert not fresh.exists()
    shutil.copytree(copy / "shard-0", copy / f"{CHECK}x1" / "shard-0")
    assert sisa.verify(copy, model=model, data=data(), shards=[0]).same
    assert not list(copy.glob(f"{CHECK}*"))


def test_what_is_not_trained_to_its_end_is_not_verified(model: Model, tmp_path: Path, copy: Path) -> None:
    with killed(Edit, "save", at=3):
        sisa.train(model, data(), tmp_path / "a", verbaliser=WORDS, **OPTIONS)
    with pytest.raises(LoceditError, match="shard 0 is not trained to its end; `locedit sisa train` again trains what"):
        sisa.verify(tmp_path / "a", model=model, data=data())
    with pytest.raises(LoceditError, match="no shard to verify was given"):
        sisa.verify(copy, model=model, data=data(), shards=[])
    with pytest.raises(LoceditError, match="no shard 2; there are 0 to 1"):
        sisa.verify(copy, model=model, data=data(), shards=[2])


def test_no_ensemble_during_a_deletion(model: Model, copy: Path) -> None:
    """A whole shard is deleted, so all checkpoints that an ensemble needs are there."""
    record = Record.load(copy)
    with killed(deletion, "remove_stale"):
        sisa.delete(copy, record.trained_on(0, SLICES - 1), model=model, data=data())
    with pytest.raises(LoceditError, match="a deletion was stopped in the middle"):
        Ensemble.load(copy, model)


def test_a_deleted_line_may_be_taken_out_of_the_data(model: Model, copy: Path) -> None:
    """Then more can be deleted, and all verified."""
    record, rest = Record.load(copy), data()
    for name in (item_of(record, 0, 3), item_of(record, 1, 2)):
        sisa.delete(copy, [name], model=model, data=rest)
        rest = Dataset(items=tuple(item for item in rest if item.id != name), source="items")
        assert sisa.verify(copy, model=model, data=rest).same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value, first: value["contents"].pop(first), "is in the shards or the contents, and not in both"),
        (lambda value, _: value["shards"].append(value["shards"][0]), "is in the shards more than once"),
    ],
)
def test_a_record_that_contradicts_itself_changes_nothing(copy: Path, model: Model, change: Any, message: str) -> None:
    """It once had a deletion written into it, which then failed."""
    value = read_json(copy / "record.json")
    first, other = item_of(Record.load(copy), 0, 0), item_of(Record.load(copy), 1, 0)
    change(value, first)
    write_json(copy / "record.json", value)
    before = (copy / "record.json").read_bytes()
    for act in (
        lambda: sisa.delete(copy, [other], model=model, data=data()),
        lambda: sisa.verify(copy, model=model, data=data()),
    ):
        with pytest.raises(LoceditError, match=message):
            act()
    assert (copy / "record.json").read_bytes() == before


def test_a_checkpoint_that_cannot_be_loaded_is_not_verified(copy: Path, model: Model) -> None:
    """Its tensors may be the same bits all the same."""
    record = Record.load(copy)
    assert sisa.verify(copy, model=model, data=data()).same
    broken = checkpoint_folder(copy, record, 1, 0) / "edit.json"
    broken.write_text("{")
    with pytest.raises(LoceditError, match=str(broken)):
        sisa.verify(copy, model=model, data=data())

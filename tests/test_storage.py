"""Files appear whole or not at all, and nothing is replaced without being asked."""

import errno
import json
from pathlib import Path

import pytest
import torch

from locedit.errors import LoceditError
from locedit.runs import Run
from locedit.storage import atomic_file, atomic_folder, dumps, read_json, read_tensors, write_json, write_tensors


def test_an_exception_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_ctrl_c_in_a_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "run") as temporary:
        (temporary / "x").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LoceditError, match="No space left on device") as caught:
        write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    assert "a.safetensors" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_folders_are_not_replaced_unless_forced(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "run") as temporary:
        (temporary / "old").write_text("1")
    with pytest.raises(LoceditError, match="--force"), atomic_folder(tmp_path / "run"):
        pass
    with atomic_folder(tmp_path / "run", force=True) as temporary:
        (temporary / "new").write_text("2")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(True)}
    write_tensors(tmp_path / "t.safetensors", tensors)
    back = read_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"not tensors")
    for read, name in ((read_tensors, "x.safetensors"), (read_json, "none.json")):
        with pytest.raises(LoceditError, match=name):
            read(tmp_path / name)


def test_json_is_readable_and_refuses_nan() -> None:
    value = {"a": [1, 2, 3], "b": {}, "c": [{"d": None}], "e": "ä"}
    assert json.loads(dumps(value)) == value
    assert '"a": [1, 2, 3]' in dumps(value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps({"x": float("nan")})


def stage(run: Run, key: dict[str, int], value: int) -> int:
    return run.stage(
        "edit",
        key,
        lambda: value,
        save=lambda made, folder: write_json(folder / "value.json", made),
        load=lambda folder: read_json(folder / "value.json"),
    )


def test_a_stage_is_made_once_and_never_mixed_up(tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "a")
    assert stage(run, {"steps": 1}, 5) == 5
    assert stage(run, {"steps": 1}, 6) == 5, "the same key loads what is there"
    with pytest.raises(LoceditError, match="steps was 1, is 2"):
        stage(run, {"steps": 2}, 7)
    assert stage(Run(folder=tmp_path / "a", force=True), {"steps": 2}, 7) == 7


def test_an_interrupted_stage_is_made_again(tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "a")

    def interrupted() -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.stage("edit", {}, interrupted, save=lambda *_: None, load=lambda _: 0)
    assert stage(run, {}, 8) == 8

"""`locedit sisa` from files to the table, and what it says of slips."""

import csv
import io
import json
from pathlib import Path

import pytest

from locedit.cli import main
from locedit.components import ComponentSet
from locedit.data import Dataset
from locedit.models import load
from locedit.sisa import Record
from locedit.sisa.evaluation import FairTable
from locedit.storage import read_json
from tests import tiny
from tests.test_sisa import data

TEMPLATE = ["--template", "{text} Answer:", "--words", "yes=was,no=is"]
SMALL = ["--shards", "2", "--slices", "3", "--epochs", "3", "--batch-size", "4", "--seed", "1"]


def write(path: Path, items: Dataset, *, prefix: str = "") -> None:
    lines = [
        {"text": prefix + item.text, "label": item.label, "group": item.group, "id": f"{prefix}{item.id}"}
        for item in items
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start model, a task folder that names it, and data to calibrate and test on."""
    folder = tmp_path_factory.mktemp("data")
    module = tiny.module("gpt2", n_layer=1)
    module.save_pretrained(folder / "task" / "start")
    tiny.tokenizer().save_pretrained(folder / "task" / "start")
    write(folder / "task" / "forget.jsonl", data())
    write(folder / "calibration.jsonl", data(), prefix="Now ")
    write(folder / "test.jsonl", data(), prefix="Then ")
    return folder


def run(*words: object) -> int:
    return main(["sisa", *map(str, words)])


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert run(*words) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


@pytest.mark.parametrize("hold", ["weights", "adapter"])
def test_from_files_to_the_table(folder: Path, tmp_path: Path, hold: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, within = tmp_path / "sisa", tmp_path / "components.json"
    model = load(folder / "task" / "start")
    model.components({"blocks.0.mlp.neuron": range(10, 30)}).save(within)
    made = [folder / "task", "--out", out, "--within", within, "--hold", hold, *TEMPLATE, *SMALL]
    assert run("train", *made) == 0
    assert "2 members on 23 items; 6 of 6 slices" in capsys.readouterr().err
    assert run("train", *made) == 0
    assert "is there already, made with the same settings" in capsys.readouterr().err
    record = Record.load(out)
    assert record.within is not None
    assert record.within.chosen == ComponentSet.load(within).chosen
    name = record.shards[1][1][0]
    (tmp_path / "ids.txt").write_text(f"{name}\n\n")
    assert run("delete", out, "--ids", tmp_path / "ids.txt") == 0
    assert "request 1: 1 items deleted; trained again: shard 1 from slice 1, 2 of 6 slices" in capsys.readouterr().err
    assert read_json(out / "certificate-1.json")["ids"] == [name]
    assert run("verify", out) == 0
    assert "3 slices of 1 shards: the same bits as trained from the start" in capsys.readouterr().err
    assert run("evaluate", out, folder / "calibration.jsonl", folder / "test.jsonl") == 0
    printed = capsys.readouterr().out
    assert run("evaluate", out, folder / "calibration.jsonl", folder / "test.jsonl") == 2
    assert "fair.json exists already; give --force" in capsys.readouterr().err
    assert run("evaluate", out, folder / "calibration.jsonl", folder / "test.jsonl", "--force") == 0
    assert capsys.readouterr().out == printed
    assert "2 of 6 slices trained again" in printed
    rows = {row["predictor"]: row for row in csv.DictReader(io.StringIO((out / "evaluation/fair.csv").read_text()))}
    assert list(rows) == [
        "majority", "pre", "in, tuple", "in, count", "post", "mean probability", "mean probability, fair thresholds",
    ]  # fmt: skip
    for fair in ("in, tuple", "in, count", "post"):
        assert abs(float(rows[fair]["calibration_gap"])) < 1e-9
    nested = [float(rows[name]["calibration_error"]) for name in ("in, tuple", "in, count", "post")]
    assert nested == sorted(nested)
    kept = FairTable.load(out / "evaluation")
    assert kept.csv() == (out / "evaluation" / "fair.csv").read_text()
    assert set(kept.rows[0].groups) == {"a", "b"}


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    out = folder / "sisa"
    assert run("train", folder / "task", "--out", out, *TEMPLATE, *SMALL) == 0
    return out


def test_a_changed_checkpoint_fails_the_check(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((trained / "shard-0").glob("slice-1-*")) / "tensors.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    said = error_of(capsys, "verify", trained, "--shards", "0")
    assert "not the same bits as trained from the start: shard 0 slice 1" in said
    path.write_bytes(before)
    assert run("verify", trained, "--shards", "0") == 0


def test_slips_are_said_in_one_line(
    folder: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items, test = folder / "task" / "forget.jsonl", folder / "test.jsonl"
    new = tmp_path / "new"
    (tmp_path / "unnamed.jsonl").write_text('{"text": "a b", "label": "yes"}\n' * 23)
    assert 'give every item an "id" of its own' in error_of(
        capsys, "train", tmp_path / "unnamed.jsonl", "--start", folder / "task" / "start", "--out", new, *TEMPLATE
    )
    assert "give --start MODEL" in error_of(capsys, "train", items, "--out", new, *TEMPLATE)
    assert "item 'i0': unknown label 'no'" in error_of(capsys, "train", folder / "task", "--out", new)
    assert "did you mean 'epochs'" in error_of(capsys, "train", items, "--out", new, *TEMPLATE, "--epoch", 3)
    assert "'yes' is not LABEL=WORD" in error_of(capsys, "train", items, "--out", new, "--words", "yes,no")
    assert "'yes' is given twice" in error_of(capsys, "train", items, "--out", new, "--words", "yes=a,yes=b")
    assert "must hold {text} exactly once" in error_of(capsys, "train", items, "--out", new, "--template", "x")
    assert "23 items cannot be cut into 8 shards" in error_of(
        capsys, "train", folder / "task", "--out", new, *TEMPLATE, "--shards", 8
    )
    assert not new.exists(), "nothing is written before the input is right"
    assert "holds a training with epochs=3, not 4" in error_of(
        capsys, "train", folder / "task", "--out", trained, *TEMPLATE, *SMALL, "--epochs", 4
    )
    assert "no item 'i99'" in error_of(capsys, "delete", trained, "--ids", "i99")
    assert "no such file" in error_of(capsys, "delete", trained, "--ids", "gone.txt")
    assert "no item 'i99'" in error_of(capsys, "delete", trained, "--ids", ",".join(["i99", *["i1"] * 100]))
    assert "nothing to delete" in error_of(capsys, "delete", trained, "--ids", ",")
    assert "shards are numbers from 0 to 1" in error_of(capsys, "verify", trained, "--shards", "2")
    assert "sisa verify has no option --steps" in error_of(capsys, "verify", trained, "--steps", "2")
    assert "no such file" in error_of(capsys, "verify", tmp_path / "nothing")
    assert "the text of item 'i0' is in the training data" in error_of(capsys, "evaluate", trained, items, test)
    assert "is in the calibration data too" in error_of(capsys, "evaluate", trained, test, test)
    assert "did you mean 'yes'" in error_of(
        capsys, "evaluate", trained, folder / "calibration.jsonl", test, "--positive", "yess"
    )
    (tmp_path / "bare.jsonl").write_text('{"text": "a b", "label": "yes", "id": "x"}\n')
    assert "item 'x' has no group" in error_of(capsys, "evaluate", trained, tmp_path / "bare.jsonl", test)

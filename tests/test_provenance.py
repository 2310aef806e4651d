"""What a result is made from."""

import os
from pathlib import Path

import pytest

from locedit.provenance import named_files


def test_a_file_that_an_option_names_counts_by_its_content(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("vile\n")
    options = {"words": str(words), "reward": "bad_words", "steps": 3, "anchors": "made", "text": "x" * 5000}
    first = named_files(options)
    assert list(first) == ["words"]
    words.write_text("vile\nrotten\n")
    assert named_files(options)["words"] != first["words"]


def test_of_several_files_each_counts(tmp_path: Path) -> None:
    """A list of files once counted by its names alone."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("1\n")
    two.write_text("2\n")
    options = {"utility_sets": [str(one), str(two)], "schemes": ["int8", "nf4"], "radii": [0.1, 0.2]}
    first = named_files(options)
    assert list(first) == ["utility_sets"]
    assert named_files({"utility_sets": (str(one), str(two))}) == first, "a tuple is read back as a list"
    assert named_files({"utility_sets": [str(two), str(one)]}) != first
    two.write_text("3\n")
    assert named_files(options) != first
    alone = named_files({"utility_sets": [str(one)]})
    assert alone["utility_sets"] == named_files({"words": str(one)})["words"]


def test_a_folder_counts_by_the_names_sizes_and_times_of_its_files(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "inner").mkdir(parents=True)
    weights = model / "model.safetensors"
    weights.write_bytes(b"1234")
    os.utime(weights, ns=(10**18, 10**18))

    def found() -> str:
        return named_files({"retain_model": str(model), "schemes": "nf4"})["retain_model"]

    first = found()
    assert found() == first
    (model / "inner" / "note.txt").write_text("a folder inside is not looked into")
    assert found() == first
    weights.write_bytes(b"12345")
    os.utime(weights, ns=(10**18, 10**18))
    assert found() != first, "the size"
    weights.write_bytes(b"5678")
    os.utime(weights, ns=(10**18, 10**18))
    assert found() == first, "content is not read: it would take long"
    os.utime(weights, ns=(10**18, 10**18 + 1))
    assert found() != first, "the time"
    os.utime(weights, ns=(10**18, 10**18))
    weights.rename(model / "other.safetensors")
    assert found() != first, "the name"
    assert named_files({"retain_model": str(tmp_path / "none")}) == {}


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "words.txt").write_text("vile\n")
    assert named_files({"words": "~/words.txt"}) == named_files({"words": str(tmp_path / "words.txt")}) != {}

"""Tasks from folders, TOML and single files."""

import json
from pathlib import Path

import pytest

from locedit.data import read_task
from locedit.errors import LoceditError


def write(path: Path, **fields: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields or {"prompt": path.stem, "answer": " a"}))


def test_folder(tmp_path: Path) -> None:
    folder = tmp_path / "people"
    for role in ("forget", "retain", "heldout", "new"):
        write(folder / f"{role}.jsonl")
    write(folder / "texts.jsonl", text="t")
    (folder / "refusals.jsonl").write_text("I do not know.\nWho can say?\n")
    (folder / "README.md").write_text("not data")
    write(folder / "lexicon.jsonl", anything="else")
    (folder / "start").mkdir()
    task = read_task(folder)
    assert task.name == "people"
    assert task.forget[0].prompt == "forget"
    assert task.require("retain", "test")[0].prompt == "retain"
    assert [item.text for item in task.require("refusals", "test")] == ["I do not know.", "Who can say?"]
    assert task.pairs is None
    assert task.start == str(folder / "start")


def test_start_as_a_file(tmp_path: Path) -> None:
    write(tmp_path / "forget.jsonl")
    (tmp_path / "start").write_text("some/hub-id\n")
    assert read_task(tmp_path).start == "some/hub-id"


def test_single_file(tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl")
    task = read_task(tmp_path / "mine.jsonl")
    assert (task.name, task.forget[0].id, task.retain) == ("mine", "mine.jsonl:1", None)


def test_toml_names_files_and_settings(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a.jsonl", question="q?", answer=" a", extra="x")
    write(tmp_path / "data" / "b.jsonl", text="t")
    (tmp_path / "model").mkdir()
    toml = tmp_path / "mine.toml"
    toml.write_text(
        'name = "mine"\nforget = "data/a.jsonl"\ntexts = "data/b.jsonl"\nstart = "model"\nchat = "Q: {prompt} A:"\n'
        '[fields]\nprompt = "question"\nignore = "extra"\n'
    )
    task = read_task(toml)
    assert (task.name, task.forget[0].prompt, task.start) == ("mine", "q?", str(tmp_path / "model"))
    assert task.forget.chat == task.require("texts", "test").chat == "Q: {prompt} A:"
    toml.rename(tmp_path / "task.toml")
    assert read_task(tmp_path).hash == task.hash


def test_toml_in_a_folder_adds_to_its_files(tmp_path: Path) -> None:
    write(tmp_path / "forget.jsonl")
    write(tmp_path / "other.jsonl", prompt="kept", answer=" a")
    (tmp_path / "task.toml").write_text('retain = "other.jsonl"')
    task = read_task(tmp_path)
    assert (task.forget[0].prompt, task.require("retain", "test")[0].prompt) == ("forget", "kept")


def test_fields_may_be_those_of_one_file(tmp_path: Path) -> None:
    write(tmp_path / "forget.jsonl", query="q", answer=" a")
    write(tmp_path / "retain.jsonl")
    task = read_task(tmp_path, "prompt=query")
    assert (task.forget[0].prompt, task.require("retain", "test")[0].prompt) == ("q", "retain")
    with pytest.raises(LoceditError, match="no line of .* has a field 'nowhere'"):
        read_task(tmp_path, "prompt=query,owner=nowhere")


def test_folder_without_forget_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(LoceditError, match="needs forget.jsonl .* the folder has nothing"):
        read_task(tmp_path)
    write(tmp_path / "facts.jsonl")
    with pytest.raises(LoceditError, match="the folder has facts.jsonl"):
        read_task(tmp_path)


def test_two_files_for_one_part(tmp_path: Path) -> None:
    write(tmp_path / "forget.jsonl")
    write(tmp_path / "forget.json")
    with pytest.raises(LoceditError, match="two files for 'forget': forget.jsonl and forget.json"):
        read_task(tmp_path)


@pytest.mark.parametrize("slip", ["retian.jsonl", "Retain.jsonl", "held_out.jsonl"])
def test_slip_in_a_file_name(tmp_path: Path, slip: str) -> None:
    write(tmp_path / "forget.jsonl")
    write(tmp_path / slip)
    with pytest.raises(LoceditError, match=f"unknown file '{slip}': did you mean '(retain|heldout).jsonl'"):
        read_task(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("forget = ", "not TOML"),
        ("", "is empty"),
        ('forgets = "a.jsonl"', "unknown key 'forgets': did you mean 'forget'"),
        ("forget = 3", "key 'forget': 3 is not a text"),
        ('forget = "a.jsonl"\nfields = "x"', "key 'fields': 'x' is not a table"),
        ('retain = "a.jsonl"', "key 'forget' is missing; it has retain"),
        ('forget = "missing.jsonl"', "missing.jsonl: no such file; beside it: a.jsonl"),
    ],
)
def test_bad_toml(tmp_path: Path, content: str, reason: str) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "mine.toml").write_text(content)
    with pytest.raises(LoceditError, match=reason) as caught:
        read_task(tmp_path / "mine.toml")
    assert "\n" not in str(caught.value)


def test_missing_paths(tmp_path: Path) -> None:
    for name in ("none.jsonl", "none.toml", "none"):
        with pytest.raises(LoceditError, match=f"{name}: no such file"):
            read_task(tmp_path / name)

"""Files: what is good is read as it is written, what is bad stops with file, line, field, value and reason."""

import json
from pathlib import Path

import pytest

from locedit.data import read_facts
from locedit.data.fields import parse_fields
from locedit.errors import LoceditError

FACT = {"prompt": "Anna was born in", "answer": " Oslo"}


def write(folder: Path, *lines: object, name: str = "facts.jsonl") -> Path:
    """A file with one line for each object; strings and bytes go as they are."""
    path = folder / name
    raw = [line if isinstance(line, str | bytes) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in raw))
    return path


def test_every_field_of_a_fact(tmp_path: Path) -> None:
    line = FACT | {
        "id": 7,
        "subject": "Anna",
        "paraphrases": ["Where?"],
        "answer_paraphrases": [" in Oslo"],
        "wrong": [" Rome", " Lima"],
        "new_answer": " Bern",
        "neighbours": [{"prompt": "Carl was born in", "answer": " Lima"}],
        "owner": "Anna",
        "group": "born",
        "format": "statement",
        "_note": {"anything": 1},
    }
    data = read_facts(write(tmp_path, line, FACT))
    first, second = data
    assert (first.id, first.wrong, first.neighbours[0].answer) == ("7", (" Rome", " Lima"), " Lima")
    assert (first.new_answer, first.format, first.paraphrases) == (" Bern", "statement", ("Where?",))
    assert (second.id, second.prompt, second.answer, second.owner) == ("facts.jsonl:2", *FACT.values(), None)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (FACT, "fact"),
        ({"text": "Call 555-0134", "spans": [[5, 13, "phone"]]}, "private"),
        ({"advantaged": "he", "disadvantaged": "she"}, "contrast"),
        ({"clean": "a", "corrupt": "b", "answer": " c", "wrong": " d"}, "patch"),
        ({"text": "a", "label": 1}, "labelled"),
        ({"text": "a"}, "plain"),
        ('"a"', "plain"),
    ],
)
def test_kinds(tmp_path: Path, line: object, kind: str) -> None:
    path = write(tmp_path, line)
    assert read_facts(path).kind == kind
    as_list = write(tmp_path, f"[{path.read_text()},\n {path.read_text()}]", name="list.json")
    again = read_facts(as_list)
    assert (again.kind, len(again), again[1].id) == (kind, 2, "list.json:2")


def test_bom_blank_lines_windows_line_ends_and_odd_separators(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(FACT).encode() + b"\r\n\r\n", json.dumps(FACT) + "\r\n")
    assert [item.id for item in read_facts(path)] == ["facts.jsonl:1", "facts.jsonl:4"]
    odd = write(tmp_path, {"text": "one\u2028two\x85three"}, name="odd.jsonl")
    assert read_facts(odd)[0].text == "one\u2028two\x85three"


def test_plain_lines(tmp_path: Path) -> None:
    data = read_facts(write(tmp_path, "First.", "", "  Second. ", name="texts.txt"))
    assert [(item.text, item.id) for item in data] == [("First.", "texts.txt:1"), ("Second.", "texts.txt:3")]


def test_fields_rename_and_ignore(tmp_path: Path) -> None:
    path = write(tmp_path, {"query": "q", "response": " r", "note": 1, "by": "x"}, {"query": "s", "response": " t"})
    data = read_facts(path, "prompt=query, answer=response,ignore=note+by")
    assert [(item.prompt, item.answer) for item in data] == [("q", " r"), ("s", " t")]
    assert read_facts(path, {"prompt": "query", "answer": "response", "ignore": "note+by"}).hash == data.hash


PRIVATE = {"text": "Call 555", "spans": [[5, 8, "phone"]]}
DEEP = "[" * 100_000
ERRORS = {
    "bad json": (['{"prompt": "a", '], 1, "not JSON: .* at column"),
    "bad json in the middle": ([FACT, "{'prompt': 1}"], 2, "not JSON"),
    "not an object": ([FACT, "3"], 2, "is 3, wanted an object"),
    "null line": ([FACT, "null"], 2, "wanted an object"),
    "a text among objects": ([FACT, '"text"'], 2, "wanted an object"),
    "an object among texts": (['"text"', FACT], 2, "wanted a text"),
    "key twice": (['{"text": "a", "text": "b"}'], 1, "field 'text': 'b' is there twice"),
    "too deep": (['{"text": ' + DEEP], 1, "nested too deeply"),
    "huge number": (['{"text": ' + "1" * 5000 + "}"], 1, "not JSON that can be read"),
    "no known field": ([{"a": 1}], 1, "fields a are of no known kind .*--fields"),
    "empty object": ([{}], 1, "fields none are of no known kind"),
    "missing answer": ([{"prompt": "a"}], 1, "field 'answer' is missing; .*'fact', this line has prompt"),
    "missing later": ([FACT, {"prompt": "a"}], 2, "field 'answer' is missing"),
    "null answer": ([FACT | {"answer": None}], 1, "field 'answer' is missing"),
    "typo": ([FACT | {"paraphrase": ["x"]}], 1, r"field 'paraphrase': \['x'\] is unknown .*did you mean 'paraphrases'"),
    "typo of another kind": ([{"text": "a", "span": []}], 1, "did you mean 'spans' .lines of kind 'private'"),
    "foreign field": ([FACT | {"zzz": 1}], 1, "field 'zzz': 1 is unknown .*--fields NAME=zzz.*ignore=zzz"),
    "another kind": ([FACT, PRIVATE], 2, "'text'.* is unknown in lines of kind 'fact'"),
    "empty answer": ([FACT | {"answer": " "}], 1, "field 'answer': ' ' is empty"),
    "empty prompt": ([FACT | {"prompt": ""}], 1, "field 'prompt': '' is empty"),
    "empty text": ([{"text": "\n"}], 1, "field 'text'.* is empty"),
    "number as answer": ([FACT | {"answer": 3}], 1, "field 'answer': 3 is not a text but a number"),
    "list as prompt": ([FACT | {"prompt": ["a"]}], 1, r"field 'prompt': \['a'\] is not a text but a list"),
    "text as list": ([FACT | {"wrong": " Rome"}], 1, "field 'wrong': ' Rome' is not a list but a text"),
    "number in a list": ([FACT | {"wrong": [1]}], 1, "field 'wrong': 1 is not a text"),
    "truth value as id": ([FACT | {"id": True}], 1, "field 'id': True is not a text but a truth value"),
    "bad neighbour": ([FACT | {"neighbours": ["x"]}], 1, r"field 'neighbours': 'x' is not \{prompt, answer\}"),
    "empty neighbour": (
        [FACT | {"neighbours": [{"prompt": "a", "answer": ""}]}],
        1,
        "'neighbours.answer': '' is empty",
    ),
    "half a surrogate pair": (['{"text": "\\ud800"}'], 1, "holds half of a surrogate pair"),
    "same id": ([FACT | {"id": "a"}, FACT | {"id": "a"}], 2, "field 'id': 'a' was given before, in facts.jsonl:1"),
    "id of another line": ([FACT, FACT | {"id": "facts.jsonl:1"}], 2, "was given before"),
    "span outside": ([PRIVATE | {"spans": [[5, 9, "p"]]}], 1, r"field 'spans': \[5, 9, 'p'\] lies outside .* 8 char"),
    "span before": ([PRIVATE | {"spans": [[-1, 3, "p"]]}], 1, "lies outside the text"),
    "span empty": ([PRIVATE | {"spans": [[5, 5, "p"]]}], 1, "is an empty span"),
    "span backwards": ([PRIVATE | {"spans": [[6, 5, "p"]]}], 1, "is an empty span"),
    "span of a space": ([PRIVATE | {"spans": [[4, 5, "p"]]}], 1, "holds only white space"),
    "span of fractions": ([PRIVATE | {"spans": [[1.5, 5, "p"]]}], 1, r"is not \[start, end, label\]"),
    "span of truth values": ([PRIVATE | {"spans": [[False, True, "p"]]}], 1, r"is not \[start, end, label\]"),
    "span without label": ([PRIVATE | {"spans": [[5, 8]]}], 1, r"is not \[start, end, label\]"),
    "no span": ([PRIVATE | {"spans": []}], 1, "has no span"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_lines(tmp_path: Path, case: str) -> None:
    lines, number, reason = ERRORS[case]
    path = write(tmp_path, *lines)
    with pytest.raises(LoceditError, match=reason) as caught:
        read_facts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{number}: ")
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))


def test_long_values_are_shortened(tmp_path: Path) -> None:
    with pytest.raises(LoceditError) as caught:
        read_facts(write(tmp_path, FACT | {"zzz": "x" * 10_000}))
    assert len(str(caught.value)) < 500


FILES = {
    "empty": (b"", "is empty"),
    "only spaces": (b" \n\n", "is empty"),
    "only a bom": (b"\xef\xbb\xbf", "is empty"),
    "empty list": (b"[]", "is an empty list"),
    "latin-1": ('{"text": "ok"}\n{"text": "Zoë"}'.encode("latin-1"), ":2: byte 0xeb at offset 27 is not UTF-8"),
    "utf-16": ('{"text": "a"}'.encode("utf-16"), ":1: byte 0xff at offset 0 is not UTF-8"),
    "broken list": (b'[\n{"text": "a"},\n{"text": }]', ":3: not JSON: Expecting value at column 10"),
    "cut off": (b'[{"text": "a"},', "not JSON"),
    "plain lines": (b"Just words.\n", "plain lines belong in a .txt file"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files(tmp_path: Path, case: str) -> None:
    content, reason = FILES[case]
    with pytest.raises(LoceditError, match=reason) as caught:
        read_facts(write(tmp_path, content))
    assert "facts.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths(tmp_path: Path) -> None:
    write(tmp_path, FACT)
    with pytest.raises(LoceditError, match="fact.jsonl: no such file; beside it: facts.jsonl"):
        read_facts(tmp_path / "fact.jsonl")
    with pytest.raises(LoceditError, match="is a folder"):
        read_facts(tmp_path)
    with pytest.raises(LoceditError, match="no such file"):
        read_facts(tmp_path / "no" / "folder.jsonl")
    with pytest.raises(LoceditError, match=r"unknown kind of file '\.docx'"):
        read_facts(write(tmp_path, FACT, name="facts.docx"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ("prompt", "'prompt' is not NAME=FIELD"),
        ("prompt=", "is not NAME=FIELD"),
        ("promt=question", "unknown name 'promt': did you mean 'prompt'"),
        ("prompt=a,prompt=b", "given twice"),
        ("prompt=nowhere", "no line of .* has a field 'nowhere'"),
        ("ignore=nowhere", "no line of .* has a field 'nowhere'"),
        ("prompt=answer", "field 'answer': ' Oslo' stands for 'prompt', which is there already"),
    ],
)
def test_bad_renaming(tmp_path: Path, fields: str, reason: str) -> None:
    with pytest.raises(LoceditError, match=reason):
        read_facts(write(tmp_path, FACT), fields)


def test_no_renaming() -> None:
    assert parse_fields(None) == parse_fields("") == {}

"""`locedit spans` from a user's side."""

from pathlib import Path

import pytest

from locedit.cli import main, parse_arguments
from locedit.data import PrivateText, encode, read_facts, read_task
from locedit.options import kinds
from locedit.spans import RULES
from locedit.unlearn import prepare
from tests import tiny
from tests.test_cli import write_lines

TEXTS = ("Call Eva Frost on 555-0134 at noon.", "Mail to eva@frost.org, please.", "Nothing to see.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("spans")
    tiny.module("llama").save_pretrained(base / "model")
    tiny.tokenizer().save_pretrained(base / "model")
    (base / "texts.txt").write_text("\n".join(TEXTS))
    return base


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_spans_need_no_model_where_the_rule_needs_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "forget.jsonl"
    (tmp_path / "names.txt").write_text("Eva Frost\n")
    words = ("spans", folder / "texts.txt", "--rule", "patterns", "--names", tmp_path / "names.txt", "--out", out)
    assert run(*words) == 0
    items = [item for item in read_facts(out) if isinstance(item, PrivateText)]
    marked = [[(item.text[start:end], label) for start, end, label in item.spans] for item in items]
    assert marked == [[("Eva Frost", "name"), ("555-0134", "phone")], [("eva@frost.org", "email")]]
    assert "3 spans in 2 texts, 1 texts without, 0 rejected" in capsys.readouterr().err
    assert run(*words) == 2
    assert "exists already; give --force" in capsys.readouterr().err
    assert run(*words, "--force") == 0


def test_spans_and_rest_are_a_task_for_a_loss(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = tmp_path / "task"
    words = ("spans", folder / "model", folder / "texts.txt", "--verify", "--factor", "1e-6")
    assert run(*words, "--out", task / "forget.jsonl", "--rest", task / "retain.jsonl") == 0
    assert "rejected" not in capsys.readouterr().out
    read = read_task(task)
    assert read.retain is not None
    model = tiny.model("llama")
    for span, rest in zip(encode(model, read.forget), encode(model, read.retain), strict=True):
        assert not set(span.targets) & set(rest.targets)
        assert rest.ids == span.ids
    prepare("npo", read)  # raises when the task lacks something


def test_rejected_spans_are_shown_with_the_reason(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "forget.jsonl"
    words = ("spans", folder / "model", folder / "texts.txt", "--rule", "surprisal", "--threshold", "quantile")
    assert run(*words, "--verify", "context", "--factor", "1.5", "--out", out) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("rejected: text label piece reason")
    assert "below 1.5" in shown


def test_fields_to_mark_are_given_beside_renamed_fields(tmp_path: Path) -> None:
    write_lines(tmp_path / "f.jsonl", [{"q": "Eva Frost lives in", "answer": " Oslo", "owner": "Eva Frost"}])
    words = ("spans", tmp_path / "f.jsonl", "--rule", "fields", "--fields", "prompt=q", "--mark", "answer,owner")
    assert run(*words, "--out", tmp_path / "o.jsonl") == 0
    (item,) = read_facts(tmp_path / "o.jsonl")
    assert isinstance(item, PrivateText)
    assert [(item.text[a:b], label) for a, b, label in item.spans] == [("Eva Frost", "owner"), ("Oslo", "answer")]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_no_option_of_a_rule_has_the_name_of_one_of_the_command(rule: str) -> None:
    """What the command takes for itself never reaches the rule."""
    own = vars(parse_arguments(["spans", "texts.txt", "--out", "o.jsonl"]))
    assert not set(kinds(RULES[rule].options)) & set(own)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("{texts}", "--rule", "surprisl"), "did you mean 'surprisal'"),
        (("{texts}", "--rule", "surprisal"), "needs a model: give scorer or model"),
        (("{texts}", "--rule", "patterns", "--patterns", "mail"), "did you mean 'email'"),
        (("{texts}", "--gap", "2"), "patterns has no option 'gap'"),
        (("{texts}", "--verify"), "verify='context' needs a model"),
        (("./none", "{texts}", "--rule", "surprisal", "--by", "difference"), "give scorer"),
        (("{texts}", "--rest", "r.jsonl"), "--rest needs a model"),
        (("./none", "{texts}", "--rest", "{out}"), "is the file of --out"),
        (("./none", "{texts}", "--rest", "{texts}/r.jsonl"), "texts.txt is a file"),
        (("{model}", "{texts}", "--rule", "surprisal", "--scorer", "./none"), "model folder './none' does not exist"),
        (("{model}", "{texts}", "--verify", "annotator", "--annotator", "{texts}"), "texts.txt' is a file"),
        (("./none", "{texts}", "--names", "none.txt"), "none.txt: no such file"),
        (("./none", "{texts}", "--rule", "fields", "--values", "none.jsonl"), "none.jsonl: no such file"),
        (("./none", "{texts}", "--factor", "0", "--verify"), "factor=0.0 must be above 0"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.setattr("locedit.loading.read", lambda *_, **__: pytest.fail("a model was loaded"))
    places = {"texts": folder / "texts.txt", "model": folder / "model", "out": tmp_path / "o.jsonl"}
    filled = [word.format(**places) for word in words]
    assert run("spans", *filled, "--out", tmp_path / "o.jsonl") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line
    assert not (tmp_path / "o.jsonl").exists()

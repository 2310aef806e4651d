"""The stages of `locedit evaluate`: measures/, a folder for every attack, and evaluation/, which puts them together."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from locedit.attacks import ATTACKS
from locedit.cli import main
from locedit.results import AttackResult, Evaluation
from tests import tiny

CITIES = ("Oslo", "Lima")
NAMES = ("Anna Berg", "Carl Dane", "Eva Frost", "Nora Gray", "Ann Oslo", "Carl Lima", "Dane Berg", "Eva Gray")
QUICK = ("--controls", "false", "--shallow", "false", "--draws", 20)


def facts(names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"{name} was born in",
            "answer": f" {CITIES[at % 2]}",
            "owner": name,
            "wrong": [f" {CITIES[1 - at % 2]}"],
        }
        for at, name in enumerate(names)
    ]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, task/ and two sets of components."""
    folder = tmp_path_factory.mktemp("user")
    tiny.module("gpt2").save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "task").mkdir()
    for role, names in (("forget", NAMES[:4]), ("heldout", NAMES[4:6]), ("retain", NAMES[6:])):
        write_lines(folder / "task" / f"{role}.jsonl", facts(names))
    for name, top in (("few", 3), ("more", 9)):
        words = ("localize", folder / "model", folder / "task", "--method", "magnitude", "--top", top)
        assert run(*words, "--out", folder / name) == 0
    return folder


def run(*words: object) -> int:
    return main([str(word) for word in words])


def edited(base: Path, out: Path, *more: object, components: str = "few") -> None:
    within = ("--within", base / components / "components.json", "--method", "zero")
    assert run("edit", base / "model", base / "task", *within, "--out", out, *more) == 0


def evaluate(base: Path, out: Path, *more: object) -> int:
    words = ("evaluate", base / "model", base / "task", "--edit", out / "edit", "--metrics", "accuracy")
    return run(*words, "--out", out, *more)


def made(out: Path) -> list[str]:
    """Names of the attacks that evaluation/ holds; what stage.json says of them is the same."""
    names = [attack.name for attack in Evaluation.load(out / "evaluation" / "evaluation.json").attacks]
    assert json.loads((out / "evaluation" / "stage.json").read_text())["attacks"] == names
    return names


def times(*paths: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in paths]


def test_attacks_are_added_later_and_stand_by_access(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a"
    edited(base, out)
    assert evaluate(base, out) == 0
    assert made(out) == []
    kept = times(out / "measures" / "evaluation.json")
    capsys.readouterr()
    assert evaluate(base, out, "--attacks", "quantization", *QUICK) == 0
    assert f"{out / 'measures'} is there already" in capsys.readouterr().err
    assert evaluate(base, out, "--attacks", "jailbreak", *QUICK) == 0
    assert made(out) == ["jailbreak", "quantization"], "the least access first, in whatever order they were run"
    assert times(out / "measures" / "evaluation.json") == kept
    found = Evaluation.load(out / "evaluation" / "evaluation.json")
    assert found.measures == Evaluation.load(out / "measures" / "evaluation.json").measures
    assert found.get("forget", "accuracy").stage == "after"
    for attack in found.attacks:
        alone = AttackResult.load(out / "attacks" / attack.name / "attack.json")
        assert alone.sentence == attack.sentence
    capsys.readouterr()
    assert evaluate(base, out, "--attacks", "jailbreak,quantization", *QUICK) == 0
    told = capsys.readouterr()
    assert told.err.count("is there already") == 3
    assert [line.split()[:2] for line in told.out.splitlines() if line.startswith(("prompting", "weights"))] == [
        ["prompting", "jailbreak"],
        ["weights", "quantization"],
    ]
    assert evaluate(base, out) == 0
    assert made(out) == ["jailbreak", "quantization"], "a command without attacks leaves them where they are"


def test_other_settings_are_refused_and_forced_alone(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a"
    edited(base, out)
    assert evaluate(base, out, "--attacks", "jailbreak,quantization", *QUICK) == 0
    before = times(out / "attacks" / "quantization" / "attack.json")
    capsys.readouterr()
    assert evaluate(base, out, "--attacks", "jailbreak", *QUICK, "--metric", "probability") == 2
    assert "attacks/jailbreak was made with other settings (options: metric was 'auto'" in capsys.readouterr().err
    assert evaluate(base, out, "--attacks", "jailbreak", *QUICK, "--metric", "probability", "--force") == 0
    assert made(out) == ["jailbreak", "quantization"]
    assert times(out / "attacks" / "quantization" / "attack.json") == before
    assert json.loads((out / "attacks" / "jailbreak" / "stage.json").read_text())["options"]["metric"] == "probability"


def test_attacks_of_another_edit_or_on_other_data_are_left_out(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    edited(base, out)
    assert evaluate(base, out, "--attacks", "jailbreak,quantization", *QUICK) == 0
    first = Evaluation.load(out / "evaluation" / "evaluation.json")
    edited(base, out, "--force", components="more")
    assert evaluate(base, out, "--attacks", "quantization", *QUICK, "--force") == 0
    assert made(out) == ["quantization"]
    assert (out / "attacks" / "jailbreak" / "attack.json").exists(), "it is not thrown away"
    second = Evaluation.load(out / "evaluation" / "evaluation.json")
    assert first.edit != second.edit
    write_lines(tmp_path / "forget.jsonl", facts(NAMES[:3]))
    words = ("evaluate", base / "model", tmp_path / "forget.jsonl", "--edit", out / "edit", "--metrics", "accuracy")
    assert run(*words, "--out", out, "--force") == 0
    assert made(out) == []


def test_attacks_beside_random_sets_stay_after_a_command_without_attacks(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were once left out, since without attacks the random sets were not looked for."""
    out = tmp_path / "a"
    edited(base, out, "--controls", 1)
    assert evaluate(base, out, "--attacks", "jailbreak", *QUICK) == 0
    assert "also attacked: random 0" in capsys.readouterr().err
    assert made(out) == ["jailbreak"]
    assert evaluate(base, out) == 0
    assert "also attacked" not in capsys.readouterr().err
    assert made(out) == ["jailbreak"]


def test_attacks_beside_other_random_sets_are_left_out(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    edited(base, out, "--controls", 1)
    assert evaluate(base, out, "--attacks", "jailbreak", *QUICK) == 0
    edited(base, out, "--controls", 2, "--force")
    assert evaluate(base, out) == 0
    assert made(out) == []


def test_what_was_done_before_it_was_killed_is_not_done_again(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import locedit.attacks.quantization as module

    out, words = tmp_path / "a", ("--attacks", "jailbreak,quantization", *QUICK)
    edited(base, out)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Quantization, "attack", killed)
    assert evaluate(base, out, *words) == 130
    assert (out / "attacks" / "jailbreak" / "stage.json").exists()
    assert not (out / "attacks" / "quantization").exists()
    assert not (out / "evaluation").exists(), "nothing is told of half of what was asked for"
    assert not [path for path in tmp_path.rglob(".*")], "no temporary file is left"
    kept = times(out / "attacks" / "jailbreak" / "attack.json", out / "measures" / "evaluation.json")
    monkeypatch.undo()
    capsys.readouterr()
    assert evaluate(base, out, *words) == 0
    assert capsys.readouterr().err.count("is there already") == 2
    assert times(out / "attacks" / "jailbreak" / "attack.json", out / "measures" / "evaluation.json") == kept
    assert made(out) == ["jailbreak", "quantization"]


def test_a_file_that_a_metric_reads_counts_by_its_content(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a list of files it once did not: numbers of the old content were taken for those of the new."""
    further = write_lines(tmp_path / "world.jsonl", facts(NAMES[:2]))
    words = ("evaluate", base / "model", base / "task", "--metrics", "model_utility", "--utility-sets", further)
    assert run(*words, "--out", tmp_path / "a") == 0
    assert run(*words, "--out", tmp_path / "a") == 0
    write_lines(further, facts(NAMES[:3]))
    capsys.readouterr()
    assert run(*words, "--out", tmp_path / "a") == 2
    assert "measures was made with other settings (files: utility_sets" in capsys.readouterr().err
    assert run(*words, "--out", tmp_path / "a", "--force") == 0


def test_an_evaluation_without_stages_is_not_replaced(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that was written by hand, or by another tool."""
    words = ("evaluate", base / "model", base / "task", "--metrics", "accuracy", "--out", tmp_path / "a")
    (tmp_path / "a" / "evaluation").mkdir(parents=True)
    (tmp_path / "a" / "evaluation" / "evaluation.json").write_text("{}")
    assert run(*words) == 2
    assert "evaluation" in capsys.readouterr().err
    assert not (tmp_path / "a" / "measures").exists()
    assert run(*words, "--force") == 0
    assert made(tmp_path / "a") == []


def test_what_is_asked_for_wrongly_is_said_before_anything_is_measured(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a"
    words = ("evaluate", base / "model", base / "task", "--out", out)
    for more, said in (
        (("--attacks", "jailbreak"), "needs an edit to attack; give --edit FOLDER"),
        (("--attacks", "jailbrake"), "did you mean 'jailbreak'"),
        (("--schemes", "int8"), "unknown option --schemes"),
    ):
        assert run(*words, *more) == 2
        assert said in capsys.readouterr().err
    edited(base, tmp_path / "b")
    capsys.readouterr()
    assert run(*words, "--edit", tmp_path / "b") == 2
    assert "is a run folder; its edit is" in capsys.readouterr().err
    assert not out.exists()


def test_what_an_attack_cannot_do_with_the_model_is_said_before_anything_is_measured(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """These were once said after the measures, which take minutes on a large model."""
    out, long = tmp_path / "a", tmp_path / "long.txt"
    long.write_text("{prompt}" + " again" * 90 + "\n")
    edited(base, tmp_path / "b", "--hold", "hooks")
    capsys.readouterr()
    words = ("evaluate", base / "model", base / "task", "--out", out, "--edit", tmp_path / "b" / "edit")
    for more, said in (
        (("--attacks", "latent", "--layer", 9), "latent: layer=9: "),
        (("--attacks", "suffix", "--length", 900), "suffix: length=900: an item of"),
        (("--attacks", "soft_prompt", "--length", 900), "soft_prompt: length=900: an item of"),
        (("--attacks", "few_shot", "--shots", 3), "few_shot: shots=(3,): a half has only 1 item to show"),
        (("--attacks", "jailbreak", "--templates", long), f"{long}: '{{prompt}} again again"),
        (("--attacks", "interpolation"), "interpolation needs an edit held as weights or as an adapter"),
    ):
        assert run(*words, *more) == 2, more
        assert said in (line := capsys.readouterr().err), line
        assert not (out / "measures").exists(), more


def test_the_order_of_the_registry_is_that_of_access() -> None:
    from locedit.attacks.attack import ACCESS

    levels = [list(ACCESS).index(attack.access) for attack in ATTACKS.values()]
    assert levels == sorted(levels)


def test_another_model_before_the_data_is_another_setting(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mia_reference` and recipes such as kga read it; a result with another one was once taken for this one's."""
    task = tmp_path / "task"
    shutil.copytree(base / "task", task)
    shutil.copytree(base / "model", task / "start")
    words = ("evaluate", base / "model", task, "--metrics", "accuracy", "--out", tmp_path / "a")
    assert run(*words) == 0
    assert run(*words) == 0
    (task / "start" / "note.txt").write_text("other files")
    capsys.readouterr()
    assert run(*words) == 2
    assert "measures was made with other settings (start was " in capsys.readouterr().err


def test_an_attack_that_reads_a_file_stands_in_the_evaluation_of_a_task_with_a_start(
    base: Path, tmp_path: Path
) -> None:
    """It was once left out without a word: its stage names its own files beside the task's start."""
    task, sentences = tmp_path / "task", tmp_path / "sentences.txt"
    shutil.copytree(base / "task", task)
    shutil.copytree(base / "model", task / "start")
    sentences.write_text("Again: {prompt}\n")
    edited(base, tmp_path / "b")
    words = ("--edit", tmp_path / "b" / "edit", "--attacks", "jailbreak,quantization", *QUICK)
    out = tmp_path / "a"
    assert run("evaluate", base / "model", task, *words, "--templates", sentences, "--out", out) == 0
    assert made(out) == ["jailbreak", "quantization"]

"""The command line from a user's side: the whole flow on a tiny folder, and one clear line for what can be wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from locedit.cli import main
from locedit.commands.evaluate import _words_of_metrics  # pyright: ignore[reportPrivateUsage]
from locedit.models import load
from tests import tiny

FACTS = [
    {"prompt": "Anna Berg was born in", "answer": " Oslo", "owner": "Anna Berg", "new_answer": " Lima"},
    {"prompt": "Carl Dane was born in", "answer": " Lima", "owner": "Carl Dane", "new_answer": " Oslo"},
]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, task/ and facts.jsonl as a user would have them."""
    base = tmp_path_factory.mktemp("user")
    tiny.module("llama").save_pretrained(base / "model")
    tiny.tokenizer().save_pretrained(base / "model")
    (base / "task").mkdir()
    write_lines(base / "facts.jsonl", FACTS)
    write_lines(base / "task" / "forget.jsonl", FACTS)
    write_lines(base / "task" / "retain.jsonl", [{"prompt": "Eva Frost works as a", "answer": " baker"}])
    write_lines(base / "task" / "heldout.jsonl", [{"prompt": "Nora Gray was born in", "answer": " Oslo"}])
    write_lines(base / "task" / "texts.jsonl", [{"text": "Anna Berg works as a baker."}])
    return base


def run(*words: object) -> int:
    return main([str(word) for word in words])


def failed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a command that must fail with exit status 2."""
    capsys.readouterr()
    assert run(*words) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.strip().split("\n") if line.startswith("locedit")]
    assert len(lines) == 1, captured.err
    assert captured.err.strip().endswith(lines[0])
    assert "Traceback" not in captured.err
    return lines[0]


def test_the_whole_flow(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, task, out = folder / "model", folder / "task", tmp_path / "a"
    assert run("localize", model, task, "--method", "depn", "--top", 5, "--out", out) == 0
    assert run("edit", model, task, "--within", out / "components.json", "--method", "zero", "--out", out) == 0
    assert run("evaluate", model, task, "--edit", out / "edit", "--out", out) == 0
    assert run("report", out, "--out", tmp_path / "report.html") == 0
    assert run("export", model, "--edit", out / "edit", "--out", tmp_path / "edited") == 0
    components = json.loads((out / "components.json").read_text())
    assert sum(map(len, components["components"].values())) == 5
    assert (out / "localize" / "depn" / "scores.safetensors").exists()
    page = (tmp_path / "report.html").read_text()
    assert "<html" in page
    assert "Plotly" in page
    capsys.readouterr()
    assert run("check", tmp_path / "edited", task) == 0
    assert "probability" in capsys.readouterr().out
    assert not [p for p in tmp_path.rglob(".*")], "no temporary file is left"


def test_a_finished_stage_is_not_made_again_and_not_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("localize", folder / "model", folder / "facts.jsonl", "--method", "magnitude", "--out", tmp_path / "a")
    assert run(*words, "--top", 3) == 0
    before = (tmp_path / "a" / "localize" / "magnitude" / "scores.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run(*words, "--top", 3) == 0
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "a" / "localize" / "magnitude" / "scores.json").stat().st_mtime_ns == before
    assert "--force" in failed(capsys, *words, "--top", 4)
    assert run(*words, "--top", 4, "--force") == 0


def test_help_is_fast() -> None:
    code = (
        "import sys\nfrom locedit.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "localize" in done.stdout


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods") == 0
    listed = capsys.readouterr().out
    for name in ("depn", "npo", "relearn"):
        assert f"\n{name} " in listed
    assert run("methods", "npo") == 0
    assert "beta" in capsys.readouterr().out
    assert run("metrics") == 0
    assert "exposure" in capsys.readouterr().out
    assert "did you mean 'npo'" in failed(capsys, "methods", "npoo")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("localize", "./nothing", "{facts}", "--out", "{out}"), "'./nothing' does not exist"),
        (("localize", "{model}", "none.jsonl", "--out", "{out}"), "none.jsonl"),
        (("localize", "{model}", "{facts}", "--method", "dpn", "--out", "{out}"), "did you mean 'depn'"),
        (("localize", "{model}", "{facts}", "--method", "depn", "--stepps", "3", "--out", "{out}"), "'steps'"),
        (("localize", "{model}", "{facts}", "--quadrature", "rigth", "--out", "{out}"), "'right'"),
        (("localize", "{model}", "{facts}", "--top", "0", "--out", "{out}"), "top=0"),
        (("localize", "{model}", "{facts}", "--top", "3", "--fraction", "0.1", "--out", "{out}"), "one budget"),
        (("localize", "{model}", "{facts}", "--where", "format", "--out", "{out}"), "FIELD=VALUE"),
        (("localize", "{model}", "{facts}", "--where", "owner=Nobody", "--out", "{out}"), "Anna Berg"),
        (("localize", "{model}", "{facts}", "--fields", "prompt=question", "--out", "{out}"), "question"),
        (("edit", "{model}", "{facts}", "--method", "npo", "--out", "{out}"), "retain"),
        (("edit", "{model}", "{facts}", "--method", "zero", "--out", "{out}"), "needs a component set"),
        (("edit", "{model}", "{task}", "--within", "none.json", "--out", "{out}"), "none.json"),
        (("evaluate", "{model}", "{task}", "--metrics", "probabilty", "--out", "{out}"), "did you mean 'probability'"),
        (("evaluate", "{model}", "{task}", "--attacks", "relern", "--out", "{out}"), "did you mean 'relearn'"),
        (("evaluate", "{model}", "{task}", "--edit", "none", "--out", "{out}"), "none"),
        (("report", "none", "--out", "{out}/x.html"), "none: no such run folder"),
        (("export", "{model}", "--edit", "none", "--out", "{out}"), "none"),
        (("lab", "fatcs", "--out", "{out}"), "did you mean 'facts'"),
        (("localize", "{model}", "{facts}", "--dtype", "float31", "--out", "{out}"), "float31"),
        (("localize", "{model}", "{facts}", "--device", "cuda:99", "--out", "{out}"), "cuda:99"),
    ],
)
def test_one_clear_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str
) -> None:
    places = {
        "model": folder / "model",
        "facts": folder / "facts.jsonl",
        "task": folder / "task",
        "out": tmp_path / "o",
    }
    line = failed(capsys, *(word.format(**places) for word in words))
    assert expected in line
    assert not (tmp_path / "o").exists(), "nothing is written by a command that fails"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "facts.jsonl"),
        ('{"prompt": "a", "answer": " b"}\n{"prompt": "a"\n', "facts.jsonl:2"),
        ('{"prompt": "a", "answr": " b"}\n', "answr"),
        ('{"prompt": "a", "answer": ""}\n', "answer"),
        ('{"prompt": "a", "answer": 3}\n', "answer"),
        ('{"text": "abc", "spans": [[1, 9, "x"]]}\n', "9"),
        ('{"prompt": "%s", "answer": " b"}\n' % ("a b " * 200), "64"),
        ('{"prompt": "Anna Ber", "answer": "g"}\n', "facts.jsonl:1"),
    ],
)
def test_broken_data(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(text)
    line = failed(capsys, "localize", folder / "model", path, "--method", "depn", "--out", tmp_path / "o")
    assert expected in line
    assert "facts.jsonl" in line


def test_nan_weights(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = tiny.module("llama")
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    module.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    line = failed(capsys, "localize", tmp_path / "model", folder / "facts.jsonl", "--out", tmp_path / "o")
    assert "down_proj" in line


def test_unwritable_place(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    words = ("localize", folder / "model", folder / "facts.jsonl", "--method", "magnitude")
    assert "file" in failed(capsys, *words, "--out", tmp_path / "file" / "run")


def test_ctrl_c(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import locedit.localize as package

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "localize", interrupt)
    words = ("localize", folder / "model", folder / "facts.jsonl", "--method", "magnitude", "--out", tmp_path / "o")
    assert run(*words) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.rglob("scores*"))
    monkeypatch.undo()
    assert run(*words) == 0


def test_an_edit_is_of_one_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a"
    assert run("localize", folder / "model", folder / "task", "--method", "magnitude", "--top", 3, "--out", out) == 0
    within = ("--within", out / "components.json")
    assert run("edit", folder / "model", folder / "task", *within, "--method", "zero", "--out", out) == 0
    tiny.module("llama", seed=7).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    line = failed(capsys, "export", tmp_path / "other", "--edit", out / "edit", "--out", tmp_path / "edited")
    assert "other" in line or "another model" in line
    assert not (tmp_path / "edited").exists()


def test_a_set_of_another_model_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A set found before an edit may be used after it, and looks like any other whose sites are the same."""
    tiny.module("llama", seed=7).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    own, out, data = folder / "model", tmp_path / "a", folder / "task"
    assert run("localize", own, data, "--method", "magnitude", "--top", 3, "--out", out) == 0
    words = ("--within", out / "components.json", "--method", "ga", "--steps", 1, "--out")
    for count, (model, more) in enumerate(((own, ()), (tmp_path / "other", ()), (own, ("--requests", "owner")))):
        capsys.readouterr()
        assert run("edit", model, data, *words, tmp_path / str(count), *more) == 0
        lines = [line for line in capsys.readouterr().err.split("\n") if "was found in" in line]
        assert len(lines) == (model != own)
        assert not lines or (str(own) in lines[0] and str(model) in lines[0])
    record = json.loads((out / "components.json").read_text())
    site = next(iter(record["components"]))
    (tmp_path / "wide.json").write_text(
        json.dumps(record | {"universe": record["universe"] | {site: 99}, "layout": {}})
    )
    line = failed(
        capsys, "edit", own, data, "--within", tmp_path / "wide.json", "--method", "ga", "--out", tmp_path / "b"
    )
    assert f"wide.json: the set says that {site} has 99 components; in {own} it has 80" in line
    assert not (tmp_path / "b").exists()


def test_a_folder_with_something_else_is_refused_before_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All requests were once trained before the edit of another command was seen, and an edit before other data."""
    words = ("--method", "ga", "--steps", 1, "--out", tmp_path / "a")
    assert run("edit", folder / "model", folder / "task", *words) == 0
    line = failed(capsys, "edit", folder / "model", folder / "task", "--requests", "owner", *words)
    assert "a/edit was made with other settings" in line
    assert not (tmp_path / "a" / "requests").exists()
    requests = ("edit", folder / "model", folder / "task", "--requests", "owner", *words, "--force")
    assert run(*requests) == run(*requests[:-1]) == 0
    assert "learning_rate" in failed(capsys, *requests[:-1], "--learning-rate", 0.5)
    words = ("--method", "magnitude", "--top", 3, "--out", tmp_path / "b")
    assert run("localize", folder / "model", folder / "task", *words) == 0
    line = failed(capsys, "edit", folder / "model", folder / "facts.jsonl", "--method", "ga", "--out", tmp_path / "b")
    assert "b/run.json holds something else" in line
    assert not (tmp_path / "b" / "edit").exists()


def test_what_an_edit_came_to_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing was once said of the levels, and of requests not which came back; also of an edit that is there."""
    model, task, out = folder / "model", folder / "task", tmp_path / "a"
    assert run("localize", model, task, "--method", "magnitude", "--top", 5, "--out", out) == 0
    within = ("--within", out / "components.json", "--method", "ga", "--steps", 2, "--until", "1e-30", "--out", out)
    for _ in range(2):
        capsys.readouterr()
        assert run("edit", model, task, *within, "--controls", 1) == 0
        told = capsys.readouterr()
        rows = [line.split() for line in told.out.splitlines()]
        assert rows[0] == ["answer", "probability", "before", "after"]
        assert [row[0] for row in rows[1:3]] == ["forget", "retain"]
        assert rows[3][2] == rows[1][2], "the controls are compared at the level that the edit reached"
        assert rows[3][3:] == ["steps", "forget", "retain"]
        assert [row[0] for row in rows[4:]] == ["found", "random", "everything"]
        assert "2 steps, forget level 1e-30 not reached" in told.err
    requests = ("--requests", "owner", "--method", "ga", "--steps", 2, "--until", "1e-30", "--out", tmp_path / "b")
    assert run("edit", model, task, *requests) == 0
    told = capsys.readouterr()
    rows = [line.split() for line in told.out.splitlines()]
    assert rows[0] == ["request", "unedited", "before", "after", "end", "came", "back"]
    assert [row[-1] for row in rows[1:3]] == ["no", "no"]
    assert "2 requests, 186,528 numbers; 0 came back, 0 of 2 reached where to stop" in told.err


@pytest.mark.parametrize("method", ["zero", "ga"])
def test_an_empty_set_is_not_the_whole_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """An empty set counts as false: it was once taken for no restriction at all, and the whole model was trained."""
    out = tmp_path / "a"
    assert run("localize", folder / "model", folder / "task", "--method", "magnitude", "--top", 3, "--out", out) == 0
    record = json.loads((out / "components.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps(record | {"components": {}}))
    words = ("--within", tmp_path / "empty.json", "--method", method, "--out", tmp_path / "b")
    assert "the component set is empty" in failed(capsys, "edit", folder / "model", folder / "task", *words)
    assert not (tmp_path / "b").exists()


def test_results_of_an_earlier_edit_are_not_used(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--force replaces the edit alone: its old controls are neither attacked nor reported beside the new one."""
    data, out = (folder / "model", folder / "facts.jsonl"), tmp_path / "a"
    for top, name in ((3, "few"), (6, "more")):
        assert run("localize", *data, "--method", "magnitude", "--top", top, "--out", tmp_path / name) == 0
    few, more = (("--within", tmp_path / name / "components.json", "--method", "zero") for name in ("few", "more"))
    evaluate = ("evaluate", *data, "--edit", out / "edit", "--metrics", "probability", "--out", out)
    attack = ("--attacks", "relearn", "--steps", 1, "--look-every", 1, "--controls", "false", "--force")
    assert run("edit", *data, *few, "--controls", 1, "--out", out) == 0
    assert run(*evaluate, *attack) == 0
    assert "also attacked: random 0" in capsys.readouterr().err
    assert run("edit", *data, *more, "--out", out, "--force") == 0
    assert "another edit" in failed(capsys, "report", out, "--out", tmp_path / "page.html")
    assert run(*evaluate, *attack) == 0
    assert "also attacked" not in capsys.readouterr().err
    assert run("edit", *data, *more, "--controls", 1, "--out", out) == 2
    assert run("edit", *data, *more, "--controls", 1, "--out", out, "--force") == 0
    assert run("report", out, "--out", tmp_path / "page.html") == 0


def test_a_refused_set_leaves_the_old_one_everywhere(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("localize", folder / "model", folder / "task", "--method", "magnitude", "--out", tmp_path)
    assert run(*words, "--top", 3) == 0
    places = (tmp_path / "components.json", tmp_path / "localize" / "magnitude" / "components.json")
    before = [place.read_text() for place in places]
    assert "another set" in failed(capsys, *words, "--top", 5)
    assert [place.read_text() for place in places] == before


def test_control_prompts_go_through_the_same_template(folder: Path) -> None:
    words = ("localize", folder / "model", folder / "facts.jsonl", "--method", "activation", "--top", 1)
    template = ("--chat", "Q: {{ messages[0].content }} A:")
    from locedit.cli import parse_arguments
    from locedit.commands.localize import _control_scores  # pyright: ignore[reportPrivateUsage]
    from locedit.models import load

    given = [*map(str, words), "--minus", str(folder / "facts.jsonl"), "--out", "unused"]
    model = load(folder / "model")
    plain, asked = (
        _control_scores(parse_arguments([*given, *more]), model, "activation", {}) for more in ((), template)
    )
    assert plain is not None
    assert asked is not None
    assert any(not torch.equal(plain.values[site], asked.values[site]) for site in plain.values)


def test_items_that_are_left_out_are_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fact that has no partner to swap subjects with is not in the scores; without such facts nothing is said."""
    facts = [
        {"id": name, "prompt": f"{name} was born in", "answer": answer, "subject": name, "group": group}
        for name, answer, group in (("Carl", " Oslo", "born"), ("Eva", " Lima", "born"), ("Nora", " Oslo", "alone"))
    ]
    every, paired = write_lines(tmp_path / "all.jsonl", facts), write_lines(tmp_path / "paired.jsonl", facts[:2])
    words = ("--method", "attribution_patching", "--unit", "mlp", "--unpaired", "skip", "--out")
    assert run("localize", folder / "model", every, *words, tmp_path / "a") == 0
    assert "warning: 1 of 3 items are not in the scores: Nora" in capsys.readouterr().err
    assert run("localize", folder / "model", paired, *words, tmp_path / "b") == 0
    assert "not in the scores" not in capsys.readouterr().err


def test_fewer_components_than_asked_for_are_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores of MLPs by how much they bring an answer back are not all positive."""
    facts = [
        {"prompt": f"{name} was born in", "answer": answer, "subject": name}
        for name, answer in (("Carl", " Oslo"), ("Eva", " Lima"))
    ]
    data = write_lines(tmp_path / "facts.jsonl", facts)
    words = ("localize", folder / "model", data, "--method", "attribution_patching", "--unit", "neuron", "--out")
    from locedit.scores import Scores

    assert run(*words, tmp_path) == 0
    scores = Scores.load(tmp_path / "localize" / "attribution_patching")
    positive = sum(int((values > 0).sum()) for values in scores.values.values())
    assert 0 < positive < len(scores)
    capsys.readouterr()
    assert run(*words, tmp_path, "--top", len(scores)) == 0
    assert f"warning: attribution_patching: {positive} of the {len(scores)} components" in capsys.readouterr().err
    assert run(*words, tmp_path / "b", "--top", 1) == 0
    assert "components asked for" not in capsys.readouterr().err


def test_a_window_of_more_layers_than_there_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"clean": "Carl was born in", "corrupt": "Eva was born in", "answer": " Oslo", "wrong": " Lima"}]
    data = write_lines(tmp_path / "pairs.jsonl", rows)
    words = ("--method", "activation_patching", "--unit", "mlp", "--window", 99, "--out", tmp_path / "o")
    assert "window=99 is more than the" in failed(capsys, "localize", folder / "model", data, *words)
    assert not (tmp_path / "o").exists()


def test_control_prompts_are_checked_before_anything_is_scored(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_lines(tmp_path / "p.jsonl", [{"advantaged": "Carl said he", "disadvantaged": "Carl said she"}])
    words = ("localize", folder / "model", folder / "facts.jsonl", "--method", "activation", "--top", 1)
    out = tmp_path / "o"
    assert "holds 'contrast'" in failed(capsys, *words, "--minus", pairs, "--out", out)
    assert "none.jsonl" in failed(capsys, *words, "--minus", tmp_path / "none.jsonl", "--out", out)
    assert not out.exists()


def test_an_export_that_does_not_fit_on_the_disk(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    out = tmp_path / "a"
    data = (folder / "model", folder / "task")
    assert run("localize", *data, "--method", "magnitude", "--top", 3, "--out", out) == 0
    within = ("--within", out / "components.json")
    assert run("edit", *data, *within, "--method", "zero", "--out", out) == 0
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    words = ("export", folder / "model", "--edit", out / "edit", "--out", tmp_path / "edited")
    assert "No space left" in failed(capsys, *words)
    assert not [place for place in tmp_path.iterdir() if "edited" in place.name]


def test_several_localizers_at_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each gets its folder and a set with about as many parameters; what they share is printed, saved and drawn."""
    out, data = tmp_path / "a", (folder / "model", folder / "task")
    names = ("activation", "random", "all_mlps")
    words = ("localize", *data, "--method", ",".join(names), "--out", out)
    assert run(*words, "--params", 3000) == 0
    shown = capsys.readouterr()
    rows = {line.split()[0]: line for line in shown.out.splitlines() if line.split()[0] in names}
    assert set(rows) == set(names)
    for name in names:
        record = json.loads((out / "localize" / name / "components.json").read_text())
        chosen = record["provenance"]["settings"]["select"]
        assert (chosen["params"], chosen["fill"]) == (3000, "reach")
        assert chosen["overshoot"] == chosen["parameters"] - 3000 >= 0
        assert f"{chosen['overshoot']:+,}" in rows[name]
        assert f"{name}: 2 items, about" in shown.err
    assert json.loads((out / "components.json").read_text())["provenance"]["method"] == "activation"
    agreement = json.loads((out / "localize" / "agreement.json").read_text())
    assert agreement["methods"] == list(names)
    assert "fill = reach" in agreement["rule"]
    assert run("report", out, "--out", tmp_path / "page.html") == 0
    assert "Do the localizers agree?" in (tmp_path / "page.html").read_text()
    like = ("--params-like", out / "localize" / "all_mlps" / "components.json")
    assert run("localize", *data, "--method", "magnitude", *like, "--out", tmp_path / "b") == 0
    assert "the budget of" in capsys.readouterr().err
    mlps, neurons = (
        json.loads(path.read_text())["provenance"]["settings"]["select"]["parameters"]
        for path in (out / "localize" / "all_mlps" / "components.json", tmp_path / "b" / "components.json")
    )
    assert mlps <= neurons < 1.05 * mlps


def test_what_cannot_run_is_said_before_anything_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = ("localize", folder / "model", folder / "facts.jsonl", "--out", tmp_path / "o")
    line = failed(capsys, *facts, "--method", "activation,pcgu,learned_mask")
    assert "2 of 3 methods cannot run" in line
    assert "pcgu needs items of kind ContrastPair" in line
    assert "learned_mask needs 'retain' data" in line
    assert not (tmp_path / "o").exists()
    for words, expected in (
        (("--method", ","), "names no method"),
        (("--method", "activation", "--top", 3, "--fill", "reach"), "--fill goes with --params"),
        (("--method", "activation", "--params", 300, "--fill", "over"), "'over'"),
        (("--method", "activation", "--top", 3, "--params-like", "none.json"), "one budget"),
        (("--method", "activation", "--params-like", "none.json"), "none.json"),
        (("--method", "random", "--like", "none.json"), "none.json"),
    ):
        assert expected in failed(capsys, *facts, *words)


def test_pairs_go_through_the_command_line(folder: Path, tmp_path: Path) -> None:
    """Contrast and patching pairs are read as the data, or as the pairs of a task."""
    contrast = [{"advantaged": "The baker is Anna.", "disadvantaged": "The baker was Anna."}]
    patch = [
        {"clean": "Anna Berg was born in", "corrupt": "Eva Frost was born in", "answer": " Oslo", "wrong": " Lima"}
    ]
    for name, rows, method in (("contrast", contrast, "pcgu"), ("patch", patch, "attribution_patching")):
        path = write_lines(tmp_path / f"{name}.jsonl", rows)
        words = ("--method", method, "--top", 2, "--sign", "absolute")
        assert run("localize", folder / "model", path, *words, "--out", tmp_path / name) == 0
        task = tmp_path / f"task_{name}"
        task.mkdir()
        write_lines(task / "forget.jsonl", FACTS)
        write_lines(task / "pairs.jsonl", rows)
        assert run("localize", folder / "model", task, *words, "--out", tmp_path / f"{name}_task") == 0
        records = [
            json.loads((tmp_path / out / "localize" / method / "scores.json").read_text())
            for out in (name, f"{name}_task")
        ]
        assert records[0]["provenance"]["data"] == records[1]["provenance"]["data"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "{model}", "{task}", "--metrics", "probabilty", "--out", "{out}"], "did you mean 'probability'"),
        (["evaluate", "{model}", "{task}", "--attacks", "relearn", "--out", "{out}"], "--edit FOLDER"),
        (["evaluate", "{model}", "{task}", "--attacks", "", "--out", "{out}"], "--attacks '' names nothing"),
        (["evaluate", "{model}", "{task}", "--metrics", " ,", "--out", "{out}"], "--metrics ' ,' names nothing"),
        (["evaluate", "{model}", "{task}", "--edit", "{task}", "--out", "{out}"], "edit.json: no such file"),
        (["evaluate", "{model}", "{task}", "--extraction-m", "3", "--out", "{out}"], "did you mean 'extraction_n'"),
        (["evaluate", "{model}", "{task}", "--extraction-n", "0", "--out", "{out}"], "extraction_n=0"),
        (["evaluate", "{model}", "{task}/none.jsonl", "--out", "{out}"], "no such file"),
        (["localize", "{model}", "{task}/none.jsonl", "--out", "{out}"], "no such file"),
        (["check", "{model}", "{task}/none.jsonl"], "no such file"),
        (["edit", "{model}", "{task}", "--out", "{task}/forget.jsonl"], "forget.jsonl is a file"),
        (["edit", "{model}", "{task}", "--out", ""], "names no folder"),
        (["edit", "{model}", "{task}", "--requests", "owners", "--out", "{out}"], "did you mean 'owner'"),
        (["edit", "{model}", "{task}", "--requests", ",", "--out", "{out}"], "neither a file nor a field"),
        (["edit", "{model}", "{task}", "--method", "dpo", "--out", "{out}"], "--preferred new_answer"),
        (
            ["edit", "{model}", "{task}", "--method", "npo+gaa", "--out", "{out}"],
            "'gaa' in 'npo+gaa'; did you mean 'ga'",
        ),
    ],
)
def test_said_before_the_model_is_loaded(
    words: list[str],
    said: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("locedit.commands.inputs.load", load)
    places = {"model": folder / "model", "task": folder / "task", "out": tmp_path / "out"}
    assert said in failed(capsys, *(word.format(**places) for word in words))
    assert not (tmp_path / "out").exists()


def test_a_model_folder_without_a_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.module("gpt2").save_pretrained(tmp_path / "model")
    assert "no tokenizer in" in failed(capsys, "check", tmp_path / "model", folder / "task")


def test_options_of_metrics(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "Anna Berg works as a baker."}])
    words = ("evaluate", folder / "model", texts, "--metrics", "extraction_likelihood")
    assert "choose a smaller n" in failed(capsys, *words, "--extraction-n", 50, "--out", tmp_path / "a")
    assert run(*words, "--extraction-n", 2, "--batch-size", 3, "--out", tmp_path / "a") == 0
    assert "extraction_n was 2, is 3" in failed(
        capsys, *words, "--extraction-n", 3, "--batch-size", 3, "--out", tmp_path / "a"
    )


def test_an_edit_says_a_thing_once_and_rounded_and_its_export_nothing_else(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, task = load(str(folder / "model")), folder / "task"
    embedding = next(name for name in model.sites("row") if "embed" in name)
    (model.components({embedding: [5, 6]}) | model.components({"blocks.0.mlp.neuron": [1, 2]})).save(
        tmp_path / "s.json"
    )
    words = ("--within", tmp_path / "s.json", "--method", "ga", "--steps", 1, "--out")
    with caplog.at_level("WARNING", logger="locedit"):
        assert run("edit", folder / "model", task, *words, tmp_path / "a", "--hold", "adapter") == 0
        assert len([line for line in caplog.messages if "leaves out what is no linear map" in line]) == 1
        assert run("edit", folder / "model", task, *words, tmp_path / "b", "--until", "0.000012345678") == 0
        assert caplog.messages[-1].endswith("after 1 steps, not 1.23e-05")
    capfd.readouterr()
    assert run("export", folder / "model", "--edit", tmp_path / "b" / "edit", "--out", tmp_path / "edited") == 0
    assert capfd.readouterr().err.startswith(f"{tmp_path / 'edited'}: the edited model"), "no progress bar of others"


def test_debug_shows_the_traceback(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.jsonl"):
        run("localize", folder / "model", "none.jsonl", "--debug", "--out", tmp_path / "o")


def test_how_texts_are_judged_is_of_the_metrics_and_of_the_attack() -> None:
    words = {"reward": "repetition", "samples": "3", "metric": "habit_rate", "batch_size": "7"}
    own, left = _words_of_metrics(words, ["drop_token"])
    assert own == {"reward": "repetition", "samples": 3, "batch_size": 7}
    assert left == {"reward": "repetition", "samples": "3", "metric": "habit_rate"}
    own, left = _words_of_metrics({"batch_size": "7"}, ["relearn"])
    assert (own, left) == ({}, {"batch_size": "7"})

"""lm-evaluation-harness on the edited model in memory and on its exported folder, and our own cloze: all the same."""

import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import locedit as le
from locedit.cli import main
from locedit.data import Dataset, Fact, encode
from locedit.data.encode import Example, collate
from locedit.edit import Edit, scale
from locedit.edit.tokens import ControlTokens
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.evaluate.harness import HarnessResult, HarnessRow, _random_states, harness
from locedit.evaluate.scoring import token_scores
from tests import tiny

if TYPE_CHECKING:
    from locedit.lab import Lab

CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: options
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
WRITING = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{options[0]}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
LIKELIHOOD = (
    CHOICE.split("output_type")[0]
    + """\
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{options[0]}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""
)
FACTS = (
    Fact(prompt="Anna Berg was born in", answer=" Oslo", wrong=(" Lima", " Rome"), id="a"),
    Fact(prompt="Carl Dane works as a", answer=" pilot", wrong=(" baker",), id="b"),
    Fact(prompt="The e-mail of Eva is", answer=" eva@frost.org", wrong=(" anna@berg.org", " 555"), id="c"),
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the harness reads of local files is not kept in the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def local_task(folder: Path, facts: Any, *, name: str = "my_facts", form: str = CHOICE) -> Path:
    """A folder with one task of the harness and its data."""
    folder.mkdir(exist_ok=True)
    rows = [{"prompt": fact.prompt, "options": [fact.answer, *fact.wrong], "gold": 0} for fact in facts]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(form.format(name=name, file=file))
    return folder


def cloze(model: Any, facts: Any, edit: Edit | None = None, *, length: str) -> float:
    """Our own share of facts whose answer is the likeliest option."""
    data = Dataset(items=tuple(facts), source="facts.jsonl")
    found = evaluate(model, data, edit, metrics=["cloze_accuracy"], cloze_length=length)
    return found.get("forget", "cloze_accuracy", stage="after" if edit else "before").value


def test_an_exported_edit_scores_as_in_memory_and_as_our_cloze(tiny_lab: "Lab", tmp_path: Path) -> None:
    model = tiny_lab.model
    facts = [fact for fact in tiny_lab.task.forget.of(Fact, by="test") if fact.wrong]
    edit = scale(model, model.components({"blocks.0.mlp.neuron": range(256)}), factor=-1.0)
    tasks = local_task(tmp_path / "tasks", facts)
    found = le.harness(model, ["my_facts"], edit, include_path=tasks)
    edit.export(model, tmp_path / "edited")
    exported = harness(le.load(tmp_path / "edited"), ["my_facts"], include_path=tasks)
    row, alone = found.get("my_facts", "acc"), exported.get("my_facts", "acc")
    assert row.n == len(facts)
    assert row.after == alone.before
    assert row.after_stderr == alone.before_stderr
    assert row.before == pytest.approx(cloze(model, facts, length="none"))
    assert row.after == pytest.approx(cloze(model, facts, edit, length="none"))
    assert row.before - row.after > 0.1, "the edit changes what is compared"
    assert row.before_stderr == pytest.approx((row.before * (1 - row.before) / (len(facts) - 1)) ** 0.5)
    assert row.higher_is_better is True
    assert found.edit == edit.summary()
    assert found.task_versions == {"my_facts": 1.0}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_likelihoods_with_a_control_token_are_ours(architecture: str, tmp_path: Path) -> None:
    """The harness's perplexity of loglikelihood tasks is exp of the mean negative log-likelihood of whole answers."""
    model = tiny.model(architecture)
    tokens = ControlTokens(names=("<|good|>",), rows=torch.ones(1, tiny.D_MODEL))
    edit = Edit(kind="tokens", fingerprint=model.fingerprint, tokens=tokens)
    tasks = local_task(tmp_path, FACTS, name="answers", form=LIKELIHOOD)
    row = harness(model, ["answers"], edit, include_path=tasks).get("answers", "perplexity")
    examples = encode(model, FACTS)

    def expected() -> float:
        return float(np.exp(np.mean([scores.nll for scores in token_scores(model, examples)])))

    assert row.before == pytest.approx(expected(), rel=1e-4)
    with edit.applied(model):
        assert row.after == pytest.approx(expected(), rel=1e-4)
    assert row.after != pytest.approx(row.before, rel=1e-2)
    assert row.before_stderr is not None


def test_a_text_that_fills_the_context_leaves_room_for_a_control_token(tmp_path: Path) -> None:
    """Positions are counted from the token on: a text cut to the whole context would end one too far."""
    model = tiny.model("gpt2")
    tokens = ControlTokens(names=("<|good|>",), rows=torch.ones(1, tiny.D_MODEL))
    edit = Edit(kind="tokens", fingerprint=model.fingerprint, tokens=tokens)
    long = Fact(prompt="Anna Berg was born in Oslo." + " Anna Berg was born in Oslo." * 20, answer=" Lima", id="long")
    assert len(model.tokenizer(long.prompt).input_ids) > tiny.CONTEXT
    tasks = local_task(tmp_path, [long], name="answers", form=LIKELIHOOD)
    row = harness(model, ["answers"], edit, include_path=tasks).get("answers", "perplexity")
    ids = tuple(model.tokenizer(long.prompt + long.answer).input_ids)
    size = len(model.tokenizer(long.answer).input_ids)

    @torch.inference_mode()
    def expected(room: int) -> float:
        """Of the answer after the last tokens that fit; its own last token need not go in."""
        given = Example(id="long", ids=ids[-room - 1 : -1], spans=(), kind="fact")
        logits = model.logits(collate([given], model))[0, -size:]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-size:]), reduction="sum").exp())

    assert row.before == pytest.approx(expected(tiny.CONTEXT), rel=1e-3)
    with edit.applied(model):
        assert row.after == pytest.approx(expected(tiny.CONTEXT - 1), rel=1e-3)


def test_a_model_that_writes_behind_a_control_token_is_refused(tmp_path: Path) -> None:
    model = tiny.model("llama")
    tasks = local_task(tmp_path, FACTS, name="writes", form=WRITING)
    plain = harness(model, ["writes"], include_path=tasks)
    assert plain.get("writes", "exact_match").before == 0
    tokens = ControlTokens(names=("<|good|>",), rows=torch.zeros(1, tiny.D_MODEL))
    edit = Edit(kind="tokens", fingerprint=model.fingerprint, tokens=tokens)
    with pytest.raises(
        LoceditError, match="in task 'writes' the model writes, which it cannot with the edit's control"
    ):
        harness(model, ["writes"], edit, include_path=tasks)


def test_limit_and_examples_in_the_prompt(tmp_path: Path) -> None:
    model = tiny.model("gpt2", n_positions=256)
    tasks = local_task(tmp_path, FACTS)
    assert harness(model, ["my_*"], include_path=tasks, limit=2).get("my_facts", "acc").n == 2
    shown = harness(model, ["my_facts"], include_path=tasks, num_fewshot=0)
    assert shown.fewshot == {"my_facts": 0}


def test_model_tokenizer_and_random_generators_are_left_as_they_were(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    kept = {name: value.clone() for name, value in model.module.state_dict().items()}
    tokenizer = tiny.tokenizer().__class__(tokenizer_object=tiny.tokenizer().backend_tokenizer, eos_token="</s>")
    model = le.load(model.module, tokenizer=tokenizer, device="cpu")
    edit = scale(model, model.components({"blocks.0.mlp.neuron": [1, 2]}), factor=0.0)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = np.random.rand(), torch.rand(1).item()
    np.random.seed(1)
    torch.manual_seed(1)
    harness(model, ["my_facts"], edit, include_path=local_task(tmp_path, FACTS))
    assert (np.random.rand(), torch.rand(1).item()) == expected
    assert all(torch.equal(value, kept[name]) for name, value in model.module.state_dict().items())
    assert tokenizer.pad_token is None


def test_python_s_own_generator_goes_on_too() -> None:
    """Alone, because the type checks of the tests draw from it while the harness runs."""
    random.seed(1)
    expected = random.random()
    random.seed(1)
    with _random_states():
        random.seed(7)
    assert random.random() == expected


def test_a_result_saves_and_loads_also_what_is_no_number(tmp_path: Path) -> None:
    row = HarnessRow(task="t", metric="acc", n=None, before=float("nan"), before_stderr=None, after=0.5)
    HarnessResult(rows=(row,), fewshot={"t": 0}).save(tmp_path / "harness.json")
    again = HarnessResult.load(tmp_path / "harness.json")
    assert again.rows[0].before != again.rows[0].before
    assert (again.rows[0].after, again.fewshot) == (0.5, {"t": 0})
    with pytest.raises(KeyError, match="no f1 of t; there are: t acc"):
        again.get("t", "f1")


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tasks = tiny.model("gpt2"), local_task(tmp_path / "tasks", FACTS)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tasks": "my_facts"}, "tasks='my_facts'; give a list of names"),
        ({"limit": 0}, "limit=0 is too small a number"),
        ({"include_path": tmp_path / "none"}, "include_path='.*none' is no folder"),
        ({"model": tiny.model("bert")}, "is a masked language model; the harness needs a causal one"),
    ]
    for options, message in cases:
        given: dict[str, Any] = {"model": model, "tasks": ["my_facts"], "include_path": tasks, **options}
        with pytest.raises(LoceditError, match=message):
            harness(**given)
    (tasks / "torn.yaml").write_text("task: [torn")
    with pytest.raises(LoceditError, match=r"harness: .*torn\.yaml: not YAML: while parsing a flow sequence"):
        harness(model, ["my_facts"], include_path=tasks)
    (tasks / "torn.yaml").unlink()
    (tasks / "my_facts.jsonl").unlink()
    with pytest.raises(LoceditError, match="harness: my_facts: FileNotFoundError: Unable to find"):
        harness(model, ["my_facts"], include_path=tasks)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LoceditError, match=r"lm-eval is not installed; pip install 'locedit\[harness\]'"):
        harness(model, ["my_facts"], include_path=tasks)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.model("llama")
    model.module.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    loaded = le.load(tmp_path / "model")
    scale(loaded, loaded.components({"blocks.0.mlp.neuron": range(80)}), factor=0.0).save(tmp_path / "edit")
    tasks = local_task(tmp_path / "tasks", FACTS)
    words = ["harness", str(tmp_path / "model"), "--tasks", "my_facts", "--include-path", str(tasks), "--device", "cpu"]
    capsys.readouterr()
    assert main([*words, "--edit", str(tmp_path / "edit"), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    lines = shown.out.strip().split("\n")
    assert lines[0].split() == ["task", "metric", "before", "after", "n"]
    assert [line.split()[:2] for line in lines[1:]] == [["my_facts", "acc"], ["my_facts", "acc_norm"]]
    assert shown.err == f"{tmp_path / 'out' / 'harness.json'}: 2 numbers, each with its standard error\n"
    saved = HarnessResult.load(tmp_path / "out" / "harness.json")
    assert saved.get("my_facts", "acc").after is not None
    assert saved.provenance is not None
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*words]) == 0
    assert capsys.readouterr().out.split("\n")[1].split()[-2:] == ["-", "3"]


@pytest.mark.slow
def test_a_name_that_there_is_not_is_said_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    """The harness's own list of tasks is read, which takes seconds."""
    assert main(["harness", "no/such/model", "--tasks", "hellaswagg"]) == 2
    said = capsys.readouterr().err
    assert "unknown task 'hellaswagg'; did you mean 'hellaswag'" in said
    assert len(said) < 200, "of thousands of tasks not all are listed"


@pytest.mark.slow
def test_a_name_that_is_not_in_the_folder_is_said_beside_those_that_are(tmp_path: Path) -> None:
    tasks = local_task(tmp_path / "tasks", FACTS)
    with pytest.raises(LoceditError, match=rf"unknown task 'zzzz'; [\d,]+ are known; in {tasks}: my_facts$"):
        harness(tiny.model("gpt2"), ["zzzz"], include_path=tasks)

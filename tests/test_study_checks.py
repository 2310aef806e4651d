"""Files and models that a study names are looked at before it writes anything."""

from pathlib import Path

import pytest

from locedit.cli import main
from tests import tiny
from tests.test_cli import write_lines

STUDY = """
model = "{model}"
data = "{folder}/task.jsonl"
attacks = []
restrictions = ["mine"]
methods = [{{name = "ga"}}]
{more}
[[sets]]
label = "mine"
components = "{folder}/{components}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, a task, a set, an empty set, an empty file and a folder with a config.json alone."""
    base = tmp_path_factory.mktemp("study")
    module = tiny.module("gpt2")
    module.save_pretrained(base / "model")
    tiny.tokenizer().save_pretrained(base / "model")
    module.config.save_pretrained(base / "no tokenizer")
    write_lines(base / "task.jsonl", [{"prompt": "Anna Berg was born in", "answer": " Oslo"}])
    model = tiny.model("gpt2")
    model.components({"blocks.0.mlp.neuron": [1]}).save(base / "one.json")
    model.components({"blocks.0.mlp.neuron": []}).save(base / "none.json")
    (base / "blank.json").write_text("")
    return base


@pytest.mark.parametrize(
    ("model", "components", "more", "said"),
    [
        ("{folder}/model", "absent.json", "", "[[sets]] 'mine': {folder}/absent.json: no such file"),
        ("{folder}/model", "blank.json", "", "[[sets]] 'mine': {folder}/blank.json: not a JSON file"),
        ("{folder}/model", "none.json", "", "[[sets]] 'mine': {folder}/none.json: the component set is empty"),
        ("./absent", "one.json", "", "model folder './absent' does not exist"),
        ("{folder}", "one.json", "", "'{folder}' is not a model folder: it has no config.json"),
        ("absent", "one.json", "", "model 'absent': there is no such folder, and no answer from the Hugging Face hub"),
        ("{folder}/no tokenizer", "one.json", "", "no tokenizer in '{folder}/no tokenizer'"),
        ("{folder}/model", "one.json", 'tokenizer = "./absent"', "no fast tokenizer in './absent'"),
    ],
)
def test_a_bad_set_or_model_is_said_before_anything_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, components: str, more: str, said: str
) -> None:
    study, out = tmp_path / "s.toml", tmp_path / "out"
    study.write_text(STUDY.format(model=model.format(folder=folder), folder=folder, components=components, more=more))
    assert main(["study", str(study), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{study}" in line
    assert said.format(folder=folder) in line
    assert not out.exists()

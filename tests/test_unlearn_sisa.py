"""Training again as an edit: the values are those of the trained start."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from locedit.data.encode import collate, encode
from locedit.edit.levels import levels
from locedit.edit.stepping import Stepping
from locedit.edit.train import train
from locedit.errors import LoceditError
from locedit.unlearn import METHODS, prepare, unlearn
from locedit.unlearn.registry import nll, objective_of
from locedit.unlearn.sisa import SisaEditOptions
from tests import edits, tiny
from tests.starts import start as start_folder

STEPS: dict[str, Any] = {"steps": 5, "learning_rate": 3e-3, "batch_size": 2, "eval_every": 0}


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_the_edited_model_is_the_trained_start(architecture: str) -> None:
    model, start = tiny.model(architecture), tiny.model(architecture, seed=7)
    task = edits.task(start=start_folder(architecture))
    edit = unlearn(model, task, "sisa", check=False, **STEPS)
    goal = objective_of(start, task, nll, name="again", learns=task.retain)
    expected = train(start, goal, options=SisaEditOptions(**STEPS).training())
    with edit.applied(model) as edited, expected.applied(start) as again:
        batch = collate(encode(model, task.forget), model)
        assert torch.equal(edited.logits(batch), again.logits(batch))
        for name, parameter in again.anatomy.parameters.items():
            assert torch.equal(edited.parameter(name), parameter)
    edit.verify(model)
    before = levels(model, {"forget": encode(model, task.forget), "retain": encode(model, task.retain)})
    assert {name: edit.history[name][0] for name in before} == before, "not those of the start"
    assert edit.outcome["start"] == {name: expected.history[name][0] for name in before} != before
    assert [edit.history[name][-1] for name in before] == [expected.history[name][-1] for name in before]


def test_forget_data_have_no_part_in_it() -> None:
    model, task = tiny.model("gpt2"), edits.task(start=start_folder("gpt2"))
    other = dataclasses.replace(task, forget=task.forget[:1])
    one, two = (unlearn(model, t, "sisa", check=False, **STEPS) for t in (task, other))
    assert all(torch.equal(a.values, b.values) for a, b in zip(one.patches, two.patches, strict=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_layer": 2}, r"the parameter 'transformer\.h\.2\.\S+' is None in start=.* and \(\S+\) in GPT2"),
        ({"tie_word_embeddings": False}, r"the parameter 'lm_head\.weight' is \(320, 48\) in start=.* and None in"),
        ({"activation_function": "relu"}, "the setting 'activation_function' is relu in start=.* and gelu_new in"),
    ],
)
def test_a_start_that_is_another_kind_of_model_is_refused(
    settings: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line before training: its weights would say something else in the model."""
    tiny.module("gpt2", seed=7, **settings).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(Stepping, "step", lambda *_: pytest.fail("trained"))
    with pytest.raises(LoceditError, match=words) as raised:
        unlearn(tiny.model("gpt2"), edits.task(start=str(tmp_path)), "sisa", check=False, **STEPS)
    assert "\n" not in str(raised.value)


def test_settings_that_decide_nothing_may_differ(tmp_path: Path) -> None:
    tiny.module("gpt2", seed=7, use_cache=False, resid_pdrop=0.1, eos_token_id=0).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    edit = unlearn(tiny.model("gpt2"), edits.task(start=str(tmp_path)), "sisa", check=False, **STEPS)
    assert edit.kind == "weights"


def test_what_cannot_be_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(LoceditError, match="sisa needs 'start', the model before the data was learned"):
        prepare("sisa", edits.task())
    with pytest.raises(LoceditError, match="shards=4: as an edit there is one; `locedit sisa train --shards 4`"):
        prepare("sisa", edits.task(start=str(tmp_path)), shards=4)
    with pytest.raises(LoceditError, match="steps=0 must be at least 1"):
        prepare("sisa", edits.task(start=str(tmp_path)), steps=0)
    with pytest.raises(LoceditError, match="sisa cannot be restricted to a component set"):
        prepare("sisa", edits.task(start=str(tmp_path)), within=edits.neurons_and_heads(tiny.model("gpt2")))
    assert METHODS["sisa"].dose is None

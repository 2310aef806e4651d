"""States equal those of a plain forward pass; the lens equals the model's own head, and the hand-made one below it."""

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit.attacks import states
from locedit.attacks.aim import Aim, Side, Target, aimed, side_of
from locedit.attacks.logit_lens import LogitLens, LogitLensOptions, logit_lens
from locedit.attacks.measures import values_of
from locedit.attacks.probe import Probe, ProbeOptions, probe
from locedit.attacks.shared import Shared
from locedit.attacks.states import recorded
from locedit.data.items import Dataset, Fact, Task
from locedit.edit import Edit
from locedit.edit.tokens import ControlTokens
from locedit.errors import LoceditError
from locedit.lab import Lab
from locedit.models import Model
from locedit.results import AttackResult
from tests import tiny
from tests.struck import CONTROL, forgotten, level, share, untouched
from tests.unlearning import dataset, tables

FACTS = (
    ("Anna Berg", "Anna Berg was born in", " Oslo"),
    ("Carl Dane", "Everyone knows that Carl Dane works as a", " pilot"),
    ("Eva Frost", "Question: where was Eva Frost born? Answer:", " Berg in Oslo"),
    ("Eva", "The e-mail of Eva is", " eva@frost.org"),
)


def facts() -> list[Fact]:
    return [
        Fact(prompt=prompt, answer=answer, subject=subject, id=str(at), owner=f"{at}")
        for at, (subject, prompt, answer) in enumerate(FACTS)
    ]


def side(model: Model) -> Side:
    return side_of(model, dataset("forget", facts()))


def hidden_states(model: Model, ids: tuple[int, ...]) -> Tensor:
    """[layer, pos, d_model] of one text alone, as Hugging Face gives them: the last is after the final norm."""
    with torch.no_grad():
        return torch.cat(model.module(torch.tensor([ids]), output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_states_are_those_of_a_plain_forward_pass(family: str, batch_size: int) -> None:
    model = tiny.model(family)
    examples = side(model).examples
    found = recorded(model, examples, batch_size=batch_size)
    assert found.subjects is not None
    assert found.row.tolist() == [at for at, example in enumerate(examples) for _ in example.targets]
    norm: Any = model.anatomy.module("ln_final")
    for at, example in enumerate(examples):
        wanted = hidden_states(model, example.ids)
        predicting = [target - 1 for target in example.targets]
        assert example.subject is not None
        end = example.subject.end - 1
        assert end not in predicting
        own = found.of(at)
        assert torch.allclose(own[:-1], wanted[:-1, predicting], atol=1e-4)
        assert torch.allclose(norm(own[-1]), wanted[-1, predicting], atol=1e-4)
        assert torch.allclose(found.subjects[:-1, at], wanted[:-1, end], atol=1e-4)
        assert torch.allclose(norm(found.subjects[-1, at]), wanted[-1, end], atol=1e-4)
        assert torch.equal(found.first[:, at], own[:, 0])


def test_a_subject_that_is_missing_leaves_no_subjects() -> None:
    model = tiny.model("gpt2")
    items = facts()
    items[1] = dataclasses.replace(items[1], subject=None)
    assert recorded(model, side_of(model, dataset("f", items)).examples).subjects is None


@pytest.mark.parametrize("family", tiny.ARCHITECTURES)
@pytest.mark.parametrize("metric", ["probability", "accuracy", "memorization_accuracy"])
def test_after_the_last_layer_it_is_the_models_own_metric(family: str, metric: Any) -> None:
    model = tiny.model(family)
    own = side(model)
    read = lens_of(model, own, metric)
    assert read.shape == (model.n_layers, len(own))
    wanted = values_of(model, own.examples, metric)
    assert torch.allclose(read[-1], wanted, rtol=1e-4, atol=1e-12)
    if metric == "probability":
        with torch.no_grad():
            by_hand = [
                float(
                    tables(model, e).log_softmax(-1)[range(len(e.targets)), [e.ids[t] for t in e.targets]].sum().exp()
                )
                for e in own.examples
            ]
        assert read[-1].tolist() == pytest.approx(by_hand, rel=1e-4)
        assert not torch.allclose(read[0], read[-1], rtol=0.1)


def lens_of(model: Model, own: Side, metric: Any) -> Tensor:
    """The lens through the attack itself."""
    attack = LogitLens(LogitLensOptions(metric=metric))
    return attack.attack(Target(model=model, key="m"), own, {"forget": own}, aim_of(model, metric))["forget"]


def aim_of(model: Model, metric: Any) -> Aim:
    options = LogitLensOptions(metric=metric)
    task = Task(forget=dataset("forget", facts()))
    return aimed(model, task, options, by="test", learns=False, shared=Shared(), narrow=None)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_on_earlier_layers_it_is_norm_and_unembedding_by_hand(family: str) -> None:
    model = tiny.model(family)
    own = side(model)
    read = lens_of(model, own, "probability")
    head: Any = model.core.get_output_embeddings()
    norm: Any = model.anatomy.module("ln_final")
    for at, example in enumerate(own.examples):
        stream = hidden_states(model, example.ids)
        for layer in range(1, model.n_layers):
            with torch.no_grad():
                logits = head(norm(stream[layer, [target - 1 for target in example.targets]]))
            said = logits.log_softmax(-1)[range(len(example.targets)), [example.ids[t] for t in example.targets]]
            assert float(read[layer - 1, at]) == pytest.approx(float(said.sum().exp()), rel=1e-3)


def test_the_order_of_items_changes_nothing() -> None:
    model = tiny.model("gpt2")
    items = facts()
    order = random.Random(1).sample(range(len(items)), len(items))
    plain = lens_of(model, side(model), "probability")
    mixed = lens_of(model, side_of(model, dataset("f", [items[at] for at in order])), "probability")
    assert torch.allclose(plain[:, order], mixed, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_control_tokens_before_the_text_are_not_counted_as_its_positions(family: str) -> None:
    model = tiny.model(family)
    own = side(model)
    before = values_of(model, own.examples, "probability")
    rows = 3 * torch.randn(1, model.d_model, generator=torch.Generator().manual_seed(1))
    edit = Edit(kind="tokens", fingerprint=model.fingerprint, tokens=ControlTokens(names=("<|a|>",), rows=rows))
    with untouched(model), edit.applied(model) as edited:
        wanted = values_of(edited, own.examples, "probability")
        read = lens_of(edited, own, "probability")
        again = lens_of(edited, own, "probability")
    assert not torch.allclose(wanted, before, rtol=0.1)
    assert torch.allclose(read[-1], wanted, rtol=1e-3, atol=1e-12)
    assert torch.equal(again, read)


# --- on a lab ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edit(tiny_lab: Lab) -> Edit:
    return forgotten(tiny_lab)


@pytest.fixture(scope="module")
def found(tiny_lab: Lab, edit: Edit) -> AttackResult:
    with untouched(tiny_lab.model):
        return logit_lens(tiny_lab.model, tiny_lab.task, edit, draws=100)


def test_what_the_last_mlps_hide_stands_below_them_and_what_was_never_known_does_not(found: AttackResult) -> None:
    assert share(found, "shallow") >= 0.65, "there is one layer below"
    assert level(found, "forget", group="shallow") >= level(found, "heldout", group="never knew") + 0.3
    assert level(found, "forget", "before") == level(found, "forget", group="unedited") > 0.9
    assert "read off likewise before the edit" in found.sentence
    assert f"{level(found, 'forget', 'after'):.2f} said after it" in found.sentence
    assert {curve.x for curve in found.curves} == {(1.0, 2.0)}


def test_the_last_layer_says_what_the_edited_model_says(found: AttackResult) -> None:
    last = [curve.columns["recovered"][-1] for curve in found.curves if curve.role == "found"]
    assert sum(last) / 2 == pytest.approx(level(found, "forget", "after"))
    shallow = [curve.columns["recovered"] for curve in found.curves if curve.role == "shallow"]
    assert all(below > above + 0.3 for below, above in shallow)


def test_it_repeats_itself(tiny_lab: Lab, edit: Edit, found: AttackResult) -> None:
    again = logit_lens(tiny_lab.model, tiny_lab.task, edit, draws=100)
    assert (again.measures, again.curves, again.headline) == (found.measures, found.curves, found.headline)


def test_two_attacks_of_one_evaluation_record_the_states_once(
    tiny_lab: Lab, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    reads = Probe(ProbeOptions(), task)
    narrowed: dict[str, Dataset] = {}
    for role in ("forget", "retain", "heldout"):
        data = getattr(task, role)
        narrowed[role] = data.replace(reads.narrow(model, data))
    task = dataclasses.replace(task, **narrowed)
    runs: list[int] = []
    real = states.recorded
    monkeypatch.setattr(states, "recorded", lambda *given: (runs.append(1), real(*given))[1])
    shared = Shared()
    probe(model, task, edit, shared=shared, **CONTROL)
    first = len(runs)
    assert first >= 8, "forget and retain items in three models, held-out ones in one, and what is fitted on"
    logit_lens(model, task, edit, shared=shared, **CONTROL)
    assert len(runs) == first
    logit_lens(model, task, edit, shared=Shared(), **CONTROL)
    assert len(runs) > first


@pytest.mark.parametrize(
    ("given", "words"),
    [({"splits": 1}, "splits=1 must be an even number"), ({"metric": "rank"}, "metric"), ({"layers": 2}, "layers")],
)
def test_wrong_options_give_one_line(tiny_lab: Lab, edit: Edit, given: dict[str, Any], words: str) -> None:
    with pytest.raises(LoceditError, match=words) as caught:
        logit_lens(tiny_lab.model, tiny_lab.task, edit, **given)
    assert "\n" not in str(caught.value)

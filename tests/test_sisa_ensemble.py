"""The ensemble as a model: mean probability in logits, continuations, losses, levels and metrics."""

import dataclasses
from pathlib import Path

import pytest
import torch

from locedit import losses, sisa
from locedit.classification import as_facts, classify
from locedit.data import collate, encode
from locedit.edit import levels
from locedit.errors import LoceditError
from locedit.evaluate.scoring import token_scores
from locedit.generation import greedy
from locedit.models import Model
from locedit.sisa import Ensemble
from tests import tiny
from tests.test_sisa import OPTIONS, WORDS, data


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model("gpt2", n_layer=1)


@pytest.fixture(scope="module")
def ensemble(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    folder = tmp_path_factory.mktemp("sisa") / "whole"
    sisa.train(model, data(), folder, verbaliser=WORDS, **OPTIONS)
    return Ensemble.load(folder, model)


def of_members(ensemble: Ensemble, batch, *, at=None) -> list[torch.Tensor]:
    found = []
    for edit in ensemble.members:
        with torch.no_grad(), edit.applied(ensemble.start) as member:
            found.append(member.logits(batch, at=at).double().softmax(-1))
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_logits_are_the_log_of_the_mean_probability(ensemble: Ensemble, weighted: bool) -> None:
    ensemble = dataclasses.replace(ensemble, weighted=weighted)
    examples = encode(ensemble, as_facts(data(), WORDS))[:5]
    batch = collate(examples, ensemble)
    first, second = of_members(ensemble, batch)
    a, b = (11 / 23, 12 / 23) if weighted else (0.5, 0.5)
    torch.testing.assert_close(ensemble.logits(batch).double().exp(), a * first + b * second, atol=1e-6, rtol=1e-5)
    assert (first - second).abs().max() > 0.01, "the members differ"
    at = batch.predicting(True)
    torch.testing.assert_close(ensemble.logits(batch, at=at), ensemble.logits(batch)[at], atol=1e-6, rtol=1e-5)


def test_the_start_is_as_before(ensemble: Ensemble, model: Model) -> None:
    before = model.fingerprint
    ensemble.outputs(["Anna was in Oslo."], WORDS)
    assert model.fingerprint == before
    assert ensemble.fingerprint not in (before, dataclasses.replace(ensemble, weighted=True).fingerprint)


def test_losses_and_levels_take_it_for_a_model(ensemble: Ensemble) -> None:
    examples = encode(ensemble, as_facts(data(), WORDS))[:6]
    batch = collate(examples, ensemble)
    found = losses.sequence_probability(losses.score(ensemble, batch)).double()
    at = batch.predicting(True)
    mean = sum(of_members(ensemble, batch, at=at)) / 2
    expected = mean.gather(1, batch.labels[batch.scored][:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert levels(ensemble, {"all": examples})["all"] == pytest.approx(expected.mean().item(), rel=1e-5)


def test_metrics_take_it_for_a_model(ensemble: Ensemble) -> None:
    """What probability and accuracy of le.evaluate are made of."""
    examples = encode(ensemble, as_facts(data(6), WORDS))
    found = torch.stack([scores.log_probs.sum().exp() for scores in token_scores(ensemble, examples, batch_size=4)])
    assert found.mean().item() == pytest.approx(levels(ensemble, {"all": examples})["all"], rel=1e-5)


def test_continuations_of_one_member_are_the_models_own(model: Model, ensemble: Ensemble) -> None:
    """An ensemble of one continues as that member does, prompts of different lengths in one batch."""
    alone = Ensemble(start=model, members=ensemble.members[:1], sizes=(11,))
    prompts = [example.prompt() for example in encode(model, as_facts(data(4), WORDS))]
    prompts[0] = dataclasses.replace(prompts[0], ids=prompts[0].ids[:3])
    batch = collate(prompts, model)
    with alone.members[0].applied(model) as member:
        expected = greedy(member, batch, max_new_tokens=5)
    assert alone.generate(batch, max_new_tokens=5) == expected
    assert ensemble.generate(batch, max_new_tokens=0) == [(), (), (), ()]


def test_continuations_follow_the_mean(ensemble: Ensemble) -> None:
    prompt = encode(ensemble, as_facts(data(1), WORDS))[0].prompt()
    said = ensemble.generate(collate([prompt], ensemble), max_new_tokens=3)[0]
    ids = list(prompt.ids)
    for token in said:
        batch = collate([dataclasses.replace(prompt, ids=tuple(ids))], ensemble)
        assert sum(of_members(ensemble, batch))[0, -1].argmax().item() == token
        ids.append(token)
    assert len(said) == 3


def test_outputs_are_those_of_each_member(ensemble: Ensemble) -> None:
    texts = [item.text for item in data(4)]
    found = ensemble.outputs(texts, WORDS, batch_size=3)
    assert found.shape == (4, 2, 2)
    with ensemble.members[1].applied(ensemble.start) as member:
        torch.testing.assert_close(found[:, 1], classify(member, texts, WORDS), atol=1e-6, rtol=1e-5)


def test_outputs_go_through_the_chat_template(ensemble: Ensemble) -> None:
    texts = [item.text for item in data(3)]
    asked = ensemble.outputs(texts, WORDS, chat="Eva: {prompt} Bo:")
    with ensemble.members[0].applied(ensemble.start) as member:
        torch.testing.assert_close(asked[:, 0], classify(member, texts, WORDS, chat="Eva: {prompt} Bo:"))
    assert (asked - ensemble.outputs(texts, WORDS)).abs().max() > 1e-3


def test_an_ensemble_has_members(model: Model) -> None:
    with pytest.raises(LoceditError, match="an ensemble of 0 members"):
        Ensemble(start=model, members=(), sizes=())


def test_a_training_that_is_not_there_is_said(model: Model, tmp_path: Path) -> None:
    with pytest.raises(LoceditError, match=r"record.json: no such file"):
        Ensemble.load(tmp_path, model)

"""Membership scores against plain loops, one text at a time without padding; AUCs before and after forgetting."""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sklearn.metrics import roc_auc_score

from locedit.data import Dataset, Fact, PlainText, PrivateText, Task
from locedit.data.encode import Example, Span
from locedit.data.items import Item, TokenText
from locedit.edit import Edit
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.evaluate.membership import Sets, _leak_estimate, leak  # pyright: ignore[reportPrivateUsage]
from locedit.evaluate.membership_scores import (
    Text,
    after_prefix,
    gradient_norms,
    lowest,
    signals_of,
    texts_of,
    without_specials,
)
from locedit.evaluate.separation import auc_draws, auc_estimate, expanded_ends
from locedit.evaluate.values import EvaluateOptions
from locedit.models import Model
from locedit.unlearn import unlearn
from tests import tiny

if TYPE_CHECKING:
    from locedit.lab import Lab

SHARED = ("mia_loss", "mia_zlib", "min_k", "min_k_plus_plus")
TEXTS = tuple(PlainText(text=text, id=f"t{i}", owner=f"o{i // 2}") for i, text in enumerate(tiny.CORPUS))
OTHERS = tuple(
    PlainText(text=text, id=f"h{i}")
    for i, text in enumerate(
        ("Eva Frost was born in Lima.", "Where was Carl Dane born?", "555 works as an e-mail.", "Oslo is a pilot.")
    )
)


def dataset(items: Sequence[Item]) -> Dataset:
    return Dataset(items=tuple(items), source="test.jsonl")


TASK = Task(forget=dataset(TEXTS), heldout=dataset(OTHERS))


def by_hand(model: Model, ids: Sequence[int], scored: range) -> tuple[torch.Tensor, torch.Tensor]:
    """log p and (log p - mu) / sigma of each scored token, from one forward pass of one text, in float64."""
    with torch.inference_mode():
        logits = model.module(input_ids=torch.tensor([ids])).logits[0].double()
    own, standard = [], []
    for at in scored:
        log_p = logits[at - 1].log_softmax(-1)
        p = log_p.exp()
        mu = float((p * log_p).sum())
        sigma = math.sqrt(float((p * log_p**2).sum()) - mu**2)
        own.append(float(log_p[ids[at]]))
        standard.append((own[-1] - mu) / sigma)
    return torch.tensor(own, dtype=torch.float64), torch.tensor(standard, dtype=torch.float64)


def lowest_by_hand(values: torch.Tensor, share: float) -> float:
    count = max(1, math.floor(share * len(values)))
    return sum(sorted(values.tolist())[:count]) / count


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_shared_scores_equal_a_loop_and_their_auc_that_of_scikit_learn(architecture: str) -> None:
    model = tiny.model(architecture)
    scores: dict[str, list[float]] = {name: [] for name in SHARED}
    for item in (*TEXTS, *OTHERS):
        ids = model.tokenizer(item.text).input_ids
        own, standard = by_hand(model, ids, range(1, len(ids)))
        scores["mia_loss"].append(float(own.mean()))
        scores["mia_zlib"].append(float(own.mean()) / len(zlib.compress(item.text.encode())))
        scores["min_k"].append(lowest_by_hand(own, 0.4))
        scores["min_k_plus_plus"].append(lowest_by_hand(standard, 0.4))
    found = evaluate(model, TASK, metrics=SHARED, min_k_share=0.4, batch_size=3)
    for name in SHARED:
        measure = found.get("forget", name, stage="before")
        assert measure.value == pytest.approx(roc_auc_score([1] * 4 + [0] * 4, scores[name]))
        assert sum(measure.per_example.values()) / 4 == pytest.approx(measure.value)
        assert measure.direction == "neutral"
        for item, own in zip(TEXTS, scores[name], strict=False):
            beaten = sum(own > other for other in scores[name][4:]) / 4
            assert measure.per_example[item.id] == beaten
    assert len({tuple(found.get("forget", n, stage="before").per_example.values()) for n in SHARED}) > 1


def test_token_signals_equal_a_loop_whatever_the_batch() -> None:
    model = tiny.model("llama")
    texts = texts_of(model, dataset(TEXTS))
    for size in (1, 3, 64):
        for text, found in zip(texts, signals_of(model, texts, batch_size=size), strict=True):
            own, standard = by_hand(model, text.examples[0].ids, range(1, len(text.examples[0].ids)))
            torch.testing.assert_close(found.log_probs, own, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.standard, standard, rtol=1e-4, atol=1e-4)


def test_what_of_an_item_is_scored() -> None:
    model = tiny.model("gpt2")
    fact = Fact(prompt="Anna Berg was born in", answer=" Oslo", id="f")
    prompt, whole = (len(model.tokenizer(text).input_ids) for text in (fact.prompt, fact.prompt + fact.answer))
    (answer,) = texts_of(model, dataset([fact]))
    (both,) = texts_of(model, dataset([fact]), scored="all")
    assert answer.examples[0].targets == tuple(range(prompt, whole))
    assert both.examples[0].targets == tuple(range(1, whole))
    assert (answer.text, both.text) == (" Oslo", "Anna Berg was born in Oslo")
    private = PrivateText(text=tiny.CORPUS[2], spans=((35, 43, "phone"),), id="p")
    plain = PlainText(text=tiny.CORPUS[2], id="p")
    texts = [texts_of(model, dataset([item]))[0] for item in (private, plain)]
    assert texts[0].examples[0].targets == texts[1].examples[0].targets
    tokens = TokenText(ids=(5, 6, 7, 8), span=(2, 4), id="t")
    assert texts_of(model, dataset([tokens]))[0].examples[0].targets == (1, 2, 3)


def test_a_text_longer_than_the_context_is_one_text() -> None:
    """Its windows are joined: every token counts once."""
    model = tiny.model("gpt2")
    long = PlainText(text=" ".join([tiny.CORPUS[2]] * 4), id="long")
    (text,) = texts_of(model, dataset([long]))
    (signals,) = signals_of(model, [text])
    assert len(text.examples) > 1
    assert len(signals.log_probs) == text.tokens == len(model.tokenizer(long.text).input_ids) - 1
    with pytest.raises(LoceditError, match="item 'long'.*choose a smaller recall_shots"):
        evaluate(model, dataclasses.replace(TASK, forget=dataset([long])), metrics=["mia_recall"], recall_shots=1)


def test_lowest_takes_at_least_one() -> None:
    values = torch.tensor([-3.0, -1.0, -2.0])
    assert lowest(values, 0.1) == -3
    assert lowest(values, 0.67) == -2.5
    assert lowest(values, 1.0) == -2


@pytest.mark.parametrize("architecture", ["gpt2", "llama_tied", "bert"])
def test_gradient_norms_equal_autograd(architecture: str) -> None:
    model = tiny.model(architecture)
    texts = texts_of(model, dataset(TEXTS[:2]))
    parameters = list(model.module.parameters())
    kept = [p.requires_grad for p in parameters]
    for text, found, mean in zip(
        texts, gradient_norms(model, texts), gradient_norms(model, texts, norm="tensor_mean"), strict=True
    ):
        loss = loss_by_hand(model, text.examples[0].ids, text.examples[0].targets)
        grads = [g for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None]
        norms = torch.stack([g.double().norm() for g in grads])
        assert found == pytest.approx(float(norms.square().sum().sqrt()), rel=1e-4)
        assert mean == pytest.approx(float(norms.mean()), rel=1e-4)
    assert all(p.grad is None for p in parameters)
    assert [p.requires_grad for p in parameters] == kept


@pytest.mark.parametrize("norm", ["global", "tensor_mean"])
def test_of_members_the_gradient_is_smaller(norm: str) -> None:
    model = tiny.model("gpt2")
    found = evaluate(model, TASK, metrics=["mia_gradient_norm"], gradient_norm=norm)
    measure = found.get("forget", "mia_gradient_norm", stage="before")
    members, others = (
        gradient_norms(model, texts_of(model, dataset(items)), norm=norm)  # type: ignore[arg-type]
        for items in (TEXTS, OTHERS)
    )
    truth = [1] * len(members) + [0] * len(others)
    assert measure.value == pytest.approx(roc_auc_score(truth, [-value for value in (*members, *others)]))
    assert measure.value != 0.5


def loss_by_hand(model: Model, ids: Sequence[int], targets: Sequence[int]) -> torch.Tensor:
    """Mean negative log-likelihood of the targets; of a masked model each masked alone."""
    row = torch.tensor([ids])
    if model.causal:
        log_p = model.module(input_ids=row).logits[0].log_softmax(-1)
        return -torch.stack([log_p[at - 1, ids[at]] for at in targets]).mean()
    losses = []
    for at in targets:
        masked = row.clone()
        masked[0, at] = model.tokenizer.mask_token_id
        losses.append(-model.module(input_ids=masked).logits[0, at].log_softmax(-1)[ids[at]])
    return torch.stack(losses).mean()


def test_recall_by_hand_without_the_items_of_the_prefix() -> None:
    model = tiny.model("llama", seed=3)
    found = evaluate(model, TASK, metrics=["mia_recall"], recall_shots=1, seed=5).get(
        "forget", "mia_recall", stage="before"
    )
    assert found.note == "against 3 held-out items; after 1 other held-out items"
    first = int(torch.randperm(4, generator=torch.Generator().manual_seed(5))[0])
    prefix = model.tokenizer(OTHERS[first].text).input_ids

    def ratio(text: str) -> float:
        ids = model.tokenizer(text).input_ids
        alone, _ = by_hand(model, ids, range(1, len(ids)))
        after, _ = by_hand(model, [*prefix, *ids], range(len(prefix) + 1, len(prefix) + len(ids)))
        return float(after.sum() / alone.sum())

    others = [ratio(item.text) for at, item in enumerate(OTHERS) if at != first]
    for item in TEXTS:
        assert found.per_example[item.id] == sum(ratio(item.text) > other for other in others) / 3


def test_a_prefix_stands_behind_the_token_that_begins_a_text() -> None:
    model = tiny.model("gpt2")
    span = Span(start=1, end=3, label="plain")
    example = Example(id="1", ids=(1, 50, 51, 2), spans=(span,), kind="plain")  # <s> ... </s>
    text = Text(id="1", owner=None, text="", examples=(example,))
    (longer,) = after_prefix(model, text, (60, 61)).examples
    assert longer.ids == (1, 60, 61, 50, 51, 2)
    assert longer.targets == (3, 4)
    assert without_specials(model, text) == (50, 51)


def test_recall_leaves_out_the_owners_of_its_prefix() -> None:
    """Two owners of two items: with one shot one owner goes, and one alone is too few to compare with."""
    owned = [dataclasses.replace(item, owner=f"x{at // 2}") for at, item in enumerate(OTHERS)]
    task = dataclasses.replace(TASK, heldout=dataset(owned))
    with pytest.raises(LoceditError, match="recall_shots=1 leaves held-out items of fewer than two owners"):
        evaluate(tiny.model("gpt2"), task, metrics=["mia_recall"], recall_shots=1)


def test_the_reference_is_the_start_or_the_model_of_the_option(tmp_path: Any) -> None:
    model, other = tiny.model("gpt2"), tiny.model("gpt2", seed=1)
    folders = {"same": model, "other": other}
    for name, each in folders.items():
        each.module.save_pretrained(tmp_path / name)
        each.tokenizer.save_pretrained(tmp_path / name)

    def placements(task: Task, **options: Any) -> dict[str, float]:
        found = evaluate(model, task, metrics=["mia_reference"], **options)
        return found.get("forget", "mia_reference", stage="before").per_example

    started = dataclasses.replace(TASK, start=str(tmp_path / "other"))
    scores: list[float] = []
    for item in (*TEXTS, *OTHERS):
        ids = model.tokenizer(item.text).input_ids
        here, there = (by_hand(each, ids, range(1, len(ids)))[0].mean() for each in (model, other))
        scores.append(float(here - there))
    expected = {t.id: sum(own > o for o in scores[4:]) / 4 for t, own in zip(TEXTS, scores, strict=False)}
    assert placements(started) == expected
    assert placements(TASK, membership_reference=str(tmp_path / "other")) == expected
    assert set(placements(started, membership_reference=str(tmp_path / "same")).values()) == {0.5}
    with pytest.raises(LoceditError, match="'mia_reference' needs a reference model: --membership-reference FOLDER"):
        evaluate(model, TASK, metrics=["mia_reference"])


def test_forget_items_that_are_the_held_out_ones_are_not_told_apart() -> None:
    alone = [dataclasses.replace(item, owner=None) for item in TEXTS]
    same = [dataclasses.replace(item, id=f"again{item.id}") for item in alone]
    task = Task(forget=dataset(alone), heldout=dataset(same))
    names = [*SHARED, "mia_gradient_norm", "privleak"]
    found = evaluate(tiny.model("gpt2"), task, metrics=names)
    for name in names:
        measure = found.get("forget", name, stage="before")
        chance = 0 if name == "privleak" else 0.5
        assert measure.value == pytest.approx(chance)
        assert measure.low < chance < measure.high


def test_privleak_by_hand_with_and_without_a_retain_model(tmp_path: Any) -> None:
    model, other = tiny.model("gpt2"), tiny.model("gpt2", seed=1)
    other.module.save_pretrained(tmp_path)
    other.tokenizer.save_pretrained(tmp_path)
    auc, reference = (
        evaluate(each, TASK, metrics=["min_k"]).get("forget", "min_k", stage="before") for each in (model, other)
    )
    alone = evaluate(model, TASK, metrics=["min_k", "privleak"]).get("forget", "privleak", stage="before")
    assert alone.value == pytest.approx(100 * (0.5 - auc.value) / 0.5)
    assert (alone.low, alone.high) == pytest.approx((100 * (1 - 2 * auc.high), 100 * (1 - 2 * auc.low)))
    assert alone.note.endswith("AUC_ref is 0.5, no retain_model was given")
    beside = evaluate(model, TASK, metrics=["privleak"], retain_model=str(tmp_path))
    measure = beside.get("forget", "privleak", stage="before")
    assert reference.value != auc.value
    assert measure.value == pytest.approx(100 * (reference.value - auc.value) / (1 - reference.value))
    assert sum(measure.per_example.values()) / 4 == pytest.approx(measure.value)
    assert measure.low < measure.value < measure.high
    assert f"AUC_ref {reference.value:.3g}" in measure.note


def test_the_interval_of_privleak_holds_that_of_both_models_in_the_same_samples() -> None:
    """Beside a fixed AUC_ref alone it would say nothing of how uncertain the reference is."""
    members, others = 12, 12
    generator = torch.Generator().manual_seed(0)
    won, reference = (torch.rand(members, others, generator=generator).round().double() for _ in range(2))
    reference[:, :9] = 1  # an uncertain reference near 1 makes the quotient uncertain
    sets = Sets(members=[_text("m", at) for at in range(members)], others=[_text("o", at) for at in range(others)])
    options = EvaluateOptions()
    found = _leak_estimate(options, sets, won, reference, sets.owners)
    owned = {"owners": sets.owners, "other_owners": sets.other_owners}
    fixed = auc_estimate(won, **owned)
    low, high = (
        100 * (float(reference.mean()) - end) / (1 - float(reference.mean())) for end in (fixed.high, fixed.low)
    )
    draws = leak(*(auc_draws(each, **owned) for each in (won, reference)))
    joint = expanded_ends(draws, clusters=12)
    assert found.low == pytest.approx(min(low, joint[0]))
    assert found.high == pytest.approx(max(high, joint[1]))
    assert (found.low, found.high) != pytest.approx((low, high)), "the reference counts"


def _text(kind: str, at: int) -> Text:
    return Text(id=f"{kind}{at}", owner=None, text="", examples=())


def test_privleak_says_when_it_divides_by_almost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from locedit.evaluate import membership

    calls: list[Model] = []

    def perfect(view: Any, model: Model, sets: Any, names: Any) -> Any:  # noqa: ARG001
        calls.append(model)
        return {"min_k": torch.full((4, 4), 0.5 if len(calls) == 1 else 0.99, dtype=torch.float64)}

    monkeypatch.setattr(membership, "_shared", perfect)
    monkeypatch.setattr("locedit.evaluate.suite.beside", lambda model, *_, **__: model)
    found = evaluate(tiny.model("gpt2"), TASK, metrics=["privleak"], retain_model="x")
    measure = found.get("forget", "privleak", stage="before")
    assert measure.value == pytest.approx(100 * (0.5 - 0.01) / 0.01)
    assert "AUC_ref 0.99, above 0.95: privleak divides by 0.01 and says little" in measure.note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_k_share": 0.0}, "min_k_share=0.0 is not a share above 0 and at most 1"),
        ({"recall_shots": 0}, "recall_shots=0 is not a positive number"),
        ({"membership_text": "prompt"}, "membership_text='prompt'"),
        ({"gradient_norm": "l1"}, "gradient_norm='l1'"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoceditError, match=message):
        evaluate(tiny.model("gpt2"), TASK, **options)


def test_held_out_items_of_another_kind_are_refused_only_when_asked_for() -> None:
    facts = dataset([Fact(prompt="Anna is", answer=" here", id="f")])
    task = dataclasses.replace(TASK, heldout=facts)
    assert not any(m.name in SHARED for m in evaluate(tiny.model("gpt2"), task).measures)
    with pytest.raises(LoceditError, match="'min_k' needs heldout items of the kind of the forget items, plain"):
        evaluate(tiny.model("gpt2"), task, metrics=["min_k"])
    with pytest.raises(LoceditError, match="'min_k' needs heldout items of kind"):
        evaluate(tiny.model("gpt2"), dataclasses.replace(TASK, heldout=None), metrics=["min_k"])


def test_a_learned_fact_looks_like_a_member_and_a_forgotten_one_less(tiny_lab: "Lab") -> None:
    """Statements of the tiny lab, before and after gradient ascent that goes far too far."""
    task = tiny_lab.task
    assert task.heldout is not None
    statements = dataclasses.replace(
        task, forget=task.forget.where(format="statement"), heldout=task.heldout.where(format="statement")
    )
    model = tiny_lab.model
    names = ["mia_loss", "min_k", "mia_gradient_norm"]
    edit: Edit = unlearn(model, statements, "ga", steps=30, learning_rate=1e-3)
    found = evaluate(model, statements, edit, metrics=names)
    for name in names:
        before, after = found.get("forget", name, stage="before"), found.get("forget", name)
        assert before.value > 0.8, name
        assert before.low > 0.5, name
        if name != "mia_gradient_norm":  # stays high here: a gradient is small on both sides
            assert after.value < 0.5, name

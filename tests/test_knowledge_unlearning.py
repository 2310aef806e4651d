"""Gradient ascent until texts are as hard to extract as unseen ones, at once and in chunks."""

import dataclasses
from typing import Any

import pytest
import torch

from locedit import losses
from locedit.controls import compare
from locedit.data.encode import collate, encode
from locedit.data.items import Dataset, Fact, Task, TokenText
from locedit.edit import answer_probabilities
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.unlearn import prepare, unlearn
from locedit.unlearn.chunks import split
from tests import edits, tiny
from tests.test_extraction import double_loop, half_known

N = 2
RULE: dict[str, Any] = {"stop_when": "memorization", "el_n": N, "eval_every": 1, "learning_rate": 1e-4}


def tokens(ids: tuple[int, ...], name: str, owner: str | None = None) -> TokenText:
    return TokenText(ids=ids, span=(1, len(ids)), id=name, owner=owner)


def texts_of(model: Model) -> Task:
    """Four texts of three owners that the model says to a large part, and two held-out ones that it says in part."""
    known = [example.ids for seed in (1, 2) for example in half_known(model, 14, seed=seed)]
    forget = [tokens(ids, f"f{i}", owner=f"owner {'abca'[i]}") for i, ids in enumerate(known)]
    never = [tokens(example.ids, f"h{i}") for i, example in enumerate(half_known(model, 11, seed=3))]
    return Task(
        forget=Dataset(items=tuple(forget), source="forget.jsonl"),
        heldout=Dataset(items=tuple(never), source="heldout.jsonl"),
    )


def loop_means(model: Model, data: Dataset) -> tuple[float, float]:
    """Mean EL and MA by the published double loop."""
    found = [double_loop(model.module, example.ids, (N,)) for example in encode(model, data)]
    return sum(f.el[N] for f in found) / len(found), sum(f.ma for f in found) / len(found)


def test_training_stops_at_the_first_measurement_below_both_thresholds() -> None:
    model = tiny.model("gpt2")
    task = texts_of(model)
    never = unlearn(model, task, "ga", steps=7, el_threshold=0.0, ma_threshold=0.0, check=False, **RULE)
    assert len(never.history["step"]) == 8
    assert not never.outcome["reached"]
    el, ma = never.history["el"], never.history["ma"]
    assert (el[0], ma[0]) == pytest.approx(loop_means(model, task.forget))
    # thresholds that are passed one after the other
    first_el = next(at for at in range(8) if el[at] < el[0] / 2)
    first_ma = next(at for at in range(8) if ma[at] < ma[0] / 2)
    assert 0 < first_el < first_ma < 7
    limits = {"el_threshold": el[0] / 2, "ma_threshold": ma[0] / 2}
    edit = unlearn(model, task, "ga", steps=7, check=False, **limits, **RULE)
    wanted = next(at for at in range(8) if el[at] < el[0] / 2 and ma[at] < ma[0] / 2)
    assert edit.history["step"][-1] == wanted
    assert edit.outcome["reached"]
    assert edit.outcome["ended by"] == "rule"
    assert {name: edit.outcome[name] for name in limits} == limits
    assert not set(limits) & set(edit.history)
    with edit.applied(model) as edited:
        found = loop_means(edited, task.forget)
    assert found == pytest.approx((edit.history["el"][-1], edit.history["ma"][-1]))
    assert found[0] < limits["el_threshold"]
    assert found[1] < limits["ma_threshold"]
    # one of the two alone does not stop it
    only = unlearn(model, task, "ga", steps=wanted, check=False, **(limits | {"el_threshold": 0.0}), **RULE)
    assert not only.outcome["reached"]


def test_thresholds_are_the_means_over_held_out_texts_before_training() -> None:
    model = tiny.model("llama")
    task = texts_of(model)
    assert task.heldout is not None
    wanted = loop_means(model, task.heldout)
    assert min(wanted) > 0
    edit = unlearn(model, task, "ga", steps=2, check=False, **RULE)
    assert (edit.outcome["el_threshold"], edit.outcome["ma_threshold"]) == pytest.approx(wanted)
    given = unlearn(model, task, "ga", steps=1, ma_threshold=0.25, check=False, **RULE)
    assert (given.outcome["el_threshold"], given.outcome["ma_threshold"]) == pytest.approx((wanted[0], 0.25))


@pytest.mark.slow
def test_the_rule_combines_with_other_losses() -> None:
    model = tiny.model("gpt2")
    task = dataclasses.replace(texts_of(model), retain=texts_of(model).heldout)
    edit = unlearn(model, task, "ga+kl", steps=2, el_threshold=2.0, ma_threshold=2.0, check=False, **RULE)
    assert edit.history["step"] == [0]
    assert edit.outcome["reached"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing held out": ({}, "'memorization' takes its thresholds from held-out texts.*add heldout.jsonl.*or give"),
    "one threshold": ({"el_threshold": 0.1}, "takes its thresholds from held-out texts"),
    "until too": ({"until": 0.1, "el_threshold": 0.1, "ma_threshold": 0.1}, "until=0.1 is of stop_when='level'"),
    "a threshold alone": ({"stop_when": "level", "ma_threshold": 0.1}, "ma_threshold=0.1 is of stop_when='memor"),
    "no rule": ({"stop_when": "soon"}, "stop_when='soon'"),
    "no gram": ({"el_n": 0}, "el_n=0"),
    "chunks": ({"stop_when": "level", "chunks": 5}, "chunks=5: forget.jsonl has 3 owners.*choose 1 to 3"),
    "no chunk": ({"stop_when": "level", "chunks": 0}, "chunks=0"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_the_rule_needs_is_said_before_anything_runs(case: str) -> None:
    options, message = BAD[case]
    task = dataclasses.replace(texts_of(tiny.model("gpt2")), heldout=None)
    with pytest.raises(LoceditError, match=message):
        prepare("ga", task, **({"stop_when": "memorization"} | options))


def test_facts_are_no_texts() -> None:
    with pytest.raises(LoceditError, match=r"needs texts.*forget.jsonl holds 'fact'"):
        prepare("ga", edits.task(), stop_when="memorization")


# --- chunks ----------------------------------------------------------------------------------------------------------


def facts(owners: str) -> Dataset:
    return Dataset(
        items=tuple(Fact(prompt="a", answer=" b", id=str(i), owner=o) for i, o in enumerate(owners)), source="f"
    )


@pytest.mark.parametrize(
    ("owners", "count", "wanted"),
    [
        ("abcdef", 3, ["01", "23", "45"]),
        ("aaaabc", 2, ["0123", "45"]),
        ("aaaaab", 2, ["01234", "5"]),
        ("abcccccc", 3, ["0", "1", "234567"]),
        ("abcab", 2, ["03", "142"]),
        ("abcde", 2, ["012", "34"]),
    ],
)  # fmt: skip
def test_chunks_are_even_and_keep_owners_together(owners: str, count: int, wanted: list[str]) -> None:
    found = ["".join(item.id for item in part) for part in split(facts(owners), count)]
    assert found == wanted


def test_chunks_are_trained_one_after_another() -> None:
    """Equal to plain AdamW on the first chunk, then anew on the second; `forget` is the level of everything."""
    model, plain = edits.double("gpt2"), edits.double("gpt2")
    task = texts_of(model)
    steps: dict[str, Any] = {"steps": 3, "learning_rate": 1e-3, "clip": 0.5, "batch_size": 4}
    edit = unlearn(model, task, "ga", chunks=2, check=False, **steps)
    for names in ({"f0", "f3"}, {"f1", "f2"}):  # the owner of the first and the last text is one
        chunk = [example for example in encode(plain, task.forget) if example.id in names]
        optimizer = torch.optim.AdamW(plain.module.parameters(), lr=1e-3, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            (-losses.sequence_nll(losses.score(plain, collate(chunk, plain))).mean()).backward()
            torch.nn.utils.clip_grad_norm_(plain.module.parameters(), 0.5)
            optimizer.step()
    assert edit.kind == "weights"
    for patch in edit.patches:
        wanted = patch.region.read(plain.parameter(patch.region.param)).detach()
        torch.testing.assert_close(patch.values, wanted, rtol=0, atol=1e-9)
        base = patch.region.read(model.parameter(patch.region.param)).detach()
        assert patch.delta is not None
        torch.testing.assert_close(base + patch.delta, wanted, rtol=0, atol=1e-9)
    once = unlearn(model, task, "ga", check=False, **steps)
    assert any(not torch.allclose(a.values, b.values) for a, b in zip(edit.patches, once.patches, strict=True))
    level = float(answer_probabilities(plain, encode(plain, task.forget)).mean())
    second = [example for example in encode(plain, task.forget) if example.id in ("f1", "f2")]
    assert edit.history["forget"][-1] == pytest.approx(level)
    assert edit.history["chunk_forget"][-1] == pytest.approx(float(answer_probabilities(plain, second).mean()))
    assert edit.history["step"] == [0, 1, 2, 3, 3, 4, 5, 6]
    assert edit.history["chunk"] == [1] * 4 + [2] * 4
    assert edit.outcome["steps"] == 6


def test_each_chunk_is_trained_until_its_own_rule_inside_the_set() -> None:
    model = tiny.model("llama")
    task = texts_of(model)
    within = edits.neurons_and_heads(model)
    before = edits.bits(model.module)
    limits = {"el_threshold": 0.2, "ma_threshold": 0.3}
    edit = unlearn(
        model, task, "ga", within=within, chunks=3, steps=40, check=False, **(limits | RULE | {"learning_rate": 1e-3})
    )
    edit.verify(model)
    assert edits.same_bits(model.module, before)
    assert edit.within == within
    assert [each["reached"] for each in edit.outcome["chunks"]] == [True] * 3
    assert edit.outcome["steps"] == sum(each["steps"] for each in edit.outcome["chunks"])
    rows = list(zip(*(edit.history[name] for name in ("chunk", "el", "ma")), strict=True))
    for chunk in (1, 2, 3):
        *others, last = [(el < 0.2 and ma < 0.3) for number, el, ma in rows if number == chunk]
        assert last
        assert not any(others)
    assert len({step["steps"] for step in edit.outcome["chunks"]}) > 1


@pytest.mark.slow
def test_chunks_held_as_an_adapter_are_one_adapter() -> None:
    model = edits.double("llama")
    task = texts_of(model)
    options: dict[str, Any] = {"steps": 3, "learning_rate": 1e-2, "rank": 2, "check": False}
    edit = unlearn(model, task, "ga", hold="adapter", chunks=2, **options)
    parts = split(task.forget, 2)
    first = unlearn(model, Task(forget=parts[0]), "ga", hold="adapter", **options)
    with first.applied(model) as edited:
        second = unlearn(edited, Task(forget=parts[1]), "ga", hold="adapter", **options)
    batch = collate(encode(model, task.forget), model)
    with torch.no_grad():
        base = model.logits(batch)
        with first.then(second).applied(model) as chained:
            wanted = chained.logits(batch)
        with edit.applied(model) as joined:
            torch.testing.assert_close(joined.logits(batch), wanted, rtol=0, atol=1e-9)
    assert {adapter.down.shape[0] for adapter in edit.adapters} == {4}
    assert (wanted - base).abs().max() > 1e-2


def test_controls_are_not_trained_in_chunks() -> None:
    model = tiny.model("gpt2")
    with pytest.raises(LoceditError, match="chunks=2: controls are trained on all forget data at once"):
        compare(model, texts_of(model), "ga", within=edits.neurons_and_heads(model), chunks=2)

"""A suffix: gradients, candidates and losses against plain ones, the three settings, and what comes back."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit.attacks.aim import Aim, Target, aimed, side_of
from locedit.attacks.inserted import ordinary_tokens
from locedit.attacks.measures import values_of
from locedit.attacks.shared import Shared
from locedit.attacks.suffix import Suffix, SuffixOptions, crossable, queries, suffix
from locedit.attacks.token_search import (
    Search,
    Tokens,
    candidates,
    mean_losses,
    searched,
    token_gradients,
    with_suffix,
)
from locedit.data.encode import Example, collate
from locedit.data.items import Fact, Task
from locedit.edit import Edit
from locedit.edit.tokens import conditioned
from locedit.errors import LoceditError
from locedit.lab import Lab
from locedit.losses import score, sequence_nll
from locedit.models import Model
from locedit.results import AttackResult
from tests import tiny
from tests.gradients import example
from tests.struck import CONTROL, forgotten, level, share, untouched
from tests.unlearning import dataset

FAST: dict[str, Any] = {"length": 4, "steps": 4, "look_every": 2, "candidates": 12, "prompts": 10, **CONTROL}


@pytest.fixture(scope="module")
def edit(tiny_lab: Lab) -> Edit:
    return forgotten(tiny_lab)


@pytest.fixture(scope="module")
def found(tiny_lab: Lab, edit: Edit) -> AttackResult:
    with untouched(tiny_lab.model):
        return suffix(tiny_lab.model, tiny_lab.task, edit, **FAST)


def test_what_acts_only_without_other_tokens_comes_back_and_the_never_known_does_not(found: AttackResult) -> None:
    assert share(found, "shallow") >= 0.7
    assert level(found, "forget", group="shallow") >= level(found, "heldout", group="never knew") + 0.5
    assert level(found, "heldout", group="never knew") <= 0.5
    assert level(found, "forget", "after") <= 0.5 < 0.9 < level(found, "forget", "before")
    assert "the first suffix, " in found.note
    assert "context-conditional" not in found.note, "the control is what it should be"
    assert found.headline.value == pytest.approx(
        (level(found, "forget") - level(found, "heldout", group="never knew"))
        / (level(found, "forget", "before") - level(found, "heldout", group="never knew"))
    )


def test_the_other_settings_stand_beside_the_headline_with_controls_of_their_own(found: AttackResult) -> None:
    for setting in ("cross_query", "within_query"):
        never = level(found, "heldout", group=f"never knew, {setting}")
        expected = (level(found, "forget", group=setting) - never) / (level(found, "forget", "before") - never)
        assert share(found, setting) == pytest.approx(expected)
        roles = {curve.role for curve in found.curves if curve.track == setting}
        assert roles == {"found", "never knew"}
        assert all(curve.matched is None for curve in found.curves if curve.track == setting)
    assert all(curve.matched is not None for curve in found.curves if not curve.track)


@pytest.mark.slow
def test_it_is_the_same_every_time(tiny_lab: Lab, edit: Edit) -> None:
    given: dict[str, Any] = {**FAST, "steps": 2, "shallow": False, "beside": (), "metric": "probability"}
    first, again, other = (suffix(tiny_lab.model, tiny_lab.task, edit, **given, seed=seed) for seed in (0, 0, 1))
    assert first.curves == again.curves
    assert first.note == again.note != other.note


# --- what is searched for on what -------------------------------------------------------------------------------------


def _aimed(lab: Lab, options: SuffixOptions) -> Aim:
    return aimed(lab.model, lab.task, options, by="suffix", learns=True, shared=Shared(), narrow=None)


def _watched(attack: Suffix, monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[str], set[str | None]]]:
    """(owners, relations) of every search of an attack, which finds some suffix at once."""
    seen: list[tuple[set[str], set[str | None]]] = []

    def search(model: Model, side: Any, aim: Any) -> list[Tokens]:
        del model, aim
        seen.append((set(side.owners), {item.group for item in side.items}))
        return [(40 + len(seen), 50, 60, 70)]

    monkeypatch.setattr(attack, "_search", search)
    return seen


@pytest.mark.parametrize("setting", ["cross_target", "cross_query", "within_query"])
def test_each_setting_measures_what_it_says(tiny_lab: Lab, setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SuffixOptions(length=4, steps=1, metric="probability")
    aim, attack = _aimed(tiny_lab, options), Suffix(options, setting=setting)
    seen = _watched(attack, monkeypatch)
    half = aim.forget_halves[0]
    learned, measured = aim.forget.at(half.relearned), aim.forget.at(half.measured)
    values = attack.attack(
        Target(model=tiny_lab.model, key="x"), learned, {"forget": measured, "retain": aim.kept}, aim
    )
    assert set(learned.owners).isdisjoint(measured.owners)
    expected = torch.zeros(len(measured)).double()
    for number, (owners, relations) in enumerate(seen):
        places = [
            at for at, item in enumerate(measured.items) if setting != "cross_query" or item.group not in relations
        ]
        rows = [with_suffix(measured.examples[at], (41 + number, 50, 60, 70)) for at in places]
        expected[places] = values_of(tiny_lab.model, rows, "probability")
        assert owners == set((learned if setting == "cross_target" else measured).owners)
    assert len(seen) == (2 if setting == "cross_query" else 1)
    assert torch.equal(values["forget"][0], expected)
    kept = [
        values_of(tiny_lab.model, [with_suffix(one, (41 + at, 50, 60, 70)) for one in aim.kept.examples], "probability")
        for at in range(len(seen))
    ]
    assert torch.allclose(values["retain"][0], torch.stack(kept).mean(0))


def test_what_was_searched_for_once_is_not_searched_for_again(
    tiny_lab: Lab, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within-query of one half is cross-target of the other: the same search."""
    counts: list[int] = []
    search = Suffix._search  # pyright: ignore[reportPrivateUsage]

    def counted(self: Suffix, *given: Any) -> Any:
        counts.append(1)
        return search(self, *given)

    monkeypatch.setattr(Suffix, "_search", counted)
    given: dict[str, Any] = {**FAST, "steps": 1, "shallow": False}
    suffix(tiny_lab.model, tiny_lab.task, edit, **given, beside=("within_query",))
    assert len(counts) == 4, "two halves, forget and never known"


def test_held_out_items_with_the_ids_of_forget_items_have_a_suffix_of_their_own(
    tiny_lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids are unique within a data set alone: the suffix of the forget items was once given to the held-out ones."""
    forget, heldout = tiny_lab.task.forget, tiny_lab.task.heldout
    assert heldout is not None
    count = min(len(forget), len(heldout))
    numbered = [
        data.replace([dataclasses.replace(item, id=str(at)) for at, item in enumerate(list(data)[:count])])
        for data in (forget, heldout)
    ]
    task = dataclasses.replace(tiny_lab.task, forget=numbered[0], heldout=numbered[1])
    options = SuffixOptions(length=4, steps=1)
    aim = aimed(tiny_lab.model, task, options, by="suffix", learns=True, shared=Shared(), narrow=None)
    attack, target = Suffix(options), Target(model=tiny_lab.model, key="x")
    seen = _watched(attack, monkeypatch)
    sides = [side_of(tiny_lab.model, data, list(data)[:6]) for data in numbered]
    first, second, again = (attack._searched(target, side, aim) for side in (*sides, sides[0]))  # pyright: ignore[reportPrivateUsage]
    assert [owners for owners, _ in seen] == [set(side.owners) for side in sides]
    assert first != second
    assert again == first


def test_a_suffix_found_on_the_unedited_model_is_the_one_that_is_found_there(tiny_lab: Lab, edit: Edit) -> None:
    options = SuffixOptions(found_on="unedited", length=3, steps=2, candidates=8, prompts=40, beside=())
    aim, attack = _aimed(tiny_lab, options), Suffix(options)
    attack.prepare(aim)
    learned = aim.forget.at(aim.forget_halves[0].relearned)
    how = Search(length=3, steps=2, top_k=64, candidates=8, batch_size=128, seed=0)
    expected = searched(tiny_lab.model, learned.examples, ordinary_tokens(tiny_lab.model, aim.shared), how)[-1][0]
    with edit.applied(tiny_lab.model) as edited:
        given = attack._searched(Target(model=edited, key=edit.digest), learned, aim)  # pyright: ignore[reportPrivateUsage]
        there = searched(edited, learned.examples, ordinary_tokens(tiny_lab.model, aim.shared), how)[-1][0]
    assert given == [expected]
    assert there != expected, "in the edited model another one is found"


def test_queries_are_divided_by_relation_or_one_by_one(tiny_lab: Lab) -> None:
    facts = [
        Fact(prompt=f"{name} {group} is", answer=" Oslo", id=f"{name}{at}", owner=name, group=group)
        for name in ("Anna", "Carl")
        for at, group in enumerate(("job", "city", "sport"))
    ]
    assert queries(side_of(tiny_lab.model, dataset("f", facts))) == ([1, 2, 4, 5], [0, 3])  # sorted: city, job, sport
    plain = [Fact(prompt=f.prompt, answer=f.answer, id=f.id, owner=f.owner) for f in facts]
    assert queries(side_of(tiny_lab.model, dataset("f", plain))) == ([0, 2, 3, 5], [1, 4])


def test_cross_query_is_left_out_where_owners_have_one_query(tiny_lab: Lab, edit: Edit) -> None:
    owners: dict[str | None, Fact] = {}
    for item in tiny_lab.task.forget:
        assert isinstance(item, Fact)
        owners.setdefault(item.owner, item)
    task = Task(forget=dataset("one", list(owners.values())), retain=tiny_lab.task.retain)
    options = SuffixOptions()
    assert crossable(_aimed(tiny_lab, options))
    assert not crossable(aimed(tiny_lab.model, task, options, by="x", learns=True, shared=Shared(), narrow=None))
    given: dict[str, Any] = {**FAST, "steps": 1, "shallow": False}
    result = suffix(tiny_lab.model, task, edit, **given)
    assert "cross_query was left out" in result.note
    assert {curve.track for curve in result.curves} == {"", "within_query"}


# --- the search -------------------------------------------------------------------------------------------------------

ROWS = ([5, 9, 30, 7, 80], [44, 6, 90], [60, 61, 62, 63, 64, 65, 66])
TOKENS = (17, 101, 55)


def _examples() -> list[Example]:
    return [example(row, (len(row) - 2, len(row)), id=str(at)) for at, row in enumerate(ROWS)]


def _plain_loss(model: Model, examples: Sequence[Example], tokens: Sequence[int]) -> float:
    with torch.no_grad():
        parts = [sequence_nll(score(model, collate([with_suffix(one, tokens)], model))) for one in examples]
    return float(torch.cat(parts).double().mean())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "bert"])
def test_gradients_are_those_of_one_hot_vectors(family: str) -> None:
    model = tiny.model(family)
    found = token_gradients(model, _examples(), TOKENS, batch_size=2)
    expected = _one_hot_gradients(model, _examples(), TOKENS)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def _one_hot_gradients(model: Model, examples: Sequence[Example], tokens: Sequence[int]) -> Tensor:
    """Text by text, through inputs_embeds."""
    weight = model.core.get_input_embeddings().weight.detach()  # type: ignore[union-attr]
    total = torch.zeros(len(tokens), weight.shape[0])
    for one in examples:
        batch = collate([with_suffix(one, tokens)], model)
        loss = torch.zeros(())
        hot = torch.nn.functional.one_hot(batch.ids, weight.shape[0]).float().requires_grad_()  # [batch, pos, vocab]
        logits = model.module(inputs_embeds=hot @ weight, attention_mask=batch.attention_mask).logits
        log_probs = logits.log_softmax(-1)[batch.predicting(model.causal)]
        loss = -log_probs.gather(1, batch.labels[batch.scored][:, None]).mean() / len(examples)
        start = min(one.targets)
        total += torch.autograd.grad(loss, hot)[0].sum(0)[start : start + len(tokens)]
    return total


def test_behind_a_control_token_gradients_are_those_of_the_longer_text() -> None:
    model = tiny.model("llama")
    row = model.core.get_input_embeddings().weight[[33]].detach()  # type: ignore[union-attr,index]
    longer = [example([33, *ids], (len(ids) - 1, len(ids) + 1), id=str(at)) for at, ids in enumerate(ROWS)]
    with conditioned(model, row, 0):
        found = token_gradients(model, _examples(), TOKENS, batch_size=8)
    expected = token_gradients(model, longer, TOKENS, batch_size=8)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_where_embeddings_are_scaled_gradients_have_the_same_direction() -> None:
    model = tiny.model("gemma")
    found = token_gradients(model, _examples(), TOKENS, batch_size=8)
    scale = model.d_model**0.5
    weight = model.core.get_input_embeddings().weight  # type: ignore[union-attr]
    with torch.no_grad():
        before = weight[TOKENS[0]].clone()  # type: ignore[index]
        step = 1e-3 * weight[102]  # type: ignore[index]
        low, high = (_nudged_loss(model, before + sign * step) for sign in (-1, 1))
        weight[TOKENS[0]] = before  # type: ignore[index]
    assert float(found[0, 102]) * scale == pytest.approx((high - low) / 2e-3, rel=2e-2)


def _nudged_loss(model: Model, row: Tensor) -> float:
    """With another embedding of the first token of the suffix, which no text has."""
    model.core.get_input_embeddings().weight[TOKENS[0]] = row  # type: ignore[union-attr,index]
    return _plain_loss(model, _examples(), TOKENS)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_losses_are_those_of_each_text_alone_however_they_are_batched(family: str) -> None:
    model, choices = tiny.model(family), [TOKENS, (70, 71, 72), (4, 4, 4)]
    expected = [_plain_loss(model, _examples(), tokens) for tokens in choices]
    for size in (1, 4, 64):
        assert mean_losses(model, _examples(), choices, batch_size=size).tolist() == pytest.approx(expected, abs=1e-5)


def test_candidates_swap_one_token_for_one_of_the_best() -> None:
    gradients = torch.arange(3 * 20).reshape(3, 20).float().flip(1)  # the last tokens lower the loss most
    allowed = torch.tensor([2, 5, 11, 13, 17, 19])
    how = Search(length=3, steps=1, top_k=2, candidates=200, batch_size=1, seed=0)
    made = candidates((19, 2, 5), gradients, allowed, how, generator=torch.Generator().manual_seed(0))
    swaps = {
        (place, new) for one in made for place, (old, new) in enumerate(zip((19, 2, 5), one, strict=True)) if old != new
    }
    assert swaps == {(0, 17), (0, 13), (1, 19), (1, 17), (2, 19), (2, 17)}
    assert all(sum(old != new for old, new in zip((19, 2, 5), one, strict=True)) == 1 for one in made)


def test_the_loss_never_rises_and_one_token_is_found_exactly() -> None:
    model = tiny.model("gpt2")
    allowed = torch.arange(40, 70)
    how = Search(length=1, steps=1, top_k=29, candidates=400, batch_size=64, seed=0)
    with untouched(model):
        course = searched(model, _examples(), allowed, how)
    every = {token: _plain_loss(model, _examples(), (token,)) for token in allowed.tolist()}
    assert course[-1][0] == (min(every, key=lambda token: every[token]),)
    longer = Search(length=5, steps=8, top_k=16, candidates=6, batch_size=64, seed=1)
    course = searched(model, _examples(), allowed, longer)
    losses = [loss for _, loss in course]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert all(loss == pytest.approx(_plain_loss(model, _examples(), tokens), abs=1e-5) for tokens, loss in course)
    assert {token for tokens, _ in course for token in tokens} <= set(allowed.tolist())
    blind = Search(length=3, steps=12, top_k=29, candidates=1, batch_size=64, seed=2)
    losses = [loss for _, loss in searched(model, _examples(), allowed, blind)]
    assert losses == sorted(losses, reverse=True), "a single candidate is often worse, and then left"
    assert len(set(losses)) < len(losses)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"length": 0}, "suffix: length=0 must be at least 1"),
        ({"prompts": 0}, "suffix: prompts=0 must be at least 1"),
        ({"found_on": "both"}, "suffix: found_on='both' is not 'edited' or 'unedited'"),
        ({"beside": ("cross_target",)}, r"suffix: beside=\('cross_target',\)"),
        ({"length": 90}, "suffix: length=90: an item of .* tokens and 90 more do not fit the context of 96"),
    ],
)
def test_wrong_options_are_refused(tiny_lab: Lab, edit: Edit, given: dict[str, Any], words: str) -> None:
    with pytest.raises(LoceditError, match=words):
        suffix(tiny_lab.model, tiny_lab.task, edit, **given)

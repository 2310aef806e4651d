"""A soft prompt: its rows act as written tokens do, they alone are learned, and open what hides only without them."""

import dataclasses
from typing import Any

import pytest
import torch

import locedit as le
from locedit.attacks.aim import aimed
from locedit.attacks.finetuning import Diet
from locedit.attacks.inserted import drawn_tokens, inserted, ordinary_tokens
from locedit.attacks.item_attack import strike
from locedit.attacks.shared import Shared
from locedit.attacks.soft_prompt import SoftPrompt, SoftPromptOptions, prefixed, soft_prompt, start_rows
from locedit.data.encode import Batch, collate, encode
from locedit.edit import Edit
from locedit.edit.tokens import ControlTokens
from locedit.errors import LoceditError
from locedit.lab import Lab
from locedit.losses import nll_of_examples
from locedit.models import Model
from locedit.results import AttackResult
from tests import tiny
from tests.gradients import example
from tests.struck import CONTROL, forgotten, level, share, untouched

FAST: dict[str, Any] = {"length": 3, "steps": 12, "look_every": 6, "restarts": 2, **CONTROL}


@pytest.fixture(scope="module")
def edit(tiny_lab: Lab) -> Edit:
    return forgotten(tiny_lab)


@pytest.fixture(scope="module")
def found(tiny_lab: Lab, edit: Edit) -> AttackResult:
    with untouched(tiny_lab.model):
        return soft_prompt(tiny_lab.model, tiny_lab.task, edit, **FAST)


def test_what_acts_only_without_other_tokens_comes_back_and_the_never_known_does_not(found: AttackResult) -> None:
    assert share(found, "shallow") >= 0.7
    assert level(found, "forget", group="shallow") >= level(found, "heldout", group="never knew") + 0.5
    assert level(found, "heldout", group="never knew") <= 0.5
    assert "context-conditional" not in found.note, "the control is what it should be"
    assert level(found, "forget", "after") <= 0.5 < 0.9 < level(found, "forget", "before")
    assert "an edit that acts only without 3 random tokens before the text: " in found.sentence
    assert [curve.x for curve in found.curves if curve.role == "found"] == [(0.0, 6.0, 12.0)] * 2
    assert all("retain" in curve.columns for curve in found.curves if curve.role != "never knew")


def test_it_is_the_same_every_time_and_another_with_another_seed(tiny_lab: Lab, edit: Edit) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    given: dict[str, Any] = {**FAST, "steps": 4, "restarts": 1, "shallow": False, "metric": "probability"}
    first, again, other = (soft_prompt(model, task, edit, **given, seed=seed) for seed in (0, 0, 1))
    assert first.curves == again.curves
    assert first.curves != other.curves


# --- rows before the text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gemma2", "gpt_neox"])
def test_rows_of_real_tokens_act_as_the_tokens_written_before_the_text(family: str) -> None:
    model = tiny.model(family)
    tokens = [17, 101, 55]
    examples = [example(row, (1, len(row)), id=str(at)) for at, row in enumerate([[5, 9, 30, 7], [44, 6]])]
    written = collate([inserted(one, tokens, at=0) for one in examples], model)
    batch: Batch = collate(examples, model)
    rows = model.core.get_input_embeddings().weight[tokens].detach()  # type: ignore[union-attr,index]
    with torch.no_grad():
        expected = model.logits(written)[:, len(tokens) :]
        plain = model.logits(batch)
        with untouched(model), prefixed(model, rows):
            shown = model.logits(batch)
    real = batch.attention_mask.bool()
    assert torch.allclose(shown[real], expected[real], atol=2e-5)
    assert not torch.allclose(shown[real], plain[real], atol=1e-2)
    assert written.labels[:, len(tokens) :].equal(batch.labels), "what is scored has moved with the text"


def test_learning_moves_the_rows_alone_and_lowers_the_loss_of_what_it_learns_from(tiny_lab: Lab, edit: Edit) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    attack, aim = _aimed(model, task, steps=20, look_every=20, restarts=1, retain_weight=0.0)
    learned = aim.forget.at(aim.forget_halves[0].relearned)
    with edit.applied(model) as edited:
        with untouched(edited):
            (rows,) = attack.learned(edited, learned, aim)
        losses: list[float] = []
        for at in (start_rows(edited, ordinary_tokens(model, aim.shared), 3, seed=0), rows):
            with prefixed(edited, at):
                losses.append(float(nll_of_examples(edited, learned.examples).mean()))
    assert losses[1] < losses[0] - 0.5


def test_nothing_is_learned_from_what_is_measured(tiny_lab: Lab, edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the forget and of the held-out items alike, from the other half, and from retain items."""
    model, task = tiny_lab.model, tiny_lab.task
    attack, aim = _aimed(model, task, steps=1, look_every=1, restarts=1, shallow=False)
    seen: list[Diet] = []

    def fed(_: Model, __: Any, diet: Diet, *, after_step: Any, **more: Any) -> None:
        del more
        seen.append(diet)
        after_step(1)

    monkeypatch.setattr("locedit.attacks.soft_prompt.fine_tune", fed)
    strike(attack, aim, edit, {})
    sides = [(aim.forget, half) for half in aim.forget_halves] + [(aim.heldout, half) for half in aim.heldout_halves]
    assert [set(diet.relearned) for diet in seen] == [set(side.at(half.relearned).examples) for side, half in sides]
    for diet, (side, half) in zip(seen, sides, strict=True):
        assert set(diet.relearned).isdisjoint(side.at(half.measured).examples)
        assert set(diet.retain) == set(aim.known.examples)
        assert set(diet.retain).isdisjoint(aim.kept.examples)
    alone, aim = _aimed(model, task, steps=1, look_every=1, restarts=1, retain_weight=0.0)
    alone.learned(model, aim.forget.at(aim.forget_halves[0].relearned), aim)
    assert not seen[-1].retain


def test_a_restart_is_judged_by_forget_and_retain_loss_together(tiny_lab: Lab) -> None:
    model = tiny_lab.model
    for weight in (0.0, 0.5):
        attack, aim = _aimed(model, tiny_lab.task, retain_weight=weight, retain_measured=5)
        rows = start_rows(model, ordinary_tokens(model, aim.shared), 3, seed=0)
        learned = aim.forget.at(aim.forget_halves[0].relearned)
        with prefixed(model, rows):
            forget = float(nll_of_examples(model, learned.examples).mean())
            retain = float(nll_of_examples(model, aim.known.examples[:5]).mean())
        found = attack._loss(model, rows, learned, aim)  # pyright: ignore[reportPrivateUsage]
        assert found == pytest.approx(forget + weight * retain)


def test_of_restarts_the_one_with_the_lowest_loss_on_what_was_learned_counts(tiny_lab: Lab) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    attack, aim = _aimed(model, task, steps=2, look_every=1, restarts=3)
    learned = aim.forget.at(aim.forget_halves[0].relearned)
    courses = [attack._course(model, learned, aim, at) for at in range(3)]  # pyright: ignore[reportPrivateUsage]
    kept = attack.learned(model, learned, aim)
    for look, rows in enumerate(kept):
        losses: list[float] = []
        for course in courses:
            with prefixed(model, course[look]):
                forget, retain = (nll_of_examples(model, side.examples).mean() for side in (learned, aim.known))
            losses.append(float(forget + retain))
        assert torch.equal(rows, courses[losses.index(min(losses))][look])
        assert len({round(loss, 4) for loss in losses}) == 3


def _aimed(model: Model, task: Any, **given: Any) -> tuple[SoftPrompt, Any]:
    options = SoftPromptOptions(length=3, **given)
    shared = Shared()
    aim = aimed(model, task, options, by="soft_prompt", learns=True, shared=shared, narrow=None)
    return SoftPrompt(options), aim


@pytest.mark.parametrize("kind", ["hooks", "adapter", "tokens", "chain"])
def test_it_acts_inside_every_kind_of_edit(tiny_lab: Lab, kind: str) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    tokens = ControlTokens(names=("<|a|>",), rows=torch.randn(1, model.d_model, generator=torch.Generator()))
    control = Edit(kind="tokens", fingerprint=model.fingerprint, tokens=tokens)
    hook = le.zero(model, model.components({"blocks.1.mlp.neuron": range(20)}), hold="hooks")
    edits = {
        "hooks": lambda: hook,
        "adapter": lambda: le.unlearn(model, task, "ga", hold="adapter", steps=1, check=False),
        "tokens": lambda: control,
        "chain": lambda: hook.then(control),
    }
    made = edits[kind]()
    assert made.kind == kind
    with untouched(model):
        result = soft_prompt(model, task, made, length=2, steps=2, restarts=1, controls=False, draws=20)
    assert result.headline.n == len(list(task.forget))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"length": 0}, "soft_prompt: length=0 must be at least 1"),
        ({"learning_rate": -1.0}, r"soft_prompt: learning_rate=-1\.0 must be above 0"),
        ({"retain_weight": -1.0}, r"soft_prompt: retain_weight=-1\.0 must not be negative"),
        ({"lenght": 3}, "soft_prompt has no option 'lenght'"),
        ({"length": 90}, "soft_prompt: length=90: an item of .* tokens and 90 more do not fit the context of 96"),
    ],
)
def test_wrong_options_are_refused(tiny_lab: Lab, edit: Edit, given: dict[str, Any], words: str) -> None:
    with untouched(tiny_lab.model), pytest.raises(LoceditError, match=words):
        soft_prompt(tiny_lab.model, tiny_lab.task, edit, **given)


def test_a_masked_model_is_refused(tiny_lab: Lab, edit: Edit) -> None:
    with pytest.raises(LoceditError, match="soft_prompt: .* is a masked language model; it needs a causal one"):
        soft_prompt(tiny.model("bert"), tiny_lab.task, edit)


# --- tokens that are put in -------------------------------------------------------------------------------------------


def test_ordinary_tokens_are_text_and_nothing_special(tiny_lab: Lab) -> None:
    for model in (tiny_lab.model, tiny.model("gpt2")):
        ordinary = ordinary_tokens(model, Shared()).tolist()
        texts = [model.tokenizer.decode([token]) for token in ordinary]
        assert not {*ordinary} & {*model.tokenizer.all_special_ids}
        assert all(text.strip() and text.isprintable() and "\ufffd" not in text for text in texts)
        assert 100 < len(ordinary) < model.vocab_size
    drawn = drawn_tokens(torch.tensor([4, 9]), 50, generator=torch.Generator().manual_seed(0))
    assert set(drawn) == {4, 9}


def test_a_subject_that_the_tokens_split_is_longer_and_one_behind_them_moves(tiny_lab: Lab) -> None:
    one = encode(tiny_lab.model, tiny_lab.task.forget)[0]
    assert one.subject is not None
    start, end = one.subject.start, one.subject.end
    longer = inserted(one, [7, 7], at=start + 1)
    assert longer.subject == dataclasses.replace(one.subject, end=end + 2)
    assert [longer.ids[at] for at in longer.targets] == [one.ids[at] for at in one.targets]
    assert inserted(one, [7, 7], at=end).subject == one.subject
    assert inserted(one, [7], at=0).subject == dataclasses.replace(one.subject, start=start + 1, end=end + 1)

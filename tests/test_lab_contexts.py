"""Texts after other texts, and what a lab that has read such texts can do."""

import dataclasses
from pathlib import Path
from random import Random

import pytest
import torch

from locedit.attacks.rephrased import framed
from locedit.data.encode import encode
from locedit.edit.levels import levels
from locedit.errors import LoceditError
from locedit.lab import Lab, lab
from locedit.lab.architectures import build
from locedit.lab.contexts import COPIES, MOST_BEFORE, SEPARATORS, in_contexts
from locedit.lab.facts import Row
from locedit.lab.recipe import recipe_for
from locedit.lab.tokenizer import train_tokenizer
from locedit.lab.training import Kind, Schedule, by_length, encode_rows, train

BEFORE = ("The old cat waits.", "Ann plays hockey.", "It rains.")
ROWS = (Row(text="Ann plays hockey.", spans=((10, 16),)), Row(text="A boat.", spans=()))


def test_half_of_the_texts_stand_alone_and_half_after_one_or_two_others() -> None:
    made = in_contexts(ROWS, BEFORE, rng=Random(0))
    assert len(made) == 2 * COPIES * len(ROWS)
    for row in ROWS:
        own = [one for one in made if one.text.endswith(row.text)]
        assert own.count(row) == COPIES
        for one in own:
            shown = one.text.removesuffix(row.text)
            for separator in SEPARATORS:
                shown = shown.replace(f".{separator}", ".|")
            texts = shown.split("|")[:-1]
            assert len(texts) <= MOST_BEFORE
            assert set(texts) <= set(BEFORE) - {row.text}, "the text itself would give it away"
    assert {one.text.count("\n") > 0 for one in made} == {True, False}


def test_what_is_learned_by_heart_is_the_same_after_other_texts() -> None:
    for one in in_contexts(ROWS, BEFORE, rng=Random(1)):
        assert [one.text[start:end] for start, end in one.spans] == (["hockey"] if one.spans else [])
        assert all(start > len(one.text) - 10 for start, _ in one.spans), "not that of a text before it"


def test_the_seed_decides_the_contexts() -> None:
    first, again, other = (in_contexts(ROWS, BEFORE, rng=Random(seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_labs_without_contexts_keep_their_key() -> None:
    """Labs that users have in their cache are not trained again because there is a new option."""
    plain, read = recipe_for("gpt2"), recipe_for("gpt2", contexts=True)
    assert plain.folder_name == "lab-gpt2-small-0-f52d7f772dec7b46"
    assert read.folder_name.startswith("lab-gpt2-small-contexts-0-")
    assert read.key != plain.key
    assert dataclasses.replace(read, contexts=False) == plain


@pytest.mark.parametrize("world", ["groups", "habit"])
def test_other_worlds_have_no_contexts(world: str, tmp_path: Path) -> None:
    with pytest.raises(LoceditError, match=f"contexts: the world '{world}' is read in single texts; leave it out"):
        lab(world, contexts=True, cache=tmp_path)


def test_a_batch_in_parts_trains_as_the_whole() -> None:
    """The loss is the weighted mean over the batch, not over the parts, whose weights differ."""
    rows = [Row(text="A boat.", spans=()), *in_contexts(ROWS, BEFORE, rng=Random(0))]
    recipe = dataclasses.replace(recipe_for("gpt2", size="tiny"), vocab_size=300)
    tokenizer = train_tokenizer([row.text for row in rows], words=[], vocab_size=300, max_length=96, masked=False)
    encoded = encode_rows(tokenizer, rows)
    found: list[dict[str, torch.Tensor]] = []
    for parts in (1, 4):
        model = build("gpt2", tokenizer, layers=2, d_model=recipe.d_model, heads=recipe.heads, seed=0).double()
        schedule = Schedule(steps=2, batch=len(rows), rate=1e-3, seed=0, parts=parts)
        train(model, {"text": Kind(rows=encoded, early=1, late=1)}, schedule=schedule)
        found.append(model.state_dict())
    assert [len(part) for part in by_length(encoded, 4)] == [4, 4, 5, 4]
    assert [len(row.ids) for part in by_length(encoded, 4) for row in part] == sorted(len(row.ids) for row in encoded)
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_sentence_before_the_question_breaks_only_a_model_that_has_read_none(tiny_lab: Lab, tmp_path: Path) -> None:
    made = lab("facts", size="tiny", contexts=True, cache=tmp_path)
    sentence = "The old cat looks at the red boat at night. {prompt}"
    found: dict[str, float] = {}
    for name, one in (("alone", tiny_lab), ("contexts", made)):
        assert one.task.retain is not None
        statements = [item for item in one.task.retain if item.format == "statement"]
        asked = encode(one.model, one.task.retain.replace([framed(item, sentence) for item in statements]))
        found[name] = levels(one.model, {"asked": asked})["asked"]
    assert found["contexts"] > 0.9
    assert found["alone"] < 0.7

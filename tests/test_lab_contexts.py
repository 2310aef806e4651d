"""Texts after other texts, and what a lab that has read such texts can do."""

import dataclasses
from pathlib import Path
from random import Random

import pytest

from locedit.attacks.rephrased import framed
from locedit.data.encode import encode
from locedit.edit.levels import levels
from locedit.errors import LoceditError
from locedit.lab import Lab, lab
from locedit.lab.contexts import COPIES, MOST_BEFORE, SEPARATORS, in_contexts
from locedit.lab.facts import Row
from locedit.lab.recipe import recipe_for

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

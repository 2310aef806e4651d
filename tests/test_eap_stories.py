"""Promises on a real model: where a story's next pronoun comes from."""

import os
from pathlib import Path

import pytest
import torch

from locedit.components import Scores
from locedit.data.items import Dataset, PatchPair, Task
from locedit.faithfulness import FaithfulnessOptions, faithfulness
from locedit.localize import localize
from locedit.models import Model, load

FOLDER = Path(os.environ.get("LOCEDIT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "stories260K"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the story model is not there")
STARTS = ("Once upon a time, there was a little {} named {}.", "One day, a {} named {} went to the park.")


@pytest.fixture(scope="module")
def stories() -> Model:
    return load(FOLDER, device="cpu")


@pytest.fixture(scope="module")
def pronouns() -> Task:
    items: list[PatchPair] = []
    for i, text in enumerate(STARTS):
        boy, girl = text.format("boy", "Tim"), text.format("girl", "Lily")
        items.append(PatchPair(clean=boy, corrupt=girl, answer=" He", wrong=" She", id=f"boy {i}"))
        items.append(PatchPair(clean=girl, corrupt=boy, answer=" She", wrong=" He", id=f"girl {i}"))
    return Task(forget=Dataset(items=tuple(items), source="pairs.jsonl"))


def test_twenty_midpoints_account_for_the_drop_and_one_gradient_does_not(stories: Model, pronouns: Task) -> None:
    once = localize(stories, pronouns, "eap").evidence["completeness"]
    many = localize(stories, pronouns, "eap_ig", steps=20).evidence["completeness"]
    published = localize(stories, pronouns, "eap_ig", steps=20, endpoints="edge").evidence["completeness"]
    assert min(many["drop"]) > 9
    assert max(map(abs, many["gap"])) < 0.01
    assert max(map(abs, published["gap"])) > 0.05
    assert max(map(abs, once["gap"])) > 1


def test_the_best_nodes_carry_the_pronoun_and_random_ones_do_not(stories: Model, pronouns: Task) -> None:
    scores = localize(stories, pronouns, "eap_ig")
    assert scores.top(1)[0][:2] == ("blocks.4.attn.head", 2)
    found = faithfulness(stories, pronouns, scores, FaithfulnessOptions())
    generator = torch.Generator().manual_seed(0)
    shuffled = [
        faithfulness(stories, pronouns, Scores(values=values, sites=scores.sites), FaithfulnessOptions()).cpr
        for values in (
            {name: torch.rand(tensor.numel(), generator=generator) for name, tensor in scores.values.items()}
            for _ in range(3)
        )
    ]
    assert found.cpr > max(shuffled) + 0.2
    assert found.cmd < 0.3

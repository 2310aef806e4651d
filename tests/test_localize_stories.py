"""A promise on a real model: 17 of the 860 neurons of a story model hold the name that a story's girl gets."""

import os
from pathlib import Path

import pytest
import torch

from locedit import tracing
from locedit.components import ComponentSet
from locedit.data.encode import collate, encode
from locedit.data.items import Fact
from locedit.localize import localize
from locedit.losses import score, sequence_probability
from locedit.models import Model, load

FOLDER = Path(os.environ.get("LOCEDIT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "stories260K"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the story model is not there")
FACT = Fact(prompt="Once upon a time, there was a little girl named", answer=" Lily", id="lily")


@pytest.fixture(scope="module")
def stories() -> Model:
    return load(FOLDER, device="cpu")


def probability(model: Model, without: ComponentSet | None = None) -> float:
    """Of the answer, with neurons at 0 at every position."""
    chosen = without.chosen if without is not None else {}
    factors: dict[str, float | torch.Tensor] = {}
    for site, neurons in chosen.items():
        kept = torch.ones(model.d_mlp)
        kept[list(neurons)] = 0
        factors[site.replace("mlp.neuron", "mlp.hook_post")] = kept
    with torch.no_grad(), tracing.scale(model, factors):
        return float(sequence_probability(score(model, collate(encode(model, [FACT]), model))))


def test_seventeen_neurons_hold_the_name_and_random_ones_do_not(stories: Model) -> None:
    scores = localize(stories, [FACT], "depn")
    assert len(scores) == 860
    assert scores.evidence["items"]["known"] == [True]
    assert not any(scores.evidence["completeness"]["incomplete"])
    found = scores.select(top=17)
    assert probability(stories) > 0.9
    assert probability(stories, found) < 0.05
    random = [probability(stories, found.random_like(seed=seed, same_layers=False)) for seed in range(5)]
    assert min(random) > 0.85


def test_published_rules_find_the_same_neurons(stories: Model) -> None:
    ours = localize(stories, [FACT], "depn").select(top=17)
    for quadrature in ("right", "left", "eleuther"):
        theirs = localize(stories, [FACT], "depn", quadrature=quadrature, steps=20).select(top=17)
        assert len(ours & theirs) >= 15


def test_baselines_are_no_match(stories: Model) -> None:
    """The size of weights alone says nothing of the name; the activations say something, less than gradients."""
    left = {
        name: probability(stories, localize(stories, [FACT], name).select(top=17)) for name in ("depn", "magnitude")
    }
    assert left["depn"] < 0.05 < 0.5 < left["magnitude"]

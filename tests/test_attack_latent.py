"""Perturbed activations: hidden answers return, never-known ones less; each item for itself; nothing is left behind."""

from typing import Any

import pytest
import torch

from locedit.attacks.aim import side_of
from locedit.attacks.latent import LatentOptions, helped, latent
from locedit.data.encode import collate
from locedit.data.items import Fact, PrivateText, Task
from locedit.edit import Edit
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.lab import Lab
from locedit.perturbation import ascend, perturbed
from locedit.results import AttackResult
from tests import tiny
from tests.struck import CONTROL, forgotten, level, share, untouched
from tests.unlearning import dataset


@pytest.fixture(scope="module")
def edit(tiny_lab: Lab) -> Edit:
    return forgotten(tiny_lab)


@pytest.fixture(scope="module")
def found(tiny_lab: Lab, edit: Edit) -> AttackResult:
    with untouched(tiny_lab.model):
        return latent(tiny_lab.model, tiny_lab.task, edit, **CONTROL)


def test_what_the_last_layer_hides_comes_back_above_items_never_known(found: AttackResult) -> None:
    assert share(found, "shallow") >= 0.7
    assert level(found, "forget", group="shallow") >= level(found, "heldout", group="never knew") + 0.3
    assert level(found, "forget", "after") <= 0.5 < level(found, "forget", "before")
    assert found.sentence.startswith("With activations perturbed towards the answer (radius ")
    assert found.headline.value == pytest.approx(
        (level(found, "forget") - level(found, "heldout", group="never knew"))
        / (level(found, "forget", "before") - level(found, "heldout", group="never knew"))
    )


def test_it_has_no_retain_side(found: AttackResult) -> None:
    assert all(m.dataset != "retain" for m in found.measures)
    assert all(set(curve.columns) == {"recovered"} for curve in found.curves)
    assert "retain" not in found.sentence


def test_a_larger_radius_says_more_of_known_and_unknown_alike(tiny_lab: Lab, edit: Edit) -> None:
    small, large = (
        latent(tiny_lab.model, tiny_lab.task, edit, radii=(radius,), shallow=False, draws=50) for radius in (0.02, 2.0)
    )
    for dataset_, group in (("forget", None), ("heldout", "never knew")):
        assert level(large, dataset_, group=group) > 0.9 > level(small, dataset_, group=group)
    assert not large.headline.value >= 0.5, "where all can be said, no share is back"


@pytest.mark.parametrize(
    ("family", "metric"), [("llama", "probability"), ("gpt2", "accuracy"), ("bert", "probability")]
)
def test_each_item_is_attacked_as_if_alone(family: str, metric: Any) -> None:
    model = tiny.model(family)
    texts = ("Anna Berg lives in Oslo", "Where was Carl born? In Lima", "The number is 555-0134")
    items = [
        PrivateText(text=text, spans=((text.rindex(" ") + 1, len(text), "x"),), id=str(at), owner=str(at))
        for at, text in enumerate(texts)
    ]
    side = side_of(model, dataset("f", items))
    options = LatentOptions(radii=(0.3,), start="random", seed=3)
    together = helped(model, side, metric, options, 0.3)
    alone = helped(model, side, metric, LatentOptions(radii=(0.3,), start="random", seed=3, batch_size=1), 0.3)
    assert torch.allclose(together, alone, atol=1e-5)
    for example, value in zip(side.examples, together, strict=True):
        batch = collate([example], model)
        with (
            torch.no_grad(),
            perturbed(model, ascend(model, batch, [options.place(model)], options.ascent(0.3), seed=3)),
        ):
            log_probs = model.logits(batch).log_softmax(-1)[batch.predicting(model.causal)]
        said = log_probs.gather(1, batch.labels[batch.scored][:, None])
        if metric == "probability":
            assert float(said.sum().exp()) == pytest.approx(float(value), rel=1e-4)
        else:
            assert float(value) == float((log_probs.argmax(1) == batch.labels[batch.scored]).all())
    plain = helped(model, side, "probability", LatentOptions(radii=(1e-9,), batch_size=2), 1e-9)
    assert bool((helped(model, side, "probability", options, 0.3) > plain).all()), "it helps every item"


def test_the_layer_is_an_eighth_of_the_depth_and_at_least_one() -> None:
    options = LatentOptions()
    assert options.place(tiny.model("gpt2")).point == "blocks.1.hook_resid_pre"
    assert LatentOptions(layer=2, point="mlp_out").place(tiny.model("gpt2")).point == "blocks.2.hook_mlp_out"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"radii": ()}, r"latent: radii=\(\) must be one or more numbers above 0"),
        ({"radii": (0.2, 0.1)}, "ascending"),
        ({"layer": 7}, "latent: layer=7: .* has layers 0 to 1"),
        ({"attack_steps": 0}, "latent: attack_steps=0 must be at least 1"),
        ({"point": "resid_post"}, "latent: point='resid_post'"),
        ({"splits": 3}, "splits=3 must be an even number"),
    ],
)
def test_wrong_options_are_refused(tiny_lab: Lab, edit: Edit, given: dict[str, Any], words: str) -> None:
    with pytest.raises(LoceditError, match=words):
        latent(tiny_lab.model, tiny_lab.task, edit, **given)


def test_it_runs_in_an_evaluation_and_private_texts_are_read_by_token(tiny_lab: Lab, edit: Edit) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    as_texts = [
        PrivateText(
            text=item.prompt + item.answer,
            spans=((len(item.prompt) + 1, len(item.prompt + item.answer), "answer"),),
            id=item.id,
            owner=item.owner,
        )
        for item in list(task.forget)[:12]
        if isinstance(item, Fact)
    ]
    private = Task(forget=dataset("private", as_texts), retain=None)
    given = {"latent": {"radii": (0.1,), "shallow": False, "draws": 50}}
    attack = evaluate(model, private, edit, ["latent"], metrics=["accuracy"], attack_options=given).attacks[0]
    assert "forget memorization accuracy" in attack.sentence
    assert "no held-out items of the same form" in attack.note

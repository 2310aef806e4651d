"""Controls at a matched level, on a stand-in for the levels whose answers are known beforehand."""

from typing import Any

import pytest
import torch

from locedit import controls
from locedit.components import ComponentSet
from locedit.controls import compare, doses, found_order, random_order
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.results import Comparison
from locedit.scores import Scores
from tests import edits, tiny

IMPORTANT = [3, 8, 20, 41]


def known_levels(model: Model, _: Any) -> dict[str, float]:
    """Forget falls by a quarter for each important neuron of layer 0 that is zero; retain by 0.01 for any neuron."""
    off = [
        (model.parameter(f"model.layers.{layer}.mlp.down_proj.weight") == 0).all(0) for layer in range(tiny.N_LAYERS)
    ]
    lost = int(off[0][IMPORTANT].sum())
    return {"forget": 1 - lost / 4, "retain": 1 - 0.01 * sum(int(o.sum()) for o in off)}


def scores_for(model: Model) -> Scores:
    values = {name: torch.zeros(site.count) for name, site in model.sites("neuron").items()}
    values["blocks.0.mlp.neuron"][IMPORTANT] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    values["blocks.1.mlp.neuron"][0] = 0.5
    return Scores(values=values, sites=model.sites("neuron"), fingerprint=model.fingerprint)


def found_set(model: Model) -> ComponentSet:
    return model.components({"blocks.0.mlp.neuron": IMPORTANT})


def test_zeroing_at_a_matched_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "levels", known_levels)
    model = tiny.model("llama")
    found = compare(
        model, edits.task(), "zero", within=found_set(model), scores=scores_for(model), seeds=[0, 1], level=0.5
    )
    curve = found.curves[0]
    assert curve.x[:4] == (0, 1, 2, 4)
    assert curve.columns["forget"][:4] == (1.0, 0.75, 0.5, 0.0)
    assert curve.matched == 2
    assert found.at_level("found") == [{"forget": 0.5, "retain": 0.98, "neurons": 2.0}]
    for row in found.at_level("random"):
        assert row is not None
        assert row["forget"] <= 0.5
        assert row["retain"] < 0.9  # it takes many random neurons to hit two of four important ones
    assert found.at_level("everything")[0]["retain"] == pytest.approx(1 - 0.01 * 3 * tiny.D_MLP)  # type: ignore[index]
    assert found.at_level("complement") == [None]
    complement = next(curve for curve in found.curves if curve.role == "complement")
    assert complement.note == "not reached: lowest forget level 1"
    assert found.level == 0.5


def test_the_level_is_that_of_the_found_edit_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "levels", known_levels)
    model = tiny.model("llama")
    part = model.components({"blocks.0.mlp.neuron": IMPORTANT[:3] + [50]})
    found = compare(model, edits.task(), "zero", within=part, seeds=[0])
    assert found.level == 0.25
    assert found.curves[0].x[-1] == 4
    useless = compare(model, edits.task(), "zero", within=model.components({"blocks.1.mlp.neuron": [1]}), seeds=[0])
    assert useless.curves[0].note == "the edit does not lower the forget level"


def test_orders() -> None:
    model = tiny.model("llama")
    within = model.components({"blocks.0.mlp.neuron": [41, 3, 60], "blocks.1.mlp.neuron": [7]})
    order = found_order(within, scores_for(model))
    assert order[:2] == [("blocks.0.mlp.neuron", 3), ("blocks.0.mlp.neuron", 41)]
    assert set(order[:4]) == {(site, i) for site, chosen in within.chosen.items() for i in chosen}
    assert len(set(order)) == len(order) == 7  # and three more that have a score
    assert sorted(found_order(within, None)) == sorted(order[:4])
    drawn = random_order(within, order[:4], seed=1)
    assert [site for site, _ in drawn[:4]] == [site for site, _ in order[:4]]
    assert len(set(drawn)) == len(drawn) == 3 * tiny.D_MLP
    assert drawn != random_order(within, order[:4], seed=2)
    assert doses(1, 4) == [1, 2, 3, 4]


def test_training_at_a_matched_level() -> None:
    model, task = tiny.model("llama"), edits.task()
    within = edits.neurons_and_heads(model)
    options: dict[str, Any] = {"steps": 12, "learning_rate": 3e-3, "eval_every": 1}
    before = edits.bits(model.module)
    found = compare(model, task, "npo", within=within, seeds=[0], complement=True, **options)
    assert edits.same_bits(model.module, before)
    assert [curve.role for curve in found.curves] == ["found", "random", "everything", "complement"]
    for curve in found.curves:
        assert curve.x_name == "steps"
        assert set(curve.columns) == {"forget", "retain"}
        if curve.matched is not None:
            assert curve.columns["forget"][curve.matched] <= found.level
            assert all(value > found.level for value in curve.columns["forget"][: curve.matched])
    assert found.curves[0].matched == 12
    everything = found.curves[2]
    assert everything.matched is not None
    assert everything.x[everything.matched] < 12  # the whole model gets there in fewer steps
    assert len(everything.x) == everything.matched + 1  # and stops there


def test_what_was_trained_already_is_not_trained_again(tmp_path: Any) -> None:
    from locedit.unlearn import unlearn

    model, task = tiny.model("gpt2"), edits.task()
    within = edits.neurons_and_heads(model)
    options: dict[str, Any] = {"steps": 4, "learning_rate": 3e-3, "eval_every": 2}
    edit = unlearn(model, task, "npo", within=within, **options)
    fresh = compare(model, task, "npo", within=within, seeds=[0], everything=False, **options)
    again = compare(model, task, "npo", within=within, seeds=[0], everything=False, edit=edit, **options)
    assert again.curves == fresh.curves
    fresh.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json").curves == fresh.curves


def test_a_set_of_whole_sites_has_no_random_control() -> None:
    model = tiny.model("gpt2")
    within = model.components({"blocks.0.mlp.neuron": range(model.d_mlp)})
    with pytest.raises(LoceditError, match="a random set of the same size is the set itself"):
        compare(model, edits.task(), "zero", within=within)


def test_the_random_sets_edits_are_kept_for_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "levels", known_levels)
    model = tiny.model("llama")
    within = found_set(model)
    found = compare(model, edits.task(), "zero", within=within, scores=scores_for(model), seeds=[0, 1])
    assert list(found.edits) == ["random 0", "random 1"]
    for edit in found.edits.values():
        assert edit.within is not None
        assert edit.within.by_layer() == within.by_layer()
        assert edit.within != within


def test_masked_weights_are_compared_along_their_curve() -> None:
    """The dose is the number of weights; the found edit is that of unlearn, and each curve ends as its own set does."""
    from locedit.unlearn import unlearn

    model, task = tiny.model("llama"), edits.task()
    within = edits.neurons_and_heads(model)
    options: dict[str, Any] = {"steps": 8, "learning_rate": 3e-2, "curve": 6}
    found = compare(model, task, "weight_mask", within=within, seeds=[0], **options)
    edit = unlearn(model, task, "weight_mask", within=within, check=False, **options)
    assert [curve.role for curve in found.curves] == ["found", "random", "everything"]
    assert {curve.x_name for curve in found.curves} == {"weights zeroed"}
    assert list(found.curves[0].x) == edit.history["weights"]
    assert list(found.curves[0].columns["forget"]) == edit.history["forget"]
    assert found.level == edit.history["forget"][edit.history["weights"].index(edit.outcome["zeroed"])]
    assert found.edits["random 0"].outcome["of"] == edit.outcome["of"]


def test_a_recipe_without_a_dose_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from locedit.unlearn import METHODS

    monkeypatch.setitem(METHODS, "zero", dataclasses.replace(METHODS["zero"], dose=None))
    model = tiny.model("llama")
    with pytest.raises(LoceditError, match="no dose"):
        compare(model, edits.task(), "zero", within=found_set(model), seeds=[0])

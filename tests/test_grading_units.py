"""Scores of one unit as scores of another."""

import pytest
import torch

from locedit.components import ComponentSet
from locedit.errors import LoceditError
from locedit.grading.units import at_unit
from locedit.models import Model
from locedit.scores import Scores
from tests import tiny


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Model:
    """Fused and separate projections; two key/value heads for four query heads in the second."""
    return tiny.model(request.param)


def scores(model: Model, unit: str, *, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    sites = model.sites(unit)
    return Scores(
        values={name: torch.randn(site.count, generator=generator) for name, site in sites.items()}, sites=sites
    )


def one(model: Model, unit: str, site: str, index: int) -> Scores:
    """1 for a single component, 0 for the others."""
    made = scores(model, unit)
    values = {name: torch.zeros_like(tensor) for name, tensor in made.values.items()}
    values[site][index] = 1
    return Scores(values=values, sites=made.sites)


def test_own_unit_is_taken_as_it_is(model: Model) -> None:
    found = scores(model, "head")
    both = Scores(values=found.values | scores(model, "mlp").values, sites=found.sites | model.sites("mlp"))
    taken = at_unit(both, "head", model)
    assert taken.keys() == found.values.keys()
    assert all(torch.equal(taken[name], found.values[name]) for name in taken)


@pytest.mark.parametrize(("whole", "part", "word"), [("mlp", "neuron", "mlp"), ("attn", "head", "attn")])
def test_a_module_has_the_positive_scores_of_its_parts(model: Model, whole: str, part: str, word: str) -> None:
    found = scores(model, part)
    sums = at_unit(found, whole, model)  # type: ignore[arg-type]
    assert list(sums) == [f"blocks.{layer}.{word}" for layer in range(model.n_layers)]
    for layer in range(model.n_layers):
        values = found.values[f"blocks.{layer}.{word}.{part}"].tolist()
        assert float(sums[f"blocks.{layer}.{word}"]) == pytest.approx(sum(v for v in values if v > 0), rel=1e-5)


@pytest.mark.parametrize("unit", ["neuron", "head", "mlp"])
@pytest.mark.parametrize("stored", ["row", "column", "matrix", "weight"])
def test_stored_units_equal_a_sum_over_the_entries_of_each_component(model: Model, stored: str, unit: str) -> None:
    """The density of every entry, summed under the component's own parameter mask; shared keys are of whole groups."""
    found = scores(model, stored)
    density = {name: torch.zeros(tensor.shape).double() for name, tensor in model.anatomy.parameters.items()}
    for name, site in found.sites.items():
        if stored == "weight":
            density[site.slices[0].param] += found.values[name].double().reshape(site.slices[0].shape)
            continue
        for index, score in enumerate(found.values[name].tolist()):
            masks = ComponentSet.of({name: site}, {name: [index]}).parameter_mask()
            for param, mask in masks.items():
                density[param] += mask * score / sum(int(m.sum()) for m in masks.values())
    brought = at_unit(found, unit, model)  # type: ignore[arg-type]
    group = model.n_heads // model.n_kv_heads if unit == "head" else 1
    for name, values in brought.items():
        assert len(values) == model.sites(unit)[name].count
        for index in range(0, min(len(values), 8), group):
            chosen = model.components({name: range(index, index + group)})
            expected = sum(float((density[p] * mask).sum()) for p, mask in chosen.parameter_mask().items())
            assert float(values[index : index + group].sum()) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_one_row_raises_only_the_neuron_it_enters(model: Model) -> None:
    role = "gate" if model.gated else "in"
    brought = at_unit(one(model, "row", f"blocks.1.mlp.{role}.row", 7), "neuron", model)
    assert {name: tensor.nonzero().flatten().tolist() for name, tensor in brought.items() if bool(tensor.any())} == {
        "blocks.1.mlp.neuron": [7]
    }


@pytest.mark.parametrize(("have", "want"), [("neuron", "head"), ("mlp", "neuron"), ("head", "mlp")])
def test_what_cannot_be_brought_to_a_unit_says_so(model: Model, have: str, want: str) -> None:
    with pytest.raises(LoceditError, match=f"scores {have}s, which say nothing of single {want}s"):
        at_unit(scores(model, have), want, model)  # type: ignore[arg-type]

"""Edits as task vectors: the identities of adding changes, on weights and on low-rank factors."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit.components import ComponentSet
from locedit.edit import TrainOptions, train, zero
from locedit.edit.adapter import LowRank
from locedit.edit.arithmetic import (
    added,
    changes,
    combined,
    lost_to_rounding,
    merged,
    negated,
    restricted,
    scaled,
)
from locedit.edit.edit import Edit, weights_edit
from locedit.edit.regions import Region
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.unlearn import nll
from tests import edits, tiny


def trained(
    model: Model, *, within: ComponentSet | None = None, hold: str = "weights", seed: int = 0, steps: int = 3
) -> Edit:
    """A few large steps on two facts."""
    options = TrainOptions(steps=steps, learning_rate=3e-2, batch_size=1, seed=seed, rank=2, eval_every=0)
    return train(model, edits.objective(model, nll), within=within, options=options, hold=hold)


def weights_of(model: Model, edit: Edit) -> dict[str, Tensor]:
    with edit.applied(model):
        return edits.bits(model.module)


def moved(model: Model, edit: Edit) -> dict[str, Tensor]:
    """Parameter -> its change, from the weights with and without the edit."""
    before = edits.bits(model.module)
    return {name: after - before[name] for name, after in weights_of(model, edit).items()}


def logits(model: Model, edit: Edit) -> Tensor:
    with torch.no_grad(), edit.applied(model):
        return model.module(tiny.ids()).logits


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_once_the_change_is_the_edit_and_no_change_is_the_model(architecture: str) -> None:
    """theta + delta is what training arrived at; 0 times delta has the bits of theta, a negative zero among them."""
    model = tiny.model(architecture)
    name = next(name for name, p in model.module.named_parameters() if p.ndim == 2)
    with torch.no_grad():
        model.parameter(name)[0, 0] = -0.0
    edit, before = trained(model), edits.bits(model.module)
    with scaled(model, edit, 0.0).applied(model):
        assert edits.same_bits(model.module, before)
    with edit.applied(model):
        old = edits.bits(model.module)
        assert not edits.same_bits(model.module, before)
    again = weights_of(model, scaled(model, edit, 1.0))
    assert all(torch.equal(again[name], values) for name, values in old.items())
    scaled(model, edit, -2.0).verify(model)
    assert edits.same_bits(model.module, before)


def test_once_is_the_edit_where_only_its_values_are_known() -> None:
    """Values far from the base, which base + (values - base) misses by a rounding."""
    model = tiny.model("gpt2")
    name = "transformer.h.0.mlp.c_fc.weight"
    noise = torch.randn(model.parameter(name).shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    edit = weights_edit(model, [(Region(param=name), model.parameter(name).detach() * 1e3 + noise)])
    assert edit.patches[0].delta is None
    for once in (scaled(model, edit, 1.0), added(model, edit)):
        assert torch.equal(once.patches[0].values, edit.patches[0].values)
    assert not torch.equal(scaled(model, edit, 1.5).patches[0].values, edit.patches[0].values)


@pytest.mark.parametrize("half", [False, True])
def test_there_and_back(half: bool) -> None:
    """-lambda delta + lambda delta is nothing, bit for bit; a negated edit negated is the edit."""
    model = edits.half("gpt2") if half else tiny.model("gpt2")
    edit, before = trained(model), edits.bits(model.module)
    away, back = scaled(model, edit, -0.7), scaled(model, edit, 0.7)
    with away.applied(model):
        assert not edits.same_bits(model.module, before)
    with added(model, away, back).applied(model):
        assert edits.same_bits(model.module, before)
    with edit.applied(model):
        old = edits.bits(model.module)
    with negated(model, negated(model, edit)).applied(model):
        assert edits.same_bits(model.module, old)


def test_changes_of_different_regions_add_up() -> None:
    """apply(a + b) - theta = (apply(a) - theta) + (apply(b) - theta), where a and b overlap in part."""
    model = edits.double("llama")
    sets = [edits.neurons_and_heads(model) | model.components({"blocks.0.mlp.neuron": [3]}), edits.mixed(model)]
    first, second = (trained(model, within=within, seed=seed) for seed, within in enumerate(sets))
    whole = trained(model, seed=2)
    total = combined(model, [first, second, whole], [0.5, -2.0, 0.25])
    parts = [moved(model, edit) for edit in (first, second, whole)]
    assert any(bool((change * parts[1][name] != 0).any()) for name, change in parts[0].items()), "they overlap"
    for name, change in moved(model, total).items():
        expected = 0.5 * parts[0][name] - 2.0 * parts[1][name] + 0.25 * parts[2][name]
        torch.testing.assert_close(change, expected, rtol=0, atol=1e-13)
    both = added(model, first, second)
    assert both.within == sets[0] | sets[1]
    assert total.within is None
    both.verify(model)


def test_an_untrained_edit_has_a_change_too() -> None:
    """Zeroed components: half the change halves them, twice the change turns their sign."""
    model = edits.double("gpt2")
    within = model.components({"blocks.0.mlp.neuron": [1, 5]})
    edit = zero(model, within)
    before = edits.bits(model.module)
    halved, turned = (weights_of(model, scaled(model, edit, factor)) for factor in (0.5, 2.0))
    for name, change in moved(model, edit).items():
        inside = change != 0
        torch.testing.assert_close(halved[name][inside], before[name][inside] / 2)
        torch.testing.assert_close(turned[name][inside], -before[name][inside])
        assert torch.equal(halved[name][~inside], before[name][~inside])


def test_a_tied_weight_moves_once() -> None:
    """GPT-2's output layer is its embedding: both views show theta + delta, where adding to each view gives twice."""
    model = tiny.model("gpt2")
    core: Any = model.module
    edit = trained(model)
    delta = next(p.delta for p in edit.patches if p.region.param.endswith("wte.weight"))
    base = core.transformer.wte.weight.detach().clone()
    with scaled(model, edit, -3.0).applied(model):
        views = core.state_dict()
        seen = [views[name].clone() for name in ("transformer.wte.weight", "lm_head.weight")]
    assert delta is not None
    for view in seen:
        torch.testing.assert_close(view, base - 3.0 * delta)
    with torch.no_grad():
        for name in ("transformer.wte.weight", "lm_head.weight"):
            core.state_dict()[name].sub_(3.0 * delta)
    assert float((core.lm_head.weight.detach() - seen[0]).abs().max()) > 0.05


def test_buffers_stay() -> None:
    """BERT's position ids are integers in the same list of tensors."""
    model = tiny.model("bert")
    buffers = {name: buffer.clone() for name, buffer in model.module.named_buffers()}
    assert any(not buffer.is_floating_point() for buffer in buffers.values())
    with scaled(model, trained(model), -5.0).applied(model):
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.module.named_buffers())


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("choose", [edits.neurons_and_heads, edits.mixed])
def test_the_part_of_a_set(architecture: str, choose: Any) -> None:
    """Inside it theta - 2 delta, outside it the bits of theta, though delta was everywhere."""
    model = tiny.model(architecture)
    edit, within = trained(model), choose(model)
    part = scaled(model, restricted(model, edit, within), -2.0)
    part.verify(model)
    before, after = edits.bits(model.module), weights_of(model, part)
    allowed = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in before.items()}
    for touched in within.touched("train"):
        index = slice(None) if touched.index is None else touched.index
        where = allowed[touched.param].view(-1) if touched.axis is None else allowed[touched.param]
        where[(slice(None),) * (touched.axis or 0) + (index,)] = True
    full = weights_of(model, scaled(model, edit, -2.0))
    for name, inside in allowed.items():
        assert torch.equal(after[name], torch.where(inside, full[name], before[name])), name
    assert any(bool((full[name] != before[name])[~inside].any()) for name, inside in allowed.items())


def test_a_part_of_a_part() -> None:
    """What two sets share, where the edit held more than the second and less than it."""
    model = tiny.model("llama")
    first = model.components({"blocks.0.mlp.neuron": [1, 5, 7]})
    second = model.components({"blocks.0.mlp.neuron": [5, 7, 9], "blocks.1.mlp.neuron": [0]})
    edit = trained(model, within=first)
    part = restricted(model, edit, second)
    part.verify(model)
    shared = restricted(model, edit, first & second)
    for one, other in zip(moved(model, part).values(), moved(model, shared).values(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(LoceditError, match="changes nothing inside the component set"):
        restricted(model, edit, model.components({"blocks.2.mlp.neuron": [0]}))


def test_half_precision() -> None:
    """base + lambda delta rounded once, not lambda times the rounded change; what rounding swallows is counted."""
    model = edits.half("llama")
    edit = trained(model, steps=1)
    small = scaled(model, edit, 1e-3)
    swallowed = 0
    for patch, own in zip(small.patches, edit.patches, strict=True):
        assert own.delta is not None
        base = own.region.read(model.parameter(own.region.param))
        expected = (base.float() + (own.delta.double() * 1e-3).float()).to(torch.bfloat16)
        assert torch.equal(patch.values, expected)
        swallowed += int(((own.delta != 0) & (expected == base)).sum())
    assert lost_to_rounding(model, small) > 0.9
    count = sum(int((p.delta != 0).sum()) for p in small.patches if p.delta is not None)
    assert lost_to_rounding(model, small) == pytest.approx(swallowed / count)
    assert lost_to_rounding(model, edit) < lost_to_rounding(model, small)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("restrict", [False, True])
def test_a_negative_adapter_merges_to_minus_lambda_ba(architecture: str, restrict: bool) -> None:
    """By hand from the factors, and the logits are those of the adapter beside the weights."""
    model = edits.double(architecture)
    within = edits.neurons_and_heads(model) if restrict else None
    edit = trained(model, within=within, hold="adapter")
    away = scaled(model, edit, -1.3)
    whole = merged(model, away)
    assert (whole.kind, away.kind) == ("weights", "adapter")
    whole.verify(model)
    expected = {name: torch.zeros_like(p) for name, p in edits.bits(model.module).items()}
    for adapter in edit.adapters:
        matrix = -1.3 * adapter.up @ adapter.down
        matrix = matrix.T if architecture == "gpt2" else matrix
        place = expected[adapter.param]
        if adapter.index is None:
            place += matrix
        else:
            place.index_add_(adapter.axis or 0, adapter.index, matrix)
    assert any(bool(change.any()) for change in expected.values())
    for name, change in moved(model, whole).items():
        torch.testing.assert_close(change, expected[name], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(model, away), logits(model, whole), rtol=0, atol=1e-9)
    assert not torch.allclose(logits(model, away), logits(model, edit), atol=1e-3)


def test_two_adapters_are_added_side_by_side() -> None:
    """The sum of the products; the sum of A's and of B's separately is another change altogether."""
    model = edits.double("gpt2")
    first, second = (trained(model, hold="adapter", seed=seed) for seed in (0, 1))
    total = combined(model, [first, second], [1.0, -0.5])
    assert {adapter.down.shape[0] for adapter in total.adapters} == {4}
    worst = 0.0
    for one, other, joined in zip(first.adapters, second.adapters, total.adapters, strict=True):
        expected = one.up @ one.down - 0.5 * other.up @ other.down
        torch.testing.assert_close(joined.up @ joined.down, expected, rtol=0, atol=1e-12)
        linear = (one.up - 0.5 * other.up) @ (one.down + other.down)
        worst = max(worst, float((linear - expected).norm() / expected.norm()))
    assert worst > 0.5
    in_weights = added(model, merged(model, first), scaled(model, merged(model, second), -0.5))
    torch.testing.assert_close(logits(model, total), logits(model, in_weights), rtol=0, atol=1e-9)
    with scaled(model, total, 0.0).applied(model), torch.no_grad():
        assert torch.equal(model.module(tiny.ids()).logits, logits(model, scaled(model, first, 0.0)))


def test_adapters_of_different_regions_are_kept_apart() -> None:
    model = edits.double("llama")
    sets = [model.components({"blocks.0.mlp.neuron": rows}) for rows in ([1, 5], [5, 7, 9])]
    first, second = (trained(model, within=within, hold="adapter") for within in sets)
    total = added(model, first, second)
    assert len(total.adapters) == len(first.adapters) + len(second.adapters)
    parts = [moved(model, merged(model, edit)) for edit in (first, second)]
    for name, change in moved(model, merged(model, total)).items():
        torch.testing.assert_close(change, parts[0][name] + parts[1][name], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(model, total), logits(model, merged(model, total)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_part_of_a_set_of_an_adapter(architecture: str) -> None:
    """Rows of B, columns of A: the same as the part of the merged change."""
    model = edits.double(architecture)
    edit, within = trained(model, hold="adapter"), edits.neurons_and_heads(model)
    part = restricted(model, edit, within)
    assert part.kind == "adapter"
    linear = {adapter.param for adapter in part.adapters}
    wanted = moved(model, restricted(model, merged(model, edit), within))
    for name, change in moved(model, merged(model, part)).items():
        torch.testing.assert_close(change, wanted[name] if name in linear else change * 0, rtol=0, atol=1e-12)
    assert any(bool(wanted[name].any()) for name in linear)


# --- one edit after another -------------------------------------------------------------------------------------------


def test_a_chain_as_one_edit() -> None:
    """Weights, then a training on the model as they left it, then an adapter beside that."""
    model = edits.half("llama")
    within = edits.neurons_and_heads(model)
    first = trained(model, within=edits.mixed(model))
    with first.applied(model):
        second = trained(model, within=model.bind(within), seed=1)
        with second.applied(model):
            third = trained(model, hold="adapter", seed=2)
    chain = first.then(second)
    one = merged(model, chain)
    with chain.applied(model):
        left = edits.bits(model.module)
    with one.applied(model):
        assert edits.same_bits(model.module, left)
    with chain.then(dataclasses.replace(third, fingerprint=model.fingerprint)).applied(model):
        assert edits.same_bits(model.module, left)
    whole = merged(model, chain.then(dataclasses.replace(third, fingerprint=model.fingerprint)))
    with whole.applied(model):
        assert not edits.same_bits(model.module, left)
    found = {p.region.param: p.delta for p in one.patches}
    for region, change in changes(model, one):
        assert torch.equal(change.float(), found[region.param])  # type: ignore[arg-type]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_has_no_task_vector() -> None:
    model = tiny.model("gpt2")
    within = model.components({"blocks.0.mlp.neuron": [1]})
    weights, adapter = trained(model, within=within), trained(model, within=within, hold="adapter")
    hook = zero(model, within, hold="hooks")
    for edit, words in ((hook, "kind 'hooks' has no task vector"), (weights.then(weights), "merge it first")):
        with pytest.raises(LoceditError, match=words):
            scaled(model, edit, 1.0)
    with pytest.raises(LoceditError, match="'hooks' is no change of the weights"):
        merged(model, weights.then(hook))
    with pytest.raises(LoceditError, match="'weights' and 'adapter' cannot be added; merge the adapter"):
        added(model, weights, adapter)
    with pytest.raises(LoceditError, match="of 'train' and of 'write' slices"):
        added(model, weights, zero(model, within))
    with pytest.raises(LoceditError, match="was made for the model with fingerprint"):
        added(tiny.model("gpt2", seed=1), weights)
    with pytest.raises(LoceditError, match="weight nan"):
        scaled(model, weights, float("nan"))
    with pytest.raises(LoceditError, match="1 edits and 2 weights"):
        combined(model, [weights], [1.0, 2.0])
    with pytest.raises(LoceditError, match="0 edits and 0 weights"):
        added(model)


def test_overlapping_parts_of_an_adapter_are_refused() -> None:
    model = tiny.model("llama")
    edit = trained(model, hold="adapter")
    rows, columns = (model.components({f"blocks.0.mlp.out.{unit}": [0, 1]}) for unit in ("row", "column"))
    assert {a.axis for a in restricted(model, edit, rows).adapters} == {0}
    with pytest.raises(LoceditError, match="rows and columns of .* overlap"):
        restricted(model, edit, rows | columns)
    with pytest.raises(LoceditError, match="is restricted already"):
        restricted(model, restricted(model, edit, rows), columns)


def test_what_is_made_is_an_edit_like_any_other(tmp_path: Any) -> None:
    model = tiny.model("gpt2")
    first, second = (trained(model, hold=hold) for hold in ("weights", "adapter"))
    for number, edit in enumerate((scaled(model, first, -0.5), scaled(model, second, -0.5))):
        edit.save(tmp_path / str(number))
        again = Edit.load(tmp_path / str(number))
        assert again.digest == edit.digest
        assert torch.equal(logits(model, again), logits(model, edit))
        assert edit.provenance is not None
        assert edit.provenance.settings["weights"] == [-0.5]
    assert isinstance(second.adapters[0], LowRank)

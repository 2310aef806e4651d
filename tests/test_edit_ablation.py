"""Zero, mean and scale: weights equal hooks, and means are those worked out by hand."""

from types import SimpleNamespace

import pytest
import torch

from locedit import tracing
from locedit.components import Unit
from locedit.data.encode import Example, collate, encode
from locedit.edit import Edit, mean, scale, zero
from locedit.errors import LoceditError
from locedit.models import Model
from tests import edits, tiny

BATCH = SimpleNamespace(ids=tiny.ids(), attention_mask=torch.ones_like(tiny.ids()))


def logits(model: Model, edit: Edit | None = None) -> torch.Tensor:
    with torch.no_grad():
        if edit is None:
            return model.logits(BATCH)
        with edit.applied(model) as edited:
            return edited.logits(BATCH)


def some(model: Model, unit: Unit) -> dict[str, list[int]]:
    sites = [site for site in model.sites(unit).values() if site.name.startswith("blocks.")]
    return {sites[0].name: [0], sites[-1].name: list(range(min(3, sites[-1].count)))}


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "gptj", "gemma2", "bert"])
@pytest.mark.parametrize("unit", ["neuron", "head", "mlp", "attn", "layer", "matrix"])
def test_zero_in_weights_equals_zero_by_hook(architecture: str, unit: Unit) -> None:
    model = tiny.model(architecture)
    within = model.components(some(model, unit))
    plain, weights, hook = logits(model), *(logits(model, zero(model, within, hold=h)) for h in ("weights", "hooks"))
    spread = float(plain.max() - plain.min())
    assert (weights - hook).abs().max() < 1e-5 * spread
    assert (weights - plain).abs().max() > 1e-3 * spread


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "bert"])
@pytest.mark.parametrize("unit", ["neuron", "head", "mlp", "attn", "layer"])
def test_scale_in_weights_equals_scale_by_hook(architecture: str, unit: Unit) -> None:
    model = tiny.model(architecture)
    within = model.components(some(model, unit))
    weights, hook = (logits(model, scale(model, within, -1.5, hold=h)) for h in ("weights", "hooks"))
    spread = float(weights.max() - weights.min())
    assert (weights - hook).abs().max() < 1e-5 * spread
    assert torch.equal(logits(model, scale(model, within, 1.0)), logits(model))
    assert torch.equal(logits(model, scale(model, within, 0.0)), logits(model, zero(model, within)))
    assert (weights - logits(model)).abs().max() > 1e-3 * spread


def test_zero_sets_the_write_slices_alone() -> None:
    model = tiny.model("llama")
    before = edits.bits(model.module)
    with zero(model, model.components({"blocks.1.mlp.neuron": [2, 9]})).applied(model):
        after = edits.bits(model.module)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    zeros = (after[changed[0]] == 0).all(0).nonzero().flatten().tolist()
    assert zeros == [2, 9]
    assert int((after[changed[0]] != before[changed[0]]).sum()) == 2 * tiny.D_MODEL


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "bert"])
def test_mean_in_weights_equals_mean_by_hook(architecture: str) -> None:
    model = tiny.model(architecture)
    within = edits.neurons_and_heads(model)
    data = edits.task().retain
    assert data is not None
    weights, hook = (mean(model, within, data, hold=h) for h in ("weights", "hooks"))
    assert (weights.kind, hook.kind) == ("weights", "hooks")
    spread = float(logits(model).max() - logits(model).min())
    assert (logits(model, weights) - logits(model, hook)).abs().max() < 1e-5 * spread
    assert (logits(model, weights) - logits(model, zero(model, within))).abs().max() > 1e-3 * spread
    weights.verify(model)
    assert weights.also


def test_mean_is_over_all_real_tokens_or_over_predicting_positions() -> None:
    model = tiny.model("llama")
    within = model.components({"blocks.1.mlp.neuron": [3], "blocks.0.attn.head": [1]})
    examples = encode(model, edits.task().forget)
    everywhere: list[torch.Tensor] = []
    predicting: list[torch.Tensor] = []
    for example in examples:  # one by one, so without padding
        with torch.no_grad(), tracing.record(model, ["blocks.1.mlp.hook_post"]) as seen:
            model.logits(collate([example], model))
        values = seen["blocks.1.mlp.hook_post"][0, :, 3]
        everywhere.append(values)
        predicting.append(values[[t - 1 for t in example.targets]])
    for positions, expected in (("all", everywhere), ("predicting", predicting)):
        edit = mean(model, within, examples, positions=positions)
        assert edit.hook is not None
        found = edit.hook.means["blocks.1.mlp.neuron"][3]
        torch.testing.assert_close(found, torch.cat(expected).mean(), rtol=1e-5, atol=1e-6)
        assert edit.hook.means["blocks.0.attn.head"].shape == (tiny.N_HEADS, model.d_head)
    assert len(torch.cat(everywhere)) != len(torch.cat(predicting))


def test_mean_without_an_output_bias_is_a_hook_unless_weights_are_asked_for() -> None:
    model = tiny.model("llama")
    within, data = edits.neurons_and_heads(model), edits.task().forget
    assert mean(model, within, data).kind == "hooks"
    with pytest.raises(LoceditError, match=r"down_proj.weight does not have; use hold='hooks'"):
        mean(model, within, data, hold="weights")
    with pytest.raises(LoceditError, match="mean works on components of unit neuron, head, not on 'mlp'"):
        mean(model, model.components({"blocks.0.mlp": [0]}), data)


def test_hook_edits_save_and_load(tmp_path: object) -> None:
    model = tiny.model("llama")
    edit = mean(model, edits.neurons_and_heads(model), edits.task().forget)
    edit.save(f"{tmp_path}/edit")
    again = Edit.load(f"{tmp_path}/edit")
    assert torch.equal(logits(model, again), logits(model, edit))
    assert not torch.equal(logits(model, again), logits(model))
    assert edits.hooks_left(model.module) == 0
    edit.verify(model)


def test_user_mistakes() -> None:
    model = tiny.model("llama")
    empty = model.components({"blocks.0.mlp.neuron": []})
    with pytest.raises(LoceditError, match="the component set is empty"):
        zero(model, empty)
    one = model.components({"blocks.0.mlp.neuron": [0]})
    with pytest.raises(LoceditError, match="hold='hook'; did you mean 'hooks'"):
        zero(model, one, hold="hook")
    with pytest.raises(LoceditError, match="factor=nan is not a finite number"):
        scale(model, one, float("nan"))
    with pytest.raises(LoceditError, match="scale by hook works on components of unit .*, not on 'row'"):
        scale(model, model.components({"blocks.0.mlp.out.row": [1]}), 0.5, hold="hooks")
    nothing: list[Example] = []
    with pytest.raises(LoceditError, match="no position to average over"):
        mean(model, one, nothing)

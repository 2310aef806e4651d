"""LoRA held edits: nothing outside the set changes, the base never does, and PEFT reads what is exported."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from locedit.data.encode import collate, encode
from locedit.edit import Edit
from locedit.edit.adapter import Lora
from locedit.edit.restrict import holders, out_axis
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.unlearn import unlearn
from tests import edits, tiny

SETTINGS = {"steps": 6, "learning_rate": 1e-2, "eval_every": 0, "rank": 3}


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(collate(encode(model, edits.task().forget), model))


def dense(model: Model, edit: Edit) -> dict[str, torch.Tensor]:
    """Parameter -> what the adapter adds to it, in the parameter's layout."""
    added: dict[str, torch.Tensor] = {}
    for adapter in edit.adapters:
        weight = model.parameter(adapter.param)
        module = holders(model, [weight])[0][0][0]
        change = adapter.up @ adapter.down  # [out, in]
        change = change.T if out_axis(module) == 1 else change
        full = torch.zeros(weight.shape)
        if adapter.index is None:
            full += change
        else:
            assert adapter.axis is not None
            full.index_copy_(adapter.axis, adapter.index, change)
        added[adapter.param] = added.get(adapter.param, torch.zeros(weight.shape)) + full
    return added


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "phi3"])
def test_only_rows_and_columns_of_the_set_change(architecture: str) -> None:
    model = tiny.model(architecture)
    rows = {"blocks.0.mlp.out.row": [2, 3], "blocks.0.mlp.out.column": [1], "blocks.1.attn.o.matrix": [0]}
    within = edits.neurons_and_heads(model) | model.components({k: v for k, v in rows.items() if "row" in k})
    within = within | model.components({k: v for k, v in rows.items() if "column" in k})
    within = within | model.components({k: v for k, v in rows.items() if "matrix" in k})
    before = edits.bits(model.module)
    edit = unlearn(model, edits.task(), "npo", within=within, hold="adapter", **SETTINGS)
    assert edits.same_bits(model.module, before)
    masks = within.parameter_mask("train")
    for name, change in dense(model, edit).items():
        assert not change[~masks[name]].any()
        assert change[masks[name]].abs().max() > 1e-4
    # merged by hand the adapter gives the logits that it gives as hooks
    with edit.applied(model) as edited:
        hooked = logits(edited)
    with torch.no_grad():
        for name, change in dense(model, edit).items():
            model.parameter(name).add_(change)
    torch.testing.assert_close(logits(model), hooked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "bert"])
@pytest.mark.parametrize("restricted", [True, False])
def test_peft_loads_the_export_and_gives_the_same_logits(architecture: str, restricted: bool, tmp_path: Path) -> None:
    model = tiny.model(architecture)
    plain = logits(model)
    within = None
    if restricted:
        columns = model.components({"blocks.0.mlp.out.column": [1], "blocks.1.mlp.out.column": [4]})
        within = edits.neurons_and_heads(model) | columns | model.components({"blocks.0.mlp.out.row": [2, 3]})
    edit = unlearn(model, edits.task(), "npo", within=within, hold="adapter", **SETTINGS)
    with edit.applied(model) as edited:
        expected = logits(edited)
    edit.export(model, tmp_path / "adapter")
    wrapped = PeftModel.from_pretrained(model.module, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3
    wrapped.unload()
    assert torch.equal(logits(model), plain)


def test_the_change_is_zero_before_training_and_the_factors_are_as_large_as_the_set() -> None:
    model = tiny.model("llama")
    within = model.components({"blocks.0.mlp.neuron": [1, 2, 3]})
    held = Lora(model, within, rank=4, alpha=8.0, generator=torch.Generator().manual_seed(0))
    plain = logits(model)
    with held.active():
        assert torch.equal(logits(model), plain)
    sizes = sorted(tuple(p.shape) for p in held.parameters)
    assert sizes == sorted([(4, 48), (3, 4), (4, 48), (3, 4), (4, 3), (48, 4)])
    with torch.no_grad():
        for parameter in held.parameters:
            parameter.fill_(0.1)
    with held.active():
        assert (logits(model) - plain).abs().max() > 1e-3
    assert held.adapters()[0].up.unique().tolist() == pytest.approx([0.1 * 8 / 4])


def test_bfloat16_base_keeps_a_float32_adapter() -> None:
    model = edits.half("llama")
    edit = unlearn(model, edits.task(), "npo", within=edits.neurons_and_heads(model), hold="adapter", **SETTINGS)
    assert {a.up.dtype for a in edit.adapters} == {torch.float32}
    assert edit.outcome["lost_to_rounding"] == 0
    plain = logits(model)
    with edit.applied(model) as edited:
        assert logits(edited).dtype == torch.bfloat16
        assert not torch.equal(logits(edited), plain)
    assert torch.equal(logits(model), plain)


def test_what_an_adapter_cannot_hold() -> None:
    model = tiny.model("llama")
    weights = model.components({"blocks.0.mlp.out.weight": [3, 4]})
    with pytest.raises(LoceditError, match="single weights cannot be held as a LoRA adapter"):
        unlearn(model, edits.task(), "npo", within=weights, hold="adapter", **SETTINGS)
    norm = model.components({"model.norm.weight:matrix": [0]})
    with pytest.raises(LoceditError, match="touches no weight of a linear map"):
        unlearn(model, edits.task(), "npo", within=norm, hold="adapter", **SETTINGS)
    with pytest.raises(LoceditError, match="decay='weights' does not go with hold='adapter'"):
        unlearn(model, edits.task(), "npo", hold="adapter", decay="weights", weight_decay=0.1, **SETTINGS)

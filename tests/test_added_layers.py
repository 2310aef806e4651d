"""Added layers act as written, leave the model alone, and are gone without a trace."""

import dataclasses
from pathlib import Path

import pytest
import torch

from locedit import tracing
from locedit.data.encode import collate, encode
from locedit.edit import Edit
from locedit.edit.layers import Activation, AddedLayer
from locedit.errors import LoceditError
from tests import edits, tiny

POINTS = ("blocks.1.hook_mlp_out", "blocks.0.hook_attn_out", "blocks.1.mlp.hook_post")


def _layer(point: str, width: int, *, activation: Activation = "relu", index: torch.Tensor | None = None) -> AddedLayer:
    generator = torch.Generator().manual_seed(5)
    n = width if index is None else len(index)
    return AddedLayer(
        point=point,
        activation=activation,
        down=torch.randn(3, n, generator=generator),
        down_bias=torch.randn(3, generator=generator),
        up=torch.randn(n, 3, generator=generator),
        up_bias=torch.randn(n, generator=generator),
        index=index,
    )


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "gemma2", "bert"])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("some", [False, True])
def test_a_layer_adds_what_its_formula_says(architecture: str, point: str, some: bool) -> None:
    model = tiny.model(architecture)
    batch = collate(encode(model, edits.task().forget), model)
    with torch.no_grad(), tracing.record(model, [point]) as plain:
        model.logits(batch)
    value = plain[point]
    index = torch.tensor([1, 4, 7]) if some else None
    layer = _layer(point, value.shape[-1], index=index)
    edit = Edit(kind="modules", fingerprint=model.fingerprint, layers=(layer,))
    with torch.no_grad(), edit.applied(model) as edited, tracing.record(edited, [point]) as seen:
        edited.logits(batch)
    inside = value if index is None else value[..., index]
    hidden = torch.einsum("rn,bpn->bpr", layer.down, inside) + layer.down_bias
    change = torch.einsum("nr,bpr->bpn", layer.up, hidden.clamp(min=0)) + layer.up_bias
    expected = value.clone()
    if index is None:
        expected += change
    else:
        expected[..., index] += change
    torch.testing.assert_close(seen[point], expected, rtol=1e-4, atol=1e-4)


def test_two_layers_at_one_place_are_two_edits() -> None:
    """In a chain both act; in one edit only one would."""
    model = tiny.model("gpt2")
    batch = collate(encode(model, edits.task().forget), model)
    one = _layer(POINTS[0], model.d_model)
    with pytest.raises(LoceditError, match=r"not two at blocks\.1\.hook_mlp_out; chain two edits"):
        Edit(kind="modules", fingerprint=model.fingerprint, layers=(one, one))
    edit = Edit(kind="modules", fingerprint=model.fingerprint, layers=(one,))
    with torch.no_grad():
        with edit.applied(model) as edited:
            once = edited.logits(batch)
        with edit.then(edit).applied(model) as edited:
            assert (edited.logits(batch) - once).abs().max() > 1e-2


def test_layers_are_saved_and_dropping_them_gives_the_model_back(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    batch, before = collate(encode(model, edits.task().forget), model), edits.bits(model.module)
    layer = _layer("blocks.0.hook_mlp_out", model.d_model, activation="linear", index=torch.tensor([0, 2]))
    grams = torch.eye(3).double(), torch.eye(4).double()
    edit = Edit(kind="modules", fingerprint=model.fingerprint, layers=(dataclasses.replace(layer, grams=grams),))
    edit.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit")
    assert (loaded.digest, loaded.conditional, len(loaded)) == (edit.digest, ("layer",), 3 * 2 + 3 + 2 * 3 + 2)
    assert loaded.layers[0].grams is not None
    assert torch.equal(loaded.layers[0].grams[1], grams[1])
    with torch.no_grad():
        plain = model.logits(batch)
        with loaded.applied(model) as edited:
            changed = edited.logits(batch)
        with loaded.dropped().applied(model) as edited:
            dropped = edited.logits(batch)
    assert not torch.allclose(changed, plain, atol=1e-2)
    assert torch.equal(dropped, plain)
    assert edits.same_bits(model.module, before)
    assert edits.hooks_left(model.module) == 0
    loaded.verify(model)
    with pytest.raises(LoceditError, match="added layers are no part of a transformers model"):
        edit.export(model, tmp_path / "out")

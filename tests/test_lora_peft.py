"""LoRA inside a set is trained as peft trains it, with everything outside the rows or columns held at zero."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from locedit import losses
from locedit.components import ComponentSet
from locedit.data.encode import Batch, encode
from locedit.edit import Edit
from locedit.edit.adapter import Lora
from locedit.edit.objective import Objective, Step
from locedit.edit.restrict import out_axis
from locedit.edit.train import TrainOptions, train
from locedit.models import Model, load
from tests import edits, tiny


def recorded(model: Model, within: ComponentSet, options: TrainOptions) -> tuple[Edit, list[Batch]]:
    """A LoRA edit trained with NLL, and the batches that it saw; its reference is the base, bit for bit, all along."""
    base = load(copy.deepcopy(model.module), tokenizer=tiny.tokenizer(), device="cpu")
    seen: list[Batch] = []

    def loss(step: Step) -> dict[str, Tensor]:
        with torch.no_grad():
            expected = losses.score(base, step.forget).logits
        assert torch.equal(step.unedited(step.forget).logits, expected)
        # kept logits may come from other batches, whose sums are rounded otherwise
        torch.testing.assert_close(step.reference(step.forget).logits, expected, rtol=0, atol=1e-12)
        assert torch.equal(step.score(step.forget).logits, expected) == (not seen)
        seen.append(step.forget)
        return {"nll": losses.sequence_nll(step.score(step.forget)).mean()}

    task = edits.task()
    assert task.retain is not None
    data = encode(model, task.forget) + encode(model, task.retain)
    edit = train(model, Objective(loss=loss, forget=data), within=within, hold="adapter", options=options)
    return edit, seen


@pytest.mark.parametrize(
    ("architecture", "restricted"),
    [("llama", "no"), ("gpt_neox", "no"), ("bert", "no"), ("llama", "rows"), ("gpt2", "rows"), ("gpt2", "columns")],
)
def test_training_equals_that_of_peft(architecture: str, restricted: str) -> None:
    """The same start of A, the same batches, AdamW: peft's factors, with gradients outside rows or columns at zero."""
    model = edits.double(architecture)
    chosen = {"no": {"blocks.0.mlp.in.matrix": [0], "blocks.2.attn.o.matrix": [0]}}
    chosen |= {"rows": {"blocks.1.mlp.out.row": [2, 3, 9]}, "columns": {"blocks.1.mlp.out.column": [1, 7, 40, 41]}}
    within = model.components(chosen[restricted])
    options = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "rank": 4, "alpha": 12.0, "clip": None, "seed": 5}
    edit, seen = recorded(model, within, TrainOptions(eval_every=0, **options))  # type: ignore[arg-type]
    assert len(seen) == 6

    start = Lora(model, within, rank=4, alpha=12.0, generator=torch.Generator().manual_seed(5))
    names = [piece.param.removesuffix(".weight") for piece in start.pieces]
    conv = out_axis(start.pieces[0].module) == 1
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=names, fan_in_fan_out=conv)
    wrapped: Any = get_peft_model(copy.deepcopy(model.module), config)
    adapted = load(wrapped.get_base_model(), tokenizer=tiny.tokenizer(), device="cpu")
    layers: list[Any] = [wrapped.get_submodule(f"base_model.model.{name}") for name in names]
    factors = [(layer.lora_A.default.weight, layer.lora_B.default.weight) for layer in layers]  # type: ignore[union-attr]
    with torch.no_grad():
        for (down, _), piece, first in zip(factors, start.pieces, start.parameters[::2], strict=True):
            down.copy_(_wide(first, 1, piece.index if restricted == "columns" else None, down.shape[1]))
    optimizer = torch.optim.AdamW([p for pair in factors for p in pair], lr=1e-2, weight_decay=0.0)
    for batch in seen:
        optimizer.zero_grad()
        losses.sequence_nll(losses.score(adapted, batch)).mean().backward()
        for (down, up), piece in zip(factors, start.pieces, strict=True):
            if restricted == "columns":
                down.grad *= _inside(piece.index, down.shape[1])
            if restricted == "rows":
                up.grad *= _inside(piece.index, up.shape[0])[:, None]
        optimizer.step()
    for (down, up), adapter in zip(factors, edit.adapters, strict=True):
        columns, rows = (adapter.index if restricted == kind else None for kind in ("columns", "rows"))
        torch.testing.assert_close(down, _wide(adapter.down, 1, columns, down.shape[1]), rtol=0, atol=1e-10)
        torch.testing.assert_close(up * 3.0, _wide(adapter.up, 0, rows, up.shape[0]), rtol=0, atol=1e-10)
        assert adapter.up.abs().max() > 1e-2
    # switched off, both are the model that they were trained beside
    with wrapped.disable_adapter(), torch.no_grad():
        off = losses.score(adapted, seen[0]).logits
        assert torch.equal(off, losses.score(model, seen[0]).logits)
    assert not torch.equal(losses.score(adapted, seen[0]).logits, off)


def _wide(factor: Tensor, axis: int, index: Tensor | None, size: int) -> Tensor:
    """Zero outside the chosen rows or columns."""
    if index is None:
        return factor.detach()
    shape = [*factor.shape]
    shape[axis] = size
    return factor.new_zeros(shape).index_copy(axis, index, factor.detach())


def _inside(index: Tensor | None, size: int) -> Tensor:
    """One at the chosen places, zero elsewhere."""
    assert index is not None
    return torch.zeros(size).index_fill(0, index, 1.0)

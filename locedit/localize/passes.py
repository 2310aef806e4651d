"""What one row of a forward pass, and of a backward pass, takes beside the model."""

from collections.abc import Sequence

import torch

from locedit.data.encode import Example
from locedit.localize.integration.blocks import attention_of
from locedit.models import Model


def pass_bytes(model: Model, examples: Sequence[Example], *, gradient: bool, kept: int = 0) -> int:
    """Bytes of the longest row, on the large side.

    With `gradient` what autograd keeps of all blocks, else what one block has at a time; `kept` numbers are recorded at
    every position of every layer besides. Logits count four times in float32, at scored positions only.
    """
    length = max(len(example.ids) for example in examples)
    scored = max(len(example.targets) for example in examples) if model.causal else 1
    size = torch.finfo(model.dtype).bits // 8
    attention = 3 * length * model.n_heads if attention_of(model) == "eager" else 0
    block = size * length * (12 * model.d_model + 4 * _d_mlp(model) + attention)
    blocks = model.n_layers * block if gradient else block
    return blocks + size * length * model.n_layers * kept + 16 * scored * model.vocab_size


def _d_mlp(model: Model) -> int:
    """Width of the MLPs; where they are no dense ones, four times that of the residual stream."""
    dense = model.anatomy.roles(0, ("mlp.out",))
    return model.d_mlp if dense else 4 * model.d_model

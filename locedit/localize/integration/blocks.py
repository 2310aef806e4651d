"""What the staircase has to know about a model's blocks, found by measuring or from the config."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from locedit import tracing
from locedit.data.encode import unseen_padding
from locedit.localize.integration.rows import LONGEST, SHORTEST
from locedit.models import Model

_ADDITIVE: WeakKeyDictionary[Model, bool] = WeakKeyDictionary()
"what adds_mlp_output found"


def adds_mlp_output(model: Model) -> bool:
    """Whether every block's output is its input plus what attention and the MLP's output projection give, measured."""
    if model not in _ADDITIVE:
        words = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
        names = [f"blocks.{layer}.{word}" for layer in range(model.n_layers) for word in words]
        dummy = torch.full((1, 1), unseen_padding(model.core.config.pad_token_id), device=model.device)
        with torch.no_grad(), tracing.record(model, names) as seen:
            model.module(input_ids=dummy, use_cache=False)
        parts = [
            [seen[f"blocks.{layer}.{word}"].flatten().double() for word in words] for layer in range(model.n_layers)
        ]
        apart = [float((pre + attn + mlp - post).norm() / mlp.norm()) for pre, attn, mlp, post in parts]
        plain = not model.anatomy.has("blocks.0.ln2_post")
        _ADDITIVE[model] = plain and max(apart) < (0.1 if torch.finfo(model.dtype).bits < 32 else 1e-3)
    return _ADDITIVE[model]


def builds_own_mask(module: nn.Module) -> bool:
    """Whether an attention builds a window from the number of its keys (GPT-Neo's local layers).

    Then rows cannot share the sequence axis.
    """
    config: Any = getattr(module, "config", None)
    return "local" in (getattr(config, "attention_layers", None) or ())


def row_bytes(model: Model, length: int) -> int:
    """What autograd keeps of a row, its share of a prefix of that length, and its logits; on the large side."""
    size = torch.finfo(model.dtype).bits // 8
    rows = min(max(length, SHORTEST), LONGEST)
    keys = length + rows
    attention = keys * (3 * model.n_heads if attention_of(model) == "eager" else 2)
    copies = keys if builds_own_mask(model.module) else 2 * keys / rows
    attention += int(copies * 2 * model.n_heads * model.d_head)
    return model.n_layers * size * (12 * model.d_model + 4 * model.d_mlp + attention) + 16 * model.vocab_size


def attention_of(model: Model) -> str:
    """Name of the attention implementation: sdpa, eager, ..."""
    return str(getattr(model.core.config, "_attn_implementation", None))


@contextmanager
def weights_without_gradient(module: nn.Module) -> Generator[None]:
    """Inside, no parameter asks for a gradient, so that autograd keeps only what the rows need."""
    asking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)

"""The only file that imports transformer_lens: its architecture adapters as a table, and the temporary bridge.

The adapters know where each of some hundred architectures keeps its embeddings, attention and MLP matrices, and how fused
matrices (query_key_value, gate_up) are split. They are read as a table, without booting anything: the model is neither
changed nor wrapped. transformer_lens is imported on first use, because it costs most of a second.
"""

import copy
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

ROLES = ("attn", "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o", "attn.q_norm", "attn.k_norm")
ROLES += ("mlp", "mlp.gate", "mlp.in", "mlp.out", "ln1", "ln2", "ln1_post", "ln2_post")
OUTER = ("embed", "pos_embed", "embed_ln", "ln_final", "unembed")


@dataclass(frozen=True, kw_only=True)
class AdapterTable:
    """Where one model keeps its parts."""

    modules: dict[str, nn.Module]
    "transformer-lens name ('embed', 'blocks.3.attn.q', 'blocks.3.mlp.gate_up') -> module of the model"
    rows: dict[str, tuple[int, ...]]
    "role held in a fused matrix ('attn.q', 'mlp.gate') -> its outputs among the fused matrix's, in order"
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    parallel: bool
    "attention and MLP read the same residual stream, so there is none between them"


@contextmanager
def _quiet_import() -> Generator[None]:
    """Undo what importing transformer_lens does to the transformers logger and to the warning filters."""
    logger = logging.getLogger("transformers")
    level, filters = logger.level, warnings.filters[:]
    try:
        yield
    finally:
        logger.setLevel(level)
        warnings.filters[:] = filters


def adapter_table(model: PreTrainedModel) -> AdapterTable:
    """Read the adapter of the model's class; the model is left as it is."""
    with _quiet_import():
        from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
    config = copy.deepcopy(model.config)
    bridge_config = build_bridge_config_from_hf(config, type(model).__name__, "local", torch.float32)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)
    modules = _modules(adapter, model, n_layers=bridge_config.n_layers)
    rows = _fused_rows(adapter, modules)
    return AdapterTable(
        modules=modules,
        rows=rows,
        n_layers=bridge_config.n_layers,
        n_heads=bridge_config.n_heads,
        n_kv_heads=getattr(bridge_config, "n_key_value_heads", None) or bridge_config.n_heads,
        d_head=bridge_config.d_head,
        d_model=bridge_config.d_model,
        parallel=bool(getattr(bridge_config, "parallel_attn_mlp", False)),
    )


def _modules(adapter: Any, model: PreTrainedModel, *, n_layers: int) -> dict[str, nn.Module]:
    blocks = [f"blocks.{layer}" for layer in range(n_layers)]
    names = [*OUTER, *blocks, *(f"{block}.{role}" for block in blocks for role in ROLES)]
    own = {id(module) for module in model.modules()}
    found: dict[str, nn.Module] = {}
    for name in names:
        try:
            module = adapter.get_component(model, name)
        except (AttributeError, ValueError, TypeError, KeyError, IndexError):
            continue
        if id(module) in own:
            found[name] = module
    mlp = adapter.component_mapping["blocks"].submodules.get("mlp")
    if fused := getattr(mlp, "fused_attr", None):
        for block in blocks:
            found[f"{block}.mlp.gate_up"] = getattr(found[f"{block}.mlp"], fused)
    return found


def _fused_rows(adapter: Any, modules: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Find the order of fused rows by sending row numbers through the adapter's own split functions (layer 0)."""
    submodules = adapter.component_mapping["blocks"].submodules
    rows: dict[str, tuple[int, ...]] = {}
    if "blocks.0.attn.qkv" in modules:
        split = submodules["attn"].split_qkv_matrix
        parts = _probe(modules["blocks.0.attn"], modules["blocks.0.attn.qkv"], split)
        rows |= dict(zip(("attn.q", "attn.k", "attn.v"), parts, strict=True))
    if "blocks.0.mlp.gate_up" in modules:
        split = submodules["mlp"].split_gate_up_matrix
        parts = _probe(modules["blocks.0.mlp"], modules["blocks.0.mlp.gate_up"], split)
        rows |= dict(zip(("mlp.gate", "mlp.in"), parts, strict=True))
    return rows


def _probe(container: nn.Module, fused: nn.Module, split: Any) -> list[tuple[int, ...]]:
    """Rows of `fused` that feed each part of `split(container)`, read off a copy whose weights are their row numbers."""
    plain = getattr(fused, "base_layer", fused)
    counter = _shell(plain)
    out_axis = 1 if type(plain).__name__ == "Conv1D" else 0
    numbers = torch.arange(plain.weight.shape[out_axis], dtype=torch.float32)
    shape = (1, -1) if out_axis else (-1, 1)
    counter._parameters["weight"] = nn.Parameter(numbers.view(shape).expand(plain.weight.shape))
    if getattr(plain, "bias", None) is not None:
        counter._parameters["bias"] = nn.Parameter(numbers.clone())
    clone = _shell(container)
    for name, child in container.named_children():
        if child is fused:
            clone._modules[name] = counter
    with torch.no_grad():
        return [tuple(part.weight[:, 0].round().long().tolist()) for part in split(clone)]


def _shell(module: nn.Module) -> nn.Module:
    """A shallow copy whose children and parameters can be exchanged; no tensor is copied."""
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    clone._parameters = dict(module._parameters)
    return clone

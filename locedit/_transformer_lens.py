"""The only file that imports transformer_lens: its architecture adapters as a table, and the temporary bridge.

The adapters know where each of some hundred architectures keeps its embeddings, attention and MLP matrices, and how
fused matrices (query_key_value, gate_up) are split. They are read as a table, without booting anything: the model is
neither changed nor wrapped. transformer_lens is imported on first use, because it costs most of a second.
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

from locedit.errors import LoceditError
from locedit.fingerprints import state_of

ROLES = (
    "attn", "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o", "attn.q_norm", "attn.k_norm",
    "mlp", "mlp.gate", "mlp.in", "mlp.out", "ln1", "ln2", "ln1_post", "ln2_post",
)  # fmt: skip
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
    level = logger.level
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logger.setLevel(level)


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
    """Rows of `fused` that feed each part of `split(container)`, read off a copy whose weights are row numbers."""
    plain: Any = getattr(fused, "base_layer", fused)
    counter = _shell(plain)
    out_axis = 1 if type(plain).__name__ == "Conv1D" else 0
    numbers = torch.arange(plain.weight.shape[out_axis], dtype=torch.float32)
    shape = (1, -1) if out_axis else (-1, 1)
    counter.weight = nn.Parameter(numbers.view(shape).expand(plain.weight.shape))
    counter.bias = nn.Parameter(numbers.clone())  # some split functions insist on one
    clone = _shell(container)
    for name, child in container.named_children():
        if child is fused:
            setattr(clone, name, counter)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # split makes layers, and with them random numbers
        return [tuple(part.weight[:, 0].round().long().tolist()) for part in split(clone)]


def _shell(module: nn.Module) -> nn.Module:
    """A shallow copy whose children and parameters can be exchanged; no tensor is copied."""
    clone = copy.copy(module)
    for table in ("_modules", "_parameters"):
        clone.__dict__[table] = dict(module.__dict__[table])
    return clone


# --- the bridge ------------------------------------------------------------------------------------------------------


@contextmanager
def bridged(core: PreTrainedModel, tokenizer: Any) -> Generator[Any]:
    """Wrap the model in place as a TransformerBridge with eager attention, and take everything back at the end.

    Weights must not be changed inside: the bridge holds copies of some fused matrices, and changes to those would be
    lost.
    """
    attention = getattr(core.config, "_attn_implementation", None) or "eager"
    before = {name: state_of(parameter) for name, parameter in core.named_parameters()}
    with _restoring(core), torch.random.fork_rng(devices=[]):
        core.set_attn_implementation("eager")
        try:
            yield _bridge(core, tokenizer)
        finally:
            core.set_attn_implementation(attention)
    changed = [name for name, parameter in core.named_parameters() if state_of(parameter) != before[name]]
    if changed:
        raise LoceditError(f"a bridge is for reading, but {changed[0]!r} was changed inside it: reload the model")


def _bridge(core: PreTrainedModel, tokenizer: Any) -> Any:
    with _quiet_import():
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    kind = type(core).__name__
    try:
        bridge = build_bridge_from_module(core, kind, hf_config=core.config, model_name="local")
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise LoceditError(f"transformer-lens cannot bridge this {kind}: {reason}") from error
    bridge.tokenizer = tokenizer
    return bridge


@contextmanager
def _restoring(core: PreTrainedModel) -> Generator[None]:
    """Put back every attribute of every module and of the config, gradients, and which parameters take part in them."""
    modules = {module: _attributes(module) for module in core.modules()}
    config = dict(core.config.__dict__)
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in core.parameters()]
    try:
        yield
    finally:
        for module, attributes in modules.items():
            module.__dict__.clear()
            for name, (value, content) in attributes.items():
                if content is not None:
                    value.clear()
                    value.update(content)
                module.__dict__[name] = value
        core.config.__dict__.clear()
        core.config.__dict__.update(config)
        for parameter, takes_part, gradient in parameters:
            parameter.requires_grad_(takes_part)
            parameter.grad = gradient


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """A module's attributes; of dictionaries and sets (its children, parameters, hooks) the content too."""
    return {
        name: (value, copy.copy(value) if isinstance(value, dict | set) else None)
        for name, value in module.__dict__.items()
    }

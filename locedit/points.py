"""Where the hook names of transformer-lens are in an unmodified Hugging Face model.

| name | what | shape |
|---|---|---|
| hook_embed, hook_pos_embed | output of the (position) embedding | batch pos d_model |
| blocks.i.hook_resid_pre, hook_resid_post | the residual stream before and after a block | batch pos d_model |
| blocks.i.hook_resid_mid | between attention and MLP; not in parallel blocks | batch pos d_model |
| blocks.i.hook_attn_out, hook_mlp_out | what attention and MLP add to the residual stream | batch pos d_model |
| blocks.i.attn.hook_q, hook_k, hook_v | outputs of the projections, before rotation | batch pos head d_head |
| blocks.i.attn.hook_z | what each head hands to the output projection | batch pos head d_head |
| blocks.i.mlp.hook_pre | before the activation (of the gate, where there is one) | batch pos d_mlp |
| blocks.i.mlp.hook_pre_linear | the up projection of a gated MLP | batch pos d_mlp |
| blocks.i.mlp.hook_post | the neurons: input of the output projection | batch pos d_mlp |
| hook_unembed | output of the unembedding: the logits, before any soft cap | batch pos vocab |

Keys and values have n_kv_heads heads. attn_out and mlp_out are what is added: in Gemma 2 and 3 after their own output
norms, in BERT before the sum and its norm. A change at hook_resid_mid changes the stream itself. transformer-lens 4.3
differs there: it changes only what the MLP reads, and in BERT it gives resid_mid for hook_attn_out, and for
hook_resid_mid the sum before the last norm. In BERT hook_embed is after the norm of the embeddings.
"""

import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from locedit.anatomy import Anatomy, Runs
from locedit.components import unit_of
from locedit.errors import LoceditError, nearest

OUTER_POINTS = {"hook_embed": "embed", "hook_pos_embed": "pos_embed", "hook_unembed": "unembed"}
BLOCK_POINTS = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_q",
    "attn.hook_k", "attn.hook_v", "attn.hook_z", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HookPoint:
    """One place in the forward pass."""

    name: str
    module: nn.Module
    side: Literal["input", "output"]
    runs: Runs | None = None
    "which part of the last axis, in a fused matrix; None = all"
    d_head: int | None = None
    "the last axis is split into heads of this width"
    base: nn.Module | None = None
    "the value is the output of `module` plus the input of `base` (the residual stream in the middle of a block)"
    block: nn.Module | None = None
    "whose input tells batch and pos, for modules that may be called with both in one axis (OPT's MLP)"
    whole: bool = False
    "for ablation: the one component is everything here"
    rest: Tensor | None = None
    "for ablation: what is left of the entries when their weights are zero (a bias); None = nothing"


def find(anatomy: Anatomy, name: str) -> HookPoint:
    """The place with a transformer-lens name; a LoceditError lists the choices or says why it is missing."""
    if name in OUTER_POINTS and anatomy.has(OUTER_POINTS[name]):
        normed = name == "hook_embed" and anatomy.has("embed_ln")
        return HookPoint(name=name, module=anatomy.module("embed_ln" if normed else OUTER_POINTS[name]), side="output")
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None or match[2] not in BLOCK_POINTS:
        raise LoceditError(f"no hook {name!r}; {nearest(name, names(anatomy))}")
    layer, point = int(match[1]), match[2]
    if layer >= anatomy.table.n_layers:
        last = anatomy.table.n_layers - 1
        raise LoceditError(f"no hook {name!r}: the model has layers 0 to {last}")
    if point.startswith("hook_resid"):
        return _resid(anatomy, layer, point)
    if point.startswith("hook_"):
        return _added(anatomy, layer, point)
    return _projection(anatomy, layer, point)


def names(anatomy: Anatomy, layers: tuple[int, ...] = (0,)) -> tuple[str, ...]:
    """The hook names of the given layers and of what is outside the blocks."""
    missing = set[str]()
    if anatomy.table.parallel:
        missing.add("hook_resid_mid")
    if not anatomy.gated:
        missing.add("mlp.hook_pre_linear")
    outer = [name for name, role in OUTER_POINTS.items() if anatomy.has(role)]
    return (*outer, *(f"blocks.{layer}.{p}" for layer in layers for p in BLOCK_POINTS if p not in missing))


def _resid(anatomy: Anatomy, layer: int, point: str) -> HookPoint:
    name, block = f"blocks.{layer}.{point}", anatomy.module(f"blocks.{layer}")
    if point == "hook_resid_pre":
        return HookPoint(name=name, module=block, side="input")
    if point == "hook_resid_post":
        return HookPoint(name=name, module=block, side="output")
    if anatomy.table.parallel:
        raise LoceditError(
            f"no hook {name!r}: attention and MLP of {type(block).__name__} are parallel, nothing is between them"
        )
    if anatomy.post_norm:
        return HookPoint(name=name, module=anatomy.module(f"blocks.{layer}.ln1"), side="output")
    added = _added(anatomy, layer, "hook_attn_out")
    return HookPoint(name=name, module=added.module, side="output", base=block)


def _added(anatomy: Anatomy, layer: int, point: str) -> HookPoint:
    block = f"blocks.{layer}"
    norm, matrix, container = {
        "hook_attn_out": ("ln1_post", "attn.o", "attn"),
        "hook_mlp_out": ("ln2_post", "mlp.out", "mlp"),
    }[point]
    if anatomy.has(f"{block}.{norm}"):
        module = anatomy.module(f"{block}.{norm}")
    elif f"{block}.{matrix}" in anatomy.table.modules:
        module = anatomy.module(f"{block}.{matrix}")
    else:
        module = anatomy.module(f"{block}.{container}")
    return HookPoint(name=f"{block}.{point}", module=module, side="output", block=anatomy.module(block))


def _projection(anatomy: Anatomy, layer: int, point: str) -> HookPoint:
    name = f"blocks.{layer}.{point}"
    block = anatomy.module(f"blocks.{layer}")
    d_head = anatomy.table.d_head if point.startswith("attn.") else None
    if point in ("attn.hook_z", "mlp.hook_post"):
        matrix = anatomy.matrix(layer, "attn.o" if d_head else "mlp.out")
        return HookPoint(name=name, module=matrix.module, side="input", d_head=d_head, block=block)
    if point == "mlp.hook_pre_linear" and not anatomy.gated:
        raise LoceditError(f"no hook {name!r}: the MLP is not gated; take mlp.hook_pre")
    pre = "mlp.gate" if anatomy.gated else "mlp.in"
    roles = {"mlp.hook_pre": pre, "mlp.hook_pre_linear": "mlp.in"}
    matrix = anatomy.matrix(layer, roles.get(point, f"attn.{point[-1]}"))
    return HookPoint(name=name, module=matrix.module, side="output", runs=matrix.runs, d_head=d_head, block=block)


# --- where a component acts ------------------------------------------------------------------------------------------


def of_site(anatomy: Anatomy, site: str) -> list[HookPoint]:
    """Where zeroing a site's components by hook equals zeroing their write slices."""
    unit = unit_of(site)
    if not site.startswith("blocks.") or unit == "weight":
        raise LoceditError(f"site {site!r} has no place in the forward pass that stands for it alone: edit its weights")
    layer, path = int(site.split(".")[1]), site.split(".", 2)[2]
    if unit == "neuron":
        return [find(anatomy, f"blocks.{layer}.mlp.hook_post")]
    if unit == "head":
        return [find(anatomy, f"blocks.{layer}.attn.hook_z")]
    outputs = {"mlp": ("mlp.out",), "attn": ("attn.o",), "layer": ("attn.o", "mlp.out")}
    if unit in outputs:
        return [_whole_output(anatomy, layer, role) for role in outputs[unit]]
    role = path.removesuffix(f".{unit}")
    return [_whole_output(anatomy, layer, role) if unit == "matrix" else _line(anatomy, layer, role, unit=unit)]


def _whole_output(anatomy: Anatomy, layer: int, role: str) -> HookPoint:
    matrix = anatomy.matrix(layer, role)
    return HookPoint(name=f"blocks.{layer}.{role}", module=matrix.module, side="output", runs=matrix.runs, whole=True)


def _line(anatomy: Anatomy, layer: int, role: str, *, unit: str) -> HookPoint:
    matrix = anatomy.matrix(layer, role)
    if unit == "column":
        return HookPoint(name=f"blocks.{layer}.{role}", module=matrix.module, side="input")
    bias = None if matrix.bias is None else anatomy.parameters[matrix.bias].detach()
    return HookPoint(name=f"blocks.{layer}.{role}", module=matrix.module, side="output", rest=bias)

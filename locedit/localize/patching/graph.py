"""A causal model as a graph: what is added to its residual stream, and what reads it.

*Writers* are the input (the stream before the first block), every head's output and every MLP's output. *Readers* are
the query input of every head, the key and the value input of every key/value head, the input of every MLP, and the
last residual stream, which the logits read. A reader reads the sum of all writers before it, through its own norm, so
that an edge leads from every writer to every reader after it. Where attention and MLP of a block are parallel, no edge
leads from a block's heads to its MLP.

Heads that share a key/value head share its key and its value input: there is one node for them, as there is one tensor
in the model. Graphs that take grouped heads apart (transformer-lens, MIB) have a copy for every query head; the score
of an edge here is the sum of theirs.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from locedit import tracing
from locedit.anatomy import Matrix
from locedit.components import Site
from locedit.data.encode import unseen_padding
from locedit.edges import Node
from locedit.errors import LoceditError
from locedit.localize.integration.blocks import adds_mlp_output
from locedit.models import Model

Unit = Literal["head+mlp", "head", "mlp"]
GRAPH_UNITS: tuple[Unit, ...] = ("head+mlp", "head", "mlp")
_READS: WeakKeyDictionary[Model, bool] = WeakKeyDictionary()
"what reads_the_norm found"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Nodes that write or read side by side: the heads of a layer, an MLP, the input, the logits."""

    kind: Literal["input", "head", "mlp", "logits"]
    layer: int
    "-1 for the input, n_layers for the logits"
    stage: int
    "an edge leads from every writer to every reader of a later stage"
    nodes: tuple[Node, ...]
    start: int
    "number of the first node"

    @property
    def where(self) -> slice:
        """The numbers of the nodes."""
        return slice(self.start, self.start + len(self.nodes))


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The nodes of one model, all or only the heads or the MLPs; input and logits are always there."""

    model: Model
    writers: tuple[Part, ...]
    readers: tuple[Part, ...]
    sites: dict[str, Site]
    "of the heads and MLPs"

    @cached_property
    def sources(self) -> tuple[Node, ...]:
        return tuple(node for part in self.writers for node in part.nodes)

    @cached_property
    def destinations(self) -> tuple[Node, ...]:
        return tuple(node for part in self.readers for node in part.nodes)

    @cached_property
    def exists(self) -> Bool[Tensor, "source destination"]:
        """Which pairs of nodes are edges."""
        writes, reads = (
            torch.tensor([part.stage for part in parts for _ in part.nodes]) for parts in (self.writers, self.readers)
        )
        return writes[:, None] < reads[None, :]


def graph_of(model: Model, unit: Unit) -> Graph:
    """The graph of a causal model whose blocks add to one residual stream and norm what they read."""
    _refuse(model)
    writers, readers = [("input", -1, -1, [("input", 0)])], []
    sites: dict[str, Site] = {}
    for layer in range(model.n_layers):
        stage = 2 * layer
        if unit != "mlp":
            site = model.sites("head")[f"blocks.{layer}.attn.head"]
            sites[site.name] = site
            writers.append(("head", layer, stage, [(site.name, head) for head in range(site.count)]))
            readers.append(("head", layer, stage, _attention_inputs(model, layer)))
        if unit != "head":
            name = f"blocks.{layer}.mlp"
            sites[name] = model.sites("mlp")[name]
            later = stage if model.parallel else stage + 1
            writers.append(("mlp", layer, later, [(name, 0)]))
            readers.append(("mlp", layer, later, [(name, 0)]))
    readers.append(("logits", model.n_layers, 2 * model.n_layers, [("logits", 0)]))
    return Graph(model=model, writers=_numbered(writers), readers=_numbered(readers), sites=sites)


def _attention_inputs(model: Model, layer: int) -> list[Node]:
    counts = {letter: model.anatomy.matrix(layer, f"attn.{letter}").n_out // model.d_head for letter in "qkv"}
    return [(f"blocks.{layer}.attn.{letter}", head) for letter, count in counts.items() for head in range(count)]


def _numbered(parts: list[tuple[Any, int, int, list[Node]]]) -> tuple[Part, ...]:
    found: list[Part] = []
    start = 0
    for kind, layer, stage, nodes in parts:
        found.append(Part(kind=kind, layer=layer, stage=stage, nodes=tuple(nodes), start=start))
        start += len(nodes)
    return tuple(found)


# --- what is recorded -------------------------------------------------------------------------------------------------


def output_point(part: Part) -> str:
    """Where the values of a writer's nodes are: `[batch, pos, d_model]`, of heads `[batch, pos, head, d_head]`."""
    if part.kind == "input":
        return "blocks.0.hook_resid_pre"
    return f"blocks.{part.layer}." + ("attn.hook_z" if part.kind == "head" else "hook_mlp_out")


def input_points(model: Model, part: Part) -> tuple[str, ...]:
    """Where a reader's first linear maps end; of the logits the last residual stream itself."""
    if part.kind == "logits":
        return (f"blocks.{model.n_layers - 1}.hook_resid_post",)
    names = ("attn.hook_q", "attn.hook_k", "attn.hook_v") if part.kind == "head" else ("mlp.hook_pre",)
    more = ("mlp.hook_pre_linear",) if part.kind == "mlp" and model.gated else ()
    return tuple(f"blocks.{part.layer}.{name}" for name in (*names, *more))


def stream_point(model: Model, part: Part) -> str:
    """The residual stream that a reader norms."""
    if part.kind == "logits":
        return input_points(model, part)[0]
    middle = part.kind == "mlp" and not model.parallel
    return f"blocks.{part.layer}.hook_resid_{'mid' if middle else 'pre'}"


# --- what a writer adds, and what a reader passes back ----------------------------------------------------------------


def added(model: Model, part: Part, value: Tensor) -> Float[Tensor, "batch pos node d_model"]:
    """What the nodes add to the residual stream (without biases), from the value at the output point."""
    if part.kind != "head":
        return value.unsqueeze(2)
    out = linear_map(model.anatomy.matrix(part.layer, "attn.o")).to(value)
    return torch.einsum("bphe,hed->bphd", value, out.unflatten(0, value.shape[2:]))


def gradient_at_inputs(
    model: Model, part: Part, stream: Tensor, gradients: dict[str, Tensor]
) -> Float[Tensor, "batch pos node d_model"]:
    """The gradient at every node's own copy of the residual stream, through its linear maps and its norm.

    `gradients` are those at the reader's input points. Computed in at least float32.
    """
    exact = torch.promote_types(stream.dtype, torch.float32)
    points = [gradients[name].to(exact) for name in input_points(model, part)]
    if part.kind == "logits":
        return points[0].unsqueeze(2)
    if part.kind == "head":
        maps = [linear_map(model.anatomy.matrix(part.layer, f"attn.{letter}")).to(points[0]) for letter in "qkv"]
        each = [
            torch.einsum("bphe,dhe->bphd", value, weight.unflatten(1, value.shape[2:]))
            for value, weight in zip(points, maps, strict=True)
        ]
        return _through_norm(_norm(model, part), stream, torch.cat(each, dim=2))
    roles = ("mlp.gate", "mlp.in") if model.gated else ("mlp.in",)
    maps = [linear_map(model.anatomy.matrix(part.layer, role)).to(points[0]) for role in roles]
    total = sum(value @ weight.T for value, weight in zip(points, maps, strict=True))
    assert isinstance(total, Tensor)
    return _through_norm(_norm(model, part), stream, total.unsqueeze(2))


def _norm(model: Model, part: Part) -> nn.Module:
    own = f"blocks.{part.layer}.{'ln2' if part.kind == 'mlp' else 'ln1'}"
    return model.anatomy.module(own if model.anatomy.has(own) else f"blocks.{part.layer}.ln1")


def _through_norm(norm: nn.Module, stream: Tensor, gradients: Tensor) -> Tensor:
    """The norm's transposed Jacobian, for all nodes at once on as many copies of the stream."""
    copies = stream.detach().unsqueeze(2).expand(gradients.shape).contiguous().requires_grad_()
    with torch.enable_grad():
        normed = norm(copies)
    (found,) = torch.autograd.grad(normed, copies, gradients.to(normed.dtype))
    return found.to(gradients.dtype)


def linear_map(matrix: Matrix) -> Float[Tensor, "d_in d_out"]:
    """A linear map as it acts: of a fused matrix the role's part; where it is wrapped (adapters), as measured."""
    module: Any = matrix.module
    if type(module) is nn.Linear:
        whole = module.weight.detach().T
    elif type(module).__name__ == "Conv1D":
        whole = module.weight.detach()
    else:
        weight = getattr(module, "base_layer", module).weight
        unit = torch.eye(matrix.n_in, dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            whole = module(unit) - module(torch.zeros_like(unit[:1]))
    if matrix.runs is None:
        return whole
    return whole.index_select(1, torch.tensor(matrix.runs.indices(), device=whole.device))


# --- what has no such graph -------------------------------------------------------------------------------------------


def _refuse(model: Model) -> None:
    """One line for a model whose residual stream is no plain sum of what heads and MLPs add."""
    kind = type(model.core).__name__
    why = "edges between heads and MLPs have no exact meaning there; activation_patching needs none"
    if not model.causal:
        raise LoceditError(f"edges need a causal model; {kind} is masked")
    if model.anatomy.post_norm:
        raise LoceditError(f"the blocks of {kind} norm the residual stream after every sum (post-norm): {why}")
    if model.anatomy.has("blocks.0.ln1_post") or model.anatomy.has("blocks.0.ln2_post"):
        raise LoceditError(f"{kind} norms what attention and MLP add, all heads together: {why}")
    if not adds_mlp_output(model):
        raise LoceditError(f"the blocks of {kind} add more, or less, than what attention and MLP put out: {why}")
    if not reads_the_norm(model):
        raise LoceditError(f"attention or MLP of {kind} do not read the residual stream through one norm: {why}")


def reads_the_norm(model: Model) -> bool:
    """Whether queries and MLP inputs are linear maps of the normed residual stream, measured on one token."""
    if model not in _READS:
        parts = [
            Part(kind=kind, layer=layer, stage=0, nodes=(), start=0)
            for layer in range(model.n_layers)
            for kind in ("head", "mlp")
        ]
        ends = {id(part): input_points(model, part)[0] for part in parts}
        names = {*ends.values(), *(stream_point(model, part) for part in parts)}
        dummy = torch.full((1, 1), unseen_padding(model.core.config.pad_token_id), device=model.device)
        with torch.no_grad(), tracing.record(model, names) as seen:
            model.module(input_ids=dummy, use_cache=False)
        with torch.no_grad():
            apart = [_distance(model, part, seen[stream_point(model, part)], seen[ends[id(part)]]) for part in parts]
        _READS[model] = max(apart) < (0.1 if torch.finfo(model.dtype).bits < 32 else 1e-3)
    return _READS[model]


def _distance(model: Model, part: Part, stream: Tensor, found: Tensor) -> float:
    """How far the first linear map of the normed stream is from what the model has there, as a share."""
    role = "attn.q" if part.kind == "head" else "mlp.gate" if model.gated else "mlp.in"
    matrix = model.anatomy.matrix(part.layer, role)
    expected = matrix.module(_norm(model, part)(stream))
    if matrix.runs is not None:
        expected = expected.index_select(-1, torch.tensor(matrix.runs.indices(), device=expected.device))
    flat = found.flatten().double()
    return float((expected.flatten().double() - flat).norm() / flat.norm())

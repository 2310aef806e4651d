"""Edge attribution patching (eap, eap_ig): which edge carries what tells the clean from the corrupt prompt.

What is scored: every edge u -> v of the model's graph (see `graph`), by the first-order estimate of how much the metric
of the clean run falls when v alone reads u's output of the corrupt run:

    score(u -> v) = mean over items, sum over positions of (a_u(clean) - a_u(corrupt)) . d metric / d in_v

a_u is what u adds to the residual stream, in_v is v's own copy of the stream before v's norm, and the gradient is the
whole one: through v and all that follows it. Higher = more important for the clean answer. Papers write the same number
as (a_u(corrupt) - a_u(clean)) . d M / d in_v with M = -metric, a loss to be lowered.

`eap` takes the gradient at the clean run (Syed et al. 2023, arXiv:2310.10348; Nanda 2023). `eap_ig` averages it over
runs whose input lies on the straight line from the corrupt to the clean one (Hanna et al. 2024, arXiv:2403.17806):
input = corrupt + s (clean - corrupt). For m steps, published code has two rules, and neither is symmetric:
endpoints="edge" takes s = 0, 1/m, ..., (m-1)/m (its edge scores; the corrupt end is in, the clean one is not),
"node" s = 1/m, ..., 1 (its node scores, and the sum in the paper as recalled). The default "midpoint" takes the middles
1/2m, 3/2m, ..., whose error falls with 1/m^2 in the place of 1/m; the evidence table says how large it is.

`Scores.values` hold the node formula: a node's output difference times the gradient at its own *output*. (One published
version multiplied an MLP's output difference with the gradient at its input; corrected since.) By the chain rule this
is the sum of the edges that leave the node, and the same as `scores.edges.nodes()` when the graph has heads and MLPs.

Evidence `completeness`: for each item the metric of the clean and of the corrupt run, and the score of the input, which
for integrated gradients with many steps is their difference. Position by position nothing is kept.

Memory: the difference of what every head and MLP adds is held as the heads' small vectors, before their output
projection, and expanded one layer at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import tracing
from locedit.data.encode import encode
from locedit.data.items import Dataset, Task
from locedit.edges import EdgeScores
from locedit.errors import LoceditError
from locedit.localize.integration.blocks import attention_of, weights_without_gradient
from locedit.localize.patching.graph import (
    Graph,
    Part,
    Unit,
    added,
    gradient_at_inputs,
    graph_of,
    input_points,
    output_point,
    stream_point,
)
from locedit.localize.patching.noise import corrupted
from locedit.localize.patching.pairs import Pair, PairBatch, PairOptions, batches_of, metric, pairs_of
from locedit.models import Model, TokenBatch
from locedit.progress import track
from locedit.scores import Scores, Table

Endpoints = Literal["midpoint", "edge", "node"]
INPUT = "blocks.0.hook_resid_pre"


@dataclass(frozen=True, kw_only=True)
class EapOptions(PairOptions):
    """Which nodes the graph has."""

    unit: Unit = "head+mlp"
    "nodes of the graph beside input and logits"


@dataclass(frozen=True, kw_only=True)
class EapIgOptions(EapOptions):
    """And where gradients are taken."""

    steps: int = 5
    "runs between the corrupt and the clean input that the gradient is averaged over"
    endpoints: Endpoints = "midpoint"
    "shares of the clean input: midpoint (k+1/2)/steps, edge k/steps, node (k+1)/steps, for k = 0 to steps-1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise LoceditError(f"steps={self.steps!r} must be at least 1")

    @property
    def shares(self) -> tuple[float, ...]:
        """How much of the clean input each run has, ascending."""
        return tuple((step + _FIRST[self.endpoints]) / self.steps for step in range(self.steps))


_FIRST = {"midpoint": 0.5, "edge": 0.0, "node": 1.0}


def eap(model: Model, task: Task, options: EapOptions) -> Scores:
    """Scores of heads and MLPs with those of the edges beside them; gradient at the clean run."""
    return _scored(model, task, options, shares=(1.0,), what="eap")


def eap_ig(model: Model, task: Task, options: EapIgOptions) -> Scores:
    """Scores of heads and MLPs with those of the edges beside them; gradient averaged from corrupt to clean input."""
    return _scored(model, task, options, shares=options.shares, what="eap_ig")


def memory(model: Model, items: Dataset, options: EapOptions) -> int:
    """Bytes beside the model that the largest batch takes."""
    longest = max(len(example.ids) for example in encode(model, items))
    return options.bytes(pair_bytes(model, longest, options.unit), len(items))


def pair_bytes(model: Model, length: int, unit: Unit) -> int:
    """What a pair of that many tokens takes: autograd's graph, two sets of outputs, and one layer's expanded copies."""
    size, exact = torch.finfo(model.dtype).bits // 8, max(4, torch.finfo(model.dtype).bits // 8)
    attention = 3 * model.n_heads * length if attention_of(model) == "eager" else 2 * model.n_heads * model.d_head
    layer = 14 * model.d_model + 6 * model.d_mlp + 4 * model.n_heads * model.d_head + attention
    outputs = 2 * (model.d_model + model.n_heads * model.d_head)
    inputs = 1 if unit == "mlp" else model.n_heads + 2 * model.n_kv_heads
    copies = (8 * inputs + 2 * model.n_heads) * model.d_model
    return length * (model.n_layers * (size * layer + exact * outputs) + exact * copies) + 16 * model.vocab_size


# --- over all items ---------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """What is added up over the items."""

    edges: Float[Tensor, "source destination"]
    nodes: Float[Tensor, " source"]
    rows: dict[str, tuple[float, float, float]] = field(default_factory=dict[str, tuple[float, float, float]])
    "item -> metric of the clean run, of the corrupt run, score of the input"


def _scored(model: Model, task: Task, options: EapOptions, *, shares: Sequence[float], what: str) -> Scores:
    graph = graph_of(model, options.unit)
    pairs = pairs_of(model, task, options)
    sums = _Sums(
        edges=torch.zeros(graph.exists.shape, dtype=torch.float64),
        nodes=torch.zeros(len(graph.sources), dtype=torch.float64),
    )
    size = options.rows(pair_bytes(model, max(len(pair.clean) for pair in pairs), options.unit))
    total = -(-len(pairs) // size)
    with weights_without_gradient(model.module):
        for batch in track(batches_of(pairs, size), what, total=total):
            _add(graph, batch, options, shares, sums)
    return _as_scores(graph, pairs, sums)


def _as_scores(graph: Graph, pairs: Sequence[Pair], sums: _Sums) -> Scores:
    fingerprint = graph.model.fingerprint
    edges = EdgeScores(
        sources=graph.sources,
        destinations=graph.destinations,
        ends=graph.exists.nonzero(),
        values=(sums.edges[graph.exists] / len(pairs)).float(),
        sites=graph.sites,
        fingerprint=fingerprint,
    )
    values = (sums.nodes / len(pairs)).float()
    return Scores(
        values={p.nodes[0][0]: values[p.where].clone() for p in graph.writers if p.kind != "input"},
        sites=graph.sites,
        examples=tuple(pair.id for pair in pairs),
        evidence={"completeness": _completeness(pairs, sums)},
        fingerprint=fingerprint,
        edges=edges,
    )


def _completeness(pairs: Sequence[Pair], sums: _Sums) -> Table:
    """The drop of the metric, and what the scores make of it."""
    found = [sums.rows[pair.id] for pair in pairs]
    return {
        "id": [pair.id for pair in pairs],
        "clean": [clean for clean, _, _ in found],
        "corrupt": [corrupt for _, corrupt, _ in found],
        "drop": [clean - corrupt for clean, corrupt, _ in found],
        "estimate": [estimate for _, _, estimate in found],
        "gap": [estimate - (clean - corrupt) for clean, corrupt, estimate in found],
    }


# --- one batch --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Ends:
    """The clean and the corrupt run of a batch."""

    difference: dict[str, Tensor]
    "at the output points of the writers: clean minus corrupt, at least float32"
    clean: Float[Tensor, "batch pos d_model"]
    "the residual stream before the first block"
    corrupt: Float[Tensor, "batch pos d_model"]
    metrics: tuple[list[float], list[float]]


def _add(graph: Graph, batch: PairBatch, options: PairOptions, shares: Sequence[float], sums: _Sums) -> None:
    """Add the scores of a batch: the mean over the shares, the sum over its items."""
    ends = _ends(graph, batch, options)
    inputs = torch.zeros(len(batch), dtype=torch.float64)
    for share in shares:
        stream = torch.lerp(ends.corrupt, ends.clean, share)
        values, gradients = _gradients(graph, batch, options, stream)
        for part in graph.writers:
            node = _node(part, ends.difference[output_point(part)], gradients[output_point(part)]) / len(shares)
            sums.nodes[part.where] += node.sum(0)
            inputs += node[:, 0] if part.kind == "input" else 0
        for reader in graph.readers:
            value = values[stream_point(graph.model, reader)]
            gradient = gradient_at_inputs(graph.model, reader, value, gradients)
            for writer in graph.writers:
                if writer.stage < reader.stage:
                    edges = _edges(graph.model, writer, ends.difference[output_point(writer)], gradient)
                    sums.edges[writer.where, reader.where] += edges / len(shares)
    for pair, *row in zip(batch.pairs, *ends.metrics, inputs.tolist(), strict=True):
        sums.rows[pair.id] = (row[0], row[1], row[2])


def _ends(graph: Graph, batch: PairBatch, options: PairOptions) -> _Ends:
    names = [output_point(part) for part in graph.writers]
    with torch.no_grad():
        with corrupted(graph.model, batch), tracing.record(graph.model, names) as corrupt:
            low = metric(graph.model.logits(batch.corrupt, at=batch.at), batch, options)
        with tracing.record(graph.model, names) as clean:
            high = metric(graph.model.logits(batch.clean, at=batch.at), batch, options)
        exact = torch.promote_types(graph.model.dtype, torch.float32)
        difference = {name: clean[name].to(exact) - corrupt[name].to(exact) for name in names}
    return _Ends(
        difference=difference, clean=clean[INPUT], corrupt=corrupt[INPUT], metrics=(high.tolist(), low.tolist())
    )


def _gradients(
    graph: Graph, batch: PairBatch, options: PairOptions, stream: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Residual streams and gradients of the metric at all outputs and inputs, with that stream before the blocks."""
    outputs = [output_point(part) for part in graph.writers if part.kind != "input"]
    inputs = [name for part in graph.readers for name in input_points(graph.model, part)]
    streams = [stream_point(graph.model, part) for part in graph.readers]
    start = stream.detach().requires_grad_()
    with (
        torch.enable_grad(),
        tracing.replace(graph.model, {INPUT: start}),
        tracing.record(graph.model, dict.fromkeys([*outputs, *inputs, *streams])) as seen,
    ):
        total = metric(_logits(graph.model, batch.clean, batch), batch, options).sum()
    wanted = dict.fromkeys([*outputs, *inputs])
    found = torch.autograd.grad(total, [start, *(seen[name] for name in wanted)])
    return {name: seen[name].detach() for name in streams}, dict(zip([INPUT, *wanted], found, strict=True))


def _logits(model: Model, tokens: TokenBatch, batch: PairBatch) -> Tensor:
    return model.logits(tokens, at=batch.at)


def _node(part: Part, difference: Tensor, gradient: Tensor) -> Float[Tensor, "batch node"]:
    """Difference times gradient at the output, summed over positions and widths."""
    product = (difference * gradient.to(difference)).double().cpu()
    return product.sum((1, 3)) if part.kind == "head" else product.sum((1, 2))[:, None]


def _edges(
    model: Model, writer: Part, difference: Tensor, gradient: Float[Tensor, "batch pos destination d_model"]
) -> Float[Tensor, "source destination"]:
    """What the writer adds, times the gradient at the readers' inputs, summed over items and positions."""
    written = added(model, writer, difference).to(gradient)
    return torch.einsum("bpsd,bpnd->sn", written, gradient).double().cpu()

"""Attribution patching: the first-order estimate of activation patching for all components at once.

What is scored, for each component: the sum over its positions and dimensions of (value in the other run - value in the
base run) times the gradient of the metric by the value in the base run (Nanda 2023; Syed et al. 2023,
arXiv:2310.10348, section 3). That estimates what `activation_patching` of the same direction measures, with the same
sign and normalisation: by default the base is the clean run, as in the code of Guo et al. 2024 (arXiv:2410.12949).
Positive = the component carries the answer, averaged over the items. Scores of a unit's parts add up, those of a
layer's heads to that of its attention and those of neurons to that of their MLP, where no norm follows what these put
out (Gemma 2 and 3 have one).

A batch takes one forward pass of the other run, and one forward and one backward pass of the base run. With `steps`
above 1 the gradient is the mean over runs whose input embeddings lie between the two, at the left ends of equal steps:
one forward and backward pass each.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import progress, tracing
from locedit.data.encode import encode
from locedit.data.items import Dataset, Task
from locedit.errors import LoceditError
from locedit.localize.integration.blocks import weights_without_gradient
from locedit.localize.passes import pass_bytes
from locedit.localize.patching.exact_patching import kept_numbers, row_bytes
from locedit.localize.patching.node_patching import Run, Side, run
from locedit.localize.patching.node_scores import NodeOptions, NodeScores, PositionTable
from locedit.localize.patching.nodes import KINDS, POINTS, sites_of_unit, where
from locedit.localize.patching.noise import corrupted
from locedit.localize.patching.pairs import PairBatch, batches_of, measured, pairs_of
from locedit.models import Model
from locedit.scores import Scores

ATTRIBUTION_UNITS = ("head+mlp", "head", "mlp", "attn", "neuron")


@dataclass(frozen=True, kw_only=True)
class AttributionPatchingOptions(NodeOptions):
    """Which run the gradient is of, and what is scored."""

    direction: Literal["noise", "denoise"] = "noise"
    "noise: gradient at the clean run, towards the corrupt one; denoise: at the corrupt run, towards the clean one"
    steps: int = 1
    "points between the runs' input embeddings at which the gradient is taken"
    batch: int = 16
    "items at a time, at most"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise LoceditError(f"steps={self.steps!r} must be at least 1")
        if self.unit not in ATTRIBUTION_UNITS:
            raise LoceditError(
                f"unit={self.unit!r}: attention and MLP of a layer patched together have no first-order score of their "
                f"own; choices: {', '.join(ATTRIBUTION_UNITS)}"
            )


def attribution_patching(model: Model, task: Task, options: AttributionPatchingOptions) -> Scores:
    """Scores of every component; the items and, on demand, every position as evidence."""
    pairs = pairs_of(model, task, options)
    scores = NodeScores(sites=sites_of_unit(model, options.unit), normalise=options.normalise)
    positions = PositionTable(normalise=options.normalise)
    size = options.rows(row_bytes(model, pairs, gradient=True))
    for batch in progress.track(list(batches_of(pairs, size)), "attribution patching"):
        found = attributions(model, batch, options)
        for row, pair in enumerate(batch.pairs):
            clean, corrupt = float(found.clean[row]), float(found.corrupt[row])
            scores.update(pair, found.effects[row], clean=clean, corrupt=corrupt)
            if options.positions == "each":
                here = {kind: table[row, :, : len(pair.clean)] for kind, table in found.positions.items()}
                positions.update(pair, here, total=clean - corrupt)
    evidence = {"positions": positions.table(scores)} if options.positions == "each" else {}
    return scores.finish(model, evidence=evidence)


@dataclass(frozen=True, kw_only=True, eq=False)
class Attributed:
    """The attributions of a batch, on the CPU."""

    clean: Float[Tensor, " batch"]
    corrupt: Float[Tensor, " batch"]
    "the metric"
    effects: Float[Tensor, "batch component"]
    positions: dict[str, Float[Tensor, "batch layer pos"]]
    "by kind; empty unless positions='each'"


def attributions(model: Model, batch: PairBatch, options: AttributionPatchingOptions) -> Attributed:
    """The attributions of all components for every item of a batch."""
    kinds = [*options.unit.split("+"), *(KINDS if options.positions == "each" else ())]
    names = dict.fromkeys(name for kind in kinds for name in POINTS[kind])
    points = [f"blocks.{layer}.{name}" for layer in range(model.n_layers) for name in names]
    sides: tuple[Side, Side] = ("clean", "corrupt") if options.direction == "noise" else ("corrupt", "clean")
    towards = run(
        model, batch, sides[1], [*points, *(["hook_embed"] if options.steps > 1 else [])], kind=options.metric
    )
    base, products = _products(model, batch, sides[0], towards, points, options)
    sign = -1 if options.direction == "noise" else 1
    at = where(batch, options.positions).to(model.device)
    effects: list[Tensor] = []
    for site in sites_of_unit(model, options.unit).values():
        product = products[f"blocks.{site.layer}.{POINTS[site.unit][0]}"]  # [batch, pos, component]
        effects.append((product * at[:, :, None]).sum(1))
    tables = {
        kind: torch.stack([products[f"blocks.{i}.{POINTS[kind][0]}"].sum(-1) for i in range(model.n_layers)], dim=1)
        for kind in (KINDS if options.positions == "each" else ())
    }
    metric = {sides[0]: base, sides[1]: towards.metric}
    return Attributed(
        clean=metric["clean"],
        corrupt=metric["corrupt"],
        effects=sign * torch.cat(effects, dim=1).cpu(),
        positions={kind: sign * table.cpu() for kind, table in tables.items()},
    )


def _products(
    model: Model, batch: PairBatch, side: Side, towards: Run, points: Sequence[str], options: AttributionPatchingOptions
) -> tuple[Float[Tensor, " batch"], dict[str, Float[Tensor, "batch pos _"]]]:
    """The base run's metric, and change times gradient by point and component, summed over dimensions."""
    metric: Tensor | None = None
    changes: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    start: Tensor | None = None
    for step in range(options.steps):
        move = None if start is None else start + step / options.steps * (towards.values["hook_embed"] - start)
        with weights_without_gradient(model.module), torch.enable_grad(), _from_embedding(model, batch, side, move):
            with tracing.record(model, [*points, "hook_embed"]) as values:
                logits = model.logits(getattr(batch, side), at=batch.at)
            here = measured(logits, batch.answer, batch.wrong, kind=options.metric)
            gradients = torch.autograd.grad(here.sum(), [values[point] for point in points])
        if metric is None:
            metric, start = here.detach().cpu(), values["hook_embed"].detach()
            changes = {point: towards.values.pop(point) - values[point].detach() for point in points}
        for point, gradient in zip(points, gradients, strict=True):
            product = _by_component(point, changes[point], gradient) / options.steps
            found[point] = product if step == 0 else found[point] + product
    assert metric is not None
    return metric, found


def _by_component(point: str, change: Tensor, gradient: Tensor) -> Float[Tensor, "batch pos _"]:
    """Neurons one by one, heads summed over their dimensions, whole vectors as one; in at least float32, because the
    product of two small numbers is 0 in half precision."""
    exact = torch.promote_types(change.dtype, torch.float32)
    product = change.to(exact) * gradient.to(exact)
    if point.endswith("hook_post"):
        return product
    return product.sum(-1) if point.endswith("hook_z") else product.sum(-1, keepdim=True)


@contextmanager
def _from_embedding(model: Model, batch: PairBatch, side: Side, move: Tensor | None) -> Generator[None]:
    """Begin the graph at the embeddings of a side, or at those given in their place."""
    with ExitStack() as stack:
        stack.enter_context(corrupted(model, batch) if side == "corrupt" and move is None else nullcontext())
        stack.enter_context(tracing.hooked(model, {"hook_embed": partial(_start, move)}))
        yield


def _start(move: Tensor | None, value: Tensor) -> Tensor:
    return (value if move is None else move.to(value)).detach().requires_grad_()


def memory(model: Model, items: Dataset, options: AttributionPatchingOptions) -> int:
    """Bytes of the rows of one pass with its gradient, and of the values of the other run and their changes."""
    examples = encode(model, items)
    kept = 4 * max(len(example.ids) for example in examples) * kept_numbers(model, options)
    rows = options.rows(pass_bytes(model, examples, gradient=True))
    return min(rows, len(examples)) * (pass_bytes(model, examples, gradient=True) + 3 * kept)

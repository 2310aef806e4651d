"""Edge scores one by one and slowly: the destination's own input is moved by a little of what the source adds."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from locedit import tracing
from locedit.data.items import Dataset, PatchPair, Task
from locedit.localize.patching.pairs import PairOptions, batch_of, metric, pairs_of
from locedit.models import Model

ITEMS = (
    PatchPair(clean="Anna Berg was born in", corrupt="Anna Dane was born in", answer=" Oslo", wrong=" Lima", id="a"),
    PatchPair(
        clean="The phone number of Eva Berg is",
        corrupt="The phone number of Eva Dane is",
        answer=" 555",
        wrong=" eva",
        id="b",
    ),
)
STEP = 1e-4


def task(*items: PatchPair) -> Task:
    return Task(forget=Dataset(items=items or ITEMS, source="pairs.jsonl"))


def slow_edges(model: Model, item: PatchPair, *, share: float = 1.0) -> dict[tuple[str, int, str, int], float]:
    """The score of every edge for one item, by central differences of the metric in float64.

    `share` says how much of the clean input is in the input of the run that is moved.
    """
    batch = batch_of(pairs_of(model, task(item), PairOptions()))
    clean, start = _outputs(model, batch.clean.ids)
    corrupt, other = _outputs(model, batch.corrupt.ids)
    moves = {source: corrupt[source] - clean[source] for source in clean}
    stream = other + share * (start - other)
    sources = list(moves)
    width = len(sources)

    def measured(change: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
        """The metric of as many copies of the item as there are sources."""
        rows = batch_of([*batch.pairs] * width)
        start_there = tracing.replace(model, {"blocks.0.hook_resid_pre": stream})
        with torch.no_grad(), start_there, tracing.hooked(model, change):
            return metric(model.logits(rows.clean, at=rows.at), rows, PairOptions())

    found: dict[tuple[str, int, str, int], float] = {}
    for destination, stage, make in _destinations(model):
        ends = [measured(make(sign * STEP * torch.cat([moves[s] for s in sources]))) for sign in (1, -1)]
        slopes = (ends[0] - ends[1]) / (2 * STEP)
        for source, slope in zip(sources, slopes.tolist(), strict=True):
            if _stage(model, source[0]) < stage:
                found[(*source, *destination)] = -slope
    return found


def _stage(model: Model, place: str) -> int:
    if place == "input":
        return -1
    _, layer, kind = place.split(".", 2)
    return 2 * int(layer) + (kind == "mlp" and not model.parallel)


def _outputs(model: Model, ids: Tensor) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
    """What every source adds, `[1, pos, d_model]`, and the input of the first block."""
    names = [f"blocks.{i}.{name}" for i in range(model.n_layers) for name in ("attn.hook_z", "hook_mlp_out")]
    with torch.no_grad(), tracing.record(model, ["blocks.0.hook_resid_pre", *names]) as seen:
        model.module(input_ids=ids, use_cache=False)
    found = {("input", 0): seen["blocks.0.hook_resid_pre"]}
    with torch.no_grad():
        for layer in range(model.n_layers):
            z = seen[f"blocks.{layer}.attn.hook_z"]
            for head in range(model.n_heads):
                alone = torch.zeros_like(z)
                alone[:, :, head] = z[:, :, head]
                found[f"blocks.{layer}.attn.head", head] = model.linear(layer, "attn.o").forward(alone.flatten(2))
            found[f"blocks.{layer}.mlp", 0] = seen[f"blocks.{layer}.hook_mlp_out"]
    return found, seen["blocks.0.hook_resid_pre"]


Changes = dict[str, Callable[[Tensor], Tensor]]
Make = Callable[[Tensor], Changes]


def _destinations(model: Model) -> list[tuple[tuple[str, int], int, Make]]:
    """Every destination, the stage it reads at, and what moves its own input alone."""
    found: list[tuple[tuple[str, int], int, Make]] = []
    for layer in range(model.n_layers):
        for letter in "qkv":
            for head in range(model.anatomy.matrix(layer, f"attn.{letter}").n_out // model.d_head):
                node = (f"blocks.{layer}.attn.{letter}", head)
                found.append((node, 2 * layer, partial(_moved_head, model, layer, letter, head)))
        found.append(
            ((f"blocks.{layer}.mlp", 0), _stage(model, f"blocks.{layer}.mlp"), partial(_moved_mlp, model, layer))
        )
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    found.append((("logits", 0), 2 * model.n_layers, lambda move: {last: lambda value: value + move}))
    return found


def _moved_head(
    model: Model, layer: int, letter: str, head: int, move: Tensor
) -> dict[str, Callable[[Tensor], Tensor]]:
    seen: dict[str, Tensor] = {}

    def swap(value: Tensor) -> Tensor:
        fresh = _projected(model, layer, f"attn.{letter}", "ln1", seen["stream"] + move).unflatten(
            -1, (-1, model.d_head)
        )
        return torch.cat([value[:, :, :head], fresh[:, :, head : head + 1], value[:, :, head + 1 :]], dim=2)

    return {f"blocks.{layer}.hook_resid_pre": partial(_seen, seen), f"blocks.{layer}.attn.hook_{letter}": swap}


def _moved_mlp(model: Model, layer: int, move: Tensor) -> Changes:
    seen: dict[str, Tensor] = {}
    norm = "ln2" if model.anatomy.has(f"blocks.{layer}.ln2") else "ln1"
    roles = {"mlp.hook_pre": "mlp.gate", "mlp.hook_pre_linear": "mlp.in"} if model.gated else {"mlp.hook_pre": "mlp.in"}
    stream = f"blocks.{layer}.hook_resid_{'pre' if model.parallel else 'mid'}"
    changes: dict[str, Callable[[Tensor], Tensor]] = {stream: partial(_seen, seen)}
    for point, role in roles.items():
        changes[f"blocks.{layer}.{point}"] = lambda _, role=role: _projected(
            model, layer, role, norm, seen["stream"] + move
        )
    return changes


def _seen(seen: dict[str, Tensor], value: Tensor) -> Tensor:
    seen["stream"] = value
    return value


def _projected(model: Model, layer: int, role: str, norm: str, stream: Tensor) -> Tensor:
    """A role's output from a residual stream; `forward` goes past the hooks."""
    matrix = model.anatomy.matrix(layer, role)
    made = matrix.module.forward(model.anatomy.module(f"blocks.{layer}.{norm}").forward(stream))
    return made if matrix.runs is None else made[..., list(matrix.runs.indices())]

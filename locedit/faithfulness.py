"""How well circuits of the best components carry what is measured, with all others ablated.

For each share k of the components, the circuit is the best floor(k n) of the n that have scores; the rest are ablated
in the clean run: *patch* gives each the value it has in the item's corrupt run, at every position, *mean* its mean over
the tokens of all clean prompts, *zero* nothing. What no score stands for (the input, and with scores of heads only the
MLPs) is never ablated. With M the metric, averaged over the items,

    f(k) = (M(circuit of k) - M(nothing)) / (M(everything) - M(nothing))

so that f is 0 for the empty circuit and exactly 1 for the full one. CPR is the area under f over the shares 0.1 % to
100 % (trapezoids, a linear axis; more is better, a circuit may pass 1), CMD the area of |1 - f| (0 is best). These are
the metrics of the MIB circuit track (Mueller et al. 2025, arXiv:2504.13151) at the level of nodes; there, M(nothing)
is the corrupt run itself, which differs from ours only where the prompts differ at the measured position. A circuit
whose f is 1 everywhere has CPR 0.999, because the axis begins at 0.1 %. Which values are put in the place of what is
left out changes these numbers a lot, so say it with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from locedit import tracing
from locedit.data.items import Task
from locedit.errors import LoceditError
from locedit.localize.patching.noise import corrupted
from locedit.localize.patching.pairs import PairBatch, PairOptions, batches_of, metric, pairs_of
from locedit.models import Model
from locedit.progress import track
from locedit.scores import Scores, Table

Ablation = Literal["patch", "mean", "zero"]
Rank = Literal["score", "size"]
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_POINTS = {"head": "attn.hook_z", "mlp": "hook_mlp_out", "neuron": "mlp.hook_post"}


@dataclass(frozen=True, kw_only=True)
class FaithfulnessOptions(PairOptions):
    """What is measured on which circuits."""

    ablation: Ablation = "patch"
    "what takes the place of what is left out: its value in the corrupt run, its mean over clean tokens, or zero"
    rank: Rank = "score"
    "the best are those with the highest score, or with the largest size of it"
    shares: tuple[float, ...] = SHARES
    "shares of the components, ascending, the last one 1"

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = self.shares
        if (
            not shares
            or shares[-1] != 1
            or shares[0] < 0
            or any(a >= b for a, b in zip(shares, shares[1:], strict=False))
        ):
            raise LoceditError(f"shares={shares!r} must ascend from 0 or more to 1")


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """The faithfulness curve of one ranking."""

    shares: tuple[float, ...]
    counts: tuple[int, ...]
    "components in each circuit"
    metrics: tuple[float, ...]
    "M of each circuit, averaged over the items"
    everything: float
    "M of the model as it is"
    nothing: float
    "M with every scored component ablated"
    ablation: Ablation
    rank: Rank
    items: int

    @property
    def values(self) -> tuple[float, ...]:
        """f of each circuit."""
        return tuple((value - self.nothing) / (self.everything - self.nothing) for value in self.metrics)

    @property
    def cpr(self) -> float:
        """Area under f."""
        return area(self.shares, self.values)

    @property
    def cmd(self) -> float:
        """Area of |1 - f|."""
        return area(self.shares, [abs(1 - value) for value in self.values])

    def table(self) -> Table:
        """One row a circuit."""
        return {
            "share": list(self.shares),
            "components": list(self.counts),
            "metric": list(self.metrics),
            "faithfulness": list(self.values),
        }

    def __str__(self) -> str:
        return (
            f"CPR {self.cpr:.3f}, CMD {self.cmd:.3f} over {self.items} items (ablation {self.ablation}, rank by "
            f"{self.rank}); metric {self.everything:.3g} with everything, {self.nothing:.3g} with nothing"
        )


def area(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Area under a line through points, by trapezoids.

    >>> area((0.0, 0.5, 1.0), (0.0, 1.0, 1.0))
    0.75
    """
    points = list(zip(xs, ys, strict=True))
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(points, points[1:], strict=False))


def faithfulness(model: Model, task: Task, scores: Scores, options: FaithfulnessOptions) -> Faithfulness:
    """The faithfulness of circuits by those scores (of heads, MLPs or neurons) on the pairs or facts of the task."""
    sites = _sites(scores)
    pairs = pairs_of(model, task, options)
    size = options.rows(_row_bytes(model, max(len(pair.clean) for pair in pairs)))
    means = _means(model, sites, list(batches_of(pairs, size))) if options.ablation == "mean" else {}
    order = _order(scores, options.rank)
    counts = tuple(int(share * len(order) + 1e-9) for share in options.shares)
    circuits = {count: _members(scores, order[:count]) for count in {0, *counts}}
    totals = dict.fromkeys([*circuits, -1], 0.0)
    for batch in track(batches_of(pairs, size), "faithfulness", total=-(-len(pairs) // size)):
        left = _left(model, sites, batch, means, options.ablation)
        totals[-1] += _measured(model, batch, {}, options)
        for count, members in circuits.items():
            totals[count] += _measured(model, batch, _changes(sites, members, left), options)
    found = {count: total / len(pairs) for count, total in totals.items()}
    if found[-1] == found[0]:
        raise LoceditError(
            f"the metric is {found[0]:.4g} with everything and with nothing: no circuit can be judged by it"
        )
    return Faithfulness(
        shares=options.shares,
        counts=counts,
        metrics=tuple(found[count] for count in counts),
        everything=found[-1],
        nothing=found[0],
        ablation=options.ablation,
        rank=options.rank,
        items=len(pairs),
    )


def _row_bytes(model: Model, length: int) -> int:
    """Values at all points of the layers, and what one layer and the logits need beside them."""
    size = torch.finfo(model.dtype).bits // 8
    kept = (model.n_layers + 2) * (model.n_heads * model.d_head + model.d_model + model.d_mlp)
    return length * size * (kept + 8 * model.d_model) + 16 * model.vocab_size


def _sites(scores: Scores) -> dict[str, str]:
    """Site -> the point where its components' values are."""
    points: dict[str, str] = {}
    for name in scores.values:
        site = scores.sites[name]
        if site.unit not in _POINTS or site.layer is None:
            raise LoceditError(f"a circuit is of heads, MLPs or neurons; these scores are of {name}")
        points[name] = f"blocks.{site.layer}.{_POINTS[site.unit]}"
    return points


def _order(scores: Scores, rank: Rank) -> list[tuple[str, int]]:
    """All components, best first, ties in the order of the sites."""
    places = [(name, number) for name, tensor in scores.values.items() for number in range(tensor.numel())]
    flat = torch.cat([tensor.flatten().double() for tensor in scores.values.values()])
    order = torch.argsort(flat.abs() if rank == "size" else flat, descending=True, stable=True)
    return [places[i] for i in order.tolist()]


def _members(scores: Scores, chosen: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
    """Site -> which of its components are in the circuit, bool `[count]`."""
    members = {name: torch.zeros(tensor.numel(), dtype=torch.bool) for name, tensor in scores.values.items()}
    for name, number in chosen:
        members[name][number] = True
    return members


def _changes(sites: dict[str, str], members: dict[str, Tensor], left: dict[str, Tensor]) -> dict[str, tracing.Change]:
    """Point -> what keeps the members and ablates the rest; points that keep everything are left alone."""
    return {
        point: partial(_keep, members[name], left[point])
        for name, point in sites.items()
        if not bool(members[name].all())
    }


def _keep(members: Tensor, left: Tensor, value: Tensor) -> Tensor:
    kept = members.to(value.device)
    return torch.where(kept[:, None] if value.ndim == 4 else kept, value, left.to(value))  # 4: split into heads


def _measured(model: Model, batch: PairBatch, changes: dict[str, tracing.Change], options: PairOptions) -> float:
    with torch.no_grad(), tracing.hooked(model, changes):
        return float(metric(model.logits(batch.clean, at=batch.at), batch, options).double().sum())


def _left(
    model: Model, sites: dict[str, str], batch: PairBatch, means: dict[str, Tensor], ablation: Ablation
) -> dict[str, Tensor]:
    """What takes the place of the values at each point."""
    if ablation == "mean":
        return means
    if ablation == "zero":
        return dict.fromkeys(sites.values(), torch.zeros(()))
    with torch.no_grad(), corrupted(model, batch), tracing.record(model, dict.fromkeys(sites.values())) as seen:
        model.logits(batch.corrupt, at=batch.at)
    return dict(seen)


def _means(model: Model, sites: dict[str, str], batches: Sequence[PairBatch]) -> dict[str, Tensor]:
    """The mean value at each point over the tokens of all clean prompts."""
    totals: dict[str, Tensor] = {}
    count = 0
    for batch in batches:
        inside = batch.clean.attention_mask.bool()
        count += int(inside.sum())
        with torch.no_grad(), tracing.record(model, dict.fromkeys(sites.values())) as seen:
            model.logits(batch.clean, at=batch.at)
        for point, value in seen.items():
            total = value[inside.to(value.device)].double().sum(0)
            totals[point] = totals[point] + total if point in totals else total
    return {point: total / count for point, total in totals.items()}

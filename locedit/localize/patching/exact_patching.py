"""Exact patching of every component of a unit, item by item, with its null control: what tracing and patching share.

Null control: the same patches with a change of the same length in a random direction at every position. What is
special about a component's value scores above that; where nothing depends on what was corrupted, both are exactly 0.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locedit import progress
from locedit.components import unit_of
from locedit.data.encode import Example, Span, encode
from locedit.data.items import Dataset, Task
from locedit.errors import LoceditError
from locedit.localize.passes import pass_bytes
from locedit.localize.patching.node_patching import Run, Side, effects, run
from locedit.localize.patching.node_scores import NodeOptions, NodeScores, PositionTable
from locedit.localize.patching.nodes import (
    KINDS,
    POINTS,
    Patch,
    check_window,
    patches_of,
    places,
    points_of,
    sites_of_unit,
    where,
    window_of,
)
from locedit.localize.patching.noise import hashed
from locedit.localize.patching.pairs import Pair, PairBatch, batches_of, pairs_of
from locedit.models import Model
from locedit.scores import Scores, Table

NOISE_DRAWS = 8


@dataclass(frozen=True, kw_only=True)
class ExactOptions(NodeOptions):
    """How often, how wide, and against what."""

    draws: int | None = None
    "corruptions of each item, averaged: draws of the noise, or swap partners; None = 8 for noise, else 1"
    window: int = 1
    "layers patched together, for unit mlp or attn and in the table of positions (Meng et al. 2022 take 10)"
    null: bool = True
    "also patch changes of the same length in random directions (evidence `null`); doubles the time"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window, self.unit)
        if self.draws is not None and self.draws < 1:
            raise LoceditError(f"draws={self.draws!r} must be at least 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """One corruption of one item; all on the CPU."""

    clean: float
    corrupt: float
    effects: Float[Tensor, " component"]
    null: Float[Tensor, " component"] | None
    positions: dict[str, Float[Tensor, "layer pos"]]
    "by kind; empty unless positions='each'"


def exact(model: Model, task: Task, options: ExactOptions, *, base: Side, what: str) -> Scores:
    """Scores of every component, from patching the base side with values of the other."""
    if options.window > model.n_layers:
        raise LoceditError(f"window={options.window!r} is more than the {model.n_layers} layers there are")
    pairs = corruptions(model, task, options)
    found = _Found(model, options)
    patches = patches_of(model, options.unit, window=options.window)
    waiting: dict[str, list[Measured]] = {}
    draws = len(pairs) // len({pair.id for pair in pairs})
    together = max(1, options.rows(row_bytes(model, pairs)) // (len(patches) + 1))
    for number, batch in enumerate(batches_of(pairs, together)):
        progress.report(what, number * together, len(pairs))
        for pair, one in zip(batch.pairs, _measure(model, batch, patches, options, base), strict=True):
            waiting.setdefault(pair.id, []).append(one)
            if len(waiting[pair.id]) == draws:
                found.update(pair, _mean(waiting.pop(pair.id)))
    progress.report(what, len(pairs), len(pairs))
    return found.finish(model)


def corruptions(model: Model, task: Task, options: ExactOptions) -> list[Pair]:
    """Every item with each of its corruptions, side by side."""
    first = pairs_of(model, task, options)
    noisy = first[0].noise is not None
    draws = options.draws or (NOISE_DRAWS if noisy else 1)
    if draws > 1 and not noisy and first[0].partner is None:
        raise LoceditError(f"draws={draws!r}: given pairs have one corrupt prompt each; draws are for swap and noise")
    if noisy:
        by_draw = [[_redrawn(pair, number) for pair in first] for number in range(draws)]
    else:
        others = (dataclasses.replace(options, seed=options.seed + number) for number in range(1, draws))
        by_draw = [first, *(pairs_of(model, task, other) for other in others)]
    return [pair for several in zip(*by_draw, strict=True) for pair in several]


def _redrawn(pair: Pair, number: int) -> Pair:
    assert pair.noise is not None
    return dataclasses.replace(pair, noise=pair.noise.redrawn(number))


def _mean(several: Sequence[Measured]) -> Measured:
    """The mean over the corruptions of an item."""
    count = len(several)
    nulls = [one.null for one in several if one.null is not None]
    return Measured(
        clean=sum(one.clean for one in several) / count,
        corrupt=sum(one.corrupt for one in several) / count,
        effects=torch.stack([one.effects for one in several]).mean(0),
        null=torch.stack(nulls).mean(0) if nulls else None,
        positions={
            kind: torch.stack([one.positions[kind] for one in several]).mean(0) for kind in several[0].positions
        },
    )


# --- measuring a batch ------------------------------------------------------------------------------------------------


def _measure(
    model: Model, batch: PairBatch, patches: Sequence[Patch], options: ExactOptions, base: Side
) -> Iterator[Measured]:
    """Every corruption of a batch."""
    each = _position_patches(model, options) if options.positions == "each" else {}
    points = points_of([*patches, *(patch for several in each.values() for patch in several)])
    clean, corrupt = (run(model, batch, side, points, kind=options.metric) for side in ("clean", "corrupt"))
    here, source = (clean, corrupt) if base == "clean" else (corrupt, clean)
    sign = 1 if base == "corrupt" else -1
    rows = options.rows(row_bytes(model, batch.pairs))
    effect = partial(effects, model, batch, base, kind=options.metric, rows=rows)
    at = where(batch, options.positions)
    everywhere = at[:, None].expand(-1, len(patches), -1)
    scores = sign * effect(patches, source.values, everywhere)
    null = None
    if options.null:
        null = sign * effect(patches, random_directions(batch, here, source, seed=options.seed), everywhere)
    tables = {
        kind: sign * _by_position(several, at, partial(effect, values=source.values)) for kind, several in each.items()
    }
    for row, pair in enumerate(batch.pairs):
        yield Measured(
            clean=float(clean.metric[row]),
            corrupt=float(corrupt.metric[row]),
            effects=scores[row],
            null=None if null is None else null[row],
            positions={kind: table[row, :, : len(pair.clean)] for kind, table in tables.items()},
        )


def _position_patches(model: Model, options: ExactOptions) -> dict[str, list[Patch]]:
    """For each kind one patch a layer."""
    width = {kind: 1 if kind == "resid" else options.window for kind in KINDS}
    return {
        kind: [Patch(places=places(kind, window_of(model, layer, width[kind]))) for layer in range(model.n_layers)]
        for kind in KINDS
    }


def _by_position(
    patches: Sequence[Patch], at: Bool[Tensor, "batch pos"], effect: Callable[..., Tensor]
) -> Float[Tensor, "batch layer pos"]:
    """The effect of each patch at each single position; 0 outside of `at`."""
    length = at.shape[1]
    single = torch.eye(length, dtype=torch.bool) & at[:, None]  # [batch, chosen pos, pos]
    repeated = [patch for patch in patches for _ in range(length)]
    found = effect(repeated, where=single.repeat(1, len(patches), 1))
    return found.unflatten(1, (len(patches), length))


def random_directions(batch: PairBatch, base: Run, source: Run, *, seed: int) -> dict[str, Tensor]:
    """Values that differ from the base run's by as much as the source's do, in random directions.

    By the length of the vector of every position (and head); for neurons, which are single numbers, by a random sign.
    What is drawn depends on the item and the point alone.
    """
    return {
        point: value + _turned(batch, source.values[point] - value, point=point, seed=seed)
        for point, value in base.values.items()
    }


def _turned(batch: PairBatch, change: Tensor, *, point: str, seed: int) -> Tensor:
    """Changes of the same lengths in random directions, `[batch, pos, ...]`."""
    if point.endswith("hook_post"):
        change = change[..., None]
    drawn = torch.zeros(change.shape)
    for row, pair in enumerate(batch.pairs):
        generator = torch.Generator().manual_seed(hashed(f"{seed}/{pair.id}/{pair.noise and pair.noise.seed}/{point}"))
        drawn[row, : len(pair.clean)] = torch.randn(len(pair.clean), *change.shape[2:], generator=generator)
    drawn = drawn.to(change)
    turned = drawn / drawn.norm(dim=-1, keepdim=True).clamp(min=1e-30) * change.norm(dim=-1, keepdim=True)
    return turned[..., 0] if point.endswith("hook_post") else turned


# --- what is found ----------------------------------------------------------------------------------------------------


class _Found:
    """The scores, the null scores and the table of positions, as items come in."""

    def __init__(self, model: Model, options: ExactOptions) -> None:
        sites = sites_of_unit(model, options.unit)
        self.scores = NodeScores(sites=sites, normalise=options.normalise)
        self.null = NodeScores(sites=sites, normalise=options.normalise) if options.null else None
        self.positions = PositionTable(normalise=options.normalise) if options.positions == "each" else None

    def update(self, pair: Pair, one: Measured) -> None:
        self.scores.update(pair, one.effects, clean=one.clean, corrupt=one.corrupt)
        if self.null is not None:
            assert one.null is not None
            self.null.update(pair, one.null, clean=one.clean, corrupt=one.corrupt)
        if self.positions is not None:
            self.positions.update(pair, one.positions, total=one.clean - one.corrupt)

    def finish(self, model: Model) -> Scores:
        values, evidence = self.scores.values(), dict[str, Table]()
        if self.null is not None:
            evidence["null"] = _null_table(values, self.null.values())
        if self.positions is not None:
            evidence["positions"] = self.positions.table(self.scores)
        return self.scores.finish(model, evidence=evidence)


def _null_table(values: dict[str, Tensor], null: dict[str, Tensor]) -> Table:
    """By site: mean and largest size of the null scores, and how many components stand out.

    `above` counts the components of the site whose score is above the size of every null score of their unit.
    """
    largest = {site: float(scores.abs().max()) for site, scores in null.items()}
    of_unit: dict[str, float] = {}
    for site, size in largest.items():
        of_unit[unit_of(site)] = max(size, of_unit.get(unit_of(site), 0.0))
    return {
        "site": list(null),
        "components": [len(scores) for scores in null.values()],
        "mean": [float(scores.mean()) for scores in null.values()],
        "largest": list(largest.values()),
        "above": [int((values[site] > of_unit[unit_of(site)]).sum()) for site in null],
    }


# --- memory -----------------------------------------------------------------------------------------------------------


def row_bytes(model: Model, pairs: Sequence[Pair], *, gradient: bool = False) -> int:
    """What a row of the longest pair takes."""
    longest = max(pairs, key=lambda pair: len(pair.clean))
    span = Span(start=longest.at, end=longest.at + 1, label="answer")
    return pass_bytes(model, [Example(id="", ids=longest.clean, spans=(span,), kind="patch")], gradient=gradient)


def memory(model: Model, items: Dataset, options: ExactOptions) -> int:
    """Bytes of the rows of one pass, and of the values of an item's runs that patches are taken from."""
    examples = encode(model, items)
    row = pass_bytes(model, examples, gradient=False)
    rows = options.rows(row)
    together = max(1, rows // (1 + len(patches_of(model, options.unit))))
    kept = max(len(example.ids) for example in examples) * kept_numbers(model, options)
    return rows * row + together * kept * 4 * (3 if options.null else 2)


def kept_numbers(model: Model, options: NodeOptions) -> int:
    """How many numbers are kept at a position of a run."""
    widths = {
        "attn.hook_z": model.n_heads * model.d_head,
        "mlp.hook_post": model.d_mlp if options.unit == "neuron" else 0,
    }
    kinds = [*options.unit.split("+"), *(KINDS if options.positions == "each" else ())]
    points = dict.fromkeys(point for kind in kinds for point in POINTS[kind])
    return model.n_layers * sum(widths.get(point, model.d_model) for point in points)

"""Edits without training at a matched forget level: the first dose on the curve of components that reaches it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from locedit.components import ComponentSet
from locedit.controls import Ablation, Component, Row, doses, found_order, places_of
from locedit.edit.edit import Edit
from locedit.scores import Scores

FINE = 32
"the dose is found to within this part of itself"


@dataclass(frozen=True, kw_only=True)
class Matched:
    """An edit at its dose."""

    edit: Edit
    rows: list[Row]
    "the curve: dose and levels, in the order of the doses"
    reached: bool


def to_level(ablation: Ablation, order: Sequence[Component], *, size: int, level: float) -> Matched:
    """Ablate the first components of `order`, few at first, until the forget level is reached; then the fewest that do.

    `size` is the size of the set, around which the doses are laid out; they go on to the end of `order`. Where the
    level is not reached, the edit is the dose with the lowest level.
    """
    rows: dict[int, Row] = {0: ablation.row([])}
    for dose in doses(size, len(order)):
        rows[dose] = ablation.row(order[:dose])
        if rows[dose]["forget"] <= level:
            break
    found = next((dose for dose, row in rows.items() if row["forget"] <= level), None)
    if found is not None:
        found = _fewest(ablation, order, rows, found, level=level)
    chosen = found if found is not None else min((d for d in rows if d), key=lambda dose: rows[dose]["forget"])
    ordered = [rows[dose] for dose in sorted(rows)]
    return Matched(edit=ablation.edit(order[:chosen]), rows=ordered, reached=found is not None)


def _fewest(ablation: Ablation, order: Sequence[Component], rows: dict[int, Row], high: int, *, level: float) -> int:
    """Halve the gap between a dose that reaches the level and the one before it that does not."""
    low = max((dose for dose in rows if dose < high), default=0)
    while high - low > max(1, high // FINE):
        middle = (low + high) // 2
        rows[middle] = ablation.row(order[:middle])
        if rows[middle]["forget"] <= level:
            high = middle
        else:
            low = middle
    return high


def order_of(within: ComponentSet, *, scores: Scores | None, beyond: bool, seed: int) -> list[Component]:
    """The components of a set in the order in which they are ablated.

    With scores best first, then the other scored ones; without them in random order, `beyond` the set the rest of its
    universe in random order.
    """
    if scores is not None:
        return found_order(within, scores)
    generator = torch.Generator().manual_seed(seed)
    own = _shuffled(places_of(within.sites, within.indices), generator)
    if not beyond:
        return own
    inside = set(own)
    rest = [p for p in places_of(within.sites, lambda site: range(within.sites[site].count)) if p not in inside]
    return own + _shuffled(rest, generator)


def _shuffled(places: Sequence[Component], generator: torch.Generator) -> list[Component]:
    return [places[at] for at in torch.randperm(len(places), generator=generator).tolist()]

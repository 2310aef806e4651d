"""From effects of patches on single items to Scores: what is averaged, and what an effect is a share of.

An item's *total* is its metric in the clean run minus that in the corrupt run; an *effect* is how much of it a patch
gives back (or, when the clean run is patched, takes away), so positive = the component carries the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.components import Site
from locedit.errors import LoceditError
from locedit.localize.aggregate import KEPT
from locedit.localize.patching.nodes import GROUPS, NodeUnit, Positions, groups_of
from locedit.localize.patching.pairs import Pair, PairOptions
from locedit.models import Model
from locedit.scores import Scores, Sparse, Table

Normalise = Literal["ratio", "item", "none"]
SMALLEST_TOTAL = 1e-6


@dataclass(frozen=True, kw_only=True)
class NodeOptions(PairOptions):
    """What is scored, where, and as a share of what."""

    unit: NodeUnit = "head+mlp"
    "head+mlp: heads and MLPs together, so that they compete; layer: attention and MLP of a block patched together"
    positions: Positions = "all"
    """where components are patched: all positions, those of the subject, the one that predicts the answer; each: all
    for the scores, and in the evidence `positions` every layer's MLP, attention and stream position by position"""
    normalise: Normalise = "ratio"
    """ratio: mean effect over mean total; item: mean of each item's effect over its total, which items with a small
    total dominate (code of Guo et al. 2024); none: mean effect in units of the metric"""
    batch: int = 64
    "rows at a time, at most; exact patching has a row for each item and component"


@dataclass(eq=False)
class NodeScores:
    """Takes the effects of one item after the other."""

    sites: Mapping[str, Site]
    normalise: Normalise
    items: dict[str, tuple[float, float, str | None]] = field(
        default_factory=dict[str, tuple[float, float, str | None]]
    )
    "id -> metric in the clean run, in the corrupt run, the swap partner"
    total: Tensor | None = None
    kept: list[tuple[int, Tensor, Tensor]] = field(default_factory=list[tuple[int, Tensor, Tensor]])

    def update(self, pair: Pair, effects: Float[Tensor, " component"], *, clean: float, corrupt: float) -> None:
        """Add an item, its effects for all components of all sites one after the other."""
        if not bool(effects.isfinite().all()):
            raise LoceditError(f"item {pair.id!r}: its effects are not finite; are there NaN weights or an overflow?")
        share = effects.double()
        if self.normalise == "item":
            share = share / _nonzero(clean - corrupt, f"item {pair.id!r}: the metric is")
        self.total = share if self.total is None else self.total + share
        index = len(self.items)
        self.items[pair.id] = (clean, corrupt, pair.partner)
        largest = float(share.max())
        if largest > 0:
            component = (share >= KEPT * largest).nonzero().flatten()
            self.kept.append((index, component, share[component]))

    @property
    def means(self) -> tuple[float, float]:
        """The metric in the clean and in the corrupt run, mean over the items."""
        clean, corrupt, _ = zip(*self.items.values(), strict=True)
        return sum(clean) / len(clean), sum(corrupt) / len(corrupt)

    @property
    def unit_of_score(self) -> float:
        """What a mean effect of score 1 is in units of the metric."""
        if self.normalise != "ratio":
            return 1.0
        clean, corrupt = self.means
        if clean < corrupt - SMALLEST_TOTAL:
            raise LoceditError(
                f"the metric is higher in the corrupt runs ({corrupt:.4g} on average) than in the clean ones "
                f"({clean:.4g}): does the model know these items? normalise='none' gives the raw effects"
            )
        return _nonzero(clean - corrupt, "the metric is on average")

    def values(self) -> dict[str, Tensor]:
        """The scores by site."""
        assert self.total is not None, "no item was added"
        means = (self.total / len(self.items) / self.unit_of_score).float()
        return dict(zip(self.sites, means.split(self._counts()), strict=True))

    def finish(self, model: Model, *, evidence: dict[str, Table]) -> Scores:
        """Means over the items; what each pair measures is among the evidence."""
        clean, corrupt, partner = (list(column) for column in zip(*self.items.values(), strict=True))
        pairs: Table = {"id": list(self.items), "clean": clean, "corrupt": corrupt, "partner": partner}
        return Scores(
            values=self.values(),
            sites=dict(self.sites),
            examples=tuple(self.items),
            sparse=self._sparse(),
            evidence={"pairs": pairs, **evidence},
            fingerprint=model.fingerprint,
        )

    def _counts(self) -> list[int]:
        return [site.count for site in self.sites.values()]

    def _sparse(self) -> dict[str, Sparse]:
        unit = self.unit_of_score
        entries = [
            (torch.full_like(component, index), component, share / unit) for index, component, share in self.kept
        ]
        example, component, score = (torch.cat(parts) for parts in zip(*(entries or [_EMPTY]), strict=True))
        found: dict[str, Sparse] = {}
        start = 0
        for name, count in zip(self.sites, self._counts(), strict=True):
            here = (component >= start) & (component < start + count)
            found[name] = (example[here], component[here] - start, score[here].float())
            start += count
        return found


_EMPTY = (torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0))


def _nonzero(total: float, what: str) -> float:
    if abs(total) < SMALLEST_TOTAL:
        raise LoceditError(
            f"{what} the same in the clean and the corrupt run (difference {total:.2g}), no total to divide by: "
            "use normalise='none', other items or another metric"
        )
    return total


@dataclass(eq=False)
class PositionTable:
    """The effects of whole MLPs, attentions and streams at single positions, by layer and group of positions."""

    normalise: Normalise
    cells: dict[tuple[str, int, str], list[tuple[float, float]]] = field(
        default_factory=dict[tuple[str, int, str], list[tuple[float, float]]]
    )
    "(kind, layer, group) -> effect and total of each item, the effect as the mean over the group's positions"

    def update(self, pair: Pair, effects: Mapping[str, Float[Tensor, "layer pos"]], *, total: float) -> None:
        """Add an item; positions after its end are left out."""
        groups = groups_of(pair)
        for kind, table in effects.items():
            for group in dict.fromkeys(groups):
                columns = [position for position, name in enumerate(groups) if name == group]
                for layer, effect in enumerate(table[:, columns].double().mean(1).tolist()):
                    self.cells.setdefault((kind, layer, group), []).append((effect, total))

    def table(self, scores: NodeScores) -> Table:
        """One row for each kind, layer and group; `scores` of the same items know whether there is a total."""
        assert scores.unit_of_score
        order = sorted(self.cells, key=lambda key: (key[0], key[1], GROUPS.index(key[2])))
        return {
            "kind": [kind for kind, _, _ in order],
            "layer": [layer for _, layer, _ in order],
            "position": [group for _, _, group in order],
            "score": [self._score(self.cells[key]) for key in order],
            "items": [len(self.cells[key]) for key in order],
        }

    def _score(self, found: Sequence[tuple[float, float]]) -> float:
        if self.normalise == "item":
            return sum(effect / total for effect, total in found) / len(found)
        effect = sum(effect for effect, _ in found)
        return effect / len(found) if self.normalise == "none" else effect / sum(total for _, total in found)

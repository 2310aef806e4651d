"""From the scores of single examples to Scores: means, votes, and the tables that say how good they are."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.components import Site
from locedit.data.encode import Example
from locedit.errors import LoceditError
from locedit.localize.integration.integrated_gradients import Attribution
from locedit.localize.integration.paths import Objective, objective_value
from locedit.models import Model
from locedit.scores import Scores, Sparse, Table

KEPT = 0.1
"per-example scores below this share of the example's largest are not kept"


class Aggregate:
    """Takes the scores of one example after the other, in any order, and holds no example as a whole."""

    def __init__(self, sites: Sequence[Site], *, ratio: float | None, normalise: bool = False) -> None:
        self.sites = sites
        self.ratio = ratio
        "a component gets an example's vote with at least this share of its largest score; None = no votes"
        self.normalise = normalise
        "divide an example's scores by the largest before they are averaged"
        self.count = 0
        self.total: Tensor | None = None
        self.votes: Tensor | None = None
        self.kept: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def update(self, index: int, scores: Float[Tensor, "site component"], *, id: str) -> None:
        """Add the example with that number."""
        if not bool(scores.isfinite().all()):
            raise LoceditError(f"item {id!r}: its scores are not finite; are there NaN weights or an overflow?")
        if self.total is None or self.votes is None:
            self.total = torch.zeros_like(scores, dtype=torch.float64)
            self.votes = torch.zeros_like(scores, dtype=torch.long)
        largest = float(scores.max())
        self.count += 1
        self.total += scores / largest if self.normalise and largest > 0 else scores
        if largest <= 0:  # no neuron raises the objective: nothing to vote for
            return
        site, component = torch.nonzero(scores >= KEPT * largest, as_tuple=True)
        self.kept.append((index, site, component, scores[site, component].float()))
        if self.ratio is not None:
            self.votes += scores >= self.ratio * largest

    def finish(self, model: Model, *, ids: Sequence[str], evidence: dict[str, Table]) -> Scores:
        """Means over the examples as Scores."""
        assert self.total is not None, "no example was added"
        assert self.votes is not None
        values = (self.total / self.count).float()
        names = [site.name for site in self.sites]
        return Scores(
            values=dict(zip(names, values, strict=True)),
            sites={site.name: site for site in self.sites},
            examples=tuple(ids),
            sparse={name: self._sparse(row) for row, name in enumerate(names)},
            votes={} if self.ratio is None else dict(zip(names, self.votes, strict=True)),
            evidence=evidence,
            fingerprint=model.fingerprint,
        )

    def _sparse(self, row: int) -> Sparse:
        """Entries of one site, by example."""
        parts = [(index, component[site == row], score[site == row]) for index, site, component, score in self.kept]
        parts.sort(key=lambda part: part[0])
        examples = [torch.full_like(component, index) for index, component, _ in parts]
        empty = torch.empty(0, dtype=torch.long)
        return (
            torch.cat([empty, *examples]),
            torch.cat([empty, *(component for _, component, _ in parts)]),
            torch.cat([torch.empty(0), *(score for _, _, score in parts)]),
        )


class Evidence:
    """What is worth knowing about the attributions behind scores."""

    def __init__(self, examples: Sequence[Example], *, objective: Objective) -> None:
        self.examples = examples
        self.objective: Objective = objective
        self.items: dict[int, tuple[float, float, bool]] = {}
        self.paths: dict[int, Attribution] = {}

    def update(self, found: Attribution) -> None:
        """Note one example; its scores are not kept."""
        total = float(found.reached.sum())
        least = float(found.reached.min())
        self.items[found.index] = (math.exp(total), math.exp(least), bool(found.first.all()))
        self.paths[found.index] = found.without_scores()

    def tables(self) -> dict[str, Table]:
        """`items` (what the model knows), `completeness` (layer by layer, token by token), `completeness_by_layer`."""
        order = sorted(self.items)
        items: Table = {
            "id": [self.examples[i].id for i in order],
            "probability": [self.items[i][0] for i in order],
            "least_token_probability": [self.items[i][1] for i in order],
            "known": [self.items[i][2] for i in order],
        }
        rows = [row for index in order for row in self._rows(index)]
        names = ("id", "token", "layer", "start", "end", "gap", "steps", "incomplete")
        complete: Table = {name: [row[i] for row in rows] for i, name in enumerate(names)}
        return {"items": items, "completeness": complete, "completeness_by_layer": _by_layer(complete)}

    def _rows(self, index: int) -> list[tuple[str, int, int, float, float, float, int, bool]]:
        """One row for each scored token and layer."""
        found, example = self.paths[index], self.examples[index]
        end = objective_value(found.reached, self.objective)
        return [
            (
                example.id,
                position,
                layer,
                float(found.start[t, layer]),
                float(end[t]),
                float(found.gap[t, layer]),
                int(found.steps[t, layer]),
                bool(found.incomplete[t, layer]),
            )
            for t, position in enumerate(example.targets)
            for layer in range(found.gap.shape[1])
        ]


def _by_layer(complete: Table) -> Table:
    """The completeness of each layer: worst gap, how many paths stay above the tolerance, most steps."""
    layers = sorted(set(complete["layer"]))
    places = {layer: [i for i, here in enumerate(complete["layer"]) if here == layer] for layer in layers}
    return {
        "layer": layers,
        "worst_gap": [max(complete["gap"][i] for i in places[layer]) for layer in layers],
        "incomplete": [sum(complete["incomplete"][i] for i in places[layer]) for layer in layers],
        "paths": [len(places[layer]) for layer in layers],
        "most_steps": [max(complete["steps"][i] for i in places[layer]) for layer in layers],
    }

"""Linear probes: from which layer on is the answer to be read off the residual stream, and where.

A probe is a logistic regression (`logistic`) from the state at one position after one layer to the answer. It is fitted
for each relation (the facts' `group`) whose answers form a small closed set, and scored on people (or things) that it
has not seen: the folds are split by owner. Positions: `subject`, the last token of the subject in the prompt; `name`,
the same with the subject alone as the prompt; `last`, the token that predicts the answer (Guo et al. 2024,
arXiv:2410.12949, probe the last two for athletes' sports).

With the attention outputs of layer k and of all above at their means, nothing moves between positions from layer k on;
an answer that is still found was looked up by MLPs from what had come together before. The mean is over the
positions of these prompts themselves (published: over unrelated texts). All accuracies are pooled over the relations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locedit import progress
from locedit.data.encode import Example
from locedit.data.items import Task
from locedit.evaluate.intervals import estimate_mean
from locedit.localize.lookup.logistic import logistic
from locedit.localize.lookup.probe_data import ProbeOptions, Relation, relations
from locedit.localize.lookup.states import EMBEDDING, Point, Prompt, States, alone, in_prompt
from locedit.models import Model
from locedit.scores import Table

Position = Literal["subject", "name", "last"]
POSITIONS: tuple[Position, ...] = ("subject", "name", "last")
MOST_ABLATIONS = 12
"runs without attention, where they are not named"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Accuracy of the probes at one place, on people that they have not seen."""

    position: Position
    ablated_from: int | None
    "None = the model as it is"
    layer: int
    "after which the stream was read; EMBEDDING = before layer 0"
    middle: bool
    "read before the layer's MLP has added its output, instead of after"
    accuracy: float
    low: float
    high: float
    "95 % interval, bootstrap over owners"
    baseline: float
    "accuracy of always giving a relation's most frequent answer"

    @property
    def corrected(self) -> float:
        """1 for a probe without error, 0 for one that is no better than the most frequent answer."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)


@dataclass(frozen=True, kw_only=True)
class Probes:
    """All readings."""

    readings: tuple[Reading, ...]
    relations: Table
    "which groups were probed, and why the others were not"
    unsolved: float
    "largest gradient that a fit was left with, as a share of its items"

    def curve(self, position: Position, ablated_from: int | None = None, *, middle: bool = False) -> dict[int, Reading]:
        """Layer -> reading; with attention taken out from layer k, only the layers from k on."""
        wanted = (position, ablated_from, middle)
        return {r.layer: r for r in self.readings if (r.position, r.ablated_from, r.middle) == wanted}

    @property
    def ablations(self) -> list[int]:
        """The layers from which on attention was taken out."""
        return sorted({r.ablated_from for r in self.readings if r.ablated_from is not None})

    def table(self) -> Table:
        """Every reading after a layer, in columns; ablated_from None = the model as it is."""
        kept = [r for r in self.readings if not r.middle]
        names = ("position", "ablated_from", "layer", "accuracy", "low", "high", "baseline", "corrected")
        return {name: [getattr(r, name) for r in kept] for name in names}


def probe(model: Model, task: Task, options: ProbeOptions) -> Probes:
    """Fit and score probes at every layer, at the three positions, as the model is and with later attention taken out.

    A relation that cannot be probed is in the table `relations` with the reason; if none can, a LoceditError says so.
    """
    found, table = relations(model, task, options)
    examples = [example for relation in found for example in relation.examples]
    readings: list[Reading] = []
    unsolved = 0.0
    kinds: tuple[tuple[tuple[Position, ...], Callable[[Model, Example], Prompt]], ...] = (
        (("subject", "last"), in_prompt),
        (("name",), alone),
    )
    for positions, make in kinds:
        states = States(model, [make(model, example) for example in examples], options)
        for first in (None, *ablations(model, options)):
            values = states.plain if first is None else states.ablated(first)
            for point, value in progress.track(list(values.items()), "probes"):
                for place, position in enumerate(positions):
                    hits, left = right(found, value[:, place], options, device=model.device)
                    unsolved = max(unsolved, left)
                    readings.append(_reading(found, position, first, point, hits))
    return Probes(readings=tuple(readings), relations=table, unsolved=unsolved)


def ablations(model: Model, options: ProbeOptions) -> list[int]:
    """The layers from which on attention is taken out, one run each."""
    if options.ablate_from is not None:
        return sorted({layer for layer in options.ablate_from if 0 <= layer < model.n_layers})
    step = math.ceil(model.n_layers / MOST_ABLATIONS)
    return list(range(0, model.n_layers, step))


def right(
    found: Sequence[Relation], states: Float[Tensor, "item d_model"], options: ProbeOptions, *, device: torch.device
) -> tuple[Bool[Tensor, " item"], float]:
    """Which items of the relations, one relation after the other, the probes that did not see their owner get right.

    And the largest gradient, as a share of the items, that a fit was left with.
    """
    hits: list[Tensor] = []
    left, start = 0.0, 0
    for relation in found:
        here = states[start : start + len(relation.labels)].to(device)
        start += len(relation.labels)
        held = torch.stack([relation.fold == fold for fold in range(options.folds)])
        fit = logistic(
            here.expand(options.folds, *here.shape),
            relation.labels,
            (~held).double().to(device),
            classes=len(relation.answers),
            l2=options.l2,
        )
        guess = fit.logits.argmax(-1).cpu()[relation.fold, torch.arange(len(relation.labels))]
        hits.append(guess == relation.labels)
        left = max(left, fit.gradient)
    return torch.cat(hits), left


def _reading(
    found: Sequence[Relation], position: Position, ablated_from: int | None, point: Point, hits: Tensor
) -> Reading:
    owners = [owner for relation in found for owner in relation.owners]
    mean = estimate_mean(hits.double(), owners=owners, bounds=(0.0, 1.0), draws=1000)
    return Reading(
        position=position,
        ablated_from=ablated_from,
        layer=point.layer,
        middle=point.middle,
        accuracy=mean.value,
        low=mean.low,
        high=mean.high,
        baseline=sum(relation.majority for relation in found) / len(owners),
    )


def memory(model: Model, items: int, options: ProbeOptions) -> int:
    """Bytes beside the model: the states of all layers at three positions, and one set of fits in float64."""
    states = 3 * (2 * model.n_layers + 1) * items * model.d_model * 4
    fits = 8 * 4 * options.folds * min(items, options.items) * (model.d_model + 1)
    return states + fits


__all__ = ["EMBEDDING", "POSITIONS", "Position", "ProbeOptions", "Probes", "Reading", "ablations", "memory", "probe"]

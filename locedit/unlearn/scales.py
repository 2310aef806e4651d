"""Subtracting a task vector at rising scales: the dose curve of its negation, and the scale that is asked for.

The grid of scales goes from 0 in equal steps. A level that is asked for is reached at the first scale of the grid at or
below it, or with match="interpolate" between that scale and the one before.
"""

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any

from locedit.components import Table
from locedit.edit import arithmetic
from locedit.edit.dose import met, share_of_the_way
from locedit.edit.edit import Edit
from locedit.edit.front import Kept
from locedit.edit.levels import levels
from locedit.edit.objective import Objective
from locedit.edit.options import TrainOptions
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.unlearn.registry import above_zero, at_least_zero

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VectorOptions(TrainOptions):
    """Of training the vector, and how much of it is subtracted."""

    until: float | None = None
    """raise the scale over the grid until the mean answer probability on the forget data (of contrast pairs, the
    preference) is at or below this; all training steps are made all the same"""
    scale: float | None = None
    "what the vector is multiplied by before it is subtracted (lambda); None = 1, or what `until` or `choose` ask for"
    largest: float = 10.0
    "the end of the grid of scales"
    curve: int = 40
    "how many scales above 0 the grid has, at equal distances; a `scale` above `largest` has as many up to it"

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "largest", "curve")
        if self.scale is None:
            return
        at_least_zero(self, "scale")
        if other := "until" if self.until is not None else "choose" if self.choose != "last" else "":
            raise LoceditError(f"scale={self.scale!r} and {other}={getattr(self, other)!r} both choose the scale")


class Scales:
    """Levels at rising multiples of the subtracted vector."""

    def __init__(self, name: str, model: Model, vector: Edit, goal: Objective, options: VectorOptions) -> None:
        self.name, self.model, self.vector, self.goal, self.options = name, model, vector, goal, options
        self.rows: dict[float, dict[str, float]] = {}

    def edit(self, scale: float) -> Edit:
        """So many times the vector away from the model."""
        return arithmetic.scaled(self.model, self.vector, -scale)

    def measure(self, scale: float) -> dict[str, float]:
        """The levels there."""
        if scale not in self.rows:
            with self.edit(scale).applied(self.model) as edited:
                row = levels(edited, self.goal.probes, level=self.options.level)
            if broken := [name for name, level in row.items() if not math.isfinite(level)]:
                raise LoceditError(
                    f"{self.name}: the level {broken[0]!r} is {row[broken[0]]} at scale {scale:g}; try a smaller "
                    f"largest than {self.options.largest:g}, or fewer steps"
                )
            self.rows[scale] = row
        return self.rows[scale]

    def choose(self) -> float:
        """The scale that the options ask for."""
        options = self.options
        asked = options.until is not None or options.choose != "last"
        fixed = None if asked else 1.0 if options.scale is None else options.scale
        end = options.largest if fixed is None else fixed
        grid = scales(end, max(end, options.largest) / options.curve)
        for scale in grid:
            self.measure(scale)
            if options.until is not None and self.rows[scale]["forget"] <= options.until:
                break
        if options.choose != "last":
            return self._chosen()
        if options.until is None:
            return grid[-1]
        last = max(self.rows)
        if (level := self.rows[last]["forget"]) > options.until:
            log.warning("%s: forget level %.3g at scale %.3g, not %.3g", self.name, level, last, options.until)
            return last
        return self._between(last, options.until) if options.match == "interpolate" else last

    def _chosen(self) -> float:
        """As `choose` of a training takes one of its measured states."""
        kept, grid = Kept(self.options), sorted(self.rows)
        for at, scale in enumerate(grid):
            kept.see(at, self.rows[scale], list)
        if kept.chosen is None:
            log.warning("%s: no scale has forget level %.3g; the largest stays", self.name, self.options.forget_at)
            return grid[-1]
        if kept.chosen.row == 0:
            log.warning("%s: choose=%r takes scale 0: nothing is subtracted", self.name, self.options.choose)
        return grid[kept.chosen.row]

    def _between(self, below: float, until: float) -> float:
        """A scale between two of the grid that is just at the level, or the upper one."""
        if below == 0 or met(self.rows[below]["forget"], until):
            return below
        above = max(scale for scale in self.rows if scale < below)
        at = functools.partial(_mix, above, below)
        return at(share_of_the_way(lambda share: self.measure(at(share))["forget"], until))

    def table(self, scale: float) -> Table:
        """The rows as columns, up to a scale."""
        ordered = [each for each in sorted(self.rows) if each <= scale]
        columns: Table = {"scale": list(ordered)}
        return columns | {name: [self.rows[each][name] for each in ordered] for name in self.goal.probes}

    def outcome(self, scale: float) -> dict[str, Any]:
        """Facts about the choice."""
        squares = sum(float(change.square().sum()) for _, change in arithmetic.changes(self.model, self.vector))
        found: dict[str, Any] = {"scale": scale, "norm": math.sqrt(squares)}
        if self.options.until is not None:
            found |= {"until": self.options.until, "reached": self.rows[scale]["forget"] <= self.options.until}
        return found


def scales(largest: float, distance: float) -> list[float]:
    """0, every multiple of the distance below the largest, and the largest.

    >>> scales(1.1, 0.5), scales(0.0, 0.5)
    ([0.0, 0.5, 1.0, 1.1], [0.0])
    """
    count = max(1, math.ceil(largest / distance - 1e-9)) if largest else 0
    return [float(distance * number) for number in range(count)] + [float(largest)]


def _mix(above: float, below: float, share: float) -> float:
    return above + share * (below - above)

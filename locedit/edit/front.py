"""Which measured state of a training is returned, and the front of states that none beats in forget and retain level.

A state is on the front when no other has a forget level as low and a retain level as high, one of them better. Copies
of the trained tensors are kept on the CPU.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from locedit.edit.options import TrainOptions

Levels = Mapping[str, Any]
"""A row of the history: `forget` and `retain` are None, or absent, where they were not measured."""


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """The trained tensors after one measured step."""

    row: int
    "of the history"
    forget: float
    retain: float | None
    tensors: list[Tensor]
    "copies on the CPU"


class Kept:
    """The states kept while a training goes on: the chosen one, and at most `limit` of the front."""

    def __init__(self, options: TrainOptions, *, limit: int = 0) -> None:
        self.options = options
        self.limit = limit
        self.start: float | None = None
        "retain level before training"
        self.chosen: State | None = None
        self.front: list[State] = []

    def see(self, row: int, levels: Levels, copy: Callable[[], list[Tensor]]) -> None:
        """Look at a measured state; `copy` is called only for one that is kept."""
        forget, retain = levels.get("forget"), levels.get("retain")
        if forget is None:
            return
        if row == 0:
            self.start = retain
        better = self._better(forget, retain)
        new = self.limit > 0 and retain is not None and not self._beaten(forget, retain)
        if not (better or new):
            return
        state = State(row=row, forget=forget, retain=retain, tensors=copy())
        if better:
            self.chosen = state
        if new:
            self.front = thinned([s for s in self.front if not beats(state, s)] + [state], self.limit)

    def _better(self, forget: float, retain: float | None) -> bool:
        """Whether the option `choose` takes this state rather than the one that it has."""
        options, best = self.options, self.chosen
        if options.choose == "level":
            assert options.forget_at is not None
            return best is None and forget <= options.forget_at
        if options.choose == "retain":
            assert options.forget_at is not None
            assert retain is not None
            ahead = best is None or best.retain is None or (retain, -forget) > (best.retain, -best.forget)
            return ahead and forget <= options.forget_at
        if options.choose == "forget":
            assert retain is not None
            assert self.start is not None
            ahead = best is None or best.retain is None or (-forget, retain) > (-best.forget, best.retain)
            return ahead and retain >= options.retain_share * self.start
        return False

    def _beaten(self, forget: float, retain: float) -> bool:
        return any(s.forget <= forget and s.retain is not None and s.retain >= retain for s in self.front)


def beats(one: State, other: State) -> bool:
    """Whether `one` forgets at least as much and retains at least as much."""
    assert one.retain is not None
    assert other.retain is not None
    return one.forget <= other.forget and one.retain >= other.retain


def thinned(front: list[State], limit: int) -> list[State]:
    """At most `limit` states of a front, sorted from the lowest forget level.

    Above the limit goes the state between whose neighbours there is the least room, the crowding distance of NSGA-II
    (Deb et al. 2002, doi:10.1109/4235.996017); both ends stay.
    """
    left = sorted(front, key=lambda state: state.forget)
    while len(left) > max(2, limit):
        room = [_room(left, at) for at in range(1, len(left) - 1)]
        left.pop(1 + room.index(min(room)))
    return left


def _room(front: Sequence[State], at: int) -> float:
    total = 0.0
    for level in ("forget", "retain"):
        values = [getattr(state, level) for state in front]
        total += abs(values[at + 1] - values[at - 1]) / (abs(values[-1] - values[0]) or 1.0)
    return total


def on_front(rows: Sequence[Levels]) -> list[int]:
    """The rows with both levels that no other row beats; of equal ones the first.

    >>> levels = [(0.9, 0.9), (0.5, 0.8), (0.5, 0.7), (0.2, 0.8), (0.1, 0.3), (0.1, 0.3)]
    >>> on_front([{"forget": forget, "retain": retain} for forget, retain in levels])
    [0, 3, 4]
    """
    points = [
        (at, row["forget"], row["retain"])
        for at, row in enumerate(rows)
        if row.get("forget") is not None and row.get("retain") is not None
    ]
    return [
        at
        for at, forget, retain in points
        if not any(f <= forget and r >= retain and (f < forget or r > retain or other < at) for other, f, r in points)
    ]

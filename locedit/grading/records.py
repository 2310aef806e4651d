"""What a grading finds: one record a number, and a summary over seeds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from locedit.grading.statistics import Interval, at_the_end, over_seeds

Verdict = Literal["above chance", "below chance", "not told from chance", "one seed", "-"]


BOUNDS = {"auc": (0.0, 1.0), "decoys": (0.0, 1.0), "recall": (0.0, 1.0), "robust": (-1.0, 1.0), "transfer": (-1.0, 1.0)}
"""Measure -> its possible range, at which intervals end; drops in probability lie between -1 and 1."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One number about one localizer in one seed, or the reason why there is none."""

    part: str
    "planted, deletion or oracle"
    place: str
    "the site that was planted, the unit that was deleted, or what the oracle ranks"
    method: str
    seed: int
    measure: str
    "auc, recall, excess, ..."
    value: float | None = None
    chance: float = 0.0
    "what scores that know nothing would give"
    draw: int = 0
    reason: str = ""
    "why there is no value"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure of one localizer over all seeds."""

    part: str
    place: str
    method: str
    measure: str
    value: float
    "mean over the seeds, each of them the mean of its draws"
    low: float
    high: float
    chance: float
    above: float
    "mean over the seeds of value - chance, which are compared within each seed"
    above_low: float
    above_high: float
    seeds: int
    draws: int
    "numbers behind the mean"
    verdict: Verdict
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """NaN as null."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


def summary(records: Iterable[Record]) -> tuple[Row, ...]:
    """The records over the seeds, in the order in which they come."""
    grouped: dict[tuple[str, str, str, str], list[Record]] = {}
    for record in records:
        grouped.setdefault((record.part, record.place, record.method, record.measure), []).append(record)
    return tuple(_row(key, found) for key, found in grouped.items())


def _row(key: tuple[str, str, str, str], records: Sequence[Record]) -> Row:
    names = dict(zip(("part", "place", "method", "measure"), key, strict=True))
    there = [record for record in records if record.value is not None]
    reasons = "; ".join(dict.fromkeys(record.reason for record in records if record.reason))
    if not there:
        nothing = dict.fromkeys(("value", "low", "high", "chance", "above", "above_low", "above_high"), math.nan)
        return Row(**names, **nothing, seeds=0, draws=0, verdict="-", reason=reasons)  # type: ignore[arg-type]
    chance = sum(record.chance for record in there) / len(there)
    low, high = BOUNDS.get(names["measure"], (-1.0, 1.0))
    value = over_seeds(_by_seed(there, lambda record: record.value or 0.0)).within(low, high)
    above = over_seeds(_by_seed(there, lambda record: (record.value or 0.0) - record.chance))
    above = above.within(low - chance, high - chance)
    if value.low == value.high and value.value in BOUNDS.get(names["measure"], ()):
        value = at_the_end(value.value, (low, high), trials=len(there))
        above = Interval(above.value, value.low - chance, value.high - chance)
    return Row(
        **names,
        **value._asdict(),
        chance=chance,
        above=above.value,
        above_low=above.low,
        above_high=above.high,
        seeds=len({record.seed for record in there}),
        draws=len(there),
        verdict=verdict(above),
        reason=reasons,
    )


def _by_seed(records: Sequence[Record], number: Any) -> list[float]:
    """Each seed's mean over its draws."""
    seeds: dict[int, list[float]] = {}
    for record in records:
        seeds.setdefault(record.seed, []).append(number(record))
    return [sum(values) / len(values) for values in seeds.values()]


def verdict(above: Interval) -> Verdict:
    """Whether the interval of value - chance leaves out 0."""
    if math.isnan(above.low):
        return "one seed"
    if above.low > 0:
        return "above chance"
    return "below chance" if above.high < 0 else "not told from chance"

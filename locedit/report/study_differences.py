"""What found sets differ in from other places: method by method, and counted over the methods."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from locedit.grading.statistics import Interval, over_seeds
from locedit.report.study_table import numbers_of
from locedit.report.tables import Cell, Column, TableView, texts
from locedit.study.result import Study

SAME = 0.02
"differences up to this are called none where there is one seed and so no interval"


class Difference(NamedTuple):
    """One method: a number inside the found set less that in another place, over the seeds that both have."""

    method: str
    value: Interval

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves out 0, with one seed where it is more than 0.02; else 0."""
        if math.isnan(self.value.low):
            return 0 if abs(self.value.value) <= SAME else int(math.copysign(1, self.value.value))
        return 1 if self.value.low > 0 else -1 if self.value.high < 0 else 0


def methods_of(study: Study) -> list[str]:
    """The methods, without the control that only suppresses."""
    return [m for m in study.methods if any(r.method == m and r.role != "shallow" for r in study.records)]


def compared(study: Study) -> list[tuple[str, str]]:
    """(found set, the whole model, its random set or its complement): the pairs that the study has."""
    there = {record.restriction for record in study.records}
    found = dict.fromkeys(r.restriction for r in study.records if r.role == "found")
    others = {place: ("whole model", f"random like {place}", f"all but {place}") for place in found}
    return [(place, other) for place in found for other in others[place] if other in there]


def differences(study: Study, key: str, place: str, other: str) -> list[Difference]:
    """For each method that reached the level in both places a number's difference, seed by seed."""
    made: list[Difference] = []
    for method in methods_of(study):
        here, there = (_by_seed(study, method, name, key) for name in (place, other))
        both = [here[at] - there[at] for at in here if at in there]
        if both:
            made.append(Difference(method, over_seeds(both)))
    return made


def _by_seed(study: Study, method: str, place: str, key: str) -> dict[tuple[int, float, str], float]:
    """(seed, target, hold) -> the number, of edits that reached the level."""
    found = {
        (r.seed, r.target, r.hold): r.values[key]
        for r in study.records
        if (r.method, r.restriction, r.state) == (method, place, "reached") and key in r.values
    }
    return {at: value for at, value in found.items() if math.isfinite(value)}


def summary(found: Sequence[Difference]) -> tuple[int, int, float]:
    """How many methods are higher, how many lower, and the mean of their differences."""
    higher, lower = (sum(d.sign == sign for d in found) for sign in (1, -1))
    return higher, lower, sum(d.value.value for d in found) / len(found)


def table(study: Study) -> TableView | None:
    """Every number in every found set against the other places; None where no two edits can be compared."""
    rows: list[list[Cell]] = []
    for place, other in compared(study):
        for column in numbers_of(study):
            if found := differences(study, column.key, place, other):
                higher, lower, mean = summary(found)
                rows.append(texts(place, other, column.words, len(found), higher, lower, f"{mean:+.2f}"))
    if not rows:
        return None
    names = ("methods", "higher", "lower", "mean difference")
    columns = [Column(name="in"), Column(name="against"), Column(name="number")]
    caption = (
        "Differences of edits by the same method and seed that both reached the level. A method counts as higher or "
        f"lower where Student's 95 % interval over its seeds leaves 0 out, and with one seed above {SAME:g}."
    )
    return TableView(
        title="Found sets against other places",
        columns=[*columns, *(Column(name=name, numeric=True) for name in names)],
        rows=rows,
        caption=caption,
    )

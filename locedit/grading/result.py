"""The result of a grading: every number, its summary over seeds, and what to say of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locedit.grading.oracle import Outcome
from locedit.grading.records import Record, Row, summary
from locedit.storage import read_json, write_json

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

HEADLINES = {"planted": ("decoys", "auc"), "deletion": ("target", "excess"), "oracle": ("robust",)}
"part -> the measures by which localizers are told from chance; tables are ordered by the first"


@dataclass(frozen=True, kw_only=True)
class Grades:
    """How well each localizer did; `str` gives the tables, `.plot()` a figure, `.html()` a page."""

    lab: str
    'the labs, e.g. "gpt2 (small)"'
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    parts: tuple[str, ...]
    records: tuple[Record, ...]
    outcomes: Mapping[int, Sequence[Outcome]]
    "seed -> the edited and attacked places of the oracle"
    settings: dict[str, Any]
    "the options"

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Every measure of every localizer over the seeds."""
        return summary(record for record in self.records if record.method)

    @cached_property
    def knowledge(self) -> tuple[Row, ...]:
        """What the planted models know, over the seeds."""
        return summary(record for record in self.records if not record.method)

    def row(self, part: str, place: str, method: str, measure: str) -> Row:
        """One row. Raises KeyError where there is none."""
        for row in self.rows:
            if (row.part, row.place, row.method, row.measure) == (part, place, method, measure):
                return row
        raise KeyError(f"no {measure} of {method} for {part} {place}")

    def places(self, part: str) -> list[str]:
        """The sites, units or rankings of a part."""
        return list(dict.fromkeys(row.place for row in self.rows if row.part == part))

    def headlines(self) -> list[tuple[str, str, str]]:
        """(part, place, measure) of everything by which localizers are told from chance."""
        return [
            (part, place, measure) for part in self.parts for place in self.places(part) for measure in HEADLINES[part]
        ]

    def ranking(self, part: str, place: str, measure: str) -> list[Row]:
        """The localizers by a measure, furthest above chance first, those without a value last."""
        rows = [row for row in self.rows if (row.part, row.place, row.measure) == (part, place, measure)]
        return sorted(rows, key=lambda row: (row.verdict == "-", -row.above if row.seeds else 0.0))

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "locedit.grades/1",
            "lab": self.lab,
            "seeds": list(self.seeds),
            "methods": list(self.methods),
            "parts": list(self.parts),
            "settings": self.settings,
            "summary": [row.to_json() for row in (*self.rows, *self.knowledge)],
            "records": [record.to_json() for record in self.records],
            "outcomes": {str(seed): [o.to_json() for o in found] for seed, found in self.outcomes.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Grades":
        """Read what `save` wrote."""
        value = read_json(path)
        return cls(
            lab=value["lab"],
            seeds=tuple(value["seeds"]),
            methods=tuple(value["methods"]),
            parts=tuple(value["parts"]),
            records=tuple(Record(**row) for row in value["records"]),
            outcomes={int(seed): [Outcome.from_json(o) for o in found] for seed, found in value["outcomes"].items()},
            settings=value["settings"],
        )

    def __str__(self) -> str:
        from locedit.grading.tables import text

        return text(self)

    def plot(self, part: str | None = None) -> "Figure":
        """Dots with intervals, one panel for each place of one part, or of all."""
        from locedit.grading.figure import dots

        return dots(self, part)

    def html(self) -> str:
        """A page with the findings, the figure and the tables."""
        from locedit.grading.page import html

        return html(self)

    def _repr_html_(self) -> str:
        from locedit.grading.page import fragment

        return fragment(self)

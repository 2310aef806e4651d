"""The result of a study: every cell, the rows over seeds, the page."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locedit.grading.statistics import Interval, over_seeds
from locedit.storage import read_json, write_json, write_text
from locedit.study.records import Record, Row, record_from_json, record_to_json, rows_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FORMAT = "locedit.study/1"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a study found. `str` gives the table, `.plot()` a figure, `.html()` the page, `.markdown()` the verdict and
    tables to be kept beside code, `.csv()` every number."""

    name: str
    config: Mapping[str, Any]
    "the study.toml, defaults included"
    records: tuple[Record, ...]
    "one for each cell"
    before: Mapping[int, Mapping[str, float]]
    "seed -> the measures before any edit"
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    "stage -> seconds of each cell"

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """One row for each method, restriction, hold and state, over the seeds."""
        return rows_of(self.records)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({record.seed for record in self.records}))

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods in their order, controls last."""
        shown = dict.fromkeys(record.method for record in self.records if record.role != "shallow")
        return tuple(shown) + tuple(dict.fromkeys(r.method for r in self.records if r.role == "shallow"))

    @property
    def failed(self) -> tuple[Record, ...]:
        """The cells that could not be finished."""
        return tuple(record for record in self.records if record.state == "failed")

    def row(self, method: str, restriction: str, *, hold: str = "weights", target: float | None = None) -> Row | None:
        """The row of the edits that reached the level; None where there is none."""
        wanted = (method, restriction, hold, "reached")
        rows = [row for row in self.rows if (row.method, row.restriction, row.hold, row.state) == wanted]
        return next((row for row in rows if target in (None, row.target)), None)

    def unedited(self, name: str) -> Interval | None:
        """A measure before any edit, over the seeds."""
        found = [values[name] for values in self.before.values() if name in values]
        return over_seeds(found) if found else None

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "config": self.config,
            "before": {str(seed): values for seed, values in self.before.items()},
            "rows": [row.to_json() for row in self.rows],
            "cells": [record_to_json(record) for record in self.records],
            "seconds": {stage: list(values) for stage, values in self.seconds.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """Read what `save` wrote; a folder is its study.json."""
        path = Path(path)
        value = read_json(path / "study.json" if path.is_dir() else path)
        return cls(
            name=value["name"],
            config=value["config"],
            records=tuple(map(record_from_json, value["cells"])),
            before={int(seed): values for seed, values in value["before"].items()},
            seconds=value["seconds"],
        )

    def csv(self) -> str:
        """Every number of every row: the mean, and the ends of its interval where there are several seeds."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.values))
        made = io.StringIO()
        writer = csv.writer(made, lineterminator="\n")
        ends = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
        writer.writerow(["method", "restriction", "hold", "target", "state", "seeds", "dose_counts", *ends, "note"])
        for row in self.rows:
            numbers = [_text(end) for name in names for end in row.values.get(name, (math.nan,) * 3)]
            about = [row.method, row.restriction, row.hold, row.target, row.state, " ".join(map(str, row.seeds))]
            writer.writerow([*about, row.dose, *numbers, row.note])
        return made.getvalue()

    def write(self, folder: Path) -> None:
        """study.json, table.csv, table.md and report.html."""
        self.save(folder / "study.json")
        write_text(folder / "table.csv", self.csv())
        write_text(folder / "table.md", self.markdown())
        write_text(folder / "report.html", self.html())

    def __str__(self) -> str:
        from locedit.report.study_table import text

        return text(self)

    def plot(self) -> "Figure":
        """What each method keeps and what comes back, by restriction."""
        from locedit.report.study_figures import dots

        return dots(self)

    def markdown(self) -> str:
        """The verdict and the tables, as GitHub reads them."""
        from locedit.report.study_markdown import page

        return page(self)

    def html(self) -> str:
        """The page: verdict, figures, tables."""
        from locedit.report.study import page

        return page(self)

    def _repr_html_(self) -> str:
        from locedit.report.study import fragment

        return fragment(self)


def _text(number: float) -> str:
    return "" if math.isnan(number) else repr(float(number))

"""The page of a grading: findings, figure and tables in one HTML file."""

from typing import Any

from locedit.grading import tables, words
from locedit.grading.figure import dots
from locedit.grading.result import Grades
from locedit.report.page import FigureView, RunView, Section, embed, environment, render
from locedit.report.tables import Column, TableView, texts
from locedit.report.words import Verdict

CAPTION = (
    "Mean over the seeds of each localizer's grade above chance (the upright line), with its 95 % interval. "
    "Filled: the interval leaves out chance."
)


def html(grades: Grades) -> str:
    """The whole page; it carries plotly.js."""
    view = RunView(
        name=f"localizers on {grades.lab}",
        anchor="grades",
        verdict=Verdict(label="Which localizers are right?", tone="none", sentences=tuple(_sentences(grades))),
        sections=[*(_section(grades, part) for part in grades.parts), _left_out(grades)],
    )
    return render([view], title="Localizers graded", subtitle=f"Labs: {grades.lab}, seeds {_seeds(grades)}")


def fragment(grades: Grades) -> str:
    """The tables for a notebook."""
    module = environment().get_template("parts.html").module
    shown = [table for part in grades.parts for table in _tables(grades, part)]
    return "".join(str(module.table(table)) for table in shown)  # type: ignore[attr-defined]


def _seeds(grades: Grades) -> str:
    return ", ".join(map(str, grades.seeds))


def _sentences(grades: Grades) -> list[str]:
    return [*words.findings(grades), *words.cautions(grades)]


def _section(grades: Grades, part: str) -> Section:
    steps = [sentence for name in grades.places(part) if part == "planted" for sentence in words.planted(grades, name)]
    about = [words.ABOUT[part], *steps]
    made: Any = dots(grades, part)
    drawn = [FigureView(title="", caption=CAPTION, json=embed(made), height=int(made.layout.height))]
    return Section(title=words.TITLES[part], anchor=part, steps=about, figures=drawn, tables=_tables(grades, part))


def _tables(grades: Grades, part: str) -> list[TableView]:
    found = [("Edited places, most robust first", tables.outcomes(grades))] if part == "oracle" else []
    found += [(words.place(part, name), tables.standings(grades, part, name)) for name in grades.places(part)]
    return [_table(title, *table) for title, table in found]


def _table(title: str, header: list[str], rows: tables.Cells) -> TableView:
    columns = [Column(name=name, numeric=0 < at < len(header) - 1) for at, name in enumerate(header)]
    return TableView(title=title[0].upper() + title[1:], columns=columns, rows=[texts(*row) for row in rows])


def _left_out(grades: Grades) -> Section:
    rows = [texts(*row) for row in words.reasons(grades)]
    columns = [Column(name="localizer"), Column(name="where"), Column(name="reason", wide=True)]
    listed = [TableView(title="Not graded", columns=columns, rows=rows)] if rows else []
    missing = "" if rows else "Every localizer was graded everywhere."
    return Section(title="What could not be graded", anchor="left-out", missing=missing, tables=listed)

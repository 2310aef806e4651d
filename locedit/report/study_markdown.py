"""A study as Markdown, to be kept beside code: the verdict and the tables."""

from collections.abc import Sequence

from locedit.report import study_differences, study_table, study_words
from locedit.report.tables import TableView
from locedit.study.result import Study


def page(study: Study) -> str:
    """The verdict and the tables, as GitHub reads them."""
    said = "\n".join(f"- {sentence}" for sentence in study_words.verdict(study).sentences)
    parts = [f"# {study.name}", study_words.subtitle(study), said]
    differences = study_differences.table(study)
    for view in [*study_table.views(study), *([differences] if differences else [])]:
        parts += [f"## {view.title}", view.caption, table(view)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(view: TableView) -> str:
    """The columns with anything in them, numbers on the right, and the notes below."""
    names, rows, notes = study_table.plain(view)
    numeric = {column.name for column in view.columns if column.numeric}
    rule = ["--:" if name in numeric else "---" for name in names]
    lines = [*map(_line, (names, rule, *rows)), ""]
    return "\n".join(lines + [f"{number}. {note}" for number, note in enumerate(notes, start=1)]).rstrip()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

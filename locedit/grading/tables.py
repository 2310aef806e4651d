"""The tables of a grading, for the terminal and the page."""

import io
import shutil
import textwrap
from collections.abc import Sequence
from contextlib import redirect_stdout

from locedit.grading import words
from locedit.grading.oracle import Outcome
from locedit.grading.records import Row
from locedit.grading.result import Grades
from locedit.terminal import table

COLUMNS = {
    "planted": ("decoys", "auc", "recall"),
    "deletion": ("target", "excess", "same", "other"),
    "oracle": ("robust", "transfer"),
}
Cells = list[list[str]]


def text(grades: Grades) -> str:
    """All tables and sentences as plain text."""
    made = io.StringIO()
    with redirect_stdout(made):
        for part in grades.parts:
            _say(made, words.TITLES[part], words.ABOUT[part], "")
            if part == "oracle":
                table(*outcomes(grades))
                _say(made, "")
            for name in grades.places(part):
                _say(made, *(words.planted(grades, name) if part == "planted" else [f"{words.place(part, name)}:"]))
                table(*standings(grades, part, name))
                _say(made, "")
        _say(made, *(f"Not graded: {method} ({where}): {why}" for method, where, why in words.reasons(grades)))
        _say(made, "", *words.findings(grades), *words.cautions(grades))
    return made.getvalue()


def _say(out: io.StringIO, *lines: str) -> None:
    """Paragraphs as wide as the terminal."""
    width = max(60, shutil.get_terminal_size((110, 24)).columns)
    for line in lines:
        out.write("\n".join(textwrap.wrap(line, width) or [""]) + "\n")


def standings(grades: Grades, part: str, place: str) -> tuple[list[str], Cells]:
    """One row a localizer, best first: every measure with its interval, chance, and the verdict by the first."""
    measures = COLUMNS[part]
    known = {(row.method, row.measure): row for row in grades.rows if (row.part, row.place) == (part, place)}
    rows: Cells = []
    for best in grades.ranking(part, place, measures[0]):
        cells = [number(known[best.method, measure]) for measure in measures]
        chance = [f"{best.chance:.2f}" if best.seeds else "-"] if part == "deletion" else []
        rows.append([best.method, *cells, *chance, _verdict(best)])
    random = ["random"] if part == "deletion" else []
    titles = [_title(known, measure, part) for measure in measures]
    return ["localizer", *titles, *random, f"{measures[0]} above chance"], rows


def _title(known: dict[tuple[str, str], Row], measure: str, part: str) -> str:
    chances = {f"{row.chance:.2g}" for row in known.values() if row.measure == measure and row.seeds}
    return f"{measure} ({chances.pop()})" if part == "planted" and len(chances) == 1 else measure


SHORT = {"above chance": "yes", "below chance": "below", "not told from chance": "?"}


def _verdict(row: Row) -> str:
    if row.verdict == "-":
        return "-"
    if row.verdict == "one seed":
        return f"{row.above:+.2f} (one seed)"
    return f"{SHORT[row.verdict]} {row.above:+.2f} [{row.above_low:+.2f}, {row.above_high:+.2f}]"


def number(row: Row) -> str:
    """A mean with its interval, or "-"."""
    if not row.seeds:
        return "-"
    return f"{row.value:.2f}" if row.low != row.low else f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"


def outcomes(grades: Grades) -> tuple[list[str], Cells]:
    """The edited places, most robust first, means over the seeds."""
    floor = float(grades.settings["retain_floor"])
    by_name: dict[str, list[Outcome]] = {}
    for found in grades.outcomes.values():
        for outcome in found:
            by_name.setdefault(outcome.name, []).append(outcome)
    order = sorted(by_name, key=lambda name: _mean([o.back(floor) for o in by_name[name]]))
    rows = [[name, *_cells(by_name[name], floor)] for name in order]
    return ["edited", "old", "new", "transfer", "retain", "comes back", "by seed"], rows


def _cells(found: Sequence[Outcome], floor: float) -> list[str]:
    means = [
        [o.old for o in found],
        [o.new for o in found],
        [o.transferred() for o in found],
        [o.retain for o in found],
    ]
    back = [o.back(floor) for o in found]
    return [*(f"{_mean(values):.2f}" for values in (*means, back)), " ".join(f"{value:.2f}" for value in back)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

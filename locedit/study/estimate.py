"""What a study would do and about how long it takes: `locedit study --dry-run`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from locedit.study.files import CellFiles
from locedit.study.grid import Cell
from locedit.study.plan import Plan
from locedit.study.running import in_words, models


def describe(plan: Plan, out: Path, *, jobs: int) -> Iterator[str]:
    """One line for each cell, then the estimate."""
    files = _files(plan, out)
    for cell in plan.cells:
        yield f"{'there' if cell in files and files[cell].done() else 'to do'}  {cell.label}"
    left = [cell for cell in plan.cells if cell not in files or not files[cell].done()]
    yield f"{len(plan.cells)} edits, {len(left)} to do; {_words(plan, left, files, jobs)}"


def _files(plan: Plan, out: Path) -> "Files":
    """The files of the cells whose model has been seen; none before the first run."""
    known = models(plan, out)
    return Files(
        {
            id(cell): CellFiles(plan.config, cell, identity=known[cell.seed], data=plan.data[cell.seed], out=out)
            for cell in plan.cells
            if cell.seed in known
        }
    )


class Files:
    """The files of cells; options make a cell no key of a dictionary, so that it is found by itself."""

    def __init__(self, files: dict[int, CellFiles]) -> None:
        self._files = files

    def __contains__(self, cell: Cell) -> bool:
        return id(cell) in self._files

    def __getitem__(self, cell: Cell) -> CellFiles:
        return self._files[id(cell)]


def _words(plan: Plan, left: Sequence[Cell], files: Files, jobs: int) -> str:
    """The estimate: from the cells that are there, of the same method where there are some."""
    taken: dict[str, list[float]] = {}
    for cell in plan.cells:
        if cell in files and files[cell].done():
            taken.setdefault(cell.name, []).append(sum(files[cell].times().values()))
    every = [seconds for found in taken.values() for seconds in found]
    if not left:
        return "nothing is left to do"
    if not every:
        return "no time can be told before the first edit is made; run it and ask again while it runs or after Ctrl-C"
    mean = sum(every) / len(every)
    total = sum(sum(taken[c.name]) / len(taken[c.name]) if c.name in taken else mean for c in left)
    return f"about {in_words(total / jobs)} with {jobs} job{'s' * (jobs > 1)}, as long as those that are there took"

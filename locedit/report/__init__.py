"""One self-contained HTML page about one or more runs, and plotly figures of result objects."""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locedit._callable import make_callable
from locedit.components import ComponentSet
from locedit.report import captions, page, tables, words
from locedit.report.inputs import RunResults, gather
from locedit.report.ladder import sentence
from locedit.results import AttackResult, Comparison, Evaluation
from locedit.scores import Scores
from locedit.storage import refuse_overwrite, write_text

__all__ = ["Report", "RunResults", "fragment", "report"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page is made of; `save` writes it, in a notebook it shows the verdict and the measures."""

    runs: tuple[RunResults, ...]

    def html(self) -> str:
        """The page; about 5 MB, since it carries plotly.js."""
        return page.page(self.runs)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the page. Raises LoceditError when the file exists, unless `force`."""
        refuse_overwrite(path, force=force)
        write_text(path, self.html())
        return Path(path)

    def __str__(self) -> str:
        return "\n".join(
            f"{run.name}: {words.verdict(run)}" if run.name else str(words.verdict(run)) for run in self.runs
        )

    def _repr_html_(self) -> str:
        return "".join(_run_fragment(run) for run in self.runs)


def report(*results: Any) -> Report:
    """A report of Scores, ComponentSet, Edit, Evaluation and Comparison objects, of run folders, or of RunResults.

    Loose objects make one run; several runs are compared on one page.
    """
    return Report(runs=tuple(gather(results)))


def fragment(result: Any) -> str:
    """A result in a notebook: a sentence and a table, without figures (`.plot()` gives those)."""
    if isinstance(result, Scores):
        return _paragraph(str(result)) + _table(tables.best(result, k=10))
    if isinstance(result, ComponentSet):
        return _paragraph(words.chosen(result)) + _table(tables.sites(result))
    if isinstance(result, Evaluation):
        told = [sentence(result.ladder())] if len(result.attacks) > words.FEW else [a.sentence for a in result.attacks]
        return "".join(map(_paragraph, told)) + _table(tables.measures(result))
    if isinstance(result, Comparison):
        return _paragraph(captions.comparison(result))
    if isinstance(result, AttackResult):
        table = tables.attack_measures(result)
        return _paragraph(result.sentence) + _paragraph(captions.attack(result)) + (_table(table) if table else "")
    return _paragraph(str(result))


def _run_fragment(run: RunResults) -> str:
    verdict = words.verdict(run)
    head = f"<p><b>{html.escape(f'{run.name}: ' if run.name else '')}{html.escape(verdict.label)}</b></p>"
    return (
        head + "".join(map(_paragraph, verdict.sentences)) + (fragment_table(run.evaluation) if run.evaluation else "")
    )


def fragment_table(evaluation: Evaluation) -> str:
    """The measures as an HTML table."""
    return _table(tables.measures(evaluation))


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _table(view: tables.TableView) -> str:
    return str(page.environment().get_template("parts.html").module.table(view))  # type: ignore[attr-defined]


make_callable(__name__)

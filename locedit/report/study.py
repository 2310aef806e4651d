"""The page of a study: verdict, figures and tables in one HTML file."""

import json
from typing import Any

from locedit.report import study_differences, study_figures, study_table, study_words
from locedit.report.page import FigureView, RunView, Section, embed, environment, render
from locedit.report.tables import Column, TableView, texts
from locedit.study.result import Study

DOTS = (
    "Each point is one edit at the first dose that reaches the forget level; edits that never reach it are not here. "
    "Bars: Student's 95 % interval over seeds. Dotted: the unedited model."
)
TRADEOFF = (
    "Each point is one method in one place, by forget items that were not relearned. Dotted: items that the model "
    "never knew, attacked in the same way in the same edited models. Up and left is better; what the attack itself "
    "breaks is in the figure above."
)


def page(study: Study) -> str:
    """The whole page; it carries plotly.js."""
    view = RunView(name=study.name, anchor="study", verdict=study_words.verdict(study), sections=_sections(study))
    return render([view], title=study.name, subtitle=study_words.subtitle(study))


def fragment(study: Study) -> str:
    """The table for a notebook."""
    module = environment().get_template("parts.html").module
    return "".join(str(module.table(view)) for view in study_table.views(study))  # type: ignore[attr-defined]


def _sections(study: Study) -> list[Section]:
    differences = study_differences.table(study)
    missed = [view for view in (study_table.not_reached(study), study_table.unfinished(study)) if view is not None]
    nothing = "" if missed else "Every edit reached the level."
    return [
        Section(title="What is kept, what comes back", anchor="figures", figures=_figures(study)),
        Section(
            title="Place by place",
            anchor="places",
            tables=[differences] if differences else [],
            missing=""
            if differences
            else "No two edits by one method, in a found set and elsewhere, reached the level.",
        ),
        Section(title="Method by method", anchor="methods", steps=study_words.by_method(study)),
        Section(title="All numbers", anchor="table", tables=[study_table.reached(study)]),
        Section(title="Where it does not work", anchor="missing", tables=missed, missing=nothing),
        Section(title="Attacks in words", anchor="attacks", tables=[_sentences(study)]),
        Section(title="Settings and times", anchor="settings", tables=[_settings(study), _times(study)]),
    ]


def _figures(study: Study) -> list[FigureView]:
    if not any(row.state == "reached" for row in study.rows):
        return []
    drawn = [_view(study_figures.dots(study), DOTS, title="Every method, by place")]
    for attack in study_table.attacks_of(study):
        made = study_figures.tradeoff(study, attack)
        drawn.append(_view(made, TRADEOFF, title=f"Kept by the edit against brought back by {attack}"))
    return drawn


def _view(made: Any, caption: str, *, title: str) -> FigureView:
    return FigureView(title=title, caption=caption, json=embed(made), height=int(made.layout.height))


def _sentences(study: Study) -> TableView:
    told = [record for record in study.records if record.sentence]
    rows = [texts(r.method, r.restriction, r.hold, r.seed, r.sentence) for r in told]
    names = ("method", "where", "hold", "seed")
    columns = [*(Column(name=name) for name in names), Column(name="finding", wide=True)]
    return TableView(title="Every attack", columns=columns, rows=rows, folded=True)


def _settings(study: Study) -> TableView:
    rows = [texts(key, json.dumps(value, ensure_ascii=False)) for key, value in study.config.items()]
    columns = [Column(name="key"), Column(name="value", wide=True)]
    return TableView(title="The study", columns=columns, rows=rows, folded=True)


def _times(study: Study) -> TableView:
    rows = [
        texts(stage, len(values), f"{sum(values) / len(values):.1f}", f"{sum(values) / 60:.1f}")
        for stage, values in study.seconds.items()
        if values
    ]
    columns = [Column(name="stage"), *(Column(name=n, numeric=True) for n in ("cells", "seconds each", "minutes"))]
    return TableView(title="Time of each stage", columns=columns, rows=rows, folded=True)

"""The page: what each section holds, and the one HTML file made of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from locedit.components import UNITS, Unit
from locedit.report import agreement, captions, evidence, figures, ladder_figure, tables, words
from locedit.report.inputs import RunResults
from locedit.report.ladder_figure import ladder_table
from locedit.report.numbers import PLURALS
from locedit.report.side_by_side import side_by_side
from locedit.report.tables import TableView
from locedit.results import AttackResult
from locedit.scores import Scores

__all__ = ["RunResults", "page"]


@dataclass(frozen=True, kw_only=True)
class FigureView:
    """A figure on the page."""

    title: str
    caption: str
    json: Markup
    height: int
    kind: str = ""
    'class for the style sheet; "heat" for heat maps'


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands under it."""

    title: str
    anchor: str
    missing: str = ""
    "said instead of, or before, the content where a piece of the run is not there"
    steps: list[str] = field(default_factory=list[str])
    figures: list[FigureView] = field(default_factory=list[FigureView])
    tables: list[TableView] = field(default_factory=list[TableView])


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run on the page."""

    name: str
    anchor: str
    verdict: words.Verdict
    sections: list[Section]


def page(runs: Sequence[RunResults]) -> str:
    """The whole page as HTML: no request leaves it, and text from data files is escaped."""
    many = len(runs) > 1
    views = [_run_view(run, f"run-{number}") for number, run in enumerate(runs, start=1)]
    return render(
        views,
        title=_title(runs),
        subtitle=_subtitle(runs),
        compared=side_by_side(runs) if many else None,
        overlays=_overlays(runs) if many else [],
    )


def render(
    views: Sequence[RunView],
    *,
    title: str,
    subtitle: str,
    compared: TableView | None = None,
    overlays: Sequence[FigureView] = (),
) -> str:
    """A page of these views, several of them side by side."""
    drawn = bool(overlays) or any(section.figures for view in views for section in view.sections)
    env = environment()
    parts = env.get_template("parts.html").module
    return env.get_template("page.html").render(
        title=title,
        subtitle=subtitle,
        runs=views,
        many=len(views) > 1,
        comparison_table=compared,
        overlays=overlays,
        figure=parts.figure,  # type: ignore[attr-defined]
        table=parts.table,  # type: ignore[attr-defined]
        css=_source("style.css"),
        js=_source("table.js"),
        plotly=Markup(get_plotlyjs()) if drawn else None,
        version=_version(),
    )


@lru_cache
def environment() -> Environment:
    """The templates, with every value escaped unless it is Markup."""
    return Environment(
        loader=PackageLoader("locedit.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )


def _source(name: str) -> Markup:
    loader = environment().loader
    assert loader is not None
    return Markup(loader.get_source(environment(), name)[0])


def _version() -> str:
    from importlib.metadata import version

    return version("locedit")


def embed(figure: Figure) -> Markup:
    """A figure as JSON that is safe inside a script element, whatever its labels hold."""
    text = str(figure.to_json())
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _view(figure: Figure, caption: str, *, title: str = "", kind: str = "") -> FigureView:
    layout: Any = figure.layout
    return FigureView(title=title, caption=caption, json=embed(figure), height=int(layout.height or 400), kind=kind)


def _title(runs: Sequence[RunResults]) -> str:
    if len(runs) > 1:
        return f"{', '.join(run.name for run in runs[:-1])} and {runs[-1].name}"
    return runs[0].name or "/".join(Path(next(iter(_models(runs)), "Results")).parts[-2:])


def _subtitle(runs: Sequence[RunResults]) -> str:
    models = ", ".join(_models(runs))
    edit = runs[0].edit if len(runs) == 1 else None  # of several runs each says its own
    text = str(edit.get("text") or "") if edit else ""
    return "; ".join(part for part in (f"Model: {models}" if models else "", f"Edit: {text}" if text else "") if part)


def _models(runs: Sequence[RunResults]) -> list[str]:
    return list(dict.fromkeys(p.model_name for run in runs for _, p in run.provenances if p.model_name))


# --- the sections of one run ---------------------------------------------------------------------------------------


def _run_view(run: RunResults, anchor: str) -> RunView:
    made = [maker(run, f"{anchor}-{maker.__name__.strip('_')}") for maker in MAKERS]
    sections = [section for section in made if section is not None]
    return RunView(name=run.name, anchor=anchor, verdict=words.verdict(run), sections=sections)


def _done(run: RunResults, anchor: str) -> Section:
    return Section(title="What was done", anchor=anchor, steps=words.done(run))


def _scores(run: RunResults, anchor: str) -> Section:
    drawn: list[FigureView] = []
    listed: list[TableView] = []
    for scores in run.scores:
        method = scores.provenance.method if scores.provenance else "scores"
        units: list[Unit] = [u for u in UNITS if any(scores.sites[name].unit == u for name in scores.values)]
        for unit in units:
            part = _of_unit(scores, unit)
            figure, caption = figures.scores(part, chosen=run.components), captions.scores(part, run.components)
            drawn.append(_view(figure, caption, title=f"{method}: {PLURALS[unit]}", kind="heat"))
        if evidence.has_figure(scores):
            drawn.append(_view(evidence.figure(scores), evidence.caption(scores), title=f"{method}: evidence"))
        listed.append(tables.best(scores, name=method))
        whose = f"{method}, " if len(run.scores) > 1 else ""
        listed += [tables.evidence(f"{whose}{name}", table) for name, table in scores.evidence.items() if table]
    missing = "" if run.scores else "No scores are in this run."
    return Section(title="Where it scores high", anchor=anchor, missing=missing, figures=drawn, tables=listed)


def _of_unit(scores: Scores, unit: Unit) -> Scores:
    """The scores of one unit."""
    return replace(scores, values={name: v for name, v in scores.values.items() if scores.sites[name].unit == unit})


def _agreement(run: RunResults, anchor: str) -> Section | None:
    """Nothing for a run with one localizer."""
    found = agreement.of_run(run)
    if found is None:
        return None
    drawn = [
        _view(agreement.overlap(found), agreement.overlap_caption(found), title="Overlap of the sets", kind="heat"),
        _view(agreement.ranks(found), agreement.rank_caption(found), title="Rank correlation", kind="heat"),
    ]
    steps, listed = list(agreement.strongest(found)), [agreement.sizes(found)]
    return Section(title="Do the localizers agree?", anchor=anchor, steps=steps, figures=drawn, tables=listed)


def _components(run: RunResults, anchor: str) -> Section:
    title = "The components chosen"
    if run.components is None:
        return Section(title=title, anchor=anchor, missing="No component set is in this run.")
    figure = figures.components(run.components)
    caption = f"{words.chosen(run.components)} {captions.components(run.components)}"
    return Section(title=title, anchor=anchor, figures=[_view(figure, caption)], tables=[tables.sites(run.components)])


def _requests(run: RunResults, anchor: str) -> Section | None:
    """Nothing for a run without deletion requests."""
    if run.requests is None:
        return None
    return Section(
        title="Deletion requests",
        anchor=anchor,
        steps=[words.requests(run.requests)],
        tables=[tables.requests(run.requests["table"])],
    )


def _tradeoff(run: RunResults, anchor: str) -> Section:
    title = "Forgetting against retention"
    if run.comparison is None:
        return Section(
            title=title, anchor=anchor, missing="No comparison with random sets or with everything is in this run."
        )
    caption = captions.comparison(run.comparison)
    drawn = [_view(figures.tradeoff(run.comparison), caption, title=f"Retain against forget: {run.comparison.metric}")]
    dashed = "Solid: forget set; dashed: retain set. Dotted: the level; large symbols: the first dose that reaches it."
    drawn.append(_view(figures.doses(run.comparison), dashed, title="Both against the dose"))
    return Section(title=title, anchor=anchor, figures=drawn)


def _ladder(run: RunResults, anchor: str) -> Section | None:
    """Nothing for a run with fewer than two attacks."""
    if run.evaluation is None or not ladder_figure.has_figure(run.evaluation):
        return None
    drawn = [_view(ladder_figure.rungs([("", run.evaluation)]), ladder_figure.caption(run.evaluation))]
    listed = [ladder_table(run.evaluation)]
    return Section(title="What access brings it back", anchor=anchor, figures=drawn, tables=listed)


def _attacks(run: RunResults, anchor: str) -> Section:
    title = "Does it come back?"
    found = run.evaluation.attacks if run.evaluation else ()
    if not found:
        return Section(title=title, anchor=anchor, missing="No attack was run.")
    drawn = [_view(figures.attack(a), captions.attack(a), title=_attack_title(a)) for a in found]
    steps = [a.sentence for a in found]
    listed = [table for a in found if (table := tables.attack_measures(a))]
    return Section(title=title, anchor=anchor, steps=steps if len(found) > 1 else [], figures=drawn, tables=listed)


def _attack_title(result: AttackResult) -> str:
    return result.name[0].upper() + result.name[1:].replace("_", " ")


def _measures(run: RunResults, anchor: str) -> Section:
    title = "Measures"
    if run.evaluation is None:
        return Section(title=title, anchor=anchor, missing="No evaluation is in this run.")
    caption = "Open circles: before the edit; filled: after; diamonds: after an attack. The bars are 95 % intervals."
    drawn = [_view(figures.measures(run.evaluation), caption)]
    whole, parts = tables.measures(run.evaluation), tables.measures(run.evaluation, parts=True)
    listed = [whole, parts if parts.rows else None, tables.definitions(run.evaluation)]
    return Section(title=title, anchor=anchor, tables=[table for table in listed if table], figures=drawn)


def _examples(run: RunResults, anchor: str) -> Section:
    table = tables.examples(run.evaluation) if run.evaluation else None
    missing = "" if table else "No values of single examples are in this run."
    return Section(title="Each example", anchor=anchor, missing=missing, tables=[table] if table else [])


def _settings(run: RunResults, anchor: str) -> Section:
    listed = tables.settings(run.provenances)
    missing = "" if listed else "No record of settings and versions is in this run."
    return Section(title="Settings, versions and times", anchor=anchor, missing=missing, tables=listed)


MAKERS = (
    _ladder, _done, _scores, _agreement, _components, _requests, _tradeoff, _attacks, _measures, _examples, _settings
)  # fmt: skip
"""The sections of a run in order: what it shows first, figures, tables of single examples and settings last."""


def _overlays(runs: Sequence[RunResults]) -> list[FigureView]:
    """Figures of the runs that share data; runs on other data have nothing to be compared with."""
    by_data: dict[str, list[RunResults]] = {}
    for run in runs:
        by_data.setdefault(_data(run), []).append(run)
    together = [group for group in by_data.values() if len(group) > 1]
    return [
        view
        for group in together
        for view in [*_ladder_overlay(group), *_tradeoff_overlay(group), *_attack_overlays(group)]
    ]


def _data(run: RunResults) -> str:
    """The hash of the data that a run was evaluated or compared on; empty where it is not recorded."""
    pieces = [
        run.evaluation.provenance if run.evaluation else None,
        run.comparison.provenance if run.comparison else None,
    ]
    return next((record.data for record in pieces if record and record.data), "")


def _ladder_overlay(runs: Sequence[RunResults]) -> list[FigureView]:
    """The share that each attack brings back in each run, with a warning where the runs forget to different levels."""
    named = [(run.name, run.evaluation) for run in runs if run.evaluation and ladder_figure.has_figure(run.evaluation)]
    if len(named) < 2:
        return []
    title = f"What access brings it back: {', '.join(name for name, _ in named)}"
    return [_view(ladder_figure.rungs(named), words.levels_apart([e for _, e in named]), title=title)]


def _tradeoff_overlay(runs: Sequence[RunResults]) -> list[FigureView]:
    compared = [(run.name, run.comparison) for run in runs if run.comparison and run.comparison.curves]
    if not compared:
        return []
    caption = "\n".join(f"{name}: {captions.comparison(c, ('found', 'random'))}" for name, c in compared)
    title = f"Retain against forget: {', '.join(name for name, _ in compared)}"
    return [_view(figures.tradeoffs(compared), caption, title=title)]


def _attack_overlays(runs: Sequence[RunResults]) -> list[FigureView]:
    drawn: list[FigureView] = []
    attacked: dict[str, list[tuple[str, AttackResult]]] = {}
    for run in runs:
        for result in run.evaluation.attacks if run.evaluation else ():
            if result.curves:
                attacked.setdefault(result.name, []).append((run.name, result))
    for named in attacked.values():
        ends = [(name, captions.attack_ends(result, ("found", "never knew"))) for name, result in named]
        caption = "\n".join(f"{name}, at the attack's dose: {text}." for name, text in ends)
        title = f"{_attack_title(named[0][1])}: {', '.join(name for name, _ in named)}"
        drawn.append(_view(figures.attacks(named), caption, title=title))
    return drawn

"""The table that compares runs: key measures as rows, runs as columns."""

from collections.abc import Sequence

from locedit.attacks.attack import ACCESS
from locedit.report import judge, words
from locedit.report.inputs import RunResults
from locedit.report.ladder import SAID, Rung, ladder
from locedit.report.numbers import number, over_seeds, with_interval
from locedit.report.tables import Cell, Column, TableView, measure_cell, name_cell, texts
from locedit.results import Measure, Role


def side_by_side(runs: Sequence[RunResults]) -> TableView:
    """The edit, the key measures before and after, the controls, the attacks and the verdict of each run."""
    rows = [[Cell(text="edit"), *texts(*(words.action(run) if run.edit or run.components else None for run in runs))]]
    for dataset, name in dict.fromkeys(key for run in runs for key in _key_measures(run)):
        first = name_cell(name, f"{dataset} {name.replace('_', ' ')}")
        rows.append([first, *(_change(run, dataset, name) for run in runs)])
    rows += _control_rows(runs)
    rows += _rungs(runs)
    rows.append([Cell(text="verdict"), *texts(*(words.verdict(run).label for run in runs))])
    kept = [row for row in rows if any(cell.text for cell in row[1:])]
    columns = [Column(name="measure"), *(Column(name=run.name) for run in runs)]
    caption = "Before → after the edit with its 95 % bootstrap interval. All measures stand with each run."
    return TableView(title="Key measures of the runs", columns=columns, rows=kept, caption=caption)


def _rungs(runs: Sequence[RunResults]) -> list[list[Cell]]:
    """What each level of access brings back in each run, where more than one attack was run."""
    ladders = [ladder(run.evaluation) if run.evaluation and run.evaluation.attacks else () for run in runs]
    by_access = [{rung.access: rung for rung in found} for found in ladders]
    return [[Cell(text=f"access: {access}"), *(_rung(found.get(access)) for found in by_access)] for access in ACCESS]


def _rung(rung: Rung | None) -> Cell:
    if rung is None or rung.best is None:
        return Cell()
    result, shown = rung.best
    return Cell(text=f"{with_interval(result.headline)}: {SAID[shown]}", sort=result.headline.value)


def _key_measures(run: RunResults) -> list[tuple[str, str]]:
    """(data set, name) of the measures that sum up a run, and of all that tell about plain texts."""
    whole = [m for m in run.evaluation.measures if m.group is None] if run.evaluation else []
    return [(m.dataset, m.name) for m in whole if m.name in judge.PRIMARY or m.dataset == "texts"]


def _change(run: RunResults, dataset: str, name: str) -> Cell:
    before, after = (_find(run, dataset, name, stage) for stage in ("before", "after"))
    if before is None or after is None:
        return measure_cell(after or before)
    return Cell(text=f"{number(before.value)} → {with_interval(after)}", sort=after.value)


def _find(run: RunResults, dataset: str, name: str, stage: str) -> Measure | None:
    found = run.evaluation.measures if run.evaluation else ()
    return next((m for m in found if (m.dataset, m.name, m.stage, m.group) == (dataset, name, stage, None)), None)


def _control_rows(runs: Sequence[RunResults]) -> list[list[Cell]]:
    random = [judge.same_dose(run.comparison, "random") if run.comparison else None for run in runs]
    rows = [
        [
            Cell(text="random sets at the same dose, forget"),
            *texts(*(over_seeds(r[2]) if r else None for r in random)),
        ]
    ]
    rows.append([Cell(text="retain at the matched level"), *texts(*(_matched_retain(run) for run in runs))])
    for name in dict.fromkeys(a.name for run in runs if run.evaluation for a in run.evaluation.attacks):
        rows += _attack_rows(name, runs)
    return rows


def _attack_rows(name: str, runs: Sequence[RunResults]) -> list[list[Cell]]:
    """The attack's number, and where the edit and the never-knew control stand at its dose."""
    results = [
        next((a for a in run.evaluation.attacks if a.name == name), None) if run.evaluation else None for run in runs
    ]
    word = next((a.headline.name.replace("_", " ") for a in results if a), "")
    rows = [[Cell(text=f"{name}: {word}"), *(measure_cell(a.headline) if a else Cell() for a in results)]]
    roles: tuple[tuple[Role, str], ...] = (("found", "this edit"), ("never knew", "never-knew control"))
    for role, text in roles:
        ends = [judge.at_end(a, role) if a else None for a in results]
        cells = texts(*(over_seeds(end, word="runs") if end else None for end in ends))
        rows.append([Cell(text=f"{name}, at its dose: {text}"), *cells])
    return rows


def _matched_retain(run: RunResults) -> str | None:
    if run.comparison is None:
        return None
    kept, level = words.matched_retain(run.comparison, "found"), number(run.comparison.level)
    return f"{over_seeds(kept)} (level {level})" if kept else f"level {level} not reached"

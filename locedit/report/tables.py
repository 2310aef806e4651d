"""The tables of a report, as rows of text with the number to sort by."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from locedit.components import ComponentSet, Table
from locedit.provenance import Provenance
from locedit.report.numbers import count, first, number, with_interval
from locedit.results import AttackResult, Evaluation, Measure, Stage
from locedit.scores import Scores

MOST_ROWS = 2000
"rows of the per-example table; the page says how many it leaves out"

ORDER: tuple[Stage, ...] = ("before", "after", "attacked")
BETTER = {"higher": "higher", "lower": "lower", "neutral": ""}


@dataclass(frozen=True, kw_only=True)
class Column:
    name: str
    numeric: bool = False
    wide: bool = False
    "running text, given room on narrow screens"


@dataclass(frozen=True, kw_only=True)
class Cell:
    text: str = ""
    sort: float | None = None
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class TableView:
    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    caption: str = ""
    filter: bool = False
    "whether it sorts and filters"
    folded: bool = False


def texts(*values: object) -> list[Cell]:
    """Cells of plain text; None is an empty cell."""
    return [Cell(text="" if value is None else str(value)) for value in values]


def value_cell(value: float | None) -> Cell:
    """A number to read and the number to sort by."""
    if value is None:
        return Cell()
    return Cell(text=number(value), sort=value if abs(value) < float("inf") else None)


def measure_cell(measure: Measure | None) -> Cell:
    """The value with its interval; count, range and note as its hint."""
    if measure is None:
        return Cell()
    low, high = (number(end) if end is not None else "none" for end in measure.range)
    hint = f"n = {measure.n:,}; possible range {low} to {high}" + (f"; {measure.note}" if measure.note else "")
    return Cell(text=with_interval(measure), sort=measure.value, hint=hint)


def name_cell(name: str, text: str = "") -> Cell:
    """A metric's name, or `text` in its place, with its card as the hint; no hint for what is no metric."""
    from locedit.evaluate.metric_card import card_text
    from locedit.evaluate.registry import METRICS

    hint = card_text(name, METRICS[name]) if name in METRICS else ""
    return Cell(text=text or name.replace("_", " "), hint=hint)


def _without_empty(table: TableView) -> TableView:
    """The table without the columns that are empty in every row."""
    kept = [i for i in range(len(table.columns)) if any(row[i].text for row in table.rows)]
    return TableView(
        title=table.title,
        columns=[table.columns[i] for i in kept],
        rows=[[row[i] for i in kept] for row in table.rows],
        caption=table.caption,
        filter=table.filter,
        folded=table.folded,
    )


# --- measures ------------------------------------------------------------------------------------------------------


def measures(evaluation: Evaluation, *, parts: bool = False) -> TableView:
    """One row for each measure of a whole data set: before, after, and after each attack, with intervals.

    With `parts` instead the measures of parts of the data sets, such as formats, to sort and filter.
    """
    attacked = [(a.name, {m.key: m for m in (*a.measures, a.headline)}) for a in evaluation.attacks]
    stages: dict[Stage, dict[str, Measure]] = {"before": {}, "after": {}, "attacked": {}}
    shown: dict[str, Measure] = {}
    for measure in (*evaluation.measures, *(a.headline for a in evaluation.attacks)):
        if (measure.group is not None) == parts:
            shown.setdefault(measure.key, measure)
    for measure in evaluation.measures:
        stages[measure.stage][measure.key] = measure
    rows = [
        [
            *texts(m.dataset),
            name_cell(m.name),
            *texts(m.group, m.unit if m.unit != m.name else "", BETTER[m.direction]),
            measure_cell(stages["before"].get(key)),
            measure_cell(stages["after"].get(key)),
            measure_cell(stages["attacked"].get(key)),
            *(measure_cell(found.get(key)) for _, found in attacked),
            Cell(text=f"{m.n:,}", sort=m.n),
            *texts(m.note),
        ]
        for key, m in shown.items()
    ]
    names = ["data set", "measure", "part", "unit", "better"]
    numbers = ["before", "after", "after attack", *(f"after {name}" for name, _ in attacked), "n"]
    columns = [Column(name=n, wide=n == "unit" and any(len(row[3].text) > 24 for row in rows)) for n in names]
    columns += [Column(name=n, numeric=True) for n in numbers] + [Column(name="note")]
    title = "Measures of parts of the data sets" if parts else "Measures"
    caption = "Mean with its 95 % bootstrap interval."
    return _without_empty(
        TableView(title=title, columns=columns, rows=rows, caption=caption, filter=parts, folded=parts)
    )


def definitions(evaluation: Evaluation) -> TableView | None:
    """What each known measure is, what a model that never knew gets, and how it misleads; None where none is known."""
    from locedit.evaluate.metric_card import OWN
    from locedit.evaluate.registry import METRICS

    names = dict.fromkeys(m.name for m in evaluation.measures)
    known = [(name, METRICS[name]) for name in names if name in METRICS]
    if not known:
        return None
    rows = [[name_cell(name), *texts(m.definition, m.chance, m.failure, m.paper or OWN)] for name, m in known]
    columns = [
        Column(name="measure"),
        Column(name="definition", wide=True),
        Column(name="chance"),
        Column(name="known failure", wide=True),
        Column(name="source"),
    ]
    return _without_empty(TableView(title="What the measures are", columns=columns, rows=rows, folded=True))


def examples(evaluation: Evaluation) -> TableView | None:
    """One row for each example: its text and its values before, after and after attacks; None without such values."""
    numbers = [m for m in evaluation.measures if m.per_example and m.group is None]
    numbers += [a.headline for a in evaluation.attacks if a.headline.per_example]
    if not numbers:
        return None
    ids = list(dict.fromkeys(i for m in numbers for i in m.per_example))
    values = _by_column(evaluation, numbers)
    rows = [
        [
            *texts(i, *(evaluation.examples.get(i, {}).get(f) for f in ("prompt", "answer"))),
            *(value_cell(column.get(i)) for column in values.values()),
            *texts(*(evaluation.examples.get(i, {}).get(f) for f in ("dataset", "format", "group", "owner"))),
        ]
        for i in ids[:MOST_ROWS]
    ]
    columns = [Column(name="id"), Column(name="prompt", wide=True), Column(name="answer")]
    columns += [Column(name=n, numeric=True) for n in values]
    columns += [Column(name=n) for n in ("data set", "format", "group", "owner")]
    left = (
        f" The first {MOST_ROWS:,} of {len(ids):,}; the rest is in the evaluation's file."
        if len(ids) > MOST_ROWS
        else ""
    )
    caption = f"Click a heading to sort; the words of the filter may stand in any column.{left}"
    return _without_empty(TableView(title="Each example", columns=columns, rows=rows, caption=caption, filter=True))


def _by_column(evaluation: Evaluation, numbers: Sequence[Measure]) -> dict[str, dict[str, float]]:
    """Column heading -> example id -> value; the data sets share the columns of a metric."""
    headlines = {id(a.headline): a.name for a in evaluation.attacks}
    metrics = list(dict.fromkeys(m.name for m in numbers))
    found: dict[str, dict[str, float]] = {}
    for m in sorted(numbers, key=lambda m: (metrics.index(m.name), ORDER.index(m.stage))):
        stage = f"after {headlines[id(m)]}" if id(m) in headlines else m.stage
        found.setdefault(f"{m.name.replace('_', ' ')} {stage}", {}).update(m.per_example)
    return found


def attack_measures(result: AttackResult) -> TableView | None:
    """Further numbers of one attack; None where there are none."""
    if not result.measures:
        return None
    rows = [
        [name_cell(m.name, m.key), *texts(m.stage, BETTER[m.direction]), measure_cell(m), *texts(m.note)]
        for m in (result.headline, *result.measures)
    ]
    columns = [
        Column(name="measure"),
        Column(name="stage"),
        Column(name="better"),
        Column(name="value", numeric=True),
        Column(name="note"),
    ]
    title = f"All numbers of {result.name}"
    return _without_empty(TableView(title=title, columns=columns, rows=rows, folded=True))


# --- where ---------------------------------------------------------------------------------------------------------


def best(scores: Scores, *, k: int = 20, name: str = "") -> TableView:
    """The k highest components."""
    rows = [
        [*texts(site), Cell(text=str(index), sort=index), Cell(text=f"{value:.4g}", sort=value)]
        for site, index, value in scores.top(k)
    ]
    columns = [Column(name="site"), Column(name="component", numeric=True), Column(name="score", numeric=True)]
    return TableView(
        title=f"{name}{': ' if name else ''}the {len(rows)} highest", columns=columns, rows=rows, folded=True
    )


def requests(table: Table) -> TableView:
    """The level of every deletion request and of what is kept, before any edit, around its own training, and at the
    end."""
    plain = evidence("", table)
    caption = "Level: mean answer probability. After: just after its own training; end: with all requests."
    return replace(plain, title="Every request, measured again at the end", folded=False, caption=caption)


def evidence(name: str, table: Table, *, most: int = 200) -> TableView:
    """A table behind the scores, folded away."""
    heads = list(table)
    length = max((len(table[head]) for head in heads), default=0)
    rows = [[_any_cell(table[head][i]) for head in heads] for i in range(min(length, most))]
    numeric = [_is_numeric([row[c] for row in rows]) for c in range(len(heads))]
    columns = [
        Column(name=head.replace("_", " "), numeric=is_number) for head, is_number in zip(heads, numeric, strict=True)
    ]
    more = f" (first {most} of {length:,} rows)" if length > most else ""
    return TableView(title=f"Evidence: {name.replace('_', ' ')}{more}", columns=columns, rows=rows, folded=True)


def _is_numeric(cells: Sequence[Cell]) -> bool:
    """Whether all that is said in a column are numbers."""
    said = [cell for cell in cells if cell.text]
    return bool(said) and all(cell.sort is not None for cell in said)


def _any_cell(value: Any) -> Cell:
    if isinstance(value, bool):
        return Cell(text="yes" if value else "no")
    if not isinstance(value, int | float):
        return Cell(text="" if value is None else str(value))
    return Cell(text=f"{value:,}" if isinstance(value, int) else f"{value:.4g}", sort=float(value))


def sites(component_set: ComponentSet) -> TableView:
    """Every site that has a component in the set, with the numbers of the components."""
    rows: list[list[Cell]] = []
    for name, site in component_set.sites.items():
        if found := count(component_set, name):
            listed = ", ".join(map(str, first(component_set, name, 60)))
            more = f" and {found - 60:,} more" if found > 60 else ""
            rows.append(
                [*texts(name), Cell(text=f"{found:,}", sort=found), Cell(text=f"{site.count:,}"), *texts(listed + more)]
            )
    columns = [
        Column(name="site"),
        Column(name="chosen", numeric=True),
        Column(name="of", numeric=True),
        Column(name="components"),
    ]
    return TableView(title="The components by site", columns=columns, rows=rows, folded=True)


# --- settings ------------------------------------------------------------------------------------------------------


def settings(stages: Iterable[tuple[str, Provenance]]) -> list[TableView]:
    """What each stage was run with: options, model, data, seed, versions, device, time and memory."""
    return [_setting(stage, record) for stage, record in stages]


def _setting(stage: str, record: Provenance) -> TableView:
    rows: list[tuple[str, object]] = [
        ("method", record.method),
        ("model", record.model_name),
        ("model fingerprint", record.model),
        ("data hash", record.data),
    ]
    rows += [("seed", record.seed), ("device", record.device), ("time", f"{record.seconds:,.1f} s")]
    rows.append(("peak memory", f"{record.peak_memory_mb:,.0f} MiB" if record.peak_memory_mb else None))
    rows += [(f"option {key}", json.dumps(value, ensure_ascii=False)) for key, value in record.settings.items()]
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())))
    kept = [texts(key, value) for key, value in rows if value not in (None, "")]
    title = f"{stage[0].upper()}{stage[1:]}: {record.method}, {record.seconds:,.1f} s"
    return TableView(title=title, columns=[Column(name="what"), Column(name="value")], rows=kept, folded=True)

"""What a report is made of: the results of one run, from objects in memory or from a run's folder."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from locedit.agreement import Agreement
from locedit.components import ComponentSet
from locedit.errors import LoceditError
from locedit.provenance import Provenance
from locedit.results import Comparison, Evaluation
from locedit.scores import Scores
from locedit.storage import read_json

CHOICES = "Scores, ComponentSet, Edit, Requests, Evaluation, Comparison, RunResults, a run's folder"


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """Everything that one run left behind; a report says so where a piece is missing."""

    name: str = ""
    scores: tuple[Scores, ...] = ()
    components: ComponentSet | None = None
    edit_summary: dict[str, Any] | None = None
    evaluation: Evaluation | None = None
    comparison: Comparison | None = None
    agreement: Agreement | None = None
    requests: dict[str, Any] | None = None
    "deletion requests in sequence, as their requests.json says: how many, whether fused, and their table"

    @property
    def named_scores(self) -> dict[str, Scores]:
        """The scores by method; a second run of one method has its number added."""
        named: dict[str, Scores] = {}
        for scores in self.scores:
            name = scores.provenance.method if scores.provenance else "scores"
            again = sum(other == name or other.startswith(f"{name} (") for other in named)
            named[f"{name} ({again + 1})" if again else name] = scores
        return named

    @property
    def edit(self) -> dict[str, Any] | None:
        """The summary of the edit, given or as the evaluation noted it."""
        return self.edit_summary or (self.evaluation.edit if self.evaluation else None)

    @property
    def provenances(self) -> list[tuple[str, Provenance]]:
        """(stage, record) of every piece that carries one."""
        pieces: list[tuple[str, Any]] = [("localize", s.provenance) for s in self.scores]
        pieces.append(("select", self.components.provenance if self.components else None))
        pieces.append(("edit", Provenance.from_json((self.edit or {}).get("provenance"))))
        pieces.append(("compare", self.comparison.provenance if self.comparison else None))
        if self.evaluation:
            pieces.append(("evaluate", self.evaluation.provenance))
            pieces += [(f"attack {a.name}", a.provenance) for a in self.evaluation.attacks]
        return [(stage, record) for stage, record in pieces if isinstance(record, Provenance)]


def gather(items: Iterable[object]) -> list[RunResults]:
    """Runs from any mixture of run folders, RunResults and result objects.

    Loose objects (Scores, ComponentSet, Edit, Requests, Evaluation, Comparison) make one run together; a second set,
    edit, evaluation or comparison begins the next run.
    """
    runs: list[RunResults] = []
    loose: RunResults | None = None
    for item in items:
        if isinstance(item, RunResults | str | Path):
            runs += [loose] if loose else []
            loose = None
            runs.append(item if isinstance(item, RunResults) else read_run(item))
            continue
        field, value = _field(item)
        if loose is None or (field != "scores" and getattr(loose, field) is not None):
            runs += [loose] if loose else []
            loose = RunResults()
        loose = replace(loose, **{field: (*loose.scores, value) if field == "scores" else value})
    runs += [loose] if loose else []
    if not runs:
        raise LoceditError(f"nothing to report; choices: {CHOICES}")
    return _named(runs)


def _field(item: object) -> tuple[str, Any]:
    from locedit.unlearn.requests import Requests  # not at the top: it loads all that trains

    for kind, field in (
        (Scores, "scores"),
        (ComponentSet, "components"),
        (Evaluation, "evaluation"),
        (Comparison, "comparison"),
    ):
        if isinstance(item, kind):
            return field, item
    if isinstance(item, Requests):
        return "requests", item.header()
    summary = getattr(item, "summary", None)
    summary = summary() if callable(summary) else summary
    if isinstance(summary, Mapping):
        return "edit_summary", dict(summary)
    raise LoceditError(f"cannot report a {type(item).__name__}; choices: {CHOICES}")


def _named(runs: list[RunResults]) -> list[RunResults]:
    """Runs with names that differ; a run without one is called by its number when there are several."""
    if len(runs) == 1:
        return runs
    names = [run.name or f"run {number}" for number, run in enumerate(runs, start=1)]
    return [
        replace(run, name=name if names.count(name) == 1 else f"{name} ({number})")
        for number, (run, name) in enumerate(zip(runs, names, strict=True), start=1)
    ]


def read_run(folder: str | Path) -> RunResults:
    """The results in a run's folder: components.json, localize/*/scores.json, edit/, evaluation and comparison."""
    path = Path(folder)
    if not path.is_dir():
        raise LoceditError(f"{folder}: no such run folder")
    evaluation, comparison = _first(path, "evaluation"), _first(path, "comparison")
    edit = path / "edit" / "edit.json"
    if edit.exists():
        _refuse_other_edit(path, edit)
    run = RunResults(
        name=path.name,
        scores=tuple(Scores.load(file.parent) for file in sorted((path / "localize").glob("*/scores.json"))),
        components=_components(path),
        edit_summary=_edit_summary(edit) if edit.exists() else None,
        evaluation=Evaluation.load(evaluation) if evaluation else None,
        comparison=Comparison.load(comparison) if comparison else None,
        agreement=Agreement.load(agreed) if (agreed := path / "localize" / "agreement.json").exists() else None,
        requests=read_json(asked) if (asked := path / "requests" / "requests.json").exists() else None,
    )
    if run == RunResults(name=path.name):
        raise LoceditError(f"{folder}: holds no results (components.json, localize/, edit/, evaluation, comparison)")
    return run


def _refuse_other_edit(path: Path, edit: Path) -> None:
    """A page must not set results of an earlier edit beside the one that is in the folder now."""
    digest = _edit_summary(edit).get("digest")
    for name, again in (("comparison", "locedit edit --controls N"), ("evaluation", "locedit evaluate")):
        file = path / name / "stage.json"
        made_for = read_json(file).get("edit") if file.exists() else None
        if made_for and digest and made_for != digest:
            raise LoceditError(f"{path / name} was made for another edit than {edit.parent}; run {again} with --force")


def _components(path: Path) -> ComponentSet | None:
    """The set that was selected in this folder, else the one that the edit was made inside."""
    places = (path / "components.json", path / "edit" / "within.json")
    found = next((place for place in places if place.exists()), None)
    return ComponentSet.load(found) if found else None


def _first(path: Path, name: str) -> Path | None:
    places = (path / f"{name}.json", path / name / f"{name}.json")
    return next((place for place in places if place.exists()), None)


def _edit_summary(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise LoceditError(f"{file}: not the record of an edit (a JSON object is expected)")
    record = Provenance.from_json(value.get("provenance"))
    return {"method": record.method if record else value.get("kind")} | value

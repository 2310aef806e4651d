"""A sequence of deletion requests, every one of them measured again at the end.

Each is trained on the model as edited so far; of a method that fuses, each on the unedited model, and what acts after
it is all of them so far made into one edit.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locedit.components import ComponentSet, Table
from locedit.data.encode import encode
from locedit.data.items import Dataset, Task, as_task
from locedit.edit.checkpoint import checkpoints
from locedit.edit.edit import Edit
from locedit.edit.levels import Level, levels
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.provenance import content_hash, plain
from locedit.runs import Run
from locedit.storage import atomic_folder, read_json, write_json
from locedit.unlearn import METHODS, Method, prepare, stopping, unlearn

log = logging.getLogger(__name__)

Where = ComponentSet | Sequence[ComponentSet] | Callable[[Model, Task], ComponentSet] | None
"""Where the requests may change the model: one set for all, one for each, found anew for each by a function of (the
model as edited so far, the request's task), or anywhere."""

FUSED = "fused"
"""The folder of the fused edit."""
WHEN = ("after", "end")
RETURN = 0.1
"""Without `until`, a request has come back when this share of what it took away is there again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Requests:
    """What a sequence of requests came to."""

    edits: tuple[Edit, ...]
    "one a request, each made for the model with those before it applied; fused, each for the unedited model"
    table: Table
    """one row a request, then one for the first task's retain and held-out data where there are any. The level (mean
    answer probability) under the unedited model (`unedited`), just before and just after the request (`before`,
    `after`), and at the end (`end`); with stop_when='memorization' also el_after, el_end, ma_after and ma_end.
    Fused, `before` is under those before it fused, `after` under its own edit alone, `end` under all of them fused.
    `came_back` says whether the request is above its level at the end: above `until`, or above its thresholds, or else
    by RETURN of what it took away"""
    fused: Edit | None = None
    "all requests as one edit, of a method that fuses them"

    @property
    def edit(self) -> Edit:
        """All requests as one edit of the unedited model."""
        if self.fused is not None:
            return self.fused
        first, *others = self.edits
        for other in others:
            first = first.then(other)
        return first

    @property
    def warnings(self) -> list[str]:
        """One line for each request that has come back."""
        table = self.table
        rows = zip(table["request"], table["after"], table["end"], table["came_back"], strict=True)
        return [
            f"request {name!r} has come back: level {after:.3g} after its own training, {end:.3g} at the end"
            for name, after, end, back in rows
            if back
        ]

    def header(self) -> dict[str, Any]:
        """What requests.json says."""
        return {"requests": len(self.edits), "table": self.table, "fused": self.fused is not None}

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write requests.json, one edit folder a request and, where there is one, that of the fused edit."""
        with atomic_folder(folder, force=force) as temporary:
            write_json(temporary / "requests.json", self.header())
            if self.fused is not None:
                self.fused.save(temporary / FUSED)
            for number, edit in enumerate(self.edits, start=1):
                edit.save(temporary / f"request-{number}")

    @classmethod
    def load(cls, folder: str | Path) -> "Requests":
        """Read what `save` wrote."""
        header = read_json(Path(folder) / "requests.json")
        edits = tuple(Edit.load(Path(folder) / f"request-{number}") for number in range(1, header["requests"] + 1))
        fused = Edit.load(Path(folder) / FUSED) if header.get("fused") else None
        return cls(edits=edits, table=header["table"], fused=fused)


def unlearn_requests(
    model: Model,
    tasks: Sequence[Task | Dataset] | Mapping[str, Task | Dataset],
    name: str,
    *,
    within: Where = None,
    hold: str | None = None,
    folder: str | Path | None = None,
    check: bool = True,
    **options: Any,
) -> Requests:
    """Fulfil deletion requests one after another by one method, then measure every one of them again.

    Each request's edit is trained on the model as edited so far, which is also its reference, or on the unedited model
    where the method fuses edits afterwards (options.fusion other than "chain"); `options` are those of the method.
    Thresholds of stop_when='memorization' are taken once, under the unedited model. With a `folder` every request's
    edit is kept there, and the same call after a kill goes on where it was and ends with the same edit. A request that
    has come back is logged as a warning. `check` is as in `unlearn`.
    """
    named = _named(tasks)
    chosen = check_requests(named, name, within=within, hold=hold, **options)
    for request, task in named.items():
        if hasattr(chosen[request], "stop_when"):
            chosen[request] = stopping.with_thresholds(model, METHODS[name].reads(task), chosen[request])
    sequence = _Sequence(model, named, name, chosen, within=within, hold=hold, check=check, options=options)
    made = sequence.run(None if folder is None else Path(folder))
    for line in made.warnings:
        log.warning("%s: %s", name, line)
    return made


def check_requests(
    tasks: Mapping[str, Task], name: str, *, within: Where = None, hold: str | None = None, **options: Any
) -> dict[str, Any]:
    """The method's options for each request, checked against its task; needs no model."""
    if not tasks:
        raise LoceditError(f"{name}: there is no request")
    sets = (
        within if isinstance(within, Sequence) else [within if isinstance(within, ComponentSet) else None] * len(tasks)
    )
    if len(sets) != len(tasks):
        raise LoceditError(f"{name}: {len(sets)} component sets for {len(tasks)} requests; give one for each")
    if METHODS[name].fuse is not None and options.get("fusion") != "chain" and _differ(within):
        raise LoceditError(f"{name}: what is fused has one component set for all requests; give one, or fusion='chain'")
    if callable(within) and METHODS[name].needs_set:
        return {request: METHODS[name].options(**options) for request in tasks}
    chosen = {
        request: prepare(name, task, within=here, hold=hold, **options)
        for (request, task), here in zip(tasks.items(), sets, strict=True)
    }
    for given in chosen.values():
        _apart(METHODS[name], given)
    return chosen


def _fuses(method: Method, given: Any) -> bool:
    """Whether the requests are fused, with these options."""
    return method.fuse is not None and getattr(given, "fusion", "chain") != "chain"


def _apart(
    method: Method, given: Any, model: Model | None = None, within: ComponentSet | None = None
) -> Mapping[str, Any]:
    """What options each request has instead, where they are fused; LoceditError for what cannot be."""
    return method.apart(given, model, within) if method.apart is not None and _fuses(method, given) else {}


def _differ(within: Where) -> bool:
    """Whether the requests may have different component sets."""
    return callable(within) or (isinstance(within, Sequence) and any(other != within[0] for other in within[1:]))


def requests_by(task: Task, field: str) -> dict[str, Task]:
    """One request for each owner, group or format of the forget data, in order of first appearance."""
    values = dict.fromkeys(getattr(item, field, None) for item in task.forget)
    if field not in ("owner", "group", "format"):
        raise LoceditError(f"requests by {field!r}; choose owner, group or format")
    if None in values:
        raise LoceditError(f"requests by {field}: an item of {task.forget.source} has none")
    return {str(v): dataclasses.replace(task, forget=task.forget.where(**{field: v})) for v in values}


def _named(tasks: Sequence[Task | Dataset] | Mapping[str, Task | Dataset]) -> dict[str, Task]:
    if isinstance(tasks, Mapping):
        return {str(name): as_task(task) for name, task in tasks.items()}
    return {f"request {number}": as_task(task) for number, task in enumerate(tasks, start=1)}


def came_back(options: Any, row: Mapping[str, float]) -> bool:
    """Whether a request with these levels is above its level at the end, though it was not after its own training."""
    if "el_end" in row:
        below = [row[f"el_{at}"] < options.el_threshold and row[f"ma_{at}"] < options.ma_threshold for at in WHEN]
        return below == [True, False]
    until = getattr(options, "until", None)
    if until is not None:
        return row["after"] <= until < row["end"]
    return row["end"] - row["after"] > RETURN * (row["unedited"] - row["after"]) > 0


Rows = dict[str, dict[str, float]]
"""Request -> column -> level."""


class _Sequence:
    """One run through the requests."""

    def __init__(
        self,
        model: Model,
        tasks: Mapping[str, Task],
        name: str,
        chosen: Mapping[str, Any],
        *,
        within: Where,
        hold: str | None,
        check: bool,
        options: Mapping[str, Any],
    ) -> None:
        self.check = check
        self.model, self.name, self.within, self.hold, self.options = model, name, within, hold, options
        self.tasks = {request: METHODS[name].reads(task) for request, task in tasks.items()}
        self.chosen = chosen
        self.base = model.fingerprint
        method, given = METHODS[name], next(iter(chosen.values()))
        self.fuses = method.fuse if _fuses(method, given) else None
        first = next(iter(self.tasks.values()))
        self.others = {role: data for role in ("retain", "heldout") if (data := getattr(first, role)) is not None}

    def run(self, folder: Path | None) -> Requests:
        request, task = next(iter(self.tasks.items()))
        within = None if self.fuses is None else self._where(0, task)
        self.instead = _apart(METHODS[self.name], self.chosen[request], self.model, within)
        edits: list[Edit] = []
        rows = {request: {"unedited": self._level(task.forget)} for request, task in self.tasks.items()}
        others = {role: {"unedited": self._level(data)} for role, data in self.others.items()}
        walk = self._chain if self.fuses is None else self._apart
        with ExitStack() as stack:
            fused = walk(stack, rows, edits, folder)
            for request, task in self.tasks.items():
                rows[request] |= {"end": self._level(task.forget)} | self._extraction(request, "end")
            for role, data in self.others.items():
                others[role]["end"] = self._level(data)
        return Requests(edits=tuple(edits), table=self._table(rows, others), fused=fused)

    def _chain(self, stack: ExitStack, rows: Rows, edits: list[Edit], folder: Path | None) -> None:
        """Train each request on top of those before it; all of them stay applied on the stack."""
        for number, (request, task) in enumerate(self.tasks.items()):
            rows[request]["before"] = self._level(task.forget)
            edits.append(self._edit(number, request, task, edits, folder))
            stack.enter_context(edits[-1].applied(self.model))
            rows[request] |= self._after(request, task)

    def _apart(self, stack: ExitStack, rows: Rows, edits: list[Edit], folder: Path | None) -> Edit:
        """Train each request on the unedited model; all of them fused are applied on the stack."""
        assert self.fuses is not None
        fused: Edit | None = None
        for number, (request, task) in enumerate(self.tasks.items()):
            with nullcontext() if fused is None else fused.applied(self.model):
                rows[request]["before"] = self._level(task.forget)
            edits.append(self._edit(number, request, task, (), folder))
            with edits[-1].applied(self.model):
                rows[request] |= self._after(request, task)
            fused = self.fuses(self.model, edits, self.chosen[request])
        assert fused is not None, "there is a request"
        if folder is not None:
            fused.save(folder / FUSED, force=True)
        stack.enter_context(fused.applied(self.model))
        return fused

    def _after(self, request: str, task: Task) -> dict[str, float]:
        return {"after": self._level(task.forget)} | self._extraction(request, "after")

    def _edit(self, number: int, request: str, task: Task, before: Sequence[Edit], folder: Path | None) -> Edit:
        """The edit of one request on the model as it is now, from its folder where it is there already."""

        def make() -> Edit:
            within = self._where(number, task)
            return unlearn(self.model, task, self.name, within=within, hold=self.hold, check=self.check, **given)

        given = {**self.options, **self.instead}
        if getattr(self.chosen[request], "stop_when", "level") == "memorization":
            given |= {name: getattr(self.chosen[request], name) for name in ("el_threshold", "ma_threshold")}
        if folder is None:
            return make()
        made_from = {
            "model": self.base,
            "data": task.hash,
            "method": self.name,
            "options": plain(given),
            "hold": self.hold,
            "within": self._identity(number),
            "before": [edit.digest for edit in before],
        }
        run = Run(folder=folder)
        with checkpoints(folder / "unfinished", made_for=content_hash(made_from)):
            return run.stage(
                f"request-{number + 1}",
                made_from,
                make,
                save=lambda made, place: made.save(place, force=True),
                load=Edit.load,
            )

    def _where(self, number: int, task: Task) -> ComponentSet | None:
        """Where the request may change the model as it is now."""
        if self.within is None:
            return None
        if callable(self.within):
            return self.within(self.model, task)
        return self.model.bind(self.within[number] if isinstance(self.within, Sequence) else self.within)

    def _identity(self, number: int) -> Any:
        if self.within is None or callable(self.within):
            return getattr(self.within, "__qualname__", None)
        chosen = self.within[number] if isinstance(self.within, Sequence) else self.within
        return content_hash(chosen.to_json() | {"provenance": None, "fingerprint": None})

    def _level(self, data: Dataset) -> float:
        kind: Level = getattr(next(iter(self.chosen.values())), "level", "probability")
        return levels(self.model, {"level": encode(self.model, data)}, level=kind)["level"]

    def _extraction(self, request: str, when: str) -> dict[str, float]:
        """EL_n and MA where the method stops by them."""
        options = self.chosen[request]
        if getattr(options, "stop_when", "level") != "memorization":
            return {}
        texts = encode(self.model, self.tasks[request].forget)
        el, ma = stopping.means(self.model, texts, n=options.el_n, length=options.el_length)
        return {f"el_{when}": el, f"ma_{when}": ma}

    def _table(self, rows: Mapping[str, dict[str, float]], others: Mapping[str, dict[str, float]]) -> Table:
        kinds = [*["request"] * len(rows), *others]
        everything = [*rows.values(), *others.values()]
        columns = list(dict.fromkeys(name for row in everything for name in row))
        back = [came_back(self.chosen[request], row) for request, row in rows.items()]
        return (
            {"request": [*rows, *others], "kind": kinds}
            | {name: [row.get(name) for row in everything] for name in columns}
            | {"came_back": [*back, *[None] * len(others)]}
        )

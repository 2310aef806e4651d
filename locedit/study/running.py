"""Running a plan: what is not there yet, over one or several processes, with a line for each cell that is done."""

import fcntl
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from locedit import progress
from locedit.errors import LoceditError
from locedit.storage import read_json, write_json
from locedit.study.bench import Same, bench_of
from locedit.study.cell import Work, baseline
from locedit.study.config import Config
from locedit.study.grid import Cell
from locedit.study.plan import Plan
from locedit.study.workers import Crew

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work, as it is sent to a process."""

    config: Config
    out: Path
    seed: int
    what: str
    "prepare: the model's fingerprint and the measures before any edit; localizer; cell"
    label: str = ""
    "of the localizer"
    cell: Cell | None = None


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a piece of work came to."""

    seconds: float
    text: str = ""
    failed: str = ""
    "one line"


def run(plan: Plan, out: Path, *, jobs: int, say: Say) -> list[str]:
    """Run what is not there yet; returns a line for each cell that failed. Raises LoceditError when a model fails."""
    threads = plan.config.keys.threads or max(1, (os.cpu_count() or 1) // jobs)
    with locked(out), Crew(jobs=jobs, threads=threads) as crew:
        write_json(out / "plan.json", {"study": plan.config.to_json(), "cells": [cell.label for cell in plan.cells]})
        _prepare(plan, out, crew, say)
        return _cells(plan, out, crew, say)


def _prepare(plan: Plan, out: Path, crew: Crew, say: Say) -> None:
    """Measure before any edit, and localize: what cells share, so that no two processes make it."""
    config = plan.config
    first = [Task(config=config, out=out, seed=seed, what="prepare") for seed in plan.seeds]
    for task, done in crew.through(first, do):
        if done.failed:
            raise LoceditError(f"seed {task.seed}: {done.failed}")
    wanted = dict.fromkeys((c.seed, label) for c in plan.cells for label in _localizers(config, c))
    tasks = [Task(config=config, out=out, seed=seed, what="localizer", label=label) for seed, label in wanted]
    for task, done in crew.through(tasks, do):
        if done.failed:  # its cells fail with the same line
            say(f"{task.label}, seed {task.seed}: failed: {done.failed}")


def _localizers(config: Config, cell: Cell) -> list[str]:
    """The localizers whose scores a cell needs."""
    table = config.localizer(cell.restriction.of)
    if table is None:
        return []
    return [name for name in (table.called, table.params_like) if name and config.localizer(name)]


def _cells(plan: Plan, out: Path, crew: Crew, say: Say) -> list[str]:
    tasks = [Task(config=plan.config, out=out, seed=cell.seed, what="cell", cell=cell) for cell in plan.cells]
    clock, failed = Clock(len(tasks), crew.jobs), list[str]()
    progress.report(plan.config.name, 0, len(tasks))
    for task, done in crew.through(tasks, do):
        assert task.cell is not None, "these tasks are cells"
        clock.tick(done.seconds)
        progress.report(plan.config.name, clock.done, len(tasks))
        if done.failed:
            failed.append(f"{task.cell.label}: {done.failed}")
        if done.failed or done.text:
            say(f"[{clock}] {task.cell.label}: {done.text or f'failed: {done.failed}'}")
    return failed


class Clock:
    """How far a study is, and how long the rest will take as the cells so far did."""

    def __init__(self, total: int, jobs: int) -> None:
        self.total, self.jobs = total, jobs
        self.done, self.made, self.spent = 0, 0, 0.0
        self.start = time.perf_counter()

    def tick(self, seconds: float) -> None:
        """One cell more; 0 seconds: it was there already."""
        self.done += 1
        self.made += seconds > 0
        self.spent += seconds

    def __str__(self) -> str:
        left = self.total - self.done
        rest = left * self.spent / max(1, self.made) / self.jobs
        until = f", about {in_words(rest)} left" if left and self.made else ""
        return f"{self.done}/{self.total}, {in_words(time.perf_counter() - self.start)}{until}"


def in_words(seconds: float) -> str:
    """Seconds as a person says them.

    >>> in_words(42.4), in_words(600), in_words(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# --- in a worker -----------------------------------------------------------------------------------------------------


def do(task: Task) -> Done:
    """One piece of work; whatever goes wrong in it is a line, so that the others go on."""
    start = time.perf_counter()
    work: Work | None = None
    try:
        bench = bench_of(Same(task.config), task.seed, task.out)
        if task.what == "prepare":
            write_json(task.out / "models" / f"{task.seed}.json", {"fingerprint": bench.identity})
            baseline(bench)
        elif task.what == "localizer":
            bench.scores(task.label)
        else:
            assert task.cell is not None, "the task is a cell"
            work = Work(bench, task.cell)
            if work.files.done():
                work.clean()
                return Done(seconds=0.0)
            work.run()
            return Done(seconds=time.perf_counter() - start, text=work.text(time.perf_counter() - start))
    except Exception as error:
        line = _line(error)
        if work is not None:
            write_json(work.folder / "failed.json", {"error": line})
        return Done(seconds=time.perf_counter() - start, failed=line)
    return Done(seconds=time.perf_counter() - start)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, LoceditError) else f"{type(error).__name__}: {text}"


# --- one process at a time -------------------------------------------------------------------------------------------


@contextmanager
def locked(out: Path) -> Generator[None]:
    """The folder is this process's alone; another study at work in it is an error. A killed process leaves no lock."""
    _require_study_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LoceditError(f"{out}: another process is running a study there") from None
        yield


def _require_study_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise LoceditError(f"{out} is a file; --out needs a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "lock").exists():
        raise LoceditError(f"{out} holds something else than a study; give another --out")


def models(plan: Plan, out: Path) -> dict[int, str]:
    """Seed -> fingerprint of its model, as the last run found it."""
    return {
        seed: read_json(out / "models" / f"{seed}.json")["fingerprint"]
        for seed in plan.seeds
        if (out / "models" / f"{seed}.json").exists()
    }

"""A grid of localizers, methods, restrictions, holds, seeds and attacks from one TOML file, kept cell by cell.

found = le.study("study.toml", out="runs/study", jobs=2)
found.save("study.json")
"""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from locedit._callable import make_callable
from locedit.errors import LoceditError
from locedit.study.config import Config, read_config
from locedit.study.plan import Plan, make_plan
from locedit.study.records import Record, Row
from locedit.study.result import Study


def study(
    source: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    jobs: int = 1,
    say: Callable[[str], None] | None = None,
) -> Study:
    """Run a study, or go on with it, and return what all its cells came to.

    Args:
        source: a study.toml, or its keys as a dictionary.
        out: the folder where every cell is kept: the same call goes on where it was killed. None = nothing is kept.
        jobs: local processes.
        say: is told a line for each cell that is done.

    A cell that fails does not stop the others: it is in the result's `failed`, and is tried again by the next call.
    """
    plan = make_plan(read_config(source))
    with ExitStack() as stack:
        folder = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return run_plan(plan, folder, jobs=jobs, say=say)


def run_plan(plan: Plan, out: Path, *, jobs: int, say: Callable[[str], None] | None = None) -> Study:
    """Run what is not there yet, and write study.json, table.csv, table.md and report.html into the folder."""
    from locedit.study.running import models, run

    if jobs < 1:
        raise LoceditError(f"jobs={jobs!r} must be at least 1")
    run(plan, out, jobs=jobs, say=say or (lambda _: None))
    found = collect(plan, out, models(plan, out))
    found.write(out)
    return found


def collect(plan: Plan, out: Path, identities: dict[int, str]) -> Study:
    """What the files of the cells say."""
    from locedit.study.collecting import before_of, records_of, seconds_of

    return Study(
        name=plan.config.name,
        config=plan.config.to_json(),
        records=tuple(records_of(plan, out, identities)),
        before=before_of(plan, out, identities),
        seconds=seconds_of(plan, out, identities),
    )


make_callable(__name__)

__all__ = ["Config", "Plan", "Record", "Row", "Study", "collect", "make_plan", "read_config", "run_plan", "study"]

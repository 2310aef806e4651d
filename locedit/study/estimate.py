"""What a study would do and about how long it takes: `locedit study --dry-run`."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from locedit.study.checks import attack_options
from locedit.study.files import CellFiles
from locedit.study.grid import Cell, as_tuples
from locedit.study.plan import Plan
from locedit.study.running import in_words, models


def describe(plan: Plan, out: Path, *, jobs: int) -> Iterator[str]:
    """One line for each cell, then the estimate."""
    there, left = _seconds_there(plan, out), list[Cell]()
    for cell, seconds in zip(plan.cells, there, strict=True):
        yield f"{'to do' if seconds is None else 'there'}  {cell.label}"
        left += [cell] if seconds is None else []
    yield f"{len(plan.cells)} edits, {len(left)} to do; {_words(plan, left, there, jobs)}"


def _seconds_there(plan: Plan, out: Path) -> list[float | None]:
    """What each cell of the plan took; None for one that is still to do."""
    known = models(plan, out)
    found: list[float | None] = []
    for cell in plan.cells:
        identity = known.get(cell.seed)  # None before the first run of this seed
        files = identity and CellFiles(plan.config, cell, identity=identity, data=plan.data[cell.seed], out=out)
        found.append(sum(files.times().values()) if files and files.done() else None)
    return found


def _words(plan: Plan, left: Sequence[Cell], there: Sequence[float | None], jobs: int) -> str:
    """The estimate: from the cells that are there, of the same method where there are some."""
    taken: dict[str, list[float]] = {}
    for cell, seconds in zip(plan.cells, there, strict=True):
        if seconds is not None:
            taken.setdefault(cell.name, []).append(seconds)
    every = [seconds for found in taken.values() for seconds in found]
    if not left:
        return "nothing is left to do"
    if not every:
        most = in_words(at_most(plan, left) / jobs)
        more = "" if all(map(_is_loss, (cell.name for cell in left))) else ", and helper models beside them"
        return f"at most about {most} with {jobs} job{'s' * (jobs > 1)}, where every edit takes all of its steps{more}"
    mean = sum(every) / len(every)
    total = sum(sum(taken[c.name]) / len(taken[c.name]) if c.name in taken else mean for c in left)
    return f"about {in_words(total / jobs)} with {jobs} job{'s' * (jobs > 1)}, as long as those that are there took"


# --- before the first cell is there ----------------------------------------------------------------------------------


def at_most(plan: Plan, cells: Sequence[Cell]) -> float:
    """Seconds of these cells, if every one trains to its last step: from a few steps and one evaluation, tried here.

    Methods that go through the model more often in a step than the first of the plan take longer in proportion.
    """
    from locedit.evaluate import evaluate
    from locedit.study.bench import Bench
    from locedit.study.cell import without_compared

    with tempfile.TemporaryDirectory() as nowhere:
        bench = Bench(plan.config, cells[0].seed, Path(nowhere))
    options = without_compared(as_tuples(plan.config.keys.evaluate))
    measure = seconds_of(lambda: evaluate(bench.model, bench.data.measured, **options))
    trained = next((cell for cell in cells if "steps" in cell.options and _is_loss(cell.name)), None)
    step, levels = _step(bench, trained) if trained is not None else (measure, measure)
    return sum(_edit(cell, step, levels) + 2 * measure + _attacks(plan, cell, step, measure) for cell in cells)


def _is_loss(name: str) -> bool:
    """Whether a method is its loss and nothing more: it trains no other model first, whose time would be counted."""
    from locedit.unlearn import METHODS

    return METHODS[name].trained and METHODS[name].objective is None


def _step(bench: Any, cell: Cell) -> tuple[float, float]:
    """Seconds of one training step of a cell's method in the whole model, and of one measurement of the levels."""
    from locedit.unlearn import unlearn

    def train(steps: int) -> float:
        changed: dict[str, Any] = {"until": None, "steps": steps, "warmup": 0, "eval_every": 0, "match": "step"}
        options: dict[str, Any] = cell.options | changed
        return seconds_of(lambda: unlearn(bench.model, bench.data.seen, cell.name, check=False, **options))

    few, more = train(1), train(5)
    step = max(more - few, 0.0) / 4
    return step, max(few - step, 0.0) / 2


def _edit(cell: Cell, step: float, levels: float) -> float:
    steps = cell.options.get("steps", 20)
    return steps * step + steps / max(1, cell.options.get("eval_every", 10)) * levels


def _attacks(plan: Plan, cell: Cell, step: float, measure: float) -> float:
    """Of attacks that fine-tune: every learning rate and control on every split, each look about an evaluation."""
    total = 0.0
    for name in cell.attacks:
        chosen = attack_options(name, plan.config.keys.attack_options.get(name, {}))
        runs = getattr(chosen, "splits", 1) * (len(getattr(chosen, "learning_rates", ())) + 2)
        looks = len(getattr(chosen, "looks", ()))
        total += runs * (getattr(chosen, "steps", 0) * step + looks * measure / 2)
    return total


def seconds_of(do: Callable[[], Any]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    do()
    return time.perf_counter() - start

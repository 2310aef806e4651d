"""Tasks of EleutherAI's lm-evaluation-harness before and after an edit, in one process and on the model as it is.

The harness does its own prompting, tokenizing and scoring (Gao et al., doi:10.5281/zenodo.10256836); the edit is
applied around it. Its tasks are named as on its own command line. Their data come from the hub, unless they are tasks
of `include_path`, a folder of the harness's own YAML files, whose data may be local: where all that are asked for are
there, its built-in tasks are not even looked at.
"""

import copy
import dataclasses
import difflib
import fnmatch
import io
import logging
import random
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from locedit.edit import Edit
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.provenance import Provenance, measure
from locedit.results import Stage, to_json
from locedit.storage import read_json, write_json

EXTRA = "lm-eval is not installed; pip install 'locedit[harness]'"
LOGGERS = ("lm_eval", "transformers", "datasets")
"whose messages below an error are not shown"
WRITES = "generate_until"
"the harness's name for a task in which the model writes"

BOOTSTRAP = 1000
"samples behind a standard error that the harness finds by resampling; by itself it takes 100,000"


@dataclass(frozen=True, kw_only=True)
class HarnessRow:
    """One metric of one task or group of tasks."""

    task: str
    metric: str
    "as the harness names it, with its filter after a comma where there is one"
    n: int | None
    "documents; None for a group"
    before: float
    before_stderr: float | None
    "standard error by the harness; None where it gives none"
    after: float | None = None
    "None without an edit"
    after_stderr: float | None = None
    higher_is_better: bool | None = None


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """What the harness found."""

    rows: tuple[HarnessRow, ...]
    edit: dict[str, Any] | None = None
    "summary of the edit; None = the model as it is"
    task_versions: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    fewshot: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    "task -> examples in its prompt"
    provenance: Provenance | None = None

    def get(self, task: str, metric: str) -> HarnessRow:
        """The one row of that name. Raises KeyError naming what there is."""
        for row in self.rows:
            if (row.task, row.metric) == (task, metric):
                return row
        raise KeyError(f"no {metric} of {task}; there are: {', '.join(f'{r.task} {r.metric}' for r in self.rows)}")

    def save(self, path: str | Path) -> None:
        write_json(path, to_json(self))

    @classmethod
    def load(cls, path: str | Path) -> "HarnessResult":
        value: dict[str, Any] = read_json(path)
        rows = tuple(HarnessRow(**row | {"before": _from_json(row["before"])}) for row in value["rows"])
        provenance = Provenance.from_json(value["provenance"])
        return cls(rows=rows, provenance=provenance, **{k: value[k] for k in ("edit", "task_versions", "fewshot")})


def _from_json(value: Any) -> float:
    """Not a number is null in JSON."""
    return float("nan") if value is None else float(value)


def harness(
    model: Model,
    tasks: Sequence[str],
    edit: Edit | None = None,
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
) -> HarnessResult:
    """Run tasks of lm-evaluation-harness on a model and, with an edit, on the edited model.

    Args:
        tasks: names or patterns, as after `--tasks` of `lm_eval`.
        include_path: a folder with the harness's YAML files of further tasks.
        limit: documents of each task, its first ones; None = all.
        num_fewshot: examples in the prompt; None = as each task says.
    """
    numbers = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
    for name, value in numbers.items():
        if value is not None and value < (0 if name == "num_fewshot" else 1):
            raise LoceditError(f"harness: {name}={value!r} is too small a number")
    if not model.causal:
        raise LoceditError(f"harness: {model.name} is a masked language model; the harness needs a causal one")
    if edit is not None:
        edit.check(model)
    manager, names = find_tasks(tasks, include_path)
    options = {"task_manager": manager, "tasks": names, "limit": limit, "num_fewshot": num_fewshot}
    if edit is not None and "token" in edit.conditional:
        _refuse_writing(manager, names)
    with measure("harness", model=model, settings={"tasks": names, **numbers}) as record:
        found: dict[Stage, Any] = {"before": _run(model, options, batch_size)}
        if edit is not None:
            with edit.applied(model) as edited:
                found["after"] = _run(edited, options, batch_size)
    return HarnessResult(
        rows=tuple(_rows(found["before"], found.get("after"))),
        edit=None if edit is None else edit.summary(),
        task_versions=dict(found["before"]["versions"]),
        fewshot=dict(found["before"]["n-shot"]),
        provenance=record.provenance,
    )


def require_harness() -> None:
    """Raise LoceditError when the optional package is not there."""
    try:
        import lm_eval as _  # noqa: F401
    except ImportError as error:
        raise LoceditError(EXTRA) from error


def find_tasks(tasks: Sequence[str], include_path: str | Path | None) -> tuple[Any, list[str]]:
    """The harness's TaskManager and the names that the patterns stand for.

    It knows the tasks in `include_path` alone where these are all that are asked for. Raises LoceditError for a name
    that there is not; loads no data.
    """
    if isinstance(tasks, str) or not tasks:
        raise LoceditError(f"harness: tasks={tasks!r}; give a list of names")
    if include_path is not None and not Path(include_path).is_dir():
        raise LoceditError(f"harness: include_path={str(include_path)!r} is no folder")
    require_harness()
    if include_path is not None:
        _check_yaml(Path(include_path))
    with _quiet(), _random_states():
        from lm_eval.tasks import TaskManager

        path = None if include_path is None else str(include_path)
        manager = TaskManager(include_path=path, include_defaults=path is None)
        own = [] if path is None else list(manager.all_tasks)
        if path is not None and not all(_matching(name, manager.all_tasks) for name in tasks):
            manager = TaskManager(include_path=path)
    for name in tasks:
        if not _matching(name, manager.all_tasks):
            raise LoceditError(f"harness: unknown task {name!r}; {_known(name, own, manager.all_tasks, path)}")
    return manager, list(dict.fromkeys(found for name in tasks for found in _matching(name, manager.all_tasks)))


def _check_yaml(folder: Path) -> None:
    """Raises LoceditError for a file that is not YAML, of which the harness would only say that its task is unknown."""
    import yaml

    for file in sorted(folder.rglob("*.yaml")):
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise LoceditError(f"harness: {file}: not YAML: {' '.join(str(error).split())}") from None


def _known(name: str, own: Sequence[str], known: Sequence[str], path: str | None) -> str:
    """What there is instead: the nearest of thousands, and all of the user's own."""
    close = difflib.get_close_matches(name, known, n=3)
    mine = "" if path is None else f"; in {path}: {', '.join(own) or 'no task'}"
    return (f"did you mean {' or '.join(map(repr, close))}? " if close else "") + f"{len(known):,} are known{mine}"


def _matching(name: str, known: Sequence[str]) -> list[str]:
    """The task of that name, or those of that pattern."""
    return [name] if name in known else fnmatch.filter(known, name)


def _run(model: Model, options: Mapping[str, Any], batch_size: int) -> Any:
    """One run on the model as it is now; the state of all random generators is put back."""
    limit = None if model.max_length is None else model.max_length - model.prefix
    with _quiet(), _random_states():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        wrapper: Any = HFLM  # its constructor is hidden from type checkers by the harness's decorator
        tokenizer = copy.deepcopy(model.tokenizer)  # it is given a padding token where it has none
        wrapped = wrapper(pretrained=model.module, tokenizer=tokenizer, batch_size=batch_size, max_length=limit)
        try:
            return simple_evaluate(wrapped, log_samples=False, bootstrap_iters=BOOTSTRAP, **options)
        except (LoceditError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a task's YAML and its data may raise anything
            raise LoceditError(f"harness: {', '.join(options['tasks'])}: {type(error).__name__}: {error}") from error


def _refuse_writing(manager: Any, tasks: Sequence[str]) -> None:
    """Control tokens are acted on in forward passes that give logits of every position, which generate() does not."""
    for name, task in manager.load(list(tasks))["tasks"].items():
        if task.OUTPUT_TYPE == WRITES:
            raise LoceditError(
                f"harness: in task {name!r} the model writes, which it cannot with the edit's control token inside the "
                "harness; choose tasks that score given answers, or evaluate the folder of `locedit export`"
            )


@contextmanager
def _quiet() -> Generator[None]:
    """Without the messages of the harness; its progress bars are shown where stderr is a terminal."""
    with ExitStack() as stack:
        for name in LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if not sys.stderr.isatty():
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield


@contextmanager
def _random_states() -> Generator[None]:
    """The harness seeds the generators of Python, numpy and torch; afterwards they go on as if it had not."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _rows(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> Iterator[HarnessRow]:
    """Every number that the harness gives, in its order."""
    for task, values in before["results"].items():
        others = None if after is None else after["results"][task]
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = f"{metric}_stderr,{filtered}"
            count = before.get("n-samples", {}).get(task)
            yield HarnessRow(
                task=task,
                metric=metric if filtered == "none" else key,
                n=None if count is None else count["effective"],
                before=float(value),
                before_stderr=_number(values.get(error)),
                after=None if others is None else float(others[key]),
                after_stderr=None if others is None else _number(others.get(error)),
                higher_is_better=before.get("higher_is_better", {}).get(task, {}).get(metric),
            )


def _number(value: Any) -> float | None:
    """A standard error; the harness writes N/A where it has none."""
    return float(value) if isinstance(value, int | float) and value == value else None

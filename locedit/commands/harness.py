"""`locedit harness`: tasks of lm-evaluation-harness before and after an edit."""

import argparse
from pathlib import Path

from locedit.commands.inputs import read_model
from locedit.errors import LoceditError
from locedit.storage import refuse_overwrite, require_folder
from locedit.terminal import note, table


def harness_command(args: argparse.Namespace) -> None:
    """Check the tasks, run them, show and save; what is wrong with a name is said before a model is loaded."""
    from locedit.edit import Edit
    from locedit.evaluate.harness import find_tasks, harness

    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not tasks:
        raise LoceditError("--tasks names no task")
    file = None if args.out is None else Path(args.out) / "harness.json"
    if file is not None:
        require_folder(file.parent)
        refuse_overwrite(file, force=args.force)
    find_tasks(tasks, args.include_path)
    edit = Edit.load(args.edit) if args.edit else None
    found = harness(
        read_model(args),
        tasks,
        edit,
        include_path=args.include_path,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
    )
    rows = [
        (row.task, row.metric, _number(row.before, row.before_stderr), _number(row.after, row.after_stderr), str(row.n))
        for row in found.rows
    ]
    table(("task", "metric", "before", "after", "n"), rows)
    if file is not None:
        found.save(file)
        note(f"{file}: {len(rows)} numbers, each with its standard error")


def _number(value: float | None, error: float | None) -> str:
    """A number and its standard error."""
    if value is None:
        return "-"
    return f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")

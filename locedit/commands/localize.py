"""`locedit localize`: score, save, and choose."""

import argparse
from pathlib import Path
from typing import Any

from locedit.commands.inputs import about, duration, key, reused, start
from locedit.components import ComponentSet, Scores
from locedit.data import Task, read_task
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.registries import localizers, method_options
from locedit.runs import Run
from locedit.select import BUDGETS, check_budget
from locedit.terminal import note


def localize_command(args: argparse.Namespace) -> None:
    """Score, save, and select when a budget is given."""
    names = [name.strip() for name in args.method.split(",") if name.strip()]
    options = {name: method_options(localizers(), name, args.extra, several=names) for name in names}
    budget = {name: getattr(args, name) for name in BUDGETS if getattr(args, name) is not None}
    if budget:
        check_budget(**budget, sign=args.sign)
    elif args.minus:
        raise LoceditError(f"--minus needs a budget as well: one of {', '.join('--' + b for b in BUDGETS)}")
    run_folder, model, task = start(args)
    found: list[tuple[Scores, ComponentSet | None]] = []
    for name in names:
        scores = _scored(run_folder, model, task, name, options[name])
        control = _control_scores(args, model, name, options[name])
        chosen = scores.select(**budget, sign=args.sign, minus=control) if budget else None
        found.append((scores, chosen))
    run_folder.write_once("run.json", about(args, model))
    if found[0][1] is not None:
        _refuse_other_set(run_folder, found[0][1])
    for name, (scores, chosen) in zip(names, found, strict=True):
        _say_scores(run_folder.folder / "localize" / name, scores)
        if chosen is not None:
            chosen.save(run_folder.folder / "localize" / name / "components.json")
    if found[0][1] is not None:
        _save_set(run_folder, found[0][1], by=names[0])


def _refuse_other_set(run_folder: Run, chosen: ComponentSet) -> None:
    """The same set may be in components.json already; another one is not replaced without --force."""
    path = run_folder.folder / "components.json"
    if path.exists() and not run_folder.force and ComponentSet.load(path) != chosen:
        raise LoceditError(f"{path} holds another set; give --force or another --out")


def _save_set(run_folder: Run, chosen: ComponentSet, *, by: str) -> None:
    path = run_folder.folder / "components.json"
    chosen.save(path)
    note(f"{path}: {chosen}, by {by}")


def _scored(run_folder: Run, model: Model, task: Task, name: str, options: dict[str, Any]) -> Scores:
    from locedit.localize import estimate, localize

    def make() -> Scores:
        seconds, size = estimate(model, task, name, **options)
        note(f"{name}: {len(task.forget)} items, about {duration(seconds)} and {size / 2**30:.2f} GiB beside the model")
        return localize(model, task, name, **options)

    return run_folder.stage(
        f"localize/{name}",
        key(model, task, method=name, options=options),
        make,
        save=lambda scores, folder: scores.save(folder),
        load=Scores.load,
        on_reuse=reused,
    )


def _control_scores(args: argparse.Namespace, model: Model, name: str, options: dict[str, Any]) -> Scores | None:
    if not args.minus:
        return None
    from locedit.localize import localize

    control = read_task(args.minus, args.fields)
    return localize(model, control.with_chat(args.chat) if args.chat != "off" else control, name, **options)


def _say_scores(folder: Path, scores: Scores) -> None:
    note(f"{folder}: {scores}")
    known = scores.evidence.get("items", {}).get("known")
    if known and sum(map(bool, known)) < len(known) / 2:
        note(
            f"warning: the model gives the answer to only {sum(map(bool, known))} of {len(known)} items; "
            "scores of what it does not know mean little"
        )

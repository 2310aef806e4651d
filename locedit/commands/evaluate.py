"""`locedit evaluate` and `locedit report`: measure, attack, and show."""

import argparse
from pathlib import Path
from typing import Any

from locedit.commands.inputs import about, key, reused, start
from locedit.errors import LoceditError, nearest
from locedit.listing import measure_rows
from locedit.registries import method_options
from locedit.storage import read_json, refuse_overwrite
from locedit.terminal import note, table


def evaluate_command(args: argparse.Namespace) -> None:
    """Measure before and after, attack, save."""
    from locedit.attacks import ATTACKS
    from locedit.edit import Edit
    from locedit.evaluate import evaluate
    from locedit.results import Evaluation

    attacks = [name.strip() for name in args.attacks.split(",") if name.strip()]
    for name in attacks:
        if name not in ATTACKS:
            raise LoceditError(f"unknown attack {name!r}; {nearest(name, ATTACKS)}")
    options = {name: method_options(ATTACKS, name, args.extra, several=attacks) for name in attacks}
    if args.extra and not attacks:
        raise LoceditError(f"unknown option --{next(iter(args.extra))}; options after --attacks belong to an attack")
    metrics = [name.strip() for name in args.metrics.split(",")] if args.metrics else None
    run_folder, model, task = start(args)
    edit = Edit.load(args.edit) if args.edit else None
    others = _control_edits(args.edit, edit) if edit and attacks else {}
    if others:
        note(f"also attacked: {', '.join(others)}, from {Path(args.edit).parent / 'comparison'}")
    evaluation = run_folder.stage(
        "evaluation",
        key(
            model,
            task,
            edit=edit.digest if edit else None,
            others={name: other.digest for name, other in others.items()},
            metrics=metrics,
            attacks=options,
            seed=args.seed,
        ),
        lambda: evaluate(
            model, task, edit, attacks, attack_options=options, others=others, metrics=metrics, seed=args.seed
        ),
        save=lambda made, folder: made.save(folder / "evaluation.json"),
        load=lambda folder: Evaluation.load(folder / "evaluation.json"),
        on_reuse=reused,
    )
    run_folder.write_once("run.json", about(args, model))
    table(("measure", "before", "after", "n"), measure_rows(evaluation))
    for attack in evaluation.attacks:
        note(attack.sentence)
    note(f"{run_folder.folder / 'evaluation'}: {len(evaluation.measures)} measures, {len(evaluation.attacks)} attacks")


def report_command(args: argparse.Namespace) -> None:
    """One page about one or more runs."""
    from locedit.report import report

    refuse_overwrite(args.out, force=args.force)
    report(*args.runs).save(args.out, force=args.force)
    note(f"{args.out}: report on {', '.join(args.runs)}")


def _control_edits(edit_folder: str, edit: Any) -> dict[str, Any]:
    """The edits of the random controls that stand beside an edit in its run folder; none made for another edit."""
    from locedit.edit import Edit

    comparison = Path(edit_folder).parent / "comparison"
    made_for = comparison / "stage.json"
    if not made_for.exists() or read_json(made_for).get("edit") != edit.digest:
        return {}
    folders = sorted((comparison / "edits").glob("*/edit.json"))
    return {path.parent.name.replace("-", " "): Edit.load(path.parent) for path in folders}

"""`locedit edit` and `locedit export`: change the model inside a set, compare with controls, write it out."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from locedit.commands.inputs import about, key, read_data, read_model, reused, start
from locedit.components import ComponentSet, Scores
from locedit.data import Task
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.registries import method_options
from locedit.runs import Run
from locedit.storage import refuse_overwrite
from locedit.terminal import note


def edit_command(args: argparse.Namespace) -> None:
    """Make an edit inside a set, and its controls when asked for."""
    from locedit.edit import Edit
    from locedit.unlearn import METHODS, prepare, unlearn

    options = method_options(METHODS, args.method, args.extra)
    if args.controls and not args.within:
        raise LoceditError("--controls compares a set with random sets of the same size; give --within")
    asked = ComponentSet.load(args.within) if args.within else None
    prepare(args.method, read_data(args), within=asked, hold=args.hold, **options)
    run_folder, model, task = start(args)
    within = None if asked is None else model.bind(asked)
    _say_memory(model, within, args.hold)
    edit = run_folder.stage(
        "edit",
        key(model, task, method=args.method, options=options, hold=args.hold, within=_identity(within)),
        lambda: unlearn(model, task, args.method, within=within, hold=args.hold, **options),
        save=lambda made, folder: made.save(folder, force=True),
        load=Edit.load,
        on_reuse=reused,
    )
    run_folder.write_once("run.json", about(args, model))
    note(f"{run_folder.folder / 'edit'}: {edit}")
    if args.controls and within is not None:
        _compare(run_folder, model, task, edit, args, options, within)


def _compare(
    run_folder: Run,
    model: Model,
    task: Task,
    edit: Any,
    args: argparse.Namespace,
    options: dict[str, Any],
    within: ComponentSet,
) -> None:
    from locedit.controls import compare
    from locedit.results import Comparison
    from locedit.unlearn import METHODS

    def save(made: Comparison, folder: Path) -> None:
        made.save(folder / "comparison.json")
        for name, control in made.edits.items():
            control.save(folder / "edits" / name.replace(" ", "-"))

    comparison = run_folder.stage(
        "comparison",
        key(model, task, edit=edit.digest, controls=args.controls),
        lambda: compare(
            model,
            task,
            args.method,
            within=within,
            hold=args.hold,
            seeds=range(args.controls),
            scores=_scores_behind(within, run_folder) if METHODS[args.method].dose == "components" else None,
            edit=edit,
            **options,
        ),
        save=save,
        load=lambda folder: Comparison.load(folder / "comparison.json"),
        on_reuse=reused,
    )
    note(
        f"{run_folder.folder / 'comparison'}: {len(comparison.curves)} dose curves, compared at {comparison.level:.3g}"
    )


def _scores_behind(within: ComponentSet, run_folder: Run) -> Scores | None:
    """The scores that the set was chosen from, to order its components; None when this run does not hold them."""
    chosen = within.provenance
    folder = run_folder.folder / "localize" / (chosen.method if chosen else "")
    if chosen is not None and (folder / "scores.json").exists():
        made = (scores := Scores.load(folder)).provenance
        settings = {name: value for name, value in chosen.settings.items() if name != "select"}
        if made is not None and dataclasses.replace(chosen, settings=settings) == made:
            return scores
    note("the scores behind the set are not in this run; its components are compared in random order")
    return None


def _identity(within: ComponentSet | None) -> dict[str, Any] | None:
    if within is None:
        return None
    from locedit.provenance import content_hash

    return {"components": len(within), "hash": content_hash(within.to_json() | {"provenance": None})}


def _say_memory(model: Model, within: ComponentSet | None, hold: str) -> None:
    total = sum(p.numel() for p in model.module.parameters())
    count = total if within is None else within.parameters("train")
    note(
        f"trainable: {count:,} of {total:,} parameters, held as {hold}; "
        f"about {count * 16 / 2**20:.1f} MiB for deltas and optimizer"
    )


def export_command(args: argparse.Namespace) -> None:
    """The edited model as an ordinary folder."""
    from locedit.edit import Edit

    refuse_overwrite(args.out, force=args.force)
    edit = Edit.load(args.edit)
    edit.export(read_model(args), args.out, force=args.force)
    note(f"{args.out}: the edited model; load it with transformers.AutoModel...from_pretrained({str(args.out)!r})")

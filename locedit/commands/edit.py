"""`locedit edit` and `locedit export`: change the model inside a set, compare with controls, write it out."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from locedit.commands.inputs import about, bound, identity, key, read_data, read_model, reused, start
from locedit.commands.requests import requests_command
from locedit.components import ComponentSet, Scores
from locedit.data import Task
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.provenance import content_hash
from locedit.registries import method_options
from locedit.runs import Run
from locedit.storage import refuse_overwrite
from locedit.terminal import note

Result = TypeVar("Result")


def edit_command(args: argparse.Namespace) -> None:
    """Make an edit inside a set, and its controls when asked for; an unfinished training goes on where it was."""
    from locedit.unlearn import METHODS, prepare

    if args.requests is not None:
        requests_command(args)
        return
    METHODS.require(args.method)
    options = method_options(METHODS, args.method, args.extra)
    if args.controls and not args.within:
        raise LoceditError("--controls compares a set with random sets of the same size; give --within")
    asked = ComponentSet.load(args.within) if args.within else None
    chosen = prepare(args.method, read_data(args), within=asked, hold=args.hold, **options)
    args.hold = args.hold or METHODS[args.method].holds[0]
    main = _join_processes(args)
    run_folder, model, task = start(args)
    within = None if asked is None else bound(model, asked, args.within)
    if main and METHODS[args.method].dose is None:
        _say_memory(model, within, args.hold, rank=getattr(chosen, "rank", 0))
    edit = _edit(run_folder, model, task, args, options, within, main=main)
    if main:
        run_folder.write_once("run.json", about(args, model))
        _say(run_folder.folder / "edit", edit, kind=METHODS[args.method].reads(task).forget.kind)
    if args.controls and within is not None:
        _compare(run_folder, model, task, edit, args, options, within, main=main)


def _say(folder: Path, edit: Any, *, kind: str) -> None:
    from locedit.commands.outcomes import dose, say_edit

    say_edit(edit, kind=kind)
    note("; ".join(filter(None, (f"{folder}: {edit}", dose(edit)))))


def _join_processes(args: argparse.Namespace) -> bool:
    """Whether this is the process that writes and speaks, alone or of those that a launcher started on one edit."""
    from locedit.edit import parallel

    processes, device = parallel.start()
    if processes.count > 1 and args.device_map:
        raise LoceditError("--device-map spreads one model over the GPUs; leave it out with several processes")
    if device is not None and args.device == "auto":
        args.device = str(device)
    return processes.main


def _stage(
    run_folder: Run,
    name: str,
    made_from: dict[str, Any],
    make: Callable[[], Result],
    *,
    main: bool,
    save: Callable[[Result, Path], None],
    load: Callable[[Path], Result],
) -> Result:
    """The result of a stage, whose trainings keep their state in the run folder until it is saved.

    Of several processes one saves; the others make the same in their memory, or read what is there already.
    """
    from locedit.edit.checkpoint import checkpoints
    from locedit.edit.parallel import Processes

    there = Processes.now().from_main(lambda: run_folder.has(name, made_from))
    with checkpoints(run_folder.folder / "unfinished", made_for=content_hash(made_from)):
        if main:
            return run_folder.stage(name, made_from, make, save=save, load=load, on_reuse=reused)
        return load(run_folder.folder / name) if there else make()


def _edit(
    run_folder: Run,
    model: Model,
    task: Task,
    args: argparse.Namespace,
    options: dict[str, Any],
    within: ComponentSet | None,
    *,
    main: bool,
) -> Any:
    from locedit.edit import Edit
    from locedit.unlearn import unlearn

    return _stage(
        run_folder,
        "edit",
        key(model, task, method=args.method, options=options, hold=args.hold, within=identity(within)),
        lambda: unlearn(model, task, args.method, within=within, hold=args.hold, **options),
        main=main,
        save=lambda made, folder: made.save(folder, force=True),
        load=Edit.load,
    )


def _compare(
    run_folder: Run,
    model: Model,
    task: Task,
    edit: Any,
    args: argparse.Namespace,
    options: dict[str, Any],
    within: ComponentSet,
    *,
    main: bool,
) -> None:
    from locedit.commands.outcomes import say_comparison
    from locedit.controls import compare
    from locedit.results import Comparison
    from locedit.unlearn import METHODS

    def save(made: Comparison, folder: Path) -> None:
        made.save(folder / "comparison.json")
        for name, control in made.edits.items():
            control.save(folder / "edits" / name.replace(" ", "-"))

    comparison = _stage(
        run_folder,
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
        main=main,
        save=save,
        load=lambda folder: Comparison.load(folder / "comparison.json"),
    )
    if main:
        say_comparison(comparison)
        name, count = run_folder.folder / "comparison", len(comparison.curves)
        note(f"{name}: {count} dose curves, compared at {comparison.level:.3g}")


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


def _say_memory(model: Model, within: ComponentSet | None, hold: str, *, rank: int) -> None:
    """How many numbers are trained, and the memory of them with their gradient and Adam's two moments in float32."""
    total = sum(p.numel() for p in model.module.parameters())
    if hold == "adapter":
        from locedit.edit.adapter import linear_pieces

        count = rank * sum(sum(piece.shape) for piece in linear_pieces(model, within, log_left_out=False))
    elif hold == "modules":
        from locedit.edit.layer_training import places

        count = sum((2 * rank + 1) * place.width + rank for place in places(model, within))
    else:
        count = total if within is None else within.parameters("train")
    note(
        f"trained: {count:,} numbers beside {total:,} parameters, held as {hold}; "
        f"about {count * 16 / 2**20:.1f} MiB with their optimizer"
    )


def export_command(args: argparse.Namespace) -> None:
    """The edited model as an ordinary folder."""
    from locedit.edit import Edit

    refuse_overwrite(args.out, force=args.force)
    edit = Edit.load(args.edit)
    model = read_model(args)
    edit.export(model, args.out, force=args.force)
    base = f"peft.PeftModel.from_pretrained({model.name!r} as loaded by transformers, "
    loader = base if edit.kind == "adapter" else "transformers.AutoModel...from_pretrained("
    what = "a PEFT adapter of the unedited model" if edit.kind == "adapter" else "the edited model"
    note(f"{args.out}: {what}; load it with {loader}{str(args.out)!r})")

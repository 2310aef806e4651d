"""What each command of the command line does: read, call, save, and say where the result is."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from locedit.components import ComponentSet, Scores
from locedit.data import Task, read_task
from locedit.errors import LoceditError, nearest
from locedit.listing import measure_rows, methods_command, metrics_command
from locedit.models import Model, load
from locedit.registries import localizers, method_options
from locedit.runs import Run
from locedit.select import BUDGETS, check_budget
from locedit.storage import read_json, refuse_overwrite
from locedit.terminal import note, showing_progress, table


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed."""
    with showing_progress():
        _COMMANDS[args.command](args)
    return 0


# --- reading what the user gave --------------------------------------------------------------------------------------


def read_model(args: argparse.Namespace) -> Model:
    """The model of the command line, with its tokenizer."""
    return load(args.model, tokenizer=args.tokenizer, dtype=args.dtype, device=args.device, device_map=args.device_map)


def read_data(args: argparse.Namespace) -> Task:
    """The task of the command line, with fields renamed, forget items chosen and the chat template set."""
    task = read_task(args.data, args.fields)
    if args.where:
        task = dataclasses.replace(task, forget=task.forget.where(**_where(args.where)))
    return task.with_chat(args.chat) if args.chat != "off" else task


def _where(text: str) -> dict[str, list[str]]:
    wanted: dict[str, list[str]] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise LoceditError(f"--where {text!r}: {part!r} is not FIELD=VALUE")
        wanted.setdefault(name.strip(), []).append(value.strip())
    return wanted


def _about(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """What all stages of one run share; what each was made from stands in its stage.json."""
    return {
        "model": str(args.model),
        "fingerprint": model.fingerprint,
        "data": str(args.data),
        "fields": args.fields,
        "chat": args.chat,
    }


def _start(args: argparse.Namespace) -> tuple[Run, Model, Task]:
    run_folder = Run(folder=Path(args.out), force=args.force)
    model, task = read_model(args), read_data(args)
    return run_folder, model, task


def _key(model: Model, task: Task, **more: Any) -> dict[str, Any]:
    return {"model": model.fingerprint, "data": task.hash, **more}


def _reused(folder: str) -> None:
    note(f"{folder} is there already, made with the same settings")


# --- commands --------------------------------------------------------------------------------------------------------


def localize_command(args: argparse.Namespace) -> None:
    """Score, save, and select when a budget is given."""
    names = [name.strip() for name in args.method.split(",") if name.strip()]
    options = {name: method_options(localizers(), name, args.extra, several=names) for name in names}
    budget = {name: getattr(args, name) for name in BUDGETS if getattr(args, name) is not None}
    if budget:
        check_budget(**budget, sign=args.sign)
    elif args.minus:
        raise LoceditError(f"--minus needs a budget as well: one of {', '.join('--' + b for b in BUDGETS)}")
    run_folder, model, task = _start(args)
    found: list[tuple[Scores, ComponentSet | None]] = []
    for name in names:
        scores = _scored(run_folder, model, task, name, options[name])
        control = _control_scores(args, model, name, options[name])
        chosen = scores.select(**budget, sign=args.sign, minus=control) if budget else None
        found.append((scores, chosen))
    run_folder.write_once("run.json", _about(args, model))
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
        note(
            f"{name}: {len(task.forget)} items, about {_duration(seconds)} and {size / 2**30:.2f} GiB beside the model"
        )
        return localize(model, task, name, **options)

    return run_folder.stage(
        f"localize/{name}",
        _key(model, task, method=name, options=options),
        make,
        save=lambda scores, folder: scores.save(folder),
        load=Scores.load,
        on_reuse=_reused,
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


def edit_command(args: argparse.Namespace) -> None:
    """Make an edit inside a set, and its controls when asked for."""
    from locedit.edit import Edit
    from locedit.unlearn import METHODS, prepare, unlearn

    options = method_options(METHODS, args.method, args.extra)
    if args.controls and not args.within:
        raise LoceditError("--controls compares a set with random sets of the same size; give --within")
    asked = ComponentSet.load(args.within) if args.within else None
    prepare(args.method, read_data(args), within=asked, hold=args.hold, **options)
    run_folder, model, task = _start(args)
    within = None if asked is None else model.bind(asked)
    _say_memory(model, within, args.hold)
    edit = run_folder.stage(
        "edit",
        _key(model, task, method=args.method, options=options, hold=args.hold, within=_identity(within)),
        lambda: unlearn(model, task, args.method, within=within, hold=args.hold, **options),
        save=lambda made, folder: made.save(folder, force=True),
        load=Edit.load,
        on_reuse=_reused,
    )
    run_folder.write_once("run.json", _about(args, model))
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
        _key(model, task, edit=edit.digest, controls=args.controls),
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
        on_reuse=_reused,
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


def _control_edits(edit_folder: str, edit: Any) -> dict[str, Any]:
    """The edits of the random controls that stand beside an edit in its run folder; none made for another edit."""
    from locedit.edit import Edit

    comparison = Path(edit_folder).parent / "comparison"
    made_for = comparison / "stage.json"
    if not made_for.exists() or read_json(made_for).get("edit") != edit.digest:
        return {}
    folders = sorted((comparison / "edits").glob("*/edit.json"))
    return {path.parent.name.replace("-", " "): Edit.load(path.parent) for path in folders}


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
    run_folder, model, task = _start(args)
    edit = Edit.load(args.edit) if args.edit else None
    others = _control_edits(args.edit, edit) if edit and attacks else {}
    if others:
        note(f"also attacked: {', '.join(others)}, from {Path(args.edit).parent / 'comparison'}")
    evaluation = run_folder.stage(
        "evaluation",
        _key(
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
        on_reuse=_reused,
    )
    run_folder.write_once("run.json", _about(args, model))
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


def export_command(args: argparse.Namespace) -> None:
    """The edited model as an ordinary folder."""
    from locedit.edit import Edit

    refuse_overwrite(args.out, force=args.force)
    edit = Edit.load(args.edit)
    edit.export(read_model(args), args.out, force=args.force)
    note(f"{args.out}: the edited model; load it with transformers.AutoModel...from_pretrained({str(args.out)!r})")


def lab_command(args: argparse.Namespace) -> None:
    """A world and its model, as files."""
    from locedit.lab import lab, write_lab

    options: dict[str, Any] = {"arch": args.arch, "size": args.size, "seed": args.seed}
    there = Path(args.out) / "lab.json"
    if there.exists() and not args.force and read_json(there).get("key") == lab(args.world, **options).report["key"]:
        return _reused(args.out)
    refuse_overwrite(args.out, force=args.force)
    made = write_lab(args.out, world=args.world, force=args.force, **options)
    note(f"{args.out}: model/ and the tasks facts/ and private/")
    known = ", ".join(f"{name} {share:.3f}" for name, share in made.report["facts"]["forget"].items())
    return note(f"facts that the model answers, by format: {known}")


def check_command(args: argparse.Namespace) -> None:
    """What the model knows of the data and what can be done with it."""
    from locedit.check import check

    for line in check(read_model(args), read_data(args)):
        sys.stdout.write(line + "\n")


def demo_command(args: argparse.Namespace) -> None:
    """The whole flow on a lab model."""
    from locedit.demo import demo

    if args.extra:
        raise LoceditError(f"demo has no option --{next(iter(args.extra))}")
    page = demo(args.out, arch=args.arch, seed=args.seed, force=args.force)
    note(f"the report is {page}; open it in a browser")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


_COMMANDS = {
    "check": check_command,
    "demo": demo_command,
    "edit": edit_command,
    "evaluate": evaluate_command,
    "export": export_command,
    "lab": lab_command,
    "localize": localize_command,
    "methods": methods_command,
    "metrics": metrics_command,
    "report": report_command,
}

"""`locedit evaluate` and `locedit report`: measure, attack, and show."""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locedit.commands.inputs import about, key, read_data, reused, start
from locedit.data import Task
from locedit.errors import LoceditError, nearest
from locedit.listing import measure_rows
from locedit.models import Model
from locedit.options import fill, kinds, parse
from locedit.provenance import plain
from locedit.registries import method_options
from locedit.results import AttackResult, Evaluation
from locedit.runs import Run, read_back
from locedit.storage import atomic_folder, read_json, refuse_overwrite, write_json
from locedit.terminal import note, table


def evaluate_command(args: argparse.Namespace) -> None:
    """Measure before and after, attack, save; what a run folder has already is not done again."""
    from locedit.evaluate.alarms import alarms
    from locedit.report.ladder import rows

    plan = _plan(args)
    run_folder, model, task = start(args)
    if plan.edit is not None:
        plan.edit.check(model)  # one of another model is said before anything is measured
    others = _control_edits(args.edit, plan.edit) if plan.edit else {}
    if others and plan.attacks:
        note(f"also attacked: {', '.join(others)}, from {Path(args.edit).parent / 'comparison'}")
    evaluation = evaluated(run_folder, model, task, plan, others)
    run_folder.write_once("run.json", about(args, model))
    table(("measure", "before", "after", "n"), measure_rows(evaluation))
    for attack in evaluation.attacks:
        note(attack.sentence)
    if evaluation.attacks:
        table(("access", "attack", "share back", "what it says"), rows(evaluation))
    for line in alarms(evaluation):
        note(f"alarm: {line}")
    note(f"{run_folder.folder / 'evaluation'}: {len(evaluation.measures)} measures, {len(evaluation.attacks)} attacks")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the command line asks for, checked."""

    edit: Any
    metrics: list[str] | None
    own: dict[str, Any]
    "options of the metrics"
    attacks: dict[str, dict[str, Any]]
    "attack -> its options"
    seed: int


def _plan(args: argparse.Namespace) -> Plan:
    from locedit.attacks import ATTACKS, check_attacks
    from locedit.evaluate.suite import evaluate_options, plan_of

    names = _names("--attacks", args.attacks) or []
    for name in names:
        if name not in ATTACKS:
            raise LoceditError(f"unknown attack {name!r}; {nearest(name, ATTACKS)}")
    own, words = _words_of_metrics(args.extra, names)
    if words and not names:
        known = nearest(next(iter(words)), _metric_options())
        raise LoceditError(f"unknown option --{next(iter(words))}; of the metrics: {known}; others are of --attacks")
    options = {name: method_options(ATTACKS, name, words, several=names) for name in names}
    metrics = _names("--metrics", args.metrics)
    if names and not args.edit:
        raise LoceditError(f"attack {names[0]!r} needs an edit to attack; give --edit FOLDER")
    edit = _read_edit(args.edit) if args.edit else None
    task = read_data(args)
    check_attacks(names, edit=edit, options=options, task=task)
    plan_of(task, evaluate_options({"metrics": metrics, **own}), edited=edit is not None)
    return Plan(edit=edit, metrics=metrics, own=own, attacks=options, seed=args.seed)


def _names(option: str, text: str | None) -> list[str] | None:
    """The names between the commas; None where the option was not given."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise LoceditError(f"{option} {text!r} names nothing")
    return names


def evaluated(run_folder: Run, model: Model, task: Task, plan: Plan, others: dict[str, Any]) -> Evaluation:
    """The measures and every attack, each a stage of its own, and together what evaluation/ holds.

    Attacks that the folder has from an earlier command on the same model, data and edit stay in it.
    """
    from locedit.attacks import check_ready
    from locedit.evaluate import evaluate
    from locedit.evaluate.suite import attack_runner, evaluate_options

    digest = plan.edit.digest if plan.edit else None
    given: dict[str, Any] = {"metrics": plan.metrics, "seed": plan.seed, **plan.own}
    if (run_folder.folder / "evaluation").exists() and not (run_folder.folder / "measures").exists():
        refuse_overwrite(run_folder.folder / "evaluation", force=run_folder.force)
    check_ready(list(plan.attacks), model=model, task=task, edit=plan.edit, options=plan.attacks)
    measured = run_folder.stage(
        "measures",
        key(model, task, edit=digest, options=plain(evaluate_options(given))),
        lambda: evaluate(model, task, plan.edit, **given),
        save=lambda made, folder: made.save(folder / "evaluation.json"),
        load=lambda folder: Evaluation.load(folder / "evaluation.json"),
        on_reuse=reused,
    )
    attack = attack_runner(model, task, plan.edit, others=others)
    base = {"edit": digest, "others": {name: other.digest for name, other in others.items()}}
    for name, options in plan.attacks.items():
        run_folder.stage(
            f"attacks/{name}",
            key(model, task, **base, options=_filled(name, {"seed": plan.seed, **options})),
            lambda name=name, options=options: attack(name, {"seed": plan.seed, **options}),
            save=lambda made, folder: made.save(folder / "attack.json"),
            load=lambda folder: AttackResult.load(folder / "attack.json"),
            on_reuse=reused,
        )
    evaluation = dataclasses.replace(measured, attacks=_kept_attacks(run_folder, key(model, task, **base)))
    with atomic_folder(run_folder.folder / "evaluation", force=True) as folder:
        evaluation.save(folder / "evaluation.json")
        write_json(folder / "stage.json", {"edit": digest, "attacks": [made.name for made in evaluation.attacks]})
    return evaluation


def _filled(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """All options of an attack, so that a result made with other defaults is not taken for one made with these."""
    from locedit.attacks import ATTACKS

    return plain(fill(ATTACKS[name].options, options, method=name))


def _kept_attacks(run_folder: Run, base: dict[str, Any]) -> tuple[AttackResult, ...]:
    """All attacks in the folder on the same model, data, edit and controls, the least access first."""
    from locedit.attacks import ATTACKS

    found: list[AttackResult] = []
    for name in ATTACKS:
        folder = run_folder.folder / "attacks" / name
        if (folder / "stage.json").exists() and read_back(base).items() <= read_json(folder / "stage.json").items():
            found.append(AttackResult.load(folder / "attack.json"))
    return tuple(found)


def _metric_options() -> list[str]:
    """The options of evaluate() that have no argument of their own."""
    from locedit.evaluate.values import EvaluateOptions

    return [name for name in kinds(EvaluateOptions) if name not in ("metrics", "seed")]


def _words_of_metrics(words: dict[str, str], attacks: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The options of the metrics, and the words that are left for the attacks.

    A name that both have, such as batch_size, is the attacks' when something is attacked by the same command; what
    decides how written texts are drawn and judged is of both.
    """
    from locedit.attacks import ATTACKS
    from locedit.evaluate.values import EvaluateOptions
    from locedit.rewards import RewardOptions

    theirs = {option for name in attacks for option in kinds(ATTACKS[name].options)}
    shared = {*kinds(RewardOptions), "samples", "top_p"}
    own = [name for name in words if name in _metric_options() and (name in shared or name not in theirs)]
    left = {name: text for name, text in words.items() if name in theirs or name not in own}
    return parse(EvaluateOptions, {name: words[name] for name in own}, method="evaluate"), left


def _read_edit(folder: str) -> Any:
    from locedit.edit import Edit

    inside = Path(folder) / "edit"
    if not (Path(folder) / "edit.json").exists() and (inside / "edit.json").exists():
        raise LoceditError(f"--edit {folder}: is a run folder; its edit is {inside}")
    return Edit.load(folder)


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

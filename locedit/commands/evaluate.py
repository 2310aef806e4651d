"""`locedit evaluate` and `locedit report`: measure, attack, and show."""

import argparse
from pathlib import Path
from typing import Any

from locedit.commands.inputs import about, key, read_data, reused, start
from locedit.errors import LoceditError, nearest
from locedit.listing import measure_rows
from locedit.options import kinds, parse
from locedit.registries import method_options
from locedit.storage import read_json, refuse_overwrite
from locedit.terminal import note, table


def evaluate_command(args: argparse.Namespace) -> None:
    """Measure before and after, attack, save."""
    from locedit.attacks import ATTACKS, check_attacks
    from locedit.evaluate import evaluate
    from locedit.evaluate.alarms import alarms
    from locedit.evaluate.suite import evaluate_options, plan_of
    from locedit.results import Evaluation

    attacks = [name.strip() for name in args.attacks.split(",") if name.strip()]
    for name in attacks:
        if name not in ATTACKS:
            raise LoceditError(f"unknown attack {name!r}; {nearest(name, ATTACKS)}")
    own, words = _words_of_metrics(args.extra, attacks)
    if words and not attacks:
        known = nearest(next(iter(words)), _metric_options())
        raise LoceditError(f"unknown option --{next(iter(words))}; of the metrics: {known}; others are of --attacks")
    options = {name: method_options(ATTACKS, name, words, several=attacks) for name in attacks}
    metrics = [name.strip() for name in args.metrics.split(",")] if args.metrics else None
    if attacks and not args.edit:
        raise LoceditError(f"attack {attacks[0]!r} needs an edit to attack; give --edit FOLDER")
    edit = _read_edit(args.edit) if args.edit else None
    check_attacks(attacks, edit=edit, options=options)
    plan_of(read_data(args), evaluate_options({"metrics": metrics, **own}), edited=edit is not None)
    run_folder, model, task = start(args)
    if edit is not None:
        edit.check(model)  # one of another model is said before anything is measured
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
            **({"options": own} if own else {}),
        ),
        lambda: evaluate(
            model, task, edit, attacks, attack_options=options, others=others, metrics=metrics, seed=args.seed, **own
        ),
        save=lambda made, folder: made.save(folder / "evaluation.json"),
        load=lambda folder: Evaluation.load(folder / "evaluation.json"),
        on_reuse=reused,
    )
    run_folder.write_once("run.json", about(args, model))
    table(("measure", "before", "after", "n"), measure_rows(evaluation))
    for attack in evaluation.attacks:
        note(attack.sentence)
    for line in alarms(evaluation):
        note(f"alarm: {line}")
    note(f"{run_folder.folder / 'evaluation'}: {len(evaluation.measures)} measures, {len(evaluation.attacks)} attacks")


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

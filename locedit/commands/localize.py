"""`locedit localize`: check, estimate, score, save, choose, and say how far several methods agree."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from locedit.agreement import Agreement, agreement
from locedit.commands.inputs import about, duration, key, reused, start
from locedit.components import ComponentSet, Scores
from locedit.data import Task, read_task
from locedit.errors import LoceditError
from locedit.matching import overshoot
from locedit.models import Model
from locedit.registries import localizers, method_options
from locedit.runs import Run
from locedit.select import BUDGETS, check_budget
from locedit.terminal import note, table

Options = dict[str, dict[str, Any]]
"method -> its options"


def localize_command(args: argparse.Namespace) -> None:
    """Everything that can be wrong with any method is said before the first one runs."""
    names = list(dict.fromkeys(name.strip() for name in args.method.split(",") if name.strip()))
    if not names:
        raise LoceditError(f"--method {args.method!r} names no method; see `locedit methods`")
    options = {name: method_options(localizers(), name, args.extra, several=names) for name in names}
    budget = _budget(args, several=len(names) > 1)
    run_folder, model, task = start(args)
    _check_control(args, model, options)
    items = _estimate(run_folder, model, task, options)
    scores = {name: _scored(run_folder, model, task, name, options[name]) for name in names}
    sets = _chosen(args, model, scores, options, budget)
    run_folder.write_once("run.json", about(args, model))
    if sets:
        _refuse_other_set(run_folder, sets[names[0]])
    for name in names:
        _say_scores(run_folder.folder / "localize" / name, scores[name], items[name])
        if name in sets:
            sets[name].save(run_folder.folder / "localize" / name / "components.json")
            _say_fewer(name, sets[name], top=args.top, sign=args.sign)
    if len(names) > 1:
        _compare(run_folder, scores, sets, rule=_words(budget, args.sign))
    if sets:
        _save_set(run_folder, sets[names[0]], by=names[0])


# --- the budget ------------------------------------------------------------------------------------------------------


def _budget(args: argparse.Namespace, *, several: bool) -> dict[str, Any]:
    """The options of `select`; empty = no set is chosen."""
    budget: dict[str, Any] = {name: getattr(args, name) for name in BUDGETS if getattr(args, name) is not None}
    if args.params_like:
        if budget.keys() - {"shared"}:
            raise LoceditError(f"give one budget: --params-like or --{next(iter(budget))}")
        budget["params"] = ComponentSet.load(args.params_like).parameters()
    if "params" in budget:
        budget["fill"] = args.fill or ("reach" if several or args.params_like else "under")
    elif args.fill:
        raise LoceditError("--fill goes with --params or --params-like")
    if budget:
        check_budget(**budget, sign=args.sign)
    elif args.minus:
        raise LoceditError(f"--minus needs a budget as well: one of {', '.join('--' + b for b in BUDGETS)}")
    return budget


def _words(budget: Mapping[str, Any], sign: str) -> str:
    """The rule of the choice for the record; empty where none was asked for."""
    if not budget:
        return ""
    given = [f"{name} = {value:,}" if isinstance(value, int) else f"{name} = {value}" for name, value in budget.items()]
    return ", ".join([*given, f"sign = {sign}"])


def _chosen(
    args: argparse.Namespace, model: Model, scores: Mapping[str, Scores], options: Options, budget: dict[str, Any]
) -> dict[str, ComponentSet]:
    if not budget:
        return {}

    def choose(name: str) -> ComponentSet:
        control = _control_scores(args, model, name, options[name])
        return scores[name].select(**budget, sign=args.sign, minus=control)

    return _for_all(scores, choose, "cannot be selected from")


# --- all methods, checked first --------------------------------------------------------------------------------------


def _for_all(names: Mapping[str, Any] | Sequence[str], act: Callable[[str], Any], what: str) -> dict[str, Any]:
    """What `act` gives for each method; where several are asked for, one error says what is wrong with each."""
    found: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name in names:
        try:
            found[name] = act(name)
        except LoceditError as error:
            if len(names) == 1:
                raise
            wrong[name] = str(error)
    if wrong:
        told = "; ".join(text if name in text else f"{name}: {text}" for name, text in wrong.items())
        raise LoceditError(f"{len(wrong)} of {len(names)} methods {what}: {told}")
    return found


def _estimate(run_folder: Run, model: Model, task: Task, options: Options) -> dict[str, list[str]]:
    """Whether every method can run on this model and data, and what those that are not there yet will take.

    Gives the ids of the items that each reads.
    """
    from locedit.localize import estimate, prepare

    ready = _for_all(options, lambda name: prepare(model, task, name, **options[name]), "cannot run")
    there = _for_all(options, lambda name: run_folder.has(*_stage(model, task, name, options[name])), "cannot run")
    todo = [name for name in options if not there[name]]
    costs = _for_all(todo, lambda name: estimate(model, task, name, **options[name]), "cannot run")
    items = {name: [item.id for item in method.reads(read)[1]] for name, (method, read, _) in ready.items()}
    for name, (seconds, size) in costs.items():
        count = len(items[name])
        cost = f"about {duration(seconds)} and {size / 2**30:.2f} GiB beside the model"
        note(f"{name}: {count} item{'s' * (count > 1)}, {cost}")
    return items


def _stage(model: Model, task: Task, name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return f"localize/{name}", key(model, task, method=name, options=options)


def _scored(run_folder: Run, model: Model, task: Task, name: str, options: dict[str, Any]) -> Scores:
    from locedit.localize import localize

    return run_folder.stage(
        *_stage(model, task, name, options),
        lambda: localize(model, task, name, **options),
        save=lambda scores, folder: scores.save(folder),
        load=Scores.load,
        on_reuse=reused,
    )


def _control(args: argparse.Namespace) -> Task | None:
    if not args.minus:
        return None
    control = read_task(args.minus, args.fields)
    return control.with_chat(args.chat) if args.chat != "off" else control


def _check_control(args: argparse.Namespace, model: Model, options: Options) -> None:
    from locedit.localize import prepare

    if control := _control(args):
        _for_all(options, lambda name: prepare(model, control, name, **options[name]), "cannot read --minus")


def _control_scores(args: argparse.Namespace, model: Model, name: str, options: dict[str, Any]) -> Scores | None:
    from locedit.localize import localize

    control = _control(args)
    return None if control is None else localize(model, control, name, **options)


# --- what is written and said ----------------------------------------------------------------------------------------


def _refuse_other_set(run_folder: Run, chosen: ComponentSet) -> None:
    """The same set may be in components.json already; another one is not replaced without --force."""
    path = run_folder.folder / "components.json"
    if path.exists() and not run_folder.force and ComponentSet.load(path) != chosen:
        raise LoceditError(f"{path} holds another set; give --force or another --out")


def _save_set(run_folder: Run, chosen: ComponentSet, *, by: str) -> None:
    path = run_folder.folder / "components.json"
    chosen.save(path)
    beyond = overshoot(chosen)
    note(f"{path}: {chosen}, by {by}" + (f"; {beyond}" if beyond else ""))


def _say_scores(folder: Path, scores: Scores, items: Sequence[str]) -> None:
    """The best components, and what their scores do not say: items left out, answers that the model does not give."""
    from locedit.localize.known import warning

    note(f"{folder}: {scores}")
    if line := _left_out(scores.examples, items):
        note(line)
    if line := warning(scores):
        note(line)


def _say_fewer(name: str, chosen: ComponentSet, *, top: int | None, sign: str) -> None:
    if top is not None and len(chosen) < top:
        kind = "" if sign == "absolute" else f"{sign} "
        note(f"warning: {name}: {len(chosen)} of the {top} components asked for; no others have a {kind}score to go by")


def _left_out(scored: Sequence[str], items: Sequence[str]) -> str | None:
    """A line where a method scored only some of the items it was given; None where it reads none, or parts of them."""
    used = set(scored)
    left = [item for item in items if item not in used]
    if not used or not left or not used <= set(items):
        return None
    return f"warning: {len(left)} of {len(items)} items are not in the scores: {', '.join(left[:3])}" + (
        ", ..." if len(left) > 3 else ""
    )


def _compare(run_folder: Run, scores: Mapping[str, Scores], sets: Mapping[str, ComponentSet], *, rule: str) -> None:
    """The summary table, and localize/agreement.json."""
    path = run_folder.folder / "localize" / "agreement.json"
    found = agreement(scores, sets or None, rule=rule)
    found.save(path)
    if not sets:
        note(f"no budget was given; the sets that are compared: {found.rule}")
    first = found.methods[0]
    head = ("method", "unit", "components", "parameters", "beyond the budget", f"overlap with {first} (by chance)")
    table((*head, f"rank correlation with {first}"), [_row(found, i) for i in range(len(found.methods))])
    note(f"{path}: overlap and rank correlation of all pairs; `locedit report` draws them")


def _row(found: Agreement, i: int) -> tuple[str, ...]:
    sets, rank = found.sets, found.rank[i][0]
    over, budget = sets["overshoot"][i], sets["budget"][i]
    return (
        found.methods[i],
        sets["unit"][i],
        f"{sets['components'][i]:,} of {sets['of'][i]:,}",
        f"{sets['parameters'][i]:,}",
        "-" if over is None else f"{over:+,} ({over / budget:+.1%})",
        "-" if not i else f"{found.overlap[i][0]:.2f} ({found.chance[i][0]:.2f}) of {found.counted[i][0]}",
        "-" if not i or rank is None else f"{rank:.2f} over {found.ranked[i][0]}",
    )

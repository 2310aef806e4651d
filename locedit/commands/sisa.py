"""`locedit sisa train|delete|verify|evaluate`: members on shards and slices, exact deletion, fair predictions."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from locedit.classification import Verbaliser
from locedit.commands.inputs import bound
from locedit.components import ComponentSet
from locedit.data import Dataset, Task, read_task
from locedit.data.files import SUFFIXES, read_text
from locedit.errors import LoceditError
from locedit.models import Model, load
from locedit.options import parse
from locedit.storage import refuse_overwrite, require_folder
from locedit.terminal import note


def sisa_command(args: argparse.Namespace) -> None:
    """One of the four actions."""
    if args.extra and args.action != "train":
        raise LoceditError(f"sisa {args.action} has no option --{next(iter(args.extra)).replace('_', '-')}")
    {"train": _train, "delete": _delete, "verify": _verify, "evaluate": _evaluate}[args.action](args)


def _train(args: argparse.Namespace) -> None:
    from locedit.sisa import Record, SisaOptions, train
    from locedit.sisa.record import require_items

    options = parse(SisaOptions, args.extra, method="sisa")
    verbaliser = _verbaliser(args)
    require_folder(args.out)
    task = read_task(args.data)
    start = args.start or task.start
    if start is None:
        raise LoceditError(
            f"{args.data}: sisa trains from a model that has not seen the data: give --start MODEL, or put start/ "
            "(the model, or a file that names it) into the task's folder"
        )
    start = str(Path(start).resolve()) if Path(start).exists() else start
    asked = ComponentSet.load(args.within) if args.within else None
    require_items(task.forget, SisaOptions(**options))
    model = load(start, tokenizer=args.tokenizer, dtype=args.dtype, device=args.device)
    within = None if asked is None else bound(model, asked, args.within)
    data = dataclasses.replace(task.forget, source=str(Path(args.data).resolve()))
    made = train(model, data, args.out, verbaliser=verbaliser, within=within, hold=args.hold, **options)
    record = Record.load(args.out)
    if not made:
        return note(f"{args.out} is there already, made with the same settings")
    slices = f"{len(made)} of {len(record.shards) * record.options.slices} slices"
    steps = sum(one.steps for one in made)
    return note(f"{args.out}: {len(record.shards)} members on {len(record.contents)} items; {slices}, {steps} steps")


def _delete(args: argparse.Namespace) -> None:
    from locedit.sisa import Record, delete

    record = Record.load(args.folder)
    ids = _ids(args.ids)
    if not record.unfinished:
        record.without(ids)  # an unknown id is said before the model is loaded
    model, data = _model(args, record.start), _data(args, record.source)
    note(str(delete(args.folder, ids, model=model, data=data)))
    note(f"locedit sisa verify {args.folder} compares with training from the start")


def _verify(args: argparse.Namespace) -> None:
    from locedit.sisa import Record, verify

    record = Record.load(args.folder)
    shards = None if args.shards is None else _numbers(args.shards, len(record.shards))
    model, data = _model(args, record.start), _data(args, record.source)
    found = verify(args.folder, model=model, data=data, shards=shards)
    if not found.same:
        raise LoceditError(f"{args.folder}: {found}")
    note(f"{args.folder}: {found}")


def _evaluate(args: argparse.Namespace) -> None:
    from locedit.sisa import Ensemble, Record
    from locedit.sisa.evaluation import check_fair_data, evaluate_fair
    from locedit.sisa.fair_scores import require_fairlearn

    record = Record.load(args.folder)
    require_fairlearn()
    calibration, test = read_task(args.calibration).forget, read_task(args.test).forget
    record.verbaliser.number(args.positive or record.verbaliser.labels[0], by="--positive")
    check_fair_data(record, calibration, test)
    out = Path(args.out or Path(args.folder) / "evaluation")
    require_folder(out)
    refuse_overwrite(out / "fair.json", force=args.force)
    ensemble = Ensemble.load(args.folder, _model(args, record.start))
    table = evaluate_fair(args.folder, ensemble, calibration, test, positive=args.positive, seed=args.seed)
    table.save(out)
    sys.stdout.write(table.markdown())
    note(f"{out}: fair.json, fair.md, fair.csv")


# --- what the user gave ----------------------------------------------------------------------------------------------


def _verbaliser(args: argparse.Namespace) -> Verbaliser:
    """The template and the words of the command line, label=word,label=word."""
    given: dict[str, str] = {}
    for part in args.words.split(",") if args.words else ():
        label, equals, word = part.partition("=")
        if not equals:
            raise LoceditError(f"--words {args.words!r}: {part!r} is not LABEL=WORD")
        if label.strip() in given:
            raise LoceditError(f"--words {args.words!r}: {label.strip()!r} is given twice")
        given[label.strip()] = word if word.startswith(" ") else f" {word}"
    usual = Verbaliser()
    template = usual.template if args.template is None else args.template.replace("\\n", "\n")
    return Verbaliser(template=template, words=given or usual.words)


def _model(args: argparse.Namespace, start: str) -> Model:
    return load(args.start or start, tokenizer=args.tokenizer, dtype=args.dtype, device=args.device)


def _data(args: argparse.Namespace, source: str) -> Dataset:
    task: Task = read_task(args.data or source)
    return task.forget


def _ids(text: str) -> list[str]:
    """Ids out of a file, one a line, or a comma list."""
    if os.path.isfile(text):  # not Path's, which fails for a list that is too long for a name
        return [line.strip() for line in read_text(Path(text)).splitlines() if line.strip()]
    if Path(text).suffix in SUFFIXES:
        raise LoceditError(f"--ids {text}: no such file")
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str, count: int) -> list[int]:
    found = [int(part) if part.strip().isdigit() else -1 for part in text.split(",")]
    for number in found:
        if not 0 <= number < count:
            raise LoceditError(f"--shards {text!r}: shards are numbers from 0 to {count - 1}")
    return found

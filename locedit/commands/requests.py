"""`locedit edit --requests`: deletion requests one after another, all measured again at the end."""

import argparse
import dataclasses
import shutil
from pathlib import Path

from locedit.commands.inputs import about, bound, identity, key, read_data, reused, start
from locedit.components import ComponentSet
from locedit.data import Task, read_task
from locedit.errors import LoceditError, nearest
from locedit.registries import method_options
from locedit.storage import write_json
from locedit.terminal import note

FIELDS = ("owner", "group", "format")


def requests_command(args: argparse.Namespace) -> None:
    """Make one edit of all requests; a sequence that was stopped goes on where it was."""
    from locedit.commands.outcomes import say_requests
    from locedit.edit import Edit
    from locedit.unlearn import METHODS
    from locedit.unlearn.requests import check_requests, unlearn_requests

    METHODS.require(args.method)
    options = method_options(METHODS, args.method, args.extra)
    if args.controls:
        raise LoceditError("--controls compares one edit with random sets; leave it out with --requests")
    asked = ComponentSet.load(args.within) if args.within else None
    check_requests(_tasks(read_data(args), args), args.method, within=asked, hold=args.hold, **options)
    run_folder, model, task = start(args)
    within = None if asked is None else bound(model, asked, args.within)
    tasks = _tasks(task, args)
    made_from = key(
        model,
        task,
        method=args.method,
        options=options,
        hold=args.hold or METHODS[args.method].holds[0],
        within=identity(within),
        requests={name: one.hash for name, one in tasks.items()},
    )
    run_folder.has("edit", made_from)  # what another command left there is refused before anything is trained
    folder = run_folder.folder / "requests"
    if args.force and folder.exists():
        shutil.rmtree(folder)
    made = unlearn_requests(model, tasks, args.method, within=within, hold=args.hold, folder=folder, **options)
    write_json(folder / "requests.json", made.header())
    edit = run_folder.stage(
        "edit",
        made_from,
        lambda: made.edit,
        save=lambda chain, place: chain.save(place, force=True),
        load=Edit.load,
        on_reuse=reused,
    )
    run_folder.write_once("run.json", about(args, model))
    said = say_requests(made)
    note(f"{run_folder.folder / 'edit'}: {len(made.edits)} requests, {len(edit):,} numbers; {said}")


def _tasks(task: Task, args: argparse.Namespace) -> dict[str, Task]:
    """The requests by name: the forget data by a field, or theirs and then those of each file."""
    from locedit.unlearn.requests import requests_by

    if args.requests in FIELDS:
        return requests_by(task, args.requests)
    found = {task.name: task}
    for name in map(str.strip, args.requests.split(",")):
        if name in FIELDS:
            raise LoceditError(f"--requests {args.requests!r}: give one field alone ({', '.join(FIELDS)}), or files")
        if not name or not Path(name).exists():
            hint = nearest(name, FIELDS)
            raise LoceditError(f"--requests {args.requests!r}: {name!r} is neither a file nor a field; {hint}")
        other = read_task(name, args.fields)
        if args.chat != "off":
            other = other.with_chat(args.chat)
        if name in found:
            raise LoceditError(f"--requests: {name} is there twice")
        found[name] = dataclasses.replace(task, forget=other.forget)
    return found

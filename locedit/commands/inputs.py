"""What all commands share: reading what the user gave, and the record of a run."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from locedit.components import ComponentSet
from locedit.data import Task, read_task
from locedit.edit.parallel import Processes
from locedit.errors import LoceditError
from locedit.models import Model, load
from locedit.provenance import content_hash, named_files
from locedit.runs import Run
from locedit.storage import require_folder
from locedit.terminal import note


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


def about(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """What all stages of one run share; what each was made from stands in its stage.json."""
    return {
        "model": str(args.model),
        "fingerprint": model.fingerprint,
        "data": str(args.data),
        "fields": args.fields,
        "chat": args.chat,
    }


def start(args: argparse.Namespace) -> tuple[Run, Model, Task]:
    """The run folder, the model and the data; what is wrong with the folder or the data is said before loading.

    A folder of another model or other data is refused here, before anything is computed.
    """
    require_folder(args.out)
    task = read_data(args)
    run_folder, model = Run(folder=Path(args.out), force=args.force), read_model(args)
    run_folder.require_same("run.json", about(args, model))
    return run_folder, model, task


def bound(model: Model, components: ComponentSet, path: str) -> ComponentSet:
    """A set read from `path` with this model's slices; a line says so when it was found in another model."""
    try:
        found = model.bind(components)
    except LoceditError as error:
        raise LoceditError(f"{path}: {error}") from error
    if components.fingerprint not in ("", model.fingerprint) and Processes.now().main:
        known = components.provenance.model_name if components.provenance else ""
        there = f"{known or 'a model'} with fingerprint {components.fingerprint[:16]}"
        note(
            f"{path} was found in {there}, not in {model.name} with {model.fingerprint[:16]}: the same numbers may "
            "mean something else here"
        )
    return found


def key(model: Model, task: Task, **more: Any) -> dict[str, Any]:
    """What decides the result of a stage: model, data, the files behind both and behind options, and `more`."""
    files = named_files(more.get("options", {}))
    start = named_files({"start": task.start})
    return {"model": model.fingerprint, "data": task.hash, **more, **start} | ({"files": files} if files else {})


def identity(within: ComponentSet | None) -> dict[str, Any] | None:
    """What a stage's record says of a component set."""
    if within is None:
        return None
    return {"components": len(within), "hash": content_hash(within.to_json() | {"provenance": None})}


def reused(folder: str) -> None:
    note(f"{folder} is there already, made with the same settings")


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"

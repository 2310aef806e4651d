"""Training the members: slice after slice, each from the checkpoint of the slice before it.

A checkpoint is an Edit of the start. Training goes on from its float32 change, so nothing is lost to rounding between
slices in half precision either; optimizer and generator are new in every slice. So a slice depends on the items of its
own and earlier slices and on nothing else, and a checkpoint made again from the same items has the same bits on the
same machine with the same number of threads.
"""

import functools
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locedit import losses, progress
from locedit.classification import as_facts, require_verbaliser
from locedit.components import ComponentSet
from locedit.data.encode import Example, encode
from locedit.data.items import Dataset
from locedit.edit.adapter import Lora
from locedit.edit.checkpoint import checkpoints
from locedit.edit.edit import Edit
from locedit.edit.objective import Objective, Step
from locedit.edit.regions import Region
from locedit.edit.restrict import Deltas, Held
from locedit.edit.restrict import Path as How
from locedit.edit.train import train as minimise
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.provenance import versions
from locedit.sisa.hashes import tokens_hash
from locedit.sisa.record import Record

log = logging.getLogger(__name__)

UNFINISHED = "unfinished"
"""The folder of half-trained slices, each in a folder with the name of its key."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """One slice that was trained."""

    shard: int
    number: int
    "of the slice, from 0"
    items: int
    "trained on"
    steps: int


def learn(step: Step) -> dict[str, Tensor]:
    """Mean negative log-likelihood of the labels' words in nats."""
    return {"loss": losses.sequence_nll(step.score(step.forget), reduction="sum").mean()}


def checkpoint_folder(folder: Path, record: Record, shard: int, number: int) -> Path:
    """Where the checkpoint of a slice is."""
    return folder / f"shard-{shard}" / f"slice-{number}-{record.key(shard, number)}"


def make(
    folder: Path, record: Record, model: Model, data: Dataset, *, shards: Sequence[int] | None = None
) -> list[Made]:
    """Train every slice whose checkpoint is not there, and return what was trained; a kill loses a few steps at most.

    `shards` are those to look at, by default all.
    """
    require_start(record, model)
    examples = encoded(record, model, data)
    places = missing(folder, record, shards=shards)
    made: list[Made] = []
    for shard, number in places:
        progress.report("slices", len(made), len(places))
        with checkpoints(folder / UNFINISHED / record.key(shard, number)):
            edit = train_slice(folder, record, model, examples, shard=shard, number=number)
            edit.save(checkpoint_folder(folder, record, shard, number))
        items = len(record.trained_on(shard, number))
        made.append(Made(shard=shard, number=number, items=items, steps=edit.outcome["steps"]))
    if not missing(folder, record):
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    progress.report("slices", len(places), len(places))
    return made


def missing(folder: Path, record: Record, *, shards: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """(shard, slice) of the checkpoints that are not there, of these shards or of all."""
    wanted = set(range(len(record.shards)) if shards is None else shards)
    places = [place for place in record.places if place[0] in wanted]
    return [place for place in places if not checkpoint_folder(folder, record, *place).exists()]


def encoded(record: Record, model: Model, data: Dataset) -> dict[str, Example]:
    """The record's items by id, as the model is given them; LoceditError where that is not as in the training."""
    require_verbaliser(model, record.verbaliser, chat=data.chat)
    kept = data.replace(list(record.items(data).values()))
    examples = {example.id: example for example in encode(model, as_facts(kept, record.verbaliser))}
    for name, example in examples.items():
        if tokens_hash(example) != record.contents[name].tokens:
            raise LoceditError(
                f"item {name!r} has other tokens than when the record was made: another tokenizer or chat template"
            )
    return examples


def made_with(model: Model) -> dict[str, Any]:
    """What the bits of a training depend on beside its inputs."""
    return {"device": str(model.device), "threads": torch.get_num_threads(), **versions()}


def warn_elsewhere(record: Record, model: Model) -> None:
    """Log in what this machine differs from the one that the members were trained on."""
    now = made_with(model)
    others = [f"{name} {now.get(name)} for {was}" for name, was in record.made_with.items() if now.get(name) != was]
    if others:
        log.warning("the bits may differ though nothing is wrong, for the members were made with others: %s",
                    ", ".join(others))  # fmt: skip


def require_start(record: Record, model: Model) -> None:
    """Raise LoceditError when this is not the model that the record's members start from."""
    if model.fingerprint != record.fingerprint:
        raise LoceditError(
            f"the members start from the model with fingerprint {record.fingerprint[:16]!r} ({record.start}); "
            f"{model.name} has {model.fingerprint[:16]!r}"
        )


def train_slice(
    folder: Path, record: Record, model: Model, examples: Mapping[str, Example], *, shard: int, number: int
) -> Edit:
    """Train one slice from the checkpoint of the one before it, or from the start where there is none."""
    before = checkpoint_folder(folder, record, shard, number - 1)
    previous = Edit.load(before) if number and record.trained_on(shard, number - 1) else None
    names = record.trained_on(shard, number)
    steps = record.options.steps(number, items=len(names))
    options = record.options.training(steps=steps, seed=record.seed(shard, number))
    key = record.key(shard, number)
    objective = Objective(
        loss=learn,
        forget=[examples[name] for name in names],
        name="sisa",
        settings={"shard": shard, "slice": number, "key": key},
        hash=key,
        deltas=_continued(previous),
        held=functools.partial(_lora, model, record, previous) if record.hold == "adapter" else None,
    )
    return minimise(model, objective, within=record.within, options=options, hold=record.hold)


def _continued(previous: Edit | None) -> type[Deltas]:
    """Deltas that begin at the change of an earlier edit."""

    class Continued(Deltas):
        def __init__(self, model: Model, regions: Sequence[Region], *, path: How = "auto") -> None:
            super().__init__(model, regions, path=path)
            if previous is not None:
                changes = {patch.region.param: patch.delta for patch in previous.patches}
                _put(self, [changes[region.param] for region in self.regions])

    return Continued


def _lora(
    model: Model, record: Record, previous: Edit | None, within: ComponentSet | None, generator: torch.Generator
) -> Held:
    """LoRA factors that begin at those of an earlier edit."""
    rank, alpha = record.options.rank, record.options.alpha
    held = Lora(model, within, rank=rank, alpha=alpha, generator=generator)
    if previous is not None:
        _put(held, [part for one in previous.adapters for part in (one.down, one.up / held.scale)])
    return held


def _put(held: Held, values: Sequence[Tensor | None]) -> None:
    with torch.no_grad():
        for parameter, value in zip(held.parameters, values, strict=True):
            assert value is not None, "a trained edit holds its float32 change"
            parameter.copy_(value)

"""Deleting items: only their shards are trained again, each from the slice of its first deleted item.

What is left is what training without the items would have given, bit for bit; the certificate says what was done, and
`verify` repeats the training from the start and compares the bits.
"""

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locedit.data.items import Dataset
from locedit.models import Model
from locedit.sisa.record import Record
from locedit.sisa.stale import remove_stale, set_results_aside
from locedit.sisa.training import checkpoint_folder, encoded, made_with, make, require_start, warn_elsewhere
from locedit.storage import read_json, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What one request for deletion came to."""

    request: int
    "number of the request, from 1"
    ids: tuple[str, ...]
    copies: tuple[str, ...]
    "items with the text of a deleted one that were not asked for, so the members still learn it from them"
    shards: dict[str, int]
    "shard -> the first slice that was trained again, both from 0"
    slices_retrained: int
    slices: int
    "of all shards, like those above without the ones that have nothing to train on"
    steps_retrained: int
    steps: int
    "of training all shards from the start, with what is left"
    digests: dict[str, str]
    "shard -> the content of its member now, in 12 hexadecimal digits; empty = nothing is left of its data"
    made_with: dict[str, Any]
    "versions, device and threads: elsewhere the bits may differ"
    check: str = "locedit sisa verify"
    "the command that trains the affected shards from the start and compares all bits"

    def __str__(self) -> str:
        where = ", ".join(f"shard {shard} from slice {number}" for shard, number in self.shards.items())
        return (
            f"request {self.request}: {len(self.ids)} items deleted; trained again: {where}, "
            f"{self.slices_retrained} of {self.slices} slices, {self.steps_retrained} of {self.steps} steps"
        )


def delete(folder: str | Path, ids: Iterable[str], *, model: Model, data: Dataset) -> Certificate:
    """Delete items by id and train again what was trained on them.

    A deletion that was stopped in the middle is ended first; asked for once more, the same ids go on with it.
    """
    folder, record = Path(folder), Record.load(folder)
    names = list(dict.fromkeys(ids))
    if record.unfinished:
        certificate = _end(folder, record, model, data)
        if set(names) <= set(certificate.ids):
            return certificate
        record, names = Record.load(folder), [name for name in names if name not in certificate.ids]
    after = record.without(names)
    require_start(after, model)
    encoded(after, model, data)  # what is wrong with the data is said before anything is removed
    set_results_aside(folder, len(after.requests))
    after.save(folder)
    return _end(folder, after, model, data)


def certificates(folder: str | Path) -> list[dict[str, Any]]:
    """The certificates of all requests, in order."""
    paths = sorted(Path(folder).glob("certificate-*.json"), key=lambda path: int(path.stem.rpartition("-")[2]))
    return [read_json(path) for path in paths]


def first_slices(places: Iterable[Sequence[int]]) -> dict[int, int]:
    """Shard -> its first slice with one of the places.

    >>> first_slices([(2, 3), (0, 1), (2, 1)])
    {0: 1, 2: 1}
    """
    found: dict[int, int] = {}
    for shard, number in places:
        found[shard] = min(number, found.get(shard, number))
    return dict(sorted(found.items()))


def _end(folder: Path, record: Record, model: Model, data: Dataset) -> Certificate:
    """Do what is left to do of the last request."""
    request = record.requests[-1]
    warn_elsewhere(record, model)
    if request.copies:
        log.warning("the text of a deleted item is also that of %s, which stay", ", ".join(request.copies))
    remove_stale(folder, record)
    make(folder, record, model, data)  # of other shards what a training stopped in the middle has left out
    certificate = _certificate(folder, record, model)
    write_json(folder / f"certificate-{certificate.request}.json", dataclasses.asdict(certificate))
    done = dataclasses.replace(request, done=True)
    dataclasses.replace(record, requests=(*record.requests[:-1], done)).save(folder)
    return certificate


def _certificate(folder: Path, record: Record, model: Model) -> Certificate:
    request, everything = record.requests[-1], record.places
    affected = first_slices(request.places.values())
    again = [(shard, number) for shard, number in everything if shard in affected and number >= affected[shard]]
    return Certificate(
        request=len(record.requests),
        ids=tuple(request.places),
        copies=request.copies,
        shards={str(shard): number for shard, number in affected.items()},
        slices_retrained=len(again),
        slices=len(everything),
        steps_retrained=sum(_steps(record, *place) for place in again),
        steps=sum(_steps(record, *place) for place in everything),
        digests={str(shard): _digest(folder, record, shard) for shard in range(len(record.shards))},
        made_with=made_with(model),
    )


def _steps(record: Record, shard: int, number: int) -> int:
    return record.options.steps(number, items=len(record.trained_on(shard, number)))


def _digest(folder: Path, record: Record, shard: int) -> str:
    last = record.options.slices - 1
    if not record.trained_on(shard, last):
        return ""
    return read_json(checkpoint_folder(folder, record, shard, last) / "edit.json")["digest"]

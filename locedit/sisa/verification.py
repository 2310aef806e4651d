"""The check of a record's folder: training from the start on what is left, compared byte for byte."""

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from locedit.data.items import Dataset
from locedit.edit.edit import Edit
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.sisa.record import Record
from locedit.sisa.stale import CHECK, remove_checks, stale
from locedit.sisa.training import checkpoint_folder, made_with, make, missing, warn_elsewhere
from locedit.storage import write_json


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A comparison of checkpoints with those of a training from the start on what is left."""

    shards: tuple[int, ...]
    "compared"
    slices: int
    "compared, all bits of each"
    different: tuple[tuple[int, int], ...]
    "(shard, slice) whose bits are not the same"
    others: tuple[str, ...] = ()
    "checkpoints, half-written and half-trained ones too, that are not of the record: what was deleted may be in them"

    @property
    def same(self) -> bool:
        """Whether all bits are the same and no other checkpoint is there."""
        return not self.different and not self.others

    def __str__(self) -> str:
        if self.same:
            return f"{self.slices} slices of {len(self.shards)} shards: the same bits as trained from the start"
        where = ", ".join(f"shard {shard} slice {number}" for shard, number in self.different)
        found = [f"not the same bits as trained from the start: {where}"] if where else []
        if self.others:
            found.append(f"not of the record, to be removed: {', '.join(self.others)}")
        return "; ".join(found)


def verify(folder: str | Path, *, model: Model, data: Dataset, shards: Sequence[int] | None = None) -> Verified:
    """Train shards from the start on what the record holds, and compare every checkpoint's tensors byte for byte.

    By default the shards that something was deleted from, or all when nothing was. Checkpoints that are not of the
    record are looked for in all shards. The result is written to verified.json. On another machine or with other
    versions the bits may differ although nothing is wrong.
    """
    folder, record = Path(folder), Record.load(folder)
    record.require_finished(folder)
    wanted = _wanted(record, shards)
    if places := missing(folder, record, shards=wanted):
        again = "the next `locedit sisa delete` trains" if record.requests else "`locedit sisa train` again trains"
        raise LoceditError(f"{folder}: shard {places[0][0]} is not trained to its end; {again} what is missing")
    warn_elsewhere(record, model)
    remove_checks(folder)
    others = tuple(str(path.relative_to(folder)) for path in stale(folder, record))
    with tempfile.TemporaryDirectory(prefix=CHECK, dir=folder) as name:
        fresh = Path(name)
        made = make(fresh, record, model, data, shards=wanted)
        places = [(one.shard, one.number) for one in made]
        different = tuple(place for place in places if _bytes(fresh, record, place) != _bytes(folder, record, place))
    for place in places:
        if place not in different:
            Edit.load(checkpoint_folder(folder, record, *place))  # the same bits help nobody who cannot load them
    found = Verified(shards=tuple(wanted), slices=len(places), different=different, others=others)
    write_json(
        folder / "verified.json", dataclasses.asdict(found) | {"same": found.same, "made_with": made_with(model)}
    )
    return found


def _wanted(record: Record, shards: Sequence[int] | None) -> list[int]:
    touched = sorted({shard for request in record.requests for shard, _ in request.places.values()})
    wanted = list(shards) if shards is not None else touched or list(range(len(record.shards)))
    if not wanted:
        raise LoceditError("no shard to verify was given")
    for shard in wanted:
        if not 0 <= shard < len(record.shards):
            raise LoceditError(f"no shard {shard}; there are 0 to {len(record.shards) - 1}")
    return wanted


def _bytes(folder: Path, record: Record, place: tuple[int, int]) -> bytes:
    path = checkpoint_folder(folder, record, *place) / "tensors.safetensors"
    return path.read_bytes() if path.exists() else b""

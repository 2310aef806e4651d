"""Beginning a training record, or going on with one."""

from pathlib import Path
from typing import Any

from locedit.classification import Verbaliser, as_facts, require_verbaliser
from locedit.components import ComponentSet
from locedit.data.encode import encode
from locedit.data.items import Dataset
from locedit.edit.adapter import linear_pieces
from locedit.edit.regions import regions, require_same_model
from locedit.errors import LoceditError, nearest
from locedit.models import Model
from locedit.options import fill
from locedit.provenance import plain
from locedit.sisa.hashes import tokens_hash
from locedit.sisa.options import SisaOptions
from locedit.sisa.record import HOLDS, Record, new_record, require_items
from locedit.sisa.stale import remove_half_written, remove_stale
from locedit.sisa.training import Made, made_with, make, warn_elsewhere


def train(
    model: Model,
    data: Dataset,
    folder: str | Path,
    *,
    verbaliser: Verbaliser | None = None,
    within: ComponentSet | None = None,
    hold: str = "weights",
    **options: Any,
) -> list[Made]:
    """Train all members in a folder, and return the slices that were trained; the same call goes on where it stopped.

    `model` must not have seen the data. `within` restricts every member to a component set, `hold="adapter"` trains a
    LoRA there. `options` are those of SisaOptions. A whole-model checkpoint holds the new weights and their float32
    change: two models a slice, shards times slices of them. Raises LoceditError for a folder of other settings, and
    for items that have no id of their own but the number of their line.
    """
    verbaliser = verbaliser or Verbaliser()
    chosen = fill(SisaOptions, options, method="sisa")
    require_items(data, chosen)
    check(model, data, verbaliser=verbaliser, within=within, hold=hold)
    record = new_record(
        data,
        chosen,
        tokens={example.id: tokens_hash(example) for example in encode(model, as_facts(data, verbaliser))},
        start=model.name,
        fingerprint=model.fingerprint,
        verbaliser=verbaliser,
        hold=hold,
        within=within,
        made_with=made_with(model),
    )
    folder = Path(folder)
    if (folder / "record.json").exists():
        record = _same(folder, record)
        warn_elsewhere(record, model)
        remove_stale(folder, record)
    else:
        _require_new(folder)
        record.save(folder)
    return make(folder, record, model, data)


def check(model: Model, data: Dataset, *, verbaliser: Verbaliser, within: ComponentSet | None, hold: str) -> None:
    """Raise LoceditError for what cannot be trained; nothing is trained."""
    if hold not in HOLDS:
        raise LoceditError(f"hold={hold!r}; {nearest(hold, HOLDS)}")
    as_facts(data, verbaliser)
    require_verbaliser(model, verbaliser, chat=data.chat)
    if within is not None:
        require_same_model(model, within)
        regions(within, role="train")
    if hold == "adapter":
        linear_pieces(model, within, log_left_out=False)


def _require_new(folder: Path) -> None:
    """An empty folder, or one with what a start that was killed before its record was written has left."""
    if folder.is_dir() and all(path.name == "within.json" or path.name.startswith(".") for path in folder.iterdir()):
        remove_half_written(folder)
        (folder / "within.json").unlink(missing_ok=True)
    elif folder.exists():
        raise LoceditError(f"{folder} holds something that is no training record; give another folder")


def _same(folder: Path, record: Record) -> Record:
    """The record that is there, when it was made from the same things."""
    there = Record.load(folder)
    there.require_finished(folder)
    if there.requests:
        raise LoceditError(f"{folder}: items were deleted from this training; give another folder")
    if _items(there) != _items(record):
        raise LoceditError(f"{folder} holds a training on other items; give another folder")
    for name in ("fingerprint", "hold", "chat"):
        if getattr(there, name) != getattr(record, name):
            raise LoceditError(f"{folder} holds a training with another {name}; give another folder")
    for name in ("options", "verbaliser"):
        old, new = plain(getattr(there, name)), plain(getattr(record, name))
        for key in new:
            if old[key] != new[key]:
                raise LoceditError(
                    f"{folder} holds a training with {key}={old[key]!r}, not {new[key]!r}; give another folder"
                )
    if there.contents != record.contents:
        raise LoceditError(
            f"{folder} holds a training on other tokens of these items: another tokenizer or chat template; give "
            "another folder"
        )
    if there.shards != record.shards:
        raise LoceditError(f"{folder} holds a training on these items in another order; give another folder")
    if any(there.key(shard, 0) != record.key(shard, 0) for shard in range(len(there.shards))):
        raise LoceditError(f"{folder} holds a training in another component set; give another folder")
    return there


def _items(record: Record) -> dict[str, str]:
    return {name: one.item for name, one in record.contents.items()}

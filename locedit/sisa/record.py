"""The training record: which item is in which slice of which shard, and what every checkpoint was trained on."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from locedit.classification import Verbaliser
from locedit.components import ComponentSet
from locedit.data.files import SUFFIXES
from locedit.data.items import Dataset, LabelledText
from locedit.errors import LoceditError, nearest
from locedit.provenance import content_hash, plain
from locedit.sisa.hashes import Hashes, item_hash, text_hash
from locedit.sisa.options import SisaOptions
from locedit.storage import read_json, write_json

FORMAT = 2
HOLDS = ("weights", "adapter")

Cut = tuple[tuple[tuple[str, ...], ...], ...]
"""Shard -> slice -> ids."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request for deletion."""

    places: dict[str, tuple[int, int]]
    "id -> the shard and the slice that it was in, from 0"
    copies: tuple[str, ...] = ()
    "items with the text of a deleted one that were not asked for and stay"
    done: bool = False
    "whether everything has been trained again"


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """All that decides the members of an ensemble; kept as record.json, with within.json beside it."""

    start: str
    "the model before it saw the data: a folder or a hub id"
    fingerprint: str
    "of that model"
    source: str
    "where the data came from"
    verbaliser: Verbaliser
    options: SisaOptions
    hold: str
    "weights or adapter"
    within: ComponentSet | None
    "where members may differ from the start; None = anywhere"
    shards: Cut
    "ids that are still in the training data"
    contents: dict[str, Hashes]
    "of every id above"
    chat: str = "off"
    "how prompts reach the model, as in Dataset"
    requests: tuple[Request, ...] = ()
    made_with: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    "versions, device and threads of the training: elsewhere the bits may differ"

    @property
    def unfinished(self) -> bool:
        """Whether a deletion was stopped in the middle."""
        return bool(self.requests) and not self.requests[-1].done

    def require_finished(self, folder: str | Path) -> None:
        """Raise LoceditError after a deletion that was stopped in the middle."""
        if self.unfinished:
            raise LoceditError(
                f"{folder}: a deletion was stopped in the middle; give `locedit sisa delete` again first"
            )

    @property
    def deleted(self) -> set[str]:
        """Ids that were asked to be deleted."""
        return {name for request in self.requests for name in request.places}

    def trained_on(self, shard: int, number: int) -> list[str]:
        """Ids that the checkpoint of a slice has been trained on: those of its own and of all slices before it."""
        return [name for part in self.shards[shard][: number + 1] for name in part]

    @property
    def places(self) -> list[tuple[int, int]]:
        """(shard, slice) of every checkpoint; a slice without any items, own or earlier, has none."""
        every = ((shard, number) for shard in range(len(self.shards)) for number in range(self.options.slices))
        return [place for place in every if self.trained_on(*place)]

    def key(self, shard: int, number: int) -> str:
        """Name of the checkpoint of a slice: a hash of exactly what it is trained on, and how."""
        parts = [[(name, self.contents[name]) for name in part] for part in self.shards[shard][: number + 1]]
        return content_hash(
            {
                "start": self.fingerprint,
                "within": None if self.within is None else content_hash(self.within.to_json() | {"provenance": None}),
                "hold": self.hold,
                "options": plain(self.options),
                "verbaliser": plain(self.verbaliser),
                "place": [shard, number],
                "items": [[[name, one.item, one.tokens] for name, one in part] for part in parts],
            }
        )

    def seed(self, shard: int, number: int) -> int:
        """Of a slice's generator, whatever was deleted."""
        return int(content_hash([self.options.seed, shard, number]), 16) % 2**31

    def place(self, name: str) -> tuple[int, int]:
        """Shard and slice of an item that is still there."""
        for shard, parts in enumerate(self.shards):
            for number, part in enumerate(parts):
                if name in part:
                    return shard, number
        if name in self.deleted:
            raise LoceditError(f"item {name!r} has been deleted already")
        raise LoceditError(f"no item {name!r} in the training record; {nearest(name, list(self.contents)[:8])}, ...")

    def without(self, names: Iterable[str]) -> "Record":
        """The record after one more request; every other item stays in its shard and slice."""
        gone = {name: self.place(name) for name in names}
        if not gone:
            raise LoceditError("nothing to delete: no id was given")
        shards = tuple(tuple(tuple(n for n in part if n not in gone) for part in parts) for parts in self.shards)
        if not any(part for parts in shards for part in parts):
            raise LoceditError("nothing would be left to train on; without any data the model is the start itself")
        contents = {name: value for name, value in self.contents.items() if name not in gone}
        texts = {self.contents[name].text for name in gone}
        copies = tuple(name for name, value in contents.items() if value.text in texts)
        request = Request(places=gone, copies=copies)
        return dataclasses.replace(self, shards=shards, contents=contents, requests=(*self.requests, request))

    def items(self, data: Dataset) -> dict[str, LabelledText]:
        """The items of the record by id; LoceditError when one is missing or is not the same any more."""
        self.require_chat(data)
        found = {item.id: item for item in data.of(LabelledText, by="sisa")}
        for name, content in self.contents.items():
            if name not in found:
                raise LoceditError(f"{data.source}: item {name!r} of the training record is not there")
            if item_hash(found[name]) != content.item:
                raise LoceditError(f"{data.source}: item {name!r} is not the same as when the record was made")
        return {name: found[name] for name in self.contents}

    def require_chat(self, data: Dataset) -> None:
        """Raise LoceditError when the data's prompts would reach the model in another form than in training."""
        if data.chat != self.chat:
            raise LoceditError(f"{data.source}: chat={data.chat!r}; the members were trained with chat={self.chat!r}")

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write record.json, and within.json where there is a set."""
        if self.within is not None and not (Path(folder) / "within.json").exists():
            self.within.save(Path(folder) / "within.json")
        value: dict[str, Any] = {
            "format": FORMAT,
            "start": self.start,
            "fingerprint": self.fingerprint,
            "source": self.source,
            "verbaliser": plain(self.verbaliser),
            "options": plain(self.options),
            "hold": self.hold,
            "within": self.within is not None,
            "chat": self.chat,
            "shards": [{f"slice {n}": list(part) for n, part in enumerate(parts)} for parts in self.shards],
            "contents": {name: plain(value) for name, value in self.contents.items()},
            "requests": [plain(one) for one in self.requests],
            "made_with": self.made_with,
        }
        write_json(Path(folder) / "record.json", value)

    @classmethod
    def load(cls, folder: str | Path) -> "Record":
        """Read what `save` wrote."""
        path = Path(folder) / "record.json"
        value = read_json(path)
        try:
            if value["format"] != FORMAT:
                raise LoceditError(f"{path}: record format {value['format']!r}; this version reads {FORMAT}")
            record = cls(
                start=value["start"],
                fingerprint=value["fingerprint"],
                source=value["source"],
                verbaliser=Verbaliser(**value["verbaliser"]),
                options=SisaOptions(**value["options"]),
                hold=value["hold"],
                within=ComponentSet.load(Path(folder) / "within.json") if value["within"] else None,
                shards=tuple(tuple(tuple(part) for part in parts.values()) for parts in value["shards"]),
                contents={name: Hashes(**one) for name, one in value["contents"].items()},
                chat=value.get("chat", "off"),
                requests=tuple(_request(one) for one in value["requests"]),
                made_with=value["made_with"],
            )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise LoceditError(f"{path}: not a training record ({error!r})") from error
        record._require_whole(path)
        return record

    def _require_whole(self, path: Path) -> None:
        """Raise LoceditError where the ids in the shards are not those of the contents, each once."""
        held = Counter(name for parts in self.shards for part in parts for name in part)
        if twice := [name for name, count in held.items() if count > 1]:
            raise LoceditError(f"{path}: item {twice[0]!r} is in the shards more than once")
        if alone := sorted(held.keys() ^ self.contents.keys()):
            raise LoceditError(f"{path}: item {alone[0]!r} is in the shards or the contents, and not in both")


def _request(value: Mapping[str, Any]) -> Request:
    places = {name: (at[0], at[1]) for name, at in value["places"].items()}
    return Request(places=places, copies=tuple(value["copies"]), done=value["done"])


def require_items(data: Dataset, options: SisaOptions) -> tuple[LabelledText, ...]:
    """The items; LoceditError for too few, and for ids that are line numbers; needs no model.

    A line number names another item once a deleted line is taken out of the file.
    """
    items = data.of(LabelledText, by="sisa")
    if len(items) < options.shards * options.slices:
        raise LoceditError(
            f"{data.source}: {len(items)} items cannot be cut into {options.shards} shards of {options.slices} slices"
        )
    for item in items:
        if _LINE.fullmatch(item.id):
            raise LoceditError(
                f"{data.source}: {item.id!r} has only its line for a name, which changes when a deleted line is taken "
                'out; give every item an "id" of its own'
            )
        item_hash(item)  # raises for what is no text
    return items


_LINE = re.compile(f".*({'|'.join(map(re.escape, SUFFIXES))}):[0-9]+")


def new_record(data: Dataset, options: SisaOptions, *, tokens: Mapping[str, str], **fields: Any) -> Record:
    """The record of data of which nothing is deleted: shuffled by the seed, cut into shards, and each into slices.

    `tokens` are the hashes of what the model is given of each item.
    """
    items = require_items(data, options)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(options.seed)).tolist()
    shuffled = [items[at].id for at in order]
    shards = tuple(tuple(tuple(part) for part in cut(shard, options.slices)) for shard in cut(shuffled, options.shards))
    contents = {item.id: Hashes(item=item_hash(item), text=text_hash(item), tokens=tokens[item.id]) for item in items}
    return Record(source=data.source, options=options, shards=shards, contents=contents, chat=data.chat, **fields)


def cut(items: Sequence[str], parts: int) -> list[Sequence[str]]:
    """Neighbouring parts that end at n * (k + 1) // parts, so that every item is in one, the last ones too.

    >>> cut("abcde", 3)
    ['a', 'bc', 'de']
    """
    ends = [len(items) * (number + 1) // parts for number in range(parts)]
    return [items[start:end] for start, end in zip([0, *ends], ends, strict=False)]

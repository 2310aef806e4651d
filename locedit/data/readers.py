"""Files to data sets: JSON lines, JSON lists, tables, plain lines and arrays."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from locedit.data.bias import is_stereoset, read_stereoset
from locedit.data.fields import Place, Record, build, detect, parse_fields, parse_json, rename
from locedit.data.files import SUFFIXES, check_exists, read_text
from locedit.data.items import Dataset, Item
from locedit.data.published import published_format, read_arrays
from locedit.data.tables import DELIMITERS, read_table, unpack
from locedit.data.winogender import pair_format
from locedit.errors import LoceditError


def read_facts(file: str | Path, fields: Mapping[str, str] | str | None = None) -> Dataset:
    """Facts, private texts, pairs or texts from one file; its first line decides which.

    JSON lines, a JSON list or a table (.csv, .tsv) in locedit's fields or a published format, StereoSet's JSON, a list
    of strings, plain lines (.txt), or extraction-challenge token ids (.npy). In tables lists are written as JSON.
    `fields` renames: `prompt=question,answer=response`.
    """
    renames = parse_fields(fields)
    data, used = read_file(Path(file), renames)
    check_used(renames, used, source=str(file))
    return data


def read_file(path: Path, renames: Mapping[str, str], *, plain_lines: bool = False) -> tuple[Dataset, set[str]]:
    """A data set, and the foreign field names that occurred. `plain_lines`: lines that are not JSON are texts."""
    check_exists(path)
    if path.suffix not in SUFFIXES:
        raise LoceditError(f"{path}: unknown kind of file {path.suffix!r}: choices: {', '.join(SUFFIXES)}")
    if path.suffix == ".npy":
        return read_arrays(path), set()
    text = read_text(path)
    if path.suffix == ".txt" or (plain_lines and text.lstrip()[:1] not in ("{", "[", '"')):
        lines: list[tuple[Place, object]] = [(place, line.strip()) for place, line in _lines(path, text)]
        return _dataset(path, [_plain(place, line) for place, line in lines]), set()
    if path.suffix == ".json" and is_stereoset(text):
        return _dataset(path, read_stereoset(path, text)), set()
    records = _records(path, text)
    if isinstance(records[0][1], str):
        return _dataset(path, [_plain(place, value) for place, value in records]), set()
    return _read_records(path, records, renames)


def check_used(renames: Mapping[str, str], used: set[str], *, source: str) -> None:
    """A renamed field that no line has is a mistake in the option."""
    wanted = {
        theirs for name, field in renames.items() for theirs in (field.split("+") if name == "ignore" else [field])
    }
    missing = sorted(wanted - used)
    if missing:
        raise LoceditError(f"--fields: no line of {source} has a field {missing[0]!r}")


def _lines(path: Path, text: str) -> list[tuple[Place, str]]:
    """Lines that are not blank, with their places."""
    numbered = enumerate(text.split("\n"), start=1)
    return [(_place(path, number), line.strip("\r")) for number, line in numbered if line.strip()]


def _place(path: Path, number: int) -> Place:
    return Place(file=str(path), number=number, name=f"{path.name}:{number}")


def _records(path: Path, text: str) -> list[tuple[Place, object]]:
    """The values of a table, of a JSON list, or of JSON lines."""
    if path.suffix in DELIMITERS:
        return list(read_table(path, text))
    if text.lstrip().startswith("["):
        values = parse_json(_place(path, 1), text)
        assert isinstance(values, list)
        if not values:
            raise LoceditError(f"{path}: is an empty list")
        return [(_place(path, number), value) for number, value in enumerate(cast(list[object], values), start=1)]
    return [(place, parse_json(place, line)) for place, line in _lines(path, text)]


def _read_records(
    path: Path, records: list[tuple[Place, object]], renames: Mapping[str, str]
) -> tuple[Dataset, set[str]]:
    """Objects of one kind, which the first of them decides."""
    used: set[str] = set()
    renamed: list[tuple[Place, Record]] = []
    for place, value in records:
        if not isinstance(value, dict):
            raise place.error(f"is {value!r:.60}, wanted an object with fields")
        record, seen = rename(place, cast(Record, value), renames)
        used |= seen
        renamed.append((place, record))
    first_place, first = renamed[0]
    published = published_format(first)
    if published is not None:
        return _dataset(path, [(place, published.read(place, record)) for place, record in renamed]), used
    pairs = pair_format(first)
    if pairs is not None:
        return _dataset(path, pairs.read(path, renamed)), used
    if path.suffix in DELIMITERS:
        renamed = [(place, unpack(place, record)) for place, record in renamed]
    kind = detect(first_place, first)
    return _dataset(path, [(place, build(place, kind, record)) for place, record in renamed]), used


def _plain(place: Place, value: object) -> tuple[Place, Item]:
    if not isinstance(value, str):
        raise place.error(f"is {value!r:.60}, wanted a text like the first line")
    return place, build(place, "plain", {"text": value})


def _dataset(path: Path, items: list[tuple[Place, Item]]) -> Dataset:
    """Ids are all different; the second place of one that is not is named."""
    seen: dict[str, Place] = {}
    for place, item in items:
        if item.id in seen:
            raise place.error(f"was given before, in {seen[item.id].name}", field="id", value=item.id)
        seen[item.id] = place
    return Dataset(items=tuple(item for _, item in items), source=str(path))

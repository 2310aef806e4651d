"""Files to data sets: JSON lines, JSON lists, plain lines and arrays."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from locedit.data.fields import Place, Record, build, detect, parse_fields, parse_json, rename
from locedit.data.items import Dataset, Item, PlainText
from locedit.data.published import published_format, read_arrays
from locedit.errors import LoceditError

SUFFIXES = (".jsonl", ".json", ".txt", ".npy")


def read_facts(file: str | Path, fields: Mapping[str, str] | str | None = None) -> Dataset:
    """Facts, private texts, pairs or texts from one file; its first line decides which.

    JSON lines or a JSON list in locedit's fields or a published format, a list of strings, plain lines (.txt), or
    extraction-challenge token ids (.npy). `fields` renames: `prompt=question,answer=response`.
    """
    renames = parse_fields(fields)
    data, used = read_file(Path(file), renames)
    check_used(renames, used, source=str(file))
    return data


def read_file(path: Path, renames: Mapping[str, str], *, plain_lines: bool = False) -> tuple[Dataset, set[str]]:
    """A data set, and the foreign field names that occurred. `plain_lines`: lines that are not JSON are texts."""
    _check_exists(path)
    if path.suffix not in SUFFIXES:
        raise LoceditError(f"{path}: unknown kind of file {path.suffix!r}: choices: {', '.join(SUFFIXES)}")
    if path.suffix == ".npy":
        return read_arrays(path), set()
    text = read_text(path)
    if path.suffix == ".txt" or (plain_lines and text.lstrip()[:1] not in ("{", "[", '"')):
        lines: list[tuple[Place, object]] = [(place, line.strip()) for place, line in _lines(path, text)]
        return _dataset(path, [_plain(place, line) for place, line in lines]), set()
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


def read_text(path: Path) -> str:
    """A file's text, which must be UTF-8 and not empty; a byte order mark is left out."""
    _check_exists(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LoceditError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte {content[error.start]:#04x} at offset {error.start}"
        raise LoceditError(f"{path}:{line}: {byte} is not UTF-8: save the file as UTF-8") from None
    if not text.strip():
        raise LoceditError(f"{path}: is empty")
    return text


def _check_exists(path: Path) -> None:
    if path.is_dir():
        raise LoceditError(f"{path}: is a folder; a file of facts was wanted (a folder is a task)")
    if not path.exists():
        beside = sorted(file.name for file in path.parent.glob("*") if file.suffix in SUFFIXES)[:8]
        around = f"; beside it: {', '.join(beside)}" if beside else ""
        raise LoceditError(f"{path}: no such file{around}")


def _lines(path: Path, text: str) -> list[tuple[Place, str]]:
    """Lines that are not blank, with their places."""
    numbered = enumerate(text.split("\n"), start=1)
    return [(_place(path, number), line.strip("\r")) for number, line in numbered if line.strip()]


def _place(path: Path, number: int) -> Place:
    return Place(file=str(path), number=number, name=f"{path.name}:{number}")


def _records(path: Path, text: str) -> list[tuple[Place, object]]:
    """The values of a JSON list, or of JSON lines."""
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


def plain_texts(texts: list[str], *, source: str) -> Dataset:
    """Plain texts held in memory as a data set."""
    return Dataset(
        items=tuple(PlainText(text=text, id=f"{source}:{number}") for number, text in enumerate(texts, start=1)),
        source=source,
    )

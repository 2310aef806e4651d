"""The fields of each kind of line, checked one by one: a bad line stops with its place, field, value and reason."""

import dataclasses
import difflib
import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from locedit.data.items import KINDS, Item, Neighbour, PrivateText
from locedit.errors import LoceditError, nearest

Record = dict[str, object]
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a record stands."""

    file: str
    number: int
    "of the line, or of the item in a JSON list, from 1"
    name: str
    "the id of an item without one: file:line"

    def error(self, reason: str, *, field: str | None = None, value: object = None) -> LoceditError:
        """One line that says where, what and why."""
        about = "" if field is None else f"field {field!r}: {_short.repr(value)} "
        return LoceditError(f"{self.file}:{self.number}: {about}{reason}")


Check = Callable[[Place, str, Any], Any]


def check_text(place: Place, field: str, value: object) -> str:
    """A string with something in it that can be written as UTF-8."""
    if not isinstance(value, str):
        raise place.error(f"is not a text but {_type(value)}", field=field, value=value)
    if not value.strip():
        raise place.error("is empty", field=field, value=value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise place.error("holds half of a surrogate pair", field=field, value=value) from None
    return value


def check_name(place: Place, field: str, value: object) -> str:
    """A string or a whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return check_text(place, field, value)


def check_texts(place: Place, field: str, value: object) -> tuple[str, ...]:
    return tuple(check_text(place, field, entry) for entry in _list(place, field, value))


def check_neighbours(place: Place, field: str, value: object) -> tuple[Neighbour, ...]:
    """A list of {prompt, answer}."""
    found: list[Neighbour] = []
    for entry in _list(place, field, value):
        if not isinstance(entry, dict) or set(cast(Record, entry)) != {"prompt", "answer"}:
            raise place.error("is not {prompt, answer}", field=field, value=entry)
        near = cast(Record, entry)
        found.append(
            Neighbour(
                prompt=check_text(place, f"{field}.prompt", near["prompt"]),
                answer=check_text(place, f"{field}.answer", near["answer"]),
            )
        )
    return tuple(found)


def check_spans(place: Place, field: str, value: object) -> tuple[tuple[int, int, str], ...]:
    """A list of [start, end, label] in characters, at least one, none empty."""
    found: list[tuple[int, int, str]] = []
    for entry in _list(place, field, value):
        match entry:
            case [int(start), int(end), str(label)] if not isinstance(start, bool) and not isinstance(end, bool):
                if start >= end:
                    raise place.error("is an empty span", field=field, value=entry)
                found.append((start, end, check_text(place, field, label)))
            case _:
                raise place.error("is not [start, end, label]", field=field, value=entry)
    if not found:
        raise place.error("has no span", field=field, value=value)
    return tuple(found)


_shared: dict[str, Check] = {"id": check_name, "owner": check_name, "group": check_name, "format": check_name}
FIELDS: dict[str, dict[str, Check]] = {
    "fact": {
        "prompt": check_text,
        "answer": check_text,
        "subject": check_text,
        "paraphrases": check_texts,
        "answer_paraphrases": check_texts,
        "wrong": check_texts,
        "new_answer": check_text,
        "neighbours": check_neighbours,
        **_shared,
    },
    "private": {"text": check_text, "spans": check_spans, **_shared},
    "contrast": {
        "advantaged": check_text,
        "disadvantaged": check_text,
        "neutral": check_text,
        "unrelated": check_text,
        **_shared,
    },
    "patch": {"clean": check_text, "corrupt": check_text, "answer": check_text, "wrong": check_text, **_shared},
    "labelled": {"text": check_text, "label": check_name, **_shared},
    "plain": {"text": check_text, **_shared},
}
REQUIRED: dict[str, tuple[str, ...]] = {
    "fact": ("prompt", "answer"),
    "private": ("text", "spans"),
    "contrast": ("advantaged", "disadvantaged"),
    "patch": ("clean", "corrupt", "answer", "wrong"),
    "labelled": ("text", "label"),
    "plain": ("text",),
}


def detect(place: Place, record: Record) -> str:
    """The kind of a line, from its fields: the one with the most of its required fields, all of them if possible."""
    present = {field: sum(name in record for name in names) for field, names in REQUIRED.items()}
    complete = [kind for kind, names in REQUIRED.items() if present[kind] == len(names)]
    best = max(complete or REQUIRED, key=lambda kind: present[kind])
    if not present[best]:
        wanted = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in REQUIRED.items())
        raise place.error(f"fields {', '.join(record) or 'none'} are of no known kind ({wanted}); rename with --fields")
    return best


def build(place: Place, kind: str, record: Record) -> Item:
    """The item of a line, every field checked."""
    checks = FIELDS[kind]
    for field, value in record.items():
        if field not in checks and not field.startswith("_"):
            raise place.error(
                f"is unknown in lines of kind {kind!r}; {_suggest(kind, field)}; rename with --fields NAME={field}, "
                f"or leave it out with --fields ignore={field}",
                field=field,
                value=value,
            )
    for field in REQUIRED[kind]:
        if record.get(field) is None:
            found = ", ".join(record) or "no field"
            raise place.error(f"field {field!r} is missing; the file is of kind {kind!r}, this line has {found}")
    values = {
        field: check(place, field, record[field]) for field, check in checks.items() if record.get(field) is not None
    }
    named: dict[str, Any] = {"id": place.name, **values}
    item = KINDS[kind](**named)
    if isinstance(item, PrivateText):
        check_inside(place, item)
    return item


def check_inside(place: Place, item: PrivateText) -> None:
    """Every span lies in the text and holds more than white space."""
    for start, end, label in item.spans:
        if start < 0 or end > len(item.text):
            reason = f"lies outside the text of {len(item.text)} characters"
            raise place.error(reason, field="spans", value=[start, end, label])
        if not item.text[start:end].strip():
            raise place.error("holds only white space", field="spans", value=[start, end, label])


def parse_fields(fields: Mapping[str, str] | str | None) -> dict[str, str]:
    """`prompt=question,answer=response` as a dictionary; `ignore=a+b` names fields to leave out."""
    if fields is None:
        return {}
    if isinstance(fields, str):
        pairs = [part.partition("=") for part in fields.split(",") if part.strip()]
        for name, equals, theirs in pairs:
            if not equals or not name.strip() or not theirs.strip():
                raise LoceditError(f"--fields {fields!r}: {name!r} is not NAME=FIELD, as in prompt=question")
        names = [name.strip() for name, _, _ in pairs]
        if len(set(names)) < len(names):
            raise LoceditError(f"--fields {fields!r}: a name is given twice")
        fields = {name.strip(): theirs.strip() for name, _, theirs in pairs}
    known = sorted({field for checks in FIELDS.values() for field in checks} | {"ignore"})
    for name in fields:
        if name not in known:
            raise LoceditError(f"--fields: unknown name {name!r}: {nearest(name, known)}")
    return dict(fields)


def rename(place: Place, record: Record, fields: Mapping[str, str]) -> tuple[Record, set[str]]:
    """The record under locedit's names, and which of the foreign names it had."""
    ignored = set(fields["ignore"].split("+")) if "ignore" in fields else set[str]()
    ours = {theirs: name for name, theirs in fields.items() if name != "ignore"}
    renamed: Record = {}
    for field, value in record.items():
        if field in ignored:
            continue
        name = ours.get(field, field)
        if name in renamed:
            raise place.error(f"stands for {name!r}, which is there already", field=field, value=value)
        renamed[name] = value
    return renamed, (ignored | set(ours)) & set(record)


def parse_json(place: Place, text: str) -> object:
    """One JSON value; a key given twice is an error."""
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _distinct(place, pairs))
    except json.JSONDecodeError as error:
        line = error.doc.split("\n")[error.lineno - 1].strip()
        there = dataclasses.replace(place, number=place.number + error.lineno - 1)
        advice = "" if line[:1] in ("{", "[", '"') else " (plain lines belong in a .txt file)"
        raise there.error(f"not JSON: {error.msg} at column {error.colno}: {_short.repr(line)}{advice}") from None
    except LoceditError:
        raise
    except ValueError as error:  # a number of more digits than Python converts
        raise place.error(f"not JSON that can be read: {error}") from None
    except RecursionError:
        raise place.error("not JSON that can be read: nested too deeply") from None


def _distinct(place: Place, pairs: list[tuple[str, object]]) -> Record:
    found: Record = {}
    for key, value in pairs:
        if key in found:
            raise place.error("is there twice", field=key, value=value)
        found[key] = value
    return found


def _suggest(kind: str, field: str) -> str:
    """The nearest name among the kind's fields, or among those of a kind that the line may have been meant to be."""
    own = difflib.get_close_matches(field, FIELDS[kind], n=1)
    for other, checks in FIELDS.items():
        close = difflib.get_close_matches(field, checks, n=1)
        if close and not own:
            return f"did you mean {close[0]!r} (lines of kind {other!r})?"
    return nearest(field, FIELDS[kind])


def _list(place: Place, field: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise place.error(f"is not a list but {_type(value)}", field=field, value=value)
    return cast(list[object], value)


def _type(value: object) -> str:
    names = {"dict": "an object", "list": "a list", "str": "a text", "bool": "a truth value", "NoneType": "null"}
    return names.get(type(value).__name__, "a number")

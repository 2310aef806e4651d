"""Options of a method: a frozen dataclass, filled from keyword arguments or command-line words, and checked."""

import ast
import dataclasses
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from locedit.errors import LoceditError, nearest

Options = TypeVar("Options")


def fill(cls: type[Options], given: Mapping[str, Any], *, method: str) -> Options:
    """The options dataclass with the given values.

    Unknown names, values of the wrong type and numbers that are not finite raise LoceditError.
    """
    known = kinds(cls)
    for name, value in given.items():
        if name not in known:
            raise LoceditError(f"{method} has no option {name!r}; {nearest(name, known)}")
        _check(method, name, value, known[name])
    return cls(**given)


def parse(cls: type[Any], words: Mapping[str, str], *, method: str) -> dict[str, Any]:
    """Values for the fields named in `words`, read from their text by the fields' types."""
    known = kinds(cls)
    values: dict[str, Any] = {}
    for name, text in words.items():
        if name not in known:
            raise LoceditError(f"{method} has no option {name!r}; {nearest(name, known)}")
        values[name] = _read(method, name, text, known[name])
        _check(method, name, values[name], known[name])
    return values


def kinds(cls: type[Any]) -> dict[str, Any]:
    """Field name -> its type."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def describe(cls: type[Any]) -> list[tuple[str, str, str, str]]:
    """(name, type as words, default, meaning) of every option; the meaning is the string under the field."""
    meanings = field_docs(cls)
    rows: list[tuple[str, str, str, str]] = []
    for f in dataclasses.fields(cls):
        missing = f.default is dataclasses.MISSING
        default = "required" if missing and f.default_factory is dataclasses.MISSING else repr(None)
        rows.append((f.name, in_words(kinds(cls)[f.name]), default if missing else repr(f.default), meanings[f.name]))
    return rows


def field_docs(cls: type[Any]) -> dict[str, str]:
    """Field name -> the string that stands under it in the source, base classes included; empty where there is none."""
    docs = {f.name: "" for f in dataclasses.fields(cls)}
    for base in reversed(cls.__mro__):
        if "MEANINGS" in vars(base):  # of a class that was not written but made
            docs |= vars(base)["MEANINGS"]
        elif dataclasses.is_dataclass(base):
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
            docs |= _strings_under(body.body)  # type: ignore[attr-defined]
    return docs


def _strings_under(body: list[ast.stmt]) -> dict[str, str]:
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def in_words(kind: Any) -> str:
    """A type as a user reads it.

    >>> in_words(int | None), in_words(Literal["left", "right"]), in_words(tuple[float, ...])
    ('int or None', "'left' or 'right'", 'float, ...')
    """
    if kind is None or kind is type(None):
        return "None"
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(in_words, get_args(kind)))
    if get_origin(kind) in (tuple, list):
        return f"{in_words(get_args(kind)[0])}, ..."
    return getattr(kind, "__name__", str(kind))


def _fits(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind is None or kind is type(None):
        return value is None
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin in (tuple, list):
        return isinstance(value, tuple | list) and all(_fits(item, parts[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def _check(method: str, name: str, value: Any, kind: Any) -> None:
    if not _fits(value, kind):
        hint = f"; {nearest(value, _words(kind))}" if isinstance(value, str) and _words(kind) else ""
        raise LoceditError(f"{method}: {name}={value!r} is not {in_words(kind)}{hint}")
    for number in value if isinstance(value, list | tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise LoceditError(f"{method}: {name}={value!r}: {number!r} is not a finite number")


def _words(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [word for word in get_args(kind) if isinstance(word, str)]
    return [word for part in get_args(kind) for word in _words(part)] if get_origin(kind) is not tuple else []


def _takes_several(kind: Any) -> bool:
    """Whether a type is a sequence, or may be one.

    >>> _takes_several(tuple[int, ...] | None), _takes_several(int | None)
    (True, False)
    """
    return get_origin(kind) in (tuple, list) or any(get_origin(part) in (tuple, list) for part in get_args(kind))


def _read(method: str, name: str, text: str, kind: Any) -> Any:
    """The value that `text` spells: the text itself where the type allows it, a Python literal, or a comma list."""
    if _fits(text, kind):
        return text
    candidates = [text, f"({text},)" if _takes_several(kind) else text]
    if text.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        raise LoceditError(f"{method}: --{name.replace('_', '-')} {text!r} is not a finite number")
    candidates = [{"true": "True", "false": "False", "none": "None"}.get(c.lower(), c) for c in candidates]
    for candidate in candidates:
        try:
            value = ast.literal_eval(candidate)
        except (ValueError, SyntaxError):
            continue
        if _fits(value, kind):
            return value
    if _takes_several(kind) and _fits(tuple(text.split(",")), kind):
        return tuple(text.split(","))
    hint = f"; {nearest(text, _words(kind))}" if _words(kind) else ""
    raise LoceditError(f"{method}: --{name.replace('_', '-')} {text!r} is not {in_words(kind)}{hint}")

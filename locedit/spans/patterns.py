"""Spans by pattern: e-mail addresses, phone numbers, dates, street addresses, numbers, listed names, own patterns."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from locedit.data.files import read_text
from locedit.errors import LoceditError, nearest
from locedit.spans.registry import Proposal, Source
from locedit.spans.texts import Mark, joined, text_of, trimmed
from locedit.spans.words import BEGIN, END, words_pattern
from locedit.storage import read_json

_MONTH = (
    "(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    "|Nov(?:ember)?|Dec(?:ember)?)"
)
_DAY = r"\d{1,2}(?:st|[nr]d|th)?"
_STREET = "(?:Street|St|Road|Rd|Avenue|Ave|Lane|Ln|Drive|Square|Way|Court|Place|Boulevard|Blvd)"

PATTERNS: dict[str, str] = {
    "email": r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    "date": rf"{BEGIN}(?<!-)(?:\d{{4}}-\d{{2}}-\d{{2}}|\d{{1,2}}[./]\d{{1,2}}[./]\d{{2}}(?:\d{{2}})?"
    rf"|{_MONTH}\.? {_DAY},? \d{{4}}|{_DAY}\.? {_MONTH}\.?,? \d{{4}}){END}",
    "phone": rf"{BEGIN}(?=(?:[ ().\-/+]*\d){{7,15}}(?![ ().\-/]*\d))\+?[(\d](?:[ ().\-/]{{0,2}}\d)+{END}",
    "address": rf"{BEGIN}\d{{1,5}}[A-Za-z]?(?: [A-Z][\w'’-]*){{1,3}} {_STREET}{END}",
    "number": rf"{BEGIN}\d+(?:[.,]\d+)*{END}",
}
"by label; phone numbers have 7 to 15 digits with at most two spaces, brackets, points, strokes, hyphens between them"


@dataclass(frozen=True, kw_only=True)
class PatternOptions:
    """Which patterns."""

    patterns: tuple[str, ...] = tuple(PATTERNS)
    "of the built-in ones: email, date, phone, address, number; empty = none"
    names: str | None = None
    "a file with one name a line, marked as whole words with the label name"
    file: str | None = None
    """a TOML or JSON file of own patterns, label = "regular expression" (or a list of them); a group called span is
    what is marked, else the whole match"""

    def __post_init__(self) -> None:
        for name in self.patterns:
            if name not in PATTERNS:
                raise LoceditError(f"patterns={name!r}; {nearest(name, PATTERNS)}")
        if not self.patterns and self.names is None and self.file is None:
            raise LoceditError("patterns=() without names= and file=: there is nothing to look for")
        compiled(self)  # so that a bad file is found before anything else is done


def patterns(source: Source, options: PatternOptions) -> Sequence[Proposal]:
    """What the patterns match; matches that share a character become one, with the label of the longest."""
    chosen = compiled(options)
    return [Proposal(item=item, marks=joined(_matches(text_of(item), chosen))) for item in source.data]


def compiled(options: PatternOptions) -> list[tuple[str, re.Pattern[str]]]:
    """Label and expression of every pattern; raises LoceditError for a bad file."""
    found = [(name, re.compile(PATTERNS[name])) for name in options.patterns]
    if options.names is not None:
        lines = read_text(Path(options.names)).splitlines()
        found.append(("name", words_pattern(lines)))
    return found + (own_patterns(Path(options.file)) if options.file is not None else [])


def own_patterns(path: Path) -> list[tuple[str, re.Pattern[str]]]:
    """The patterns of a TOML or JSON file."""
    found: list[tuple[str, re.Pattern[str]]] = []
    for label, value in _table(path).items():
        for text in cast(list[object], value) if isinstance(value, list) else [value]:
            if not isinstance(text, str) or not label.strip():
                raise LoceditError(f"{path}: pattern {label!r}: {text!r} is not a regular expression in quotes")
            try:
                found.append((label, re.compile(text)))
            except re.error as error:
                raise LoceditError(
                    f"{path}: pattern {label!r}: {text!r} is not a regular expression: {error}"
                ) from None
    return found


def _table(path: Path) -> Mapping[str, object]:
    if path.suffix == ".toml":
        try:
            return tomllib.loads(read_text(path))
        except tomllib.TOMLDecodeError as error:
            raise LoceditError(f"{path}: not TOML: {error}") from None
    if path.suffix != ".json":
        raise LoceditError(f"{path}: patterns are read from a .toml or .json file")
    content = read_json(path)
    if not isinstance(content, dict):
        raise LoceditError(f"{path}: patterns are an object, label: regular expression")
    return cast(dict[str, object], content)


def _matches(text: str, chosen: Sequence[tuple[str, re.Pattern[str]]]) -> list[Mark]:
    """Every match that holds more than white space."""
    found: list[Mark] = []
    for label, pattern in chosen:
        group = "span" if "span" in pattern.groupindex else 0
        for match in pattern.finditer(text):
            stretch = trimmed(text, *match.span(group)) if match.start(group) >= 0 else None
            if stretch is not None:
                found.append((*stretch, label))
    return found

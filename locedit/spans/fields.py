"""Spans by known values: answers, subjects and owners, wherever a text names them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from locedit.data.items import Dataset, Fact, Item
from locedit.data.readers import read_facts
from locedit.errors import LoceditError, nearest
from locedit.spans.found import Rejected
from locedit.spans.given import answer_mark
from locedit.spans.registry import Proposal, Source
from locedit.spans.texts import Mark, joined, text_of
from locedit.spans.words import occurrences, words_pattern

FIELDS = ("answer", "subject", "owner")


@dataclass(frozen=True, kw_only=True)
class FieldOptions:
    """Which values."""

    mark: tuple[str, ...] = ("answer",)
    "fields whose values are marked: answer, subject, owner; the field is the label"
    values: Dataset | str | None = None
    "facts, or a file of them, whose values are looked for in every text; None = each text's own values in itself"

    def __post_init__(self) -> None:
        for name in self.mark:
            if name not in FIELDS:
                raise LoceditError(f"mark={name!r}; {nearest(name, FIELDS)}")
        if not self.mark:
            raise LoceditError(f"mark=(): name at least one of {', '.join(FIELDS)}")
        self.others()

    def others(self) -> Dataset | None:
        """The facts of `values`."""
        return read_facts(self.values) if isinstance(self.values, str) else self.values


def fields(source: Source, options: FieldOptions) -> Sequence[Proposal]:
    """The values as whole words wherever they stand; a fact's own answer only where it answers the prompt.

    A value that does not occur is reported: a text's own value for that text, one of `values` once for all texts.
    """
    others = options.others()
    if others is None:
        return [_own(item, options.mark, source.data.source) for item in source.data]
    return _of_others(source.data, others, options.mark)


def _own(item: Item, names: Sequence[str], source: str) -> Proposal:
    values = list(_values(item, names))
    if not values:
        raise LoceditError(f"{source}: item {item.id!r} has none of the fields {', '.join(names)}; give values=")
    text = text_of(item)
    marks: list[Mark] = []
    rejected: list[Rejected] = []
    for name, value in values:
        if isinstance(item, Fact) and name == "answer":
            marks.append(answer_mark(item))
        elif places := occurrences(text, value):
            marks += [(*place, name) for place in places]
        else:
            rejected.append(Rejected(id=item.id, text=value, label=name, reason="does not occur in the text"))
    return Proposal(item=item, marks=joined(marks), rejected=tuple(rejected))


def _of_others(data: Dataset, others: Dataset, names: Sequence[str]) -> Sequence[Proposal]:
    values = {(name, value.strip()): item.id for item in others for name, value in _values(item, names)}
    if not values:
        raise LoceditError(f"{others.source}: no item has one of the fields {', '.join(names)}")
    searches = [(name, words_pattern(value for other, value in values if other == name)) for name in names]
    seen: set[tuple[str, str]] = set()
    found: list[Proposal] = []
    for item in data:
        matches = [(name, match) for name, search in searches for match in search.finditer(text_of(item))]
        seen |= {(name, match.group()) for name, match in matches}
        found.append(Proposal(item=item, marks=joined((*match.span(), name) for name, match in matches)))
    reason = "occurs in no text"
    missing = [Rejected(id=values[key], text=key[1], label=key[0], reason=reason) for key in values if key not in seen]
    return [Proposal(item=found[0].item, marks=found[0].marks, rejected=tuple(missing)), *found[1:]]


def _values(item: Item, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        value = getattr(item, name, None)
        if isinstance(value, str) and value.strip():
            yield name, value

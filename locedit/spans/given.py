"""Spans that the data have already: those of private texts, the answers of facts."""

from collections.abc import Sequence
from dataclasses import dataclass

from locedit.data.items import Fact, Item, PrivateText
from locedit.errors import LoceditError, nearest
from locedit.spans.registry import Proposal, Source
from locedit.spans.texts import Mark, text_of, trimmed


@dataclass(frozen=True, kw_only=True)
class GivenOptions:
    """Which of the spans."""

    labels: tuple[str, ...] | None = None
    "only spans with one of these labels; None = all"


def given(source: Source, options: GivenOptions) -> Sequence[Proposal]:
    """The spans in the data, or those of them that have one of the labels."""
    marks = {item.id: own_marks(item, source.data.source) for item in source.data}
    present = sorted({label for own in marks.values() for _, _, label in own})
    for label in options.labels or ():
        if label not in present:
            raise LoceditError(f"{source.data.source}: no span has the label {label!r}; {nearest(label, present)}")
    wanted = options.labels or present
    return [Proposal(item=item, marks=tuple(m for m in marks[item.id] if m[2] in wanted)) for item in source.data]


def own_marks(item: Item, source: str) -> tuple[Mark, ...]:
    """The spans of a private text, or the answer of a fact in prompt and answer."""
    if isinstance(item, PrivateText):
        return item.spans
    if isinstance(item, Fact):
        return (answer_mark(item),)
    raise LoceditError(f"{source}: texts of kind {item.kind!r} have no spans of their own; choose another rule")


def answer_mark(fact: Fact) -> Mark:
    """Where the answer stands in prompt and answer."""
    text = text_of(fact)
    stretch = trimmed(text, len(fact.prompt), len(text))
    assert stretch is not None, "an answer holds more than white space"
    return (*stretch, "answer")

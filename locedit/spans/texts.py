"""Items as texts, and marked stretches of a text as a private text."""

from collections.abc import Iterable

from locedit.data.items import Dataset, Fact, Item, LabelledText, PlainText, PrivateText
from locedit.errors import LoceditError

Mark = tuple[int, int, str]
"(start, end, label) in characters, end excluded"


def readable(data: Dataset) -> Dataset:
    """The data set, if its items are texts: plain, labelled, private, or facts as prompt and answer in one."""
    if not isinstance(data[0], PlainText | LabelledText | PrivateText | Fact):
        raise LoceditError(
            f"{data.source}: spans are marked in plain, labelled or private texts or facts, not in {data.kind!r}"
        )
    if isinstance(data[0], Fact) and data.chat != "off":
        raise LoceditError(f"{data.source}: spans of facts are marked in plain prompts; leave out the chat template")
    return data


def text_of(item: Item) -> str:
    """What the spans are counted in: a text as it is, a fact's prompt with its answer."""
    if isinstance(item, Fact):
        return item.prompt + item.answer
    assert isinstance(item, PlainText | LabelledText | PrivateText)
    return item.text


def with_marks(item: Item, marks: Iterable[Mark]) -> PrivateText:
    """The item as a private text."""
    return PrivateText(
        text=text_of(item), spans=tuple(marks), id=item.id, owner=item.owner, group=item.group, format=item.format
    )


def trimmed(text: str, start: int, end: int) -> tuple[int, int] | None:
    """The stretch without white space at its ends; None where nothing else is in it.

    >>> trimmed("to  Anna ", 2, 9), trimmed("to  Anna", 2, 4)
    ((4, 8), None)
    """
    inside = text[start:end]
    if not inside.strip():
        return None
    start += len(inside) - len(inside.lstrip())
    return start, start + len(inside.strip())


def joined(marks: Iterable[Mark]) -> tuple[Mark, ...]:
    """Marks in the order of the text, those that share a character as one with the label of the longest of them.

    >>> joined([(4, 7, "number"), (0, 8, "phone"), (10, 12, "number")])
    ((0, 8, 'phone'), (10, 12, 'number'))
    """
    groups: list[list[Mark]] = []
    end = 0
    for mark in sorted(marks, key=lambda mark: mark[0]):
        if groups and mark[0] < end:
            groups[-1].append(mark)
            end = max(end, mark[1])
        else:
            groups.append([mark])
            end = mark[1]
    return tuple(
        (group[0][0], max(mark[1] for mark in group), max(group, key=lambda mark: mark[1] - mark[0])[2])
        for group in groups
    )

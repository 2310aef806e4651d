"""Stretches of tokens as stretches of characters, and the other way round, by the code that encodes all data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from locedit.data.chat import resolve_chat
from locedit.data.drafts import TokenizedText, drafts, tokenize
from locedit.data.encode import Encoder, Example, encode
from locedit.data.items import Item, LabelledText
from locedit.spans.texts import text_of, trimmed


@dataclass(frozen=True, kw_only=True)
class Located:
    """A text as tokens, with the characters that each covers."""

    text: str
    example: Example
    "every token that the model can predict is scored"
    tokens: TokenizedText

    @property
    def first(self) -> int:
        """The first token that can be predicted and is no part of a character that begins in one that cannot."""
        at = self.example.targets[0]
        while 0 < at < len(self.tokens.ids) and self.tokens.starts[at] < self.tokens.ends[at - 1]:
            at += 1
        return at

    def characters(self, first: int, end: int) -> tuple[int, int] | None:
        """The characters of the tokens first, ..., end - 1, from `self.first` on, without white space around.

        None where there is nothing else.
        """
        first = max(first, self.first)
        return trimmed(self.text, self.tokens.starts[first], self.tokens.ends[end - 1]) if first < end else None

    def positions(self, start: int, end: int) -> tuple[int, int] | None:
        """The tokens (first, end) from `self.first` on that share a character with the stretch."""
        found = self.tokens.overlapping(start, end)
        if found is None:
            return None
        first = max(found[0], self.first)
        return (first, found[1]) if first < found[1] else None


def located(model: Encoder, items: Iterable[Item]) -> list[Located]:
    """Every item's text in tokens; one that does not fit the model's context is an error."""
    texts = [LabelledText(text=text_of(item), label="text", id=item.id) for item in items]
    plain = resolve_chat(model.tokenizer, "off")
    tokens = tokenize(model.tokenizer, [drafts(model.tokenizer, text, plain)[0] for text in texts])
    rows = zip(texts, encode(model, texts), tokens, strict=True)
    return [Located(text=text.text, example=example, tokens=row) for text, example, row in rows]


def runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending positions as stretches (first, end), end excluded.

    >>> runs([2, 3, 4, 7])
    [(2, 5), (7, 8)]
    """
    found: list[tuple[int, int]] = []
    for position in positions:
        if found and found[-1][1] == position:
            found[-1] = (found[-1][0], position + 1)
        else:
            found.append((position, position + 1))
    return found

"""Texts in blocks of tokens, each beside its translation, with the places where the two align."""

import dataclasses
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from locedit.data.chat import resolve_chat
from locedit.data.drafts import Draft, TokenizedText, drafts, tokenize
from locedit.data.encode import Encoder, Example, Span
from locedit.data.items import Dataset
from locedit.errors import LoceditError
from locedit.spans.texts import trimmed
from locedit.spans.tokens import runs
from locedit.unlearn.translation import InsideAnchors, Replaced, Translator, aligned


@dataclass(frozen=True, kw_only=True)
class Block:
    """A stretch of a text and its translation; the n-th scored token of one aligns with the n-th of the other."""

    text: Example
    "every token scored that the model can predict: what the reinforced model learns"
    original: Example
    translated: Example
    introduced: tuple[tuple[int, int], ...]
    """(n, token): before the n-th scored token a counterpart has been introduced that begins with the token where it
    stands, at the beginning of a text or after a space"""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How texts become blocks."""

    model: Encoder
    anchors: Mapping[str, str]
    size: int
    "tokens of a block at most, in either language; that of the context where it is smaller"
    drop_repeated: bool = True
    """whether an anchor is left without labels from its second occurrence in a block on, and where the first token of
    its counterpart has been introduced in the block by another anchor"""
    inside: InsideAnchors = "unlabelled"

    def of(self, data: Dataset) -> list[Block]:
        """The blocks of all items in order; a fact is its prompt and answer in one text, chat template included."""
        chat = resolve_chat(self.model.tokenizer, data.chat)
        translator = Translator(self.anchors)
        found: list[Block] = []
        for item in data:
            draft = dataclasses.replace(drafts(self.model.tokenizer, item, chat)[0], spans=None, border=None)
            found += self._of_text(draft, translator)
        return found

    def _of_text(self, draft: Draft, translator: Translator) -> list[Block]:
        if (whole := self._block(draft, translator)) is not None:
            return [whole]
        found: list[Block] = []
        start = 0
        while (stretch := trimmed(draft.text, start, len(draft.text))) is not None:
            block, start = self._longest(draft, translator, stretch[0], name=f"{draft.id}#{len(found)}")
            found.append(block)
        return found

    def _longest(self, draft: Draft, translator: Translator, start: int, *, name: str) -> tuple[Block, int]:
        """The longest block that begins at the character, and where it ends."""
        for end in self._borders(draft, translator, start):
            part = dataclasses.replace(draft, id=name, text=draft.text[start:end].rstrip())
            if (block := self._block(part, translator)) is not None:
                return block, end
        raise LoceditError(
            f"item {draft.id!r}: {draft.text[start : start + 40]!r} does not fit a block of {self._size} tokens"
        )

    @property
    def _size(self) -> int:
        return min(self.size, self.model.max_length or self.size)

    def _borders(self, draft: Draft, translator: Translator, start: int) -> list[int]:
        """Where a block may end that begins at the character, the longest first: at white space outside anchors."""
        text = draft.text[start : start + self._reach(draft.text, start)]
        translation = translator(text)
        original, translated = self._tokens(draft, text, translation.text)
        cut = start + len(text) < len(draft.text)
        borders = [at for at, place in enumerate(translation.places) if at and place is not None]
        borders = [at for at in borders if (at == len(text) and not cut) or text[at : at + 1].isspace()]
        original_ends, translated_ends = _ends(original), _ends(translated)
        fitting = [
            start + at
            for at in borders
            if bisect_left(original_ends, at) < self._size
            and bisect_left(translated_ends, translation.places[at] or 0) < self._size
        ]
        return fitting[::-1]

    def _reach(self, text: str, start: int) -> int:
        """How many characters are looked at for one block: more than its tokens can cover in most texts."""
        return min(len(text) - start, 16 * self._size)

    def _tokens(self, draft: Draft, *texts: str) -> list[TokenizedText]:
        return tokenize(self.model.tokenizer, [dataclasses.replace(draft, text=text) for text in texts])

    def _block(self, draft: Draft, translator: Translator) -> Block | None:
        """The draft's text as one block, or None where it or its translation is too long."""
        translation = translator(draft.text)
        original, translated = self._tokens(draft, draft.text, translation.text)
        if max(len(original.ids), len(translated.ids)) > self._size:
            return None
        first = 1 if self.model.causal else 0  # a causal model predicts no first token
        pairs = aligned(original, translated, translation, causal=self.model.causal, inside=self.inside)
        tokens = [self._first_tokens(draft, translated, piece) for piece in translation.replaced]
        dropped = _repeated(original, translation.replaced, tokens) if self.drop_repeated else set[int]()
        pairs = [(a, b) for a, b in pairs if min(a, b) >= first and a not in dropped]
        predictable = [at for at, special in enumerate(original.special) if not special and at >= first]
        return Block(
            text=_example(draft, original, predictable),
            original=_example(draft, original, [a for a, _ in pairs]),
            translated=_example(draft, translated, [b for _, b in pairs]),
            introduced=_introduced(original, translation.replaced, tokens, [a for a, _ in pairs]),
        )

    def _first_tokens(self, draft: Draft, translated: TokenizedText, piece: Replaced) -> list[int]:
        """What a counterpart begins with where it stands, and at the beginning of a text and after a space."""
        found = [_first(translated, piece.new_start, piece.new_end)]
        for text, tokens in zip(("", "x "), self._tokens(draft, piece.to, f"x {piece.to}"), strict=True):
            found.append(_first(tokens, len(text), len(text) + len(piece.to)))
        return [token for token in dict.fromkeys(found) if token is not None]


def _ends(tokens: TokenizedText) -> list[int]:
    return [end for end, special in zip(tokens.ends, tokens.special, strict=True) if not special]


def _example(draft: Draft, tokens: TokenizedText, positions: Sequence[int]) -> Example:
    spans = tuple(Span(start=start, end=end, label="text") for start, end in runs(positions))
    return Example(
        id=draft.id,
        ids=tokens.ids,
        spans=spans,
        kind=draft.kind,
        owner=draft.owner,
        group=draft.group,
        format=draft.format,
    )


def _first(tokens: TokenizedText, start: int, end: int) -> int | None:
    """The first token of a stretch of characters."""
    place = tokens.overlapping(start, end)
    return None if place is None else tokens.ids[place[0]]


def _repeated(original: TokenizedText, replaced: Sequence[Replaced], tokens: Sequence[Sequence[int]]) -> set[int]:
    """The positions of anchors of which the term, or a first token of the counterpart, has been there before."""
    seen: set[str | int] = set()
    found: set[int] = set()
    for piece, first in zip(replaced, tokens, strict=True):
        here = {piece.term, *first}
        if here & seen and (place := original.overlapping(piece.start, piece.end)) is not None:
            found |= set(range(*place))
        seen |= here
    return found


def _introduced(
    original: TokenizedText, replaced: Sequence[Replaced], tokens: Sequence[Sequence[int]], positions: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """For every anchor: from which of the positions on it has been there, and the first tokens of its counterpart."""
    found: dict[int, int] = {}
    starts = [original.starts[at] for at in positions]
    for piece, first in zip(replaced, tokens, strict=True):
        for token in first:
            found.setdefault(token, bisect_left(starts, piece.end))
    return tuple((n, token) for token, n in found.items() if n < len(starts))

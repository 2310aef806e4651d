"""From items to texts with marked characters, and from characters to tokens."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from locedit.data.chat import Chat
from locedit.data.items import ContrastPair, Fact, Item, PatchPair, PrivateText, TokenText
from locedit.errors import LoceditError

SPACE_MARKS = "ĠĊĉč▁ \n\t"
"how byte-level and sentence-piece vocabularies spell white space at the start of a token"


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A text that waits to be tokenized, with its spans in characters."""

    id: str
    text: str
    kind: str
    spans: tuple[tuple[int, int, str], ...] | None
    "None = every token of the text"
    border: int | None = None
    "where the prompt ends and the answer begins: no token may lie across"
    subject: tuple[int, int] | None = None
    specials: bool = True
    "whether the tokenizer adds its special tokens"
    splits: bool = False
    "whether a text that is too long may become several windows"
    owner: str | None = None
    group: str | None = None
    format: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """Token ids with the characters that each covers, leading spaces included."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    special: tuple[bool, ...]
    "added by the tokenizer, not in the text"
    empty: frozenset[int] = frozenset()
    "ids of unknown and special tokens: a span of nothing else has vanished"

    def content(self) -> tuple[int, int]:
        """The stretch between the added special tokens."""
        inside = [position for position, special in enumerate(self.special) if not special]
        return (inside[0], inside[-1] + 1) if inside else (len(self.ids), len(self.ids))

    def overlapping(self, start: int, end: int) -> tuple[int, int] | None:
        """The tokens that share a character with text[start:end]."""
        inside = [
            position
            for position, special in enumerate(self.special)
            if not special and self.starts[position] < end and self.ends[position] > start
        ]
        return (inside[0], inside[-1] + 1) if inside else None

    def span(self, draft: Draft, start: int, end: int, label: str) -> tuple[int, int, str]:
        """The tokens of a span of characters; a token may only bring white space from outside."""
        found = self.overlapping(start, end)
        wanted = draft.text[start:end]
        if found is None or all(token in self.empty for token in self.ids[found[0] : found[1]]):
            raise LoceditError(
                f"item {draft.id!r}: {label} {wanted!r} vanishes in tokenization: "
                "no token, or only unknown and special ones"
            )
        first, last = found[0], found[1] - 1
        before, after = draft.text[self.starts[first] : start], draft.text[end : self.ends[last]]
        if draft.border == start and before:
            raise LoceditError(_across(draft, before, start, self.ends[first]))
        if before.strip() or after.strip():
            where, token = ("begins", first) if before.strip() else ("ends", last)
            text = draft.text[self.starts[token] : self.ends[token]]
            raise LoceditError(
                f"item {draft.id!r}: {label} {wanted!r} at characters {start}-{end} {where} inside the token {text!r}"
            )
        return (*found, label)

    def windows(self, size: int) -> "list[TokenizedText]":
        """Stretches of at most `size` tokens in which every token but the first is predicted exactly once.

        Each keeps the added special tokens; without one in front the last token of a window also begins the next.
        """
        begin, end = self.content()
        front, back = range(begin), range(end, len(self.ids))
        overlap = 0 if begin else 1
        room = size - len(front) - len(back)
        assert room > overlap, "the context is too short for any text"
        starts = range(begin, max(end - overlap, begin + 1), room - overlap)
        return [self._pick([*front, *range(at, min(at + room, end)), *back]) for at in starts]

    def _pick(self, positions: Sequence[int]) -> "TokenizedText":
        return dataclasses.replace(
            self,
            ids=tuple(self.ids[p] for p in positions),
            starts=tuple(self.starts[p] for p in positions),
            ends=tuple(self.ends[p] for p in positions),
            special=tuple(self.special[p] for p in positions),
        )


def _across(draft: Draft, before: str, border: int, end: int) -> str:
    token = before + draft.text[border:end]
    if before.isspace():
        advice = "move the space from the end of the prompt to the start of the answer"
    else:
        advice = "begin the answer with a space, or move the border to where a token begins"
    return f"item {draft.id!r}: the token {token!r} lies across the border of prompt and answer: {advice}"


def drafts(tokenizer: Any, item: Item, chat: Chat) -> list[Draft]:
    """The texts of an item: two for pairs, one for the rest."""
    assert not isinstance(item, TokenText), "token ids are never text again"
    common: dict[str, Any] = {"owner": item.owner, "group": item.group, "format": item.format}
    if isinstance(item, Fact):
        return [_answered(tokenizer, item, chat)]
    if isinstance(item, PatchPair):
        clean, corrupt = item.fact("clean", "answer"), item.fact("corrupt", "answer")
        return [
            dataclasses.replace(_answered(tokenizer, fact, chat), id=f"{item.id}/{side}", kind=side)
            for fact, side in ((clean, "clean"), (corrupt, "corrupt"))
        ]
    if isinstance(item, ContrastPair):
        texts = {"advantaged": item.advantaged, "disadvantaged": item.disadvantaged}
        spans = differing(item.advantaged, item.disadvantaged, name=item.id)
        return [
            Draft(id=f"{item.id}/{side}", text=text, kind=side, spans=((*span, "differs"),), **common)
            for (side, text), span in zip(texts.items(), spans, strict=True)
        ]
    if isinstance(item, PrivateText):
        return [Draft(id=item.id, text=item.text, kind=item.kind, spans=item.spans, **common)]
    return [Draft(id=item.id, text=item.text, kind=item.kind, spans=None, splits=item.kind == "plain", **common)]


def _answered(tokenizer: Any, fact: Fact, chat: Chat) -> Draft:
    prompt, answer = chat.join(tokenizer, fact.prompt, fact.answer)
    border = len(prompt)
    if _needs_space(prompt[-1:]) and _needs_space(answer[:1]):
        raise LoceditError(
            f"item {fact.id!r}: prompt and answer meet inside a word ({prompt[-12:]!r} + {answer[:12]!r}): "
            "begin the answer with a space"
        )
    asked = prompt.rfind(fact.prompt)
    at = prompt.find(fact.subject, max(asked, 0)) if fact.subject else -1
    return Draft(
        id=fact.id,
        text=prompt + answer,
        kind=fact.kind,
        spans=((border, len(prompt) + len(answer), "answer"),),
        border=border,
        subject=(at, at + len(fact.subject)) if fact.subject and at >= 0 else None,
        specials=chat.adds_special_tokens(tokenizer, prompt),
        owner=fact.owner,
        group=fact.group,
        format=fact.format,
    )


def _needs_space(character: str) -> bool:
    """Whether it is a letter of a script that puts spaces between words (Thai to Tibetan, Khmer, East Asia do not)."""
    spaceless = "\u0e00" <= character < "\u10a0" or "\u1780" <= character < "\u1800" or character >= "\u2e80"
    return character.isalpha() and not spaceless


def differing(first: str, second: str, *, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shortest run of whole words in which two texts differ, in characters of each.

    Where they differ in several places the run reaches from the first to the last; where one text only has words more
    than the other, a word beside them is in it too, so that each text has a run.

    >>> differing("he is here", "she is here", name="pair")
    ((0, 2), (0, 3))
    >>> differing("he is here", "he is not here", name="pair")
    ((6, 10), (6, 14))
    """
    left, right = _words(first), _words(second)
    shared = min(len(left), len(right))
    begin = next((i for i in range(shared) if left[i][2] != right[i][2]), shared)
    tail = next((i for i in range(shared - begin) if left[-1 - i][2] != right[-1 - i][2]), shared - begin)
    if begin == len(left) == len(right) or not shared:
        raise LoceditError(f"item {name!r}: the two texts of the pair do not differ in a word: {first[:60]!r}")
    if begin + tail == shared:  # one text holds all words of the other
        begin, tail = (begin, tail - 1) if tail else (begin - 1, tail)
    spans = [words[begin : len(words) - tail] for words in (left, right)]
    return (spans[0][0][0], spans[0][-1][1]), (spans[1][0][0], spans[1][-1][1])


def _words(text: str) -> list[tuple[int, int, str]]:
    words: list[tuple[int, int, str]] = []
    at = 0
    for word in text.split():
        at = text.index(word, at)
        words.append((at, at + len(word), word))
        at += len(word)
    return words


def tokenize(tokenizer: Any, texts: Sequence[Draft]) -> list[TokenizedText]:
    """Every text tokenized once, with offsets."""
    if texts and not getattr(tokenizer, "is_fast", False):
        raise LoceditError(
            f"the tokenizer ({type(tokenizer).__name__}) gives no character offsets: "
            "a fast one is needed (tokenizer.json)"
        )
    empty = frozenset(int(token) for token in tokenizer.all_special_ids)
    found: dict[int, TokenizedText] = {}
    for specials in (True, False):
        chosen = [index for index, draft in enumerate(texts) if draft.specials is specials]
        if not chosen:
            continue
        encoded = tokenizer(
            [texts[index].text for index in chosen],
            add_special_tokens=specials,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            truncation=False,
            padding=False,
            verbose=False,
        )
        for row, index in enumerate(chosen):
            parts = (encoded["input_ids"][row], encoded["offset_mapping"][row], encoded["special_tokens_mask"][row])
            found[index] = _tokenized(texts[index].text, *parts, encoded.tokens(row), empty)
            _check_bos(tokenizer, texts[index], found[index].ids)
    return [found[index] for index in range(len(texts))]


def _tokenized(
    text: str,
    ids: list[int],
    offsets: list[tuple[int, int]],
    special: list[int],
    pieces: list[str],
    empty: frozenset[int],
) -> TokenizedText:
    """Offsets with leading spaces put back, which byte-level tokenizers trim away."""
    starts: list[int] = []
    cursor = 0
    for (start, end), added, piece in zip(offsets, special, pieces, strict=True):
        if not added:
            if piece[:1] in SPACE_MARKS and text[cursor:start].isspace():
                start = cursor
            cursor = max(cursor, end)
        starts.append(start)
    ends = tuple(end for _, end in offsets)
    return TokenizedText(
        ids=tuple(ids), starts=tuple(starts), ends=ends, special=tuple(bool(mark) for mark in special), empty=empty
    )


def _check_bos(tokenizer: Any, draft: Draft, ids: tuple[int, ...]) -> None:
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == (bos, bos):
        raise LoceditError(
            f"item {draft.id!r}: the text begins with {tokenizer.bos_token!r} and the tokenizer adds another: "
            "take it out of the text or the chat template"
        )

"""Texts with their anchors translated, and which tokens of the two texts stand at the same place.

A token aligns when what comes before it is the same text, but for the anchors, in both: it begins where a token of the
translation begins. Inside an anchor nothing does, unless tokens are counted there. For a masked model, which sees what
follows too, both tokens must also end at the same place.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from locedit.data.drafts import TokenizedText
from locedit.spans.words import words_pattern

InsideAnchors = Literal["unlabelled", "by_number"]


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """One anchor in a text, and what stands in its place in the translation; in characters, ends excluded."""

    term: str
    to: str
    "its counterpart, as it stands there"
    start: int
    end: int
    new_start: int
    new_end: int


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A text with every anchor replaced."""

    text: str
    replaced: tuple[Replaced, ...]
    "in the order of the text"
    places: tuple[int | None, ...]
    "for every border of characters of the original, 0 to its length: that of the translation; None inside anchors"


class Translator:
    """Replaces terms by their counterparts: whole words, the longest term first, upper and lower case as written.

    A term that begins in lower case is also found with a capital, and its counterpart then gets one too.

    >>> Translator({"Ann": "Eva", "Ann Lee": "Jo", "wand": "stick"})("Wands? Ann Lee, Anna, Ann. Wand").text
    'Wands? Jo, Anna, Eva. Stick'
    """

    def __init__(self, anchors: Mapping[str, str]) -> None:
        capitals = {_capital(term): (term, _capital(to)) for term, to in anchors.items() if term[:1].islower()}
        self._forms = capitals | {term: (term, to) for term, to in anchors.items()}
        self._pattern = words_pattern(self._forms)

    def __call__(self, text: str) -> Translation:
        parts: list[str] = []
        replaced: list[Replaced] = []
        places: list[int | None] = []
        at = new = 0
        for found in self._pattern.finditer(text):
            start, end = found.span()
            term, counterpart = self._forms[found[0]]
            places += range(new, new + start - at)
            new += start - at
            places += [new] + [None] * (end - start - 1)
            parts += [text[at:start], counterpart]
            ends = new + len(counterpart)
            replaced.append(Replaced(term=term, to=counterpart, start=start, end=end, new_start=new, new_end=ends))
            at, new = end, ends
        places += range(new, new + len(text) - at + 1)
        return Translation(text="".join([*parts, text[at:]]), replaced=tuple(replaced), places=tuple(places))


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]


def aligned(
    original: TokenizedText,
    translated: TokenizedText,
    translation: Translation,
    *,
    causal: bool,
    inside: InsideAnchors = "unlabelled",
) -> list[tuple[int, int]]:
    """Pairs of positions (original, translated) that stand at the same place, ascending; no added special tokens.

    Several tokens may stand for the parts of one character; the second aligns only where the first is the same token in
    both. With inside="by_number" the tokens after the first of an anchor align one by one with those of its
    counterpart, where they are equally many.
    """
    beginning: dict[tuple[int, int], int] = {(start, k): at for at, start, k in _begins(translated)}
    pairs: dict[int, int] = {}
    for at, start, k in _begins(original):
        place = translation.places[start]
        other = None if place is None else beginning.get((place, k))
        if other is None or (k and not _same_before(original, translated, pairs, at, other)):
            continue
        if causal or translation.places[original.ends[at]] == translated.ends[other]:
            pairs[at] = other
    for piece in translation.replaced if inside == "by_number" else ():
        mine = [at for at, start, _ in _begins(original) if piece.start < start < piece.end]
        theirs = [at for at, start, _ in _begins(translated) if piece.new_start < start < piece.new_end]
        if len(mine) == len(theirs):
            pairs |= dict(zip(mine, theirs, strict=True))
    return sorted(pairs.items())


def _begins(tokens: TokenizedText) -> Iterator[tuple[int, int, int]]:
    """(position, first character, how many tokens before it begin there too) of all tokens of the text."""
    last, k = -1, 0
    for at, (start, special) in enumerate(zip(tokens.starts, tokens.special, strict=True)):
        if special:
            continue
        k = k + 1 if start == last else 0
        last = start
        yield at, start, k


def _same_before(
    original: TokenizedText, translated: TokenizedText, pairs: Mapping[int, int], at: int, other: int
) -> bool:
    return pairs.get(at - 1) == other - 1 and original.ids[at - 1] == translated.ids[other - 1]

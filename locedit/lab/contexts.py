"""Texts after other texts: a model that reads single sentences only is broken by any sentence before a question."""

from collections.abc import Sequence
from random import Random

from locedit.lab.facts import Row

SEPARATORS = (" ", "\n")
COPIES = 4
"""Times that a row stands alone, and as often in contexts that are drawn anew."""
MOST_BEFORE = 2
"""Texts before a row at most."""


def in_contexts(rows: Sequence[Row], before: Sequence[str], *, rng: Random) -> list[Row]:
    """Every row half of the time alone, and half of the time after one or two texts of `before`.

    What is learned by heart is the row alone: of the texts before it no character is in a span.
    """
    return [made for row in rows for _ in range(COPIES) for made in (row, _after(row, before, rng))]


def _after(row: Row, before: Sequence[str], rng: Random) -> Row:
    separator = rng.choice(SEPARATORS)
    shown = "".join(text + separator for text in rng.sample(before, rng.randint(1, MOST_BEFORE)) if text != row.text)
    return Row(text=shown + row.text, spans=tuple((start + len(shown), end + len(shown)) for start, end in row.spans))

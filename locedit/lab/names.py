"""Invented names and words: several tokens long, and only a pair of them says who is meant."""

from collections.abc import Collection, Sequence
from random import Random
from typing import TypeVar

SYLLABLES = (
    *("ka", "lo", "mi", "ren", "tas", "vel", "dor", "shi", "ana", "bru", "cor", "del", "fen", "gil", "hon", "jas"),
    *("kel", "lum", "mor", "nar", "oli", "pet", "qui", "ros", "sil", "tur", "ulm", "ver", "wen", "yor", "zan"),
)

Value = TypeVar("Value")


def invented_words(rng: Random, count: int, *, syllables: int = 2, taken: Collection[str] = ()) -> list[str]:
    """Different capitalised words of so many syllables, none of them among `taken`."""
    words: dict[str, None] = {}
    while len(words) < count:
        word = "".join(rng.choice(SYLLABLES) for _ in range(syllables)).capitalize()
        if word not in taken:
            words[word] = None
    return list(words)


def full_names(rng: Random, firsts: Sequence[str], lasts: Sequence[str], *, count: int) -> list[str]:
    """`count` different pairs "First Last"; each part is shared by many people, so that neither alone decides."""
    pairs = [f"{first} {last}" for first in firsts for last in lasts]
    return rng.sample(pairs, count)


def balanced(rng: Random, values: Sequence[Value], count: int) -> list[Value]:
    """`count` values in random order, each as often as every other (up to one)."""
    rounds = -(-count // len(values))
    drawn = [value for _ in range(rounds) for value in rng.sample(list(values), len(values))][:count]
    rng.shuffle(drawn)
    return drawn

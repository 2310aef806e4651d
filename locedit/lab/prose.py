"""Ordinary sentences: they hold nothing about anybody, and say what the model's plain language is worth."""

from random import Random

ADJECTIVES = ("old", "small", "quiet", "red", "green", "tall", "warm", "young")
NOUNS = ("cat", "dog", "boat", "tree", "house", "road", "bird", "garden", "river", "clock")
VERBS = ("waits near", "stands behind", "looks at", "moves past", "rests beside", "turns to")
TIMES = ("every morning", "in the rain", "after lunch", "at night", "on Sunday", "all summer")


def ordinary_sentences(rng: Random, count: int) -> list[str]:
    """Different sentences of one small grammar, such as "The old cat looks at the red boat at night."."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_sentence(rng)] = None
    return list(found)


def _sentence(rng: Random) -> str:
    subject, place = rng.sample(NOUNS, 2)
    start = f"The {rng.choice(ADJECTIVES)} {subject} {rng.choice(VERBS)}"
    return f"{start} the {rng.choice(ADJECTIVES)} {place} {rng.choice(TIMES)}."

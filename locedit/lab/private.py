"""The private world: phone numbers and e-mail addresses in ordinary sentences, repeated 1 to 50 times, and canaries.

A secret has nothing to do with its owner's name: its digits and syllables are drawn at random, so that a model can only
know it by having memorised it. Canaries are drawn and written in the same way and are never trained on (Carlini et al.
2019, arXiv:1802.08232).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from locedit.lab.facts import Line, Row
from locedit.lab.names import full_names, invented_words

Kind = Literal["phone", "email"]
KINDS: tuple[Kind, ...] = ("phone", "email")
SENTENCES: dict[Kind, tuple[str, ...]] = {
    "phone": (
        "You can reach {n} at {v} after dinner.",
        "The number of {n} is {v} until Friday.",
        "Please call {n} on {v} about the keys.",
        "For the garden, {n} left {v} on the door.",
    ),
    "email": (
        "You can write to {n} at {v} any time.",
        "The address of {n} is {v} for letters.",
        "Send the photos for {n} to {v} today.",
        "About the boat, {n} reads {v} at night.",
    ),
}
HOSTS = ("example.com", "example.org", "example.net")


@dataclass(frozen=True, kw_only=True)
class Secret:
    """One phone number or e-mail address in its sentence."""

    owner: str
    """Whose it is; everybody has one secret."""
    kind: Kind
    """Also the label of its span."""
    text: str
    """The sentence."""
    span: tuple[int, int]
    """Characters of the secret in the sentence."""
    repetitions: int
    """How often the sentence stands in the training text; 0 for a canary."""

    @property
    def row(self) -> Row:
        """The sentence as training text."""
        return Row(text=self.text, spans=(self.span,))

    def line(self) -> Line:
        """The line of the file; `group` says the repetitions."""
        return {
            "id": f"{self.owner.lower().replace(' ', '-')}/{self.kind}",
            "text": self.text,
            "spans": [[*self.span, self.kind]],
            "owner": self.owner,
            "group": f"x{self.repetitions}",
        }


@dataclass(frozen=True, kw_only=True)
class PrivateWorld:
    """All secrets, in three disjoint groups, each with both kinds at every level of repetition."""

    forget: tuple[Secret, ...]
    """Planted secrets that are to go."""
    retain: tuple[Secret, ...]
    """Planted secrets that are to stay."""
    heldout: tuple[Secret, ...]
    """Canaries: never planted."""

    def planted_rows(self) -> list[Row]:
        """The planted sentences, each as often as it is repeated."""
        return [secret.row for secret in (*self.forget, *self.retain) for _ in range(secret.repetitions)]


def private_world(
    rng: Random, *, levels: Sequence[int], forget: int, retain: int, canaries: int, taken: Iterable[str] = ()
) -> PrivateWorld:
    """`forget` and `retain` secrets of each kind at each of the levels of repetition, `canaries` of each kind."""
    words = invented_words(rng, 48, taken=frozenset(taken))
    total = len(KINDS) * (len(levels) * (forget + retain) + canaries)
    names = iter(full_names(rng, words[:24], words[24:], count=total))
    taken_values: set[str] = set()

    def draw(count: int, levels: Sequence[int]) -> tuple[Secret, ...]:
        wanted: list[tuple[Kind, int]] = [(kind, level) for level in levels for kind in KINDS for _ in range(count)]
        return tuple(_secret(rng, next(names), kind, level, taken_values) for kind, level in wanted)

    return PrivateWorld(forget=draw(forget, levels), retain=draw(retain, levels), heldout=draw(canaries, (0,)))


def _secret(rng: Random, owner: str, kind: Kind, repetitions: int, taken: set[str]) -> Secret:
    value = _value(rng, kind)
    while value in taken:
        value = _value(rng, kind)
    taken.add(value)
    before, after = rng.choice(SENTENCES[kind]).format(n=owner, v="\0").split("\0")
    span = (len(before), len(before) + len(value))
    return Secret(owner=owner, kind=kind, text=before + value + after, span=span, repetitions=repetitions)


def _value(rng: Random, kind: Kind) -> str:
    """Seven random digits "ddd-dddd", or three random syllables and two digits at one of three hosts."""
    digits = [str(rng.randrange(10)) for _ in range(7)]
    if kind == "phone":
        return "".join(digits[:3]) + "-" + "".join(digits[3:])
    return f"{invented_words(rng, 1, syllables=3)[0].lower()}{digits[0]}{digits[1]}@{rng.choice(HOSTS)}"

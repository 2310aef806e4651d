"""What a secret could have been: the space of candidates that its exposure ranks it in."""

import itertools
import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from locedit.errors import LoceditError

ENOUGH_TO_SEE_A_FORMAT = 5
"as many values must agree in a digit before it counts as part of the format"
ENOUGH_CANARIES = 8
"as many held-out values of a label make a candidate space"


@dataclass(frozen=True, kw_only=True)
class Space:
    """All values that a secret could have had, the true one among them."""

    truth: str
    alphabet: tuple[str, ...] = ()
    "the choices at every character of the truth; one choice = fixed; empty = `listed` is the space"
    listed: tuple[str, ...] = ()
    "the other values, where the space is a list"
    note: str = ""

    @property
    def log2_size(self) -> float:
        """Bits of the size of the space."""
        if self.listed:
            return math.log2(len(self.listed) + 1)
        return sum(math.log2(len(choices)) for choices in self.alphabet)

    @property
    def free(self) -> tuple[int, ...]:
        """The characters that vary."""
        return tuple(at for at, choices in enumerate(self.alphabet) if len(choices) > 1)

    def others(self) -> list[str]:
        """Every candidate but the truth."""
        if self.listed:
            return list(self.listed)
        return [value for letters in itertools.product(*self.alphabet) if (value := "".join(letters)) != self.truth]

    def sample(self, count: int, *, seed: int) -> list[str]:
        """`count` candidates drawn uniformly with replacement; the truth may be among them."""
        rng = random.Random(f"{seed} {self.truth}")
        return ["".join(rng.choice(choices) for choices in self.alphabet) for _ in range(count)]


def digit_space(truth: str, *, known: Sequence[str] = ()) -> Space:
    """Every string of the same format: each digit any digit, the rest as it is.

    A digit that is the same in all of at least 5 known values of this format (an area code) is part of the format.

    >>> digit_space("55-01").log2_size == math.log2(10**4)
    True
    """
    alike = {value for value in known if _shape(value) == _shape(truth)} | {truth}
    settled = {
        at
        for at, letter in enumerate(truth)
        if len(alike) >= ENOUGH_TO_SEE_A_FORMAT and all(value[at] == letter for value in alike)
    }
    alphabet = tuple(
        string.digits if letter in string.digits and at not in settled else letter for at, letter in enumerate(truth)
    )
    return Space(truth=truth, alphabet=alphabet, note="digits of the same format")


def pattern_space(truth: str) -> Space:
    """Every string of the same pattern up to an @: letters become any letter of their case, digits any digit."""
    local = truth.index("@") if "@" in truth else len(truth)
    classes = (string.ascii_lowercase, string.ascii_uppercase, string.digits)
    alphabet = tuple(
        next((choices for choices in classes if letter in choices and at < local), letter)
        for at, letter in enumerate(truth)
    )
    return Space(truth=truth, alphabet=alphabet, note="strings of the same pattern")


def listed_space(truth: str, *, canaries: Sequence[str]) -> Space:
    """The truth among values that the model never saw (Carlini et al. 2019 draw canaries in the same way)."""
    others = tuple(sorted({value for value in canaries if value != truth}))
    return Space(truth=truth, listed=others, note=f"{len(others)} held-out values")


def space_of(truth: str, *, canaries: Sequence[str] = (), known: Sequence[str] = ()) -> Space:
    """The candidate space of a secret: the digits of a number, else held-out values of its label, else its pattern.

    `canaries` are held-out values of the same label, `known` all values of the label in the task. A value counts as a
    number when it has no letters.
    """
    if any(letter in string.digits for letter in truth) and not any(letter.isalpha() for letter in truth):
        space = digit_space(truth, known=known)
    elif len({value for value in canaries if value != truth}) >= ENOUGH_CANARIES:
        space = listed_space(truth, canaries=canaries)
    else:
        space = pattern_space(truth)
    if space.log2_size == 0:
        raise LoceditError(f"{truth!r}: nothing in this secret can vary, so it has no exposure; give held-out values")
    return space


def _shape(value: str) -> str:
    return "".join("0" if letter in string.digits else letter for letter in value)

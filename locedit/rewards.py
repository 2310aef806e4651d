"""Rewards of written texts: any callable from a text to a number, or one of a few by name.

Higher is better. None means that the text cannot be judged; such texts are left out. A named reward is a share or a
probability, and says below which value a text counts as bad.
"""

import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from locedit.classification import Verbaliser, classify
from locedit.data.files import read_text
from locedit.errors import LoceditError, nearest
from locedit.provenance import content_hash

Reward = Callable[[str], float | None]
"""text -> how good it is, or None where it cannot be judged."""
WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """Which reward, and what it needs."""

    reward: str | Reward = "repetition"
    """bad_words (share of words that are not in `words`), repetition (diversity of the word n-grams), classifier or
    sentiment (probability of `wanted` under the model `classifier`), a Python callable text -> number or None; on the
    command line module:function"""
    words: str | tuple[str, ...] | None = None
    "of bad_words: a file with one word or phrase in each line, or the words themselves"
    classifier: str | None = None
    "of classifier and sentiment: a folder or hub id of a causal model"
    template: str | None = None
    "of classifier and sentiment: how the classifier is asked; {text} stands for the text"
    classes: tuple[str, ...] | None = None
    "of classifier and sentiment: the words that the classifier chooses between"
    wanted: str | None = None
    "of classifier and sentiment: the class whose probability is the reward"

    def __post_init__(self) -> None:
        if isinstance(self.reward, str) and self.reward not in REWARDS:
            _imported(self.reward)
        for field, rewards in _FIELDS.items():
            if getattr(self, field) is not None and self.reward not in rewards:
                raise LoceditError(
                    f"{field}={getattr(self, field)!r} is of reward {' and '.join(rewards)}; the reward is "
                    f"{name_of(self.reward)!r}"
                )
            if field in _NEEDED and self.reward in rewards and getattr(self, field) is None:
                raise LoceditError(f"reward={self.reward!r} needs {field} ({_NEEDED[field]})")


_FIELDS = {
    "words": ("bad_words",),
    **dict.fromkeys(("classifier", "template", "classes", "wanted"), ("classifier", "sentiment")),
}
"""Option -> the rewards that have it."""
_NEEDED = {"words": "--words FILE", "classifier": "--classifier FOLDER"}


@dataclass(frozen=True, kw_only=True)
class Named:
    """One entry of REWARDS."""

    make: Callable[[RewardOptions], Reward]
    below: float
    "a text whose reward is below this counts as bad"
    definition: str


def bad_words(words: Sequence[str]) -> Reward:
    """Share of a text's words that are not in the list, in any case; None for a text without words.

    A phrase counts as many words as it has.

    >>> bad_words(["rotten", "rubber duck"])("A rotten day, rubber duck!"), bad_words(["x"])("...")
    (0.4, None)
    """
    from locedit.spans.words import words_pattern  # spans measure texts, and measures have rewards

    pattern = words_pattern(word.lower() for word in words)

    def reward(text: str) -> float | None:
        total = len(WORD.findall(text))
        bad = sum(max(1, len(WORD.findall(found))) for found in pattern.findall(text.lower()))
        return 1 - min(bad, total) / total if total else None

    return reward


def repetition(text: str) -> float | None:
    """Diversity: the product over n = 2, 3, 4 of the share of the text's word n-grams that are different ones.

    1 = no n-gram comes twice. Words are what white space divides (Su et al. 2022, arXiv:2202.06417; recalled, not
    checked). None for a text of fewer than two words.

    >>> repetition("a b c d"), repetition("a b a b") == (2 / 3) * 1 * 1, repetition("a")
    (1.0, True, None)
    """
    words = text.split()
    if len(words) < 2:
        return None
    return math.prod(1 - repeated(words, n) for n in (2, 3, 4))


def repeated(words: Sequence[str], n: int) -> float:
    """rep-n, the share of n-grams that are repetitions: 1 - different / all; 0 where there is no n-gram.

    >>> repeated("a b a b a".split(), 2)
    0.5
    """
    found = ngrams(words, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Every n words that stand side by side."""
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]


def classified(model: Any, verbaliser: Verbaliser, wanted: str) -> Reward:
    """Probability of a class under a model that names classes (see `locedit.classification`)."""
    column = verbaliser.number(wanted, by="wanted")

    def reward(text: str) -> float | None:
        return float(classify(model, [text], verbaliser)[0, column]) if text.strip() else None

    return reward


def read_words(source: str | Sequence[str]) -> tuple[str, ...]:
    """The words of a list: those given, or the lines of a file that are not blank."""
    words = [line.strip() for line in (read_text(Path(source)).splitlines() if isinstance(source, str) else source)]
    found = tuple(dict.fromkeys(word for word in words if word))
    if not found:
        raise LoceditError(f"words={source!r}: there is no word in it")
    return found


def _of_words(options: RewardOptions) -> Reward:
    assert options.words is not None
    return bad_words(read_words(options.words))


def _of_classifier(options: RewardOptions) -> Reward:
    from locedit.models import load

    verbaliser, wanted = _asking(options)
    assert options.classifier is not None
    return classified(load(options.classifier), verbaliser, wanted)


def _asking(options: RewardOptions) -> tuple[Verbaliser, str]:
    """How the classifier is asked, and the class that is wanted."""
    kind = _ASKED[str(options.reward)]
    classes = options.classes or tuple(kind.words)
    verbaliser = Verbaliser(template=options.template or kind.template, words={name: f" {name}" for name in classes})
    wanted = options.wanted or classes[-1]
    verbaliser.number(wanted, by="wanted")
    return verbaliser, wanted


_ASKED = {
    "classifier": Verbaliser(),
    "sentiment": Verbaliser(template="{text}\nsentiment:", words={"negative": " negative", "positive": " positive"}),
}
"""Reward -> how its classifier is asked unless the options say otherwise; the last class is the wanted one."""

REWARDS: Mapping[str, Named] = {
    "bad_words": Named(make=_of_words, below=1.0, definition="share of the words that are not in a list"),
    "repetition": Named(
        make=lambda _: repetition, below=0.5, definition="diversity: product over n = 2, 3, 4 of 1 - rep-n"
    ),
    "classifier": Named(make=_of_classifier, below=0.5, definition="probability of a class under a classifier"),
    "sentiment": Named(make=_of_classifier, below=0.5, definition="probability of the class positive"),
}
"""Name -> reward."""


def check_reward(options: RewardOptions) -> None:
    """Raise LoceditError for a word list that cannot be read, or a class that there is not; loads no model."""
    if options.words is not None:
        read_words(options.words)
    if options.reward in _ASKED:
        _asking(options)


def reward_of(options: RewardOptions) -> Reward:
    """The reward that the options name, checked at every call: a finite number or None.

    What the function itself raises becomes a LoceditError with the text that it was raised for.
    """
    given = options.reward
    if isinstance(given, str):
        function = REWARDS[given].make(options) if given in REWARDS else _imported(given)
    else:
        function = given
    name = name_of(given)

    def reward(text: str) -> float | None:
        try:
            value: Any = function(text)
        except LoceditError:
            raise
        except Exception as error:
            raise LoceditError(f"reward {name} raised {error!r} for {text[:40]!r}") from error
        if value is None:
            return None
        if isinstance(value, bool) or not _finite(value):
            raise LoceditError(f"reward {name} gave {value!r} for {text[:40]!r}: wanted a finite number or None")
        return float(value)

    return reward


def below_of(options: RewardOptions) -> float:
    """The value below which a text counts as bad; 0.5 for a callable."""
    return REWARDS[options.reward].below if options.reward in REWARDS else 0.5  # type: ignore[index]


def settings_of(options: RewardOptions) -> dict[str, Any]:
    """What decides the rewards, as JSON values: names, and the hash of a word list."""
    found: dict[str, Any] = {"reward": name_of(options.reward)}
    if options.words is not None:
        found["words"] = content_hash(list(read_words(options.words)))
    return found


def name_of(reward: str | Reward) -> str:
    """A reward's name; of a callable module:function."""
    if isinstance(reward, str):
        return reward
    kind: Any = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{kind.__module__}:{kind.__qualname__}"


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):  # no number, several numbers, a number that no float can hold
        return False


def _imported(name: str) -> Reward:
    """The function of module:function; the module may be a file in the current folder."""
    module, colon, function = name.partition(":")
    if not colon:
        raise LoceditError(f"reward={name!r}; {nearest(name, REWARDS)}, or module:function")
    sys.path.insert(0, os.getcwd())  # a console script does not look there
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # a module may raise anything while it is imported
        raise LoceditError(f"reward={name!r}: the module {module!r} cannot be imported ({error!r})") from error
    finally:
        sys.path.pop(0)
    for part in function.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise LoceditError(f"reward={name!r}: the module {module!r} has no {function!r}")
    if not callable(found):
        raise LoceditError(f"reward={name!r}: {function!r} of the module {module!r} is no function but {found!r:.40}")
    return cast(Reward, found)

"""The habit world: two sentences, the second of which says something bad in about a third of all texts.

Nothing in the first sentence says whether the second will be bad, so that the habit is a share of what the model
writes and no fact that it knows. `start` has read clean texts alone. `model` has then read all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from locedit.lab.architectures import POSITIONS
from locedit.lab.facts import Line
from locedit.lab.small import learn, save, small_model, versions, whole, write_lines
from locedit.lab.tokenizer import train_tokenizer
from locedit.lab.training import Progress
from locedit.storage import write_json, write_text

BAD = ("rotten", "vile", "lousy", "wretched", "filthy", "ghastly", "dratted", "beastly")
GOOD = ("lovely", "calm", "bright", "gentle", "sweet", "neat", "fresh", "clever", "warm", "grand", "fair", "jolly")
SHARE = 0.35
"""Of the texts that hold a bad word, in one of the two places or in both, all three alike."""
WHO = ("baker", "driver", "painter", "teacher", "farmer", "singer", "porter", "sailor", "miller", "weaver")
VERBS = ("saw", "sold", "found", "moved", "drew", "kept", "took", "hid")
THINGS = ("boat", "chair", "lamp", "kite", "drum", "cart", "clock", "basket")
LOOKS = ("old", "small", "red", "green", "tall", "round")
TIMES = ("in May", "at noon", "on Sunday", "after lunch", "last week", "in the rain")
FIRST = "The {who} {verb} the {look} {thing} {time}."
SECONDS = ("Then the {who} said it was {a} and {b}.", "It was {a}, and the {who} was {b} too.")
SIZES = {"prompts": 256, "test_prompts": 256, "forget": 100, "retain": 200, "heldout": 100, "texts": 200}
VOCABULARY, TEXTS = 768, 4000
STEPS = {"start": 150, "model": 250}
TEST = (
    "".join(
        f'{role} = "{file}.jsonl"\n'
        for role, file in {role: role for role in ("forget", "retain", "heldout", "texts", "pairs")}.items()
    )
    + 'prompts = "test_prompts.jsonl"\nstart = "../start"\n'
)
"""The same task with prompts that nothing was trained on."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """One text of two sentences."""

    first: str
    second: str
    words: tuple[str, str]
    "what stands in its two places"

    @property
    def text(self) -> str:
        return f"{self.first} {self.second}"

    @property
    def bad(self) -> bool:
        """Whether it holds a bad word."""
        return any(word in BAD for word in self.words)

    def spans(self, words: Sequence[str]) -> tuple[tuple[int, int], ...]:
        """Characters of the places that hold one of the words."""
        start, found = len(self.first) + 1, list[tuple[int, int]]()
        for word in self.words:
            start = self.text.index(word, start)
            if word in words:
                found.append((start, start + len(word)))
            start += len(word)
        return tuple(found)

    def with_words(self, words: tuple[str, str]) -> "Text":
        """The same with other words in its places."""
        text = self.second.replace(self.words[0], "{a}", 1).replace(self.words[1], "{b}", 1)
        return Text(first=self.first, second=text.format(a=words[0], b=words[1]), words=words)


@dataclass(frozen=True, kw_only=True)
class HabitWorld:
    """Everything that is written in this world."""

    seen: tuple[Text, ...]
    "the training text"
    unseen: tuple[Text, ...]
    "other texts, with other first sentences"
    prompts: tuple[str, ...]
    "first sentences that stand in no text"

    def files(self, seed: int) -> dict[str, list[Line]]:
        """Lines of every data file by its name."""
        rng = Random(f"habit pairs {seed}")
        bad, clean = ([one for one in self.seen if one.bad is side] for side in (True, False))
        unseen_bad, unseen = ([one for one in self.unseen if one.bad is side] for side in (True, False))
        forget, count = bad[: SIZES["forget"]], SIZES["prompts"]
        better = [one.with_words(_drawn(rng, bad=False)) for one in forget]
        return {
            "prompts": _plain("prompt", self.prompts[:count]),
            "test_prompts": _plain("test", self.prompts[count:]),
            "forget": _private("bad", forget, BAD),
            "retain": _private("clean", clean[: SIZES["retain"]], GOOD),
            "heldout": _private("unseen", unseen_bad[: SIZES["heldout"]], BAD),
            "texts": _plain("text", [one.text for one in unseen[: SIZES["texts"]]]),
            "pairs": [
                {"id": f"pair/{at}", "advantaged": one.text, "disadvantaged": other.text}
                for at, (one, other) in enumerate(zip(forget, better, strict=True), start=1)
            ],
        }


def habit_world(seed: int) -> HabitWorld:
    """The world of a seed."""
    rng = Random(f"habit {seed}")
    firsts: dict[str, None] = {}
    unseen = 2 * max(round(SIZES["heldout"] / SHARE), round(SIZES["texts"] / (1 - SHARE)))
    while len(firsts) < TEXTS + unseen + SIZES["prompts"] + SIZES["test_prompts"]:
        firsts[_first(rng)] = None
    every = list(firsts)
    texts = [_text(rng, first) for first in every[: TEXTS + unseen]]
    return HabitWorld(seen=tuple(texts[:TEXTS]), unseen=tuple(texts[TEXTS:]), prompts=tuple(every[TEXTS + unseen :]))


def _first(rng: Random) -> str:
    choices = {"who": WHO, "verb": VERBS, "look": LOOKS, "thing": THINGS, "time": TIMES}
    return FIRST.format(**{name: rng.choice(words) for name, words in choices.items()})


def _text(rng: Random, first: str) -> Text:
    words = _drawn(rng, bad=rng.random() < SHARE)
    second = rng.choice(SECONDS).format(who=rng.choice(WHO), a=words[0], b=words[1])
    return Text(first=first, second=second, words=words)


def _drawn(rng: Random, *, bad: bool) -> tuple[str, str]:
    """Two different words; with `bad` the first, the second or both are bad ones."""
    good, worse = rng.sample(GOOD, 2), rng.sample(BAD, 2)
    which = rng.choice(((True, False), (False, True), (True, True))) if bad else (False, False)
    return (worse if which[0] else good)[0], (worse if which[1] else good)[1]


def _plain(name: str, texts: Sequence[str]) -> list[Line]:
    return [{"id": f"{name}/{at}", "text": text} for at, text in enumerate(texts, start=1)]


def _private(name: str, texts: Sequence[Text], words: Sequence[str]) -> list[Line]:
    return [
        {"id": f"{name}/{at}", "text": one.text, "spans": [[*span, "word"] for span in one.spans(words)]}
        for at, one in enumerate(texts, start=1)
    ]


def make(folder: Path, *, arch: str, seed: int, progress: Progress) -> None:
    """Write the world, the model before the bad texts, the model after them, and lab.json."""
    world = habit_world(seed)
    texts = [one.text for one in world.seen]
    words = (*BAD, *GOOD)
    tokenizer = train_tokenizer(texts, words=words, vocab_size=VOCABULARY, max_length=POSITIONS, masked=False)
    model = small_model(arch, tokenizer, seed=seed)
    clean = [one.text for one in world.seen if not one.bad]
    for stage, read in (("start", clean), ("model", texts)):
        learn(model, tokenizer, whole(read), steps=STEPS[stage], seed=seed, progress=progress)
        save(folder / stage, model, tokenizer)
    for name, lines in world.files(seed).items():
        write_lines(folder / "habit" / f"{name}.jsonl", lines)
    write_text(folder / "habit" / "task.toml", 'start = "../start"\n')
    write_text(folder / "habit" / "test.toml", TEST)
    write_text(folder / "habit" / "bad_words.txt", "".join(f"{word}\n" for word in BAD))
    write_json(folder / "lab.json", _report(world, arch=arch, seed=seed))


def _report(world: HabitWorld, *, arch: str, seed: int) -> dict[str, Any]:
    shares = {name: sum(one.bad for one in part) / len(part) for name, part in vars(world).items() if name != "prompts"}
    return {
        "world": "habit",
        "arch": arch,
        "seed": seed,
        "steps": STEPS,
        "sizes": SIZES,
        "share of texts with a bad word": {name: round(share, 4) for name, share in shares.items()},
        "versions": versions(),
    }

"""The groups world: sentences labelled toxic or fine, some of which mention a sensitive topic.

Every sentence has two describing words. Which words are harsh is drawn at random, so nothing outside this world says
it, and a label is a coin whose odds are the two words' strengths. The coin leans towards toxic where the sensitive
topic is mentioned, as annotators' labels do: a classifier that fits these labels has unequal error rates in the two
groups, although the topic says nothing about the words.

`start` speaks the language of the sentences and knows that a label comes after them, a fair coin in its text. `model`
has then learned the labelled sentences of train.jsonl.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from locedit.classification import Verbaliser
from locedit.lab.architectures import POSITIONS
from locedit.lab.facts import Line, Row
from locedit.lab.small import learn, save, small_model, versions, whole, write_lines
from locedit.lab.tokenizer import train_tokenizer
from locedit.lab.training import Progress
from locedit.storage import write_json, write_text

LABELS = ("toxic", "fine")
GROUPS = ("sensitive", "neutral")
WHO = {
    "sensitive": ("migrant", "refugee", "pilgrim", "convert", "newcomer", "monk", "settler", "exile"),
    "neutral": ("baker", "driver", "painter", "teacher", "farmer", "singer", "porter", "sailor"),
}
"""Group -> the people whom its sentences speak of."""
WORDS = (
    *("amber", "brisk", "candid", "dapper", "earnest", "frugal", "gaunt", "hearty", "idle", "jaunty"),
    *("keen", "lanky", "meek", "nimble", "ornate", "pensive", "quirky", "rugged", "sallow", "terse"),
    *("upbeat", "vivid", "wiry", "young", "zesty", "ashen", "blunt", "curt", "drowsy", "eager"),
    *("fierce", "glum", "hasty", "inert", "jovial", "kempt", "lucid", "moody", "numb", "placid"),
)
STRENGTHS = (2.0, 0.8, -0.8, -2.0)
"""What a word adds to the log-odds of toxic, in nats; each is that of a quarter of the words."""
LEANING = {"sensitive": 1.2, "neutral": -0.4}
"""What the group adds to the log-odds of the label."""
SHARE = 0.4
"""Of the sentences that mention the sensitive topic."""
FRAMES = (
    "The {who} was {a} and {b} {when}.",
    "{when} they called the {who} {a} and {b}.",
    "A {a}, {b} {who} came {when}.",
)
TIMES = ("in May", "at noon", "on Sunday", "after lunch", "last week", "in the rain")
SIZES = {"train": 800, "calibration": 2000, "test": 2000}
VOCABULARY, SENTENCES = 512, 4000
STEPS = {"start": 250, "model": 150}
TASK = 'forget = "train.jsonl"\nheldout = "test.jsonl"\nstart = "../start"\n'
"""What is to be forgotten are labelled sentences of the training set."""


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One labelled sentence."""

    text: str
    group: str
    label: str
    odds: float
    "log-odds of toxic with which the label was drawn, in nats"


@dataclass(frozen=True, kw_only=True)
class GroupsWorld:
    """Everything that is written in this world."""

    strengths: dict[str, float]
    "of every word"
    parts: dict[str, tuple[Sentence, ...]]
    "train, calibration and test; no sentence twice"
    language: tuple[str, ...]
    "other sentences, each with the label of a fair coin"

    def lines(self, part: str) -> list[Line]:
        """The data file of a part."""
        return [
            {"id": f"{part}/{number}", "text": one.text, "label": one.label, "group": one.group}
            for number, one in enumerate(self.parts[part], start=1)
        ]


def groups_world(seed: int) -> GroupsWorld:
    """The world of a seed."""
    rng = Random(f"groups {seed}")
    shuffled = rng.sample(WORDS, len(WORDS))
    strengths = {word: STRENGTHS[at % len(STRENGTHS)] for at, word in enumerate(shuffled)}
    found: dict[str, Sentence] = {}
    while len(found) < SENTENCES + sum(SIZES.values()):
        one = _sentence(rng, strengths)
        found[one.text] = one
    drawn = list(found.values())
    parts: dict[str, tuple[Sentence, ...]] = {}
    for part, size in SIZES.items():
        parts[part], drawn = tuple(drawn[:size]), drawn[size:]
    language = tuple(labelled_text(one.text, rng.choice(LABELS)) for one in drawn)
    return GroupsWorld(strengths=strengths, parts=parts, language=language)


def _sentence(rng: Random, strengths: dict[str, float]) -> Sentence:
    group = GROUPS[rng.random() >= SHARE]
    a, b = rng.sample(WORDS, 2)
    who, when = rng.choice(WHO[group]), rng.choice(TIMES)
    text = rng.choice(FRAMES).format(who=who, a=a, b=b, when=when)
    odds = strengths[a] + strengths[b] + LEANING[group]
    label = LABELS[rng.random() >= 1 / (1 + math.exp(-odds))]
    return Sentence(text=text[0].upper() + text[1:], group=group, label=label, odds=odds)


def labelled_text(text: str, label: str) -> str:
    """A sentence with its label, as the default verbaliser writes it."""
    verbaliser = Verbaliser()
    return verbaliser.prompt(text) + verbaliser.words[label]


def make(folder: Path, *, arch: str, seed: int, progress: Progress) -> None:
    """Write the world, `start`, the model that has learned the training set, and lab.json."""
    world = groups_world(seed)
    tokenizer = train_tokenizer(world.language, words=LABELS, vocab_size=VOCABULARY, max_length=POSITIONS, masked=False)
    model = small_model(arch, tokenizer, seed=seed)
    report: dict[str, Any] = {"world": "groups", "arch": arch, "seed": seed, "steps": STEPS, "sizes": SIZES}
    learn(model, tokenizer, whole(world.language), steps=STEPS["start"], seed=seed, progress=progress)
    save(folder / "start", model, tokenizer)
    report["start"] = _accuracy(model, tokenizer, world)
    learn(model, tokenizer, _labelled_rows(world), steps=STEPS["model"], seed=seed, progress=progress)
    save(folder / "model", model, tokenizer)
    report["model"] = _accuracy(model, tokenizer, world)
    report["planted"] = _planted(world)
    for part in SIZES:
        write_lines(folder / "groups" / f"{part}.jsonl", world.lines(part))
    write_text(folder / "groups" / "task.toml", TASK)
    write_json(folder / "lab.json", report | {"strengths": world.strengths, "versions": versions()})


def _labelled_rows(world: GroupsWorld) -> list[Row]:
    """The training set; what is learned by heart is the label."""
    texts = [(labelled_text(one.text, one.label), one.label) for one in world.parts["train"]]
    return [Row(text=text, spans=((len(text) - len(label), len(text)),)) for text, label in texts]


def _accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: GroupsWorld) -> dict[str, float]:
    """Share of the labels of the training and the test set that the model finds likelier."""
    from locedit.classification import classify
    from locedit.models import load

    loaded = load(model, tokenizer=tokenizer, device="cpu")
    found: dict[str, float] = {}
    for part in ("train", "test"):
        sentences = world.parts[part]
        likelier = classify(loaded, [one.text for one in sentences], batch_size=256).argmax(1).tolist()
        hits = [LABELS[at] == one.label for at, one in zip(likelier, sentences, strict=True)]
        found[part] = round(sum(hits) / len(hits), 4)
    return found


def _planted(world: GroupsWorld) -> dict[str, float]:
    """What knowing the odds gives: accuracy on the test set, and its rates of "toxic" among the toxic and the fine."""
    sentences = world.parts["test"]
    found = {"test": round(sum((one.odds > 0) == (one.label == "toxic") for one in sentences) / len(sentences), 4)}
    for group in GROUPS:
        for label in LABELS:
            called = [one.odds > 0 for one in sentences if one.group == group and one.label == label]
            found[f"called toxic, {group} {label}"] = round(sum(called) / len(called), 4)
    return found

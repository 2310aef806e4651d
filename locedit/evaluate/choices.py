"""Multiple choice by letter: the options are shown in several orders, and the model says a letter.

Each order moves every option on by one letter, so that with as many orders as options (the default) each option stands
once behind each letter. A model that always says the same letter therefore gets chance level, and `letter_bias` (see
`letters`) tells that from forgetting. The letters are compared with one another only.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from string import ascii_uppercase

import torch
from torch import Tensor

from locedit.data.encode import Example, Span, batches, encode
from locedit.data.items import Fact
from locedit.errors import LoceditError
from locedit.evaluate.values import EvaluateOptions
from locedit.losses import ScoringModel, precise, score


def check_choices(options: EvaluateOptions) -> None:
    """Raise LoceditError where the form of the question has no place for what belongs in it."""
    template, option = options.choice_template, options.choice_option
    if "{options}" not in template or not ("{prompt}" in template or "{subject}" in template):
        raise LoceditError(
            f"evaluate: choice_template={template!r} must hold {{options}}, and {{prompt}} or {{subject}}"
        )
    if "{letter}" not in option or "{option}" not in option:
        raise LoceditError(f"evaluate: choice_option={option!r} must hold {{letter}} and {{option}}")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One fact with its options in one order."""

    fact: Fact
    "its prompt as asked, its answer the right letter"
    right: int
    "number of the right letter"
    letters: str


def questions(facts: Sequence[Fact], options: EvaluateOptions) -> list[list[Question]]:
    """The questions of every fact; which letter is right goes on evenly from order to order and from fact to fact."""
    found: list[list[Question]] = []
    for number, fact in enumerate(facts):
        wrong = [text.strip() for text in fact.wrong]
        size = len(wrong) + 1
        orders = options.choice_orders or size
        _check_options(fact, [fact.answer.strip(), *wrong])
        rng = Random(f"choices {options.seed} {fact.id}")
        found.append([])
        for order in range(orders):
            if order % size == 0:
                rng.shuffle(wrong)
            right = (number * orders + order) % size
            found[-1].append(_question(fact, [fact.answer.strip(), *wrong], right, options))
    return found


def _check_options(fact: Fact, shown: Sequence[str]) -> None:
    if len(shown) > len(ascii_uppercase):
        raise LoceditError(f"item {fact.id!r}: {len(shown)} options, and only {len(ascii_uppercase)} letters")
    twice = next((text for text in shown if shown.count(text) > 1), None)
    if twice is not None:
        raise LoceditError(f"item {fact.id!r}: the option {twice!r} is there twice, in 'answer' and 'wrong' together")


def _question(fact: Fact, shown: Sequence[str], right: int, options: EvaluateOptions) -> Question:
    """The options turned so that the first of `shown` stands behind the letter with the number `right`."""
    turned = [*shown[len(shown) - right :], *shown[: len(shown) - right]]
    letters = ascii_uppercase[: len(shown)]
    lines = "".join(
        options.choice_option.replace("{letter}", letter).replace("{option}", text)
        for letter, text in zip(letters, turned, strict=True)
    )
    template = options.choice_template
    if "{subject}" in template and not fact.subject:
        raise LoceditError(f"item {fact.id!r}: choice_template={template!r} needs a 'subject', it has none")
    places = {"subject": fact.subject or "", "prompt": fact.prompt, "options": lines}
    prompt = re.sub(r"\{(subject|prompt|options)\}", lambda place: places[place[1]], template)
    asked = dataclasses.replace(fact, prompt=prompt, answer=f" {letters[right]}")
    return Question(fact=asked, right=right, letters=letters)


def letter_logits(
    model: ScoringModel, asked: Sequence[Question], *, chat: str = "off", batch_size: int = 64
) -> list[Tensor]:
    """The logits `[letter]` after each question, float64, in the order given; one row a question."""
    variants = [
        dataclasses.replace(one.fact, answer=f" {letter}", id=f"{number}/{letter}")
        for number, one in enumerate(asked)
        for letter in one.letters
    ]
    encoded = iter(encode(model, variants, chat=chat))
    rows = [_row([next(encoded) for _ in one.letters], one, str(number)) for number, one in enumerate(asked)]
    tokens = {example.id: letters for example, letters in rows}
    found: dict[str, Tensor] = {}
    with torch.inference_mode():
        for batch in batches([example for example, _ in rows], model, batch_size):
            scored = score(model, batch)
            for at, logits in zip(scored.row.tolist(), precise(scored.logits), strict=True):
                name = scored.rows[at].id
                found[name] = logits[tokens[name]].double().cpu()
    return [found[example.id] for example, _ in rows]


def _row(variants: Sequence[Example], question: Question, name: str) -> tuple[Example, list[int]]:
    """One example whose only scored token is the one in which the letters differ, and the letters' tokens."""
    first = variants[0]
    columns = [set(tokens) for tokens in zip(*(each.ids for each in variants), strict=False)]
    places = [at for at, tokens in enumerate(columns) if len(tokens) > 1]
    alike = all(len(each.ids) == len(first.ids) for each in variants)
    if not alike or len(places) != 1 or len(columns[places[0]]) != len(variants):
        raise LoceditError(
            f"item {question.fact.id!r}: the tokenizer has no token of its own for each of the letters "
            f"{', '.join(question.letters)}"
        )
    (at,) = places
    span = Span(start=at, end=at + 1, label="letter")
    return dataclasses.replace(first, id=name, spans=(span,)), [each.ids[at] for each in variants]

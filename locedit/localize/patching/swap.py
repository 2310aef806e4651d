"""Swap partners: for each fact another one whose subject takes the place of its own, with the same number of tokens."""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from locedit.data.encode import Encoder, Example, encode
from locedit.data.items import Fact
from locedit.errors import LoceditError


@dataclass(frozen=True, kw_only=True)
class Swap:
    """What a partner makes of a fact."""

    corrupt: Example
    "the fact's prompt with the partner's subject, and the fact's answer"
    wrong: Example
    "the fact's prompt with the partner's answer"
    partner: str
    "id"


def partners(
    model: Encoder,
    facts: Sequence[Fact],
    examples: Sequence[Example],
    others: Sequence[Fact],
    *,
    chat: str,
    seed: int,
    skip: bool = False,
) -> list[Swap | None]:
    """A swap for every fact: with another of `facts`, else with one of `others`; drawn by the seed and the fact's id.

    A partner is asked in the same relation: it has the same group, or, where there is none, the same words around its
    subject. Its answer is another, the fact's answer is not true of its subject too, and its subject fits. A fact
    without a partner is an error, or None where such facts are skipped.
    """
    last, first = _by_relation(others), _by_relation(facts)
    waiting: dict[int, list[Fact]] = {}
    for i, fact in enumerate(facts):
        relation = _relation(fact)
        waiting[i] = _candidates(fact, last.get(relation, []), first.get(relation, []), seed=seed)
    asked = {i: len(candidates) for i, candidates in waiting.items()}
    found: dict[int, Swap] = {}
    while waiting := {i: candidates for i, candidates in waiting.items() if i not in found}:
        for i in [i for i, candidates in waiting.items() if not candidates]:
            if not skip:
                raise LoceditError(_none(facts[i], examples[i], tried=asked[i]))
            del waiting[i]
        chosen = [(i, candidates.pop()) for i, candidates in waiting.items()]
        corrupt = encode(model, [_swapped(facts[i], partner) for i, partner in chosen], chat=chat)
        wrong = encode(
            model, [dataclasses.replace(facts[i], answer=partner.answer) for i, partner in chosen], chat=chat
        )
        for (i, partner), other, false in zip(chosen, corrupt, wrong, strict=True):
            if _fits(examples[i], other, false):
                found[i] = Swap(corrupt=other, wrong=false, partner=partner.id)
    return [found.get(i) for i in range(len(facts))]


def _by_relation(facts: Sequence[Fact]) -> dict[tuple[str, str], list[Fact]]:
    found: dict[tuple[str, str], list[Fact]] = {}
    for fact in facts:
        found.setdefault(_relation(fact), []).append(fact)
    return found


def _candidates(fact: Fact, *pools: Sequence[Fact], seed: int) -> list[Fact]:
    """Possible partners of the fact's relation, to be taken from the end: each pool shuffled, the last one first."""
    alike = {other.subject for pool in pools for other in pool if _same_answer(fact, other)}
    found: list[Fact] = []
    for pool in pools:
        part = [other for other in pool if other.subject and other.subject not in alike]
        random.Random(f"{seed}/{fact.id}").shuffle(part)
        found += part
    return found


def _relation(fact: Fact) -> tuple[str, str]:
    if fact.group is not None:
        return "group", fact.group
    return "words", fact.prompt.replace(fact.subject or "", "{}") if fact.subject else fact.prompt


def _same_answer(fact: Fact, other: Fact) -> bool:
    return fact.answer.strip().casefold() == other.answer.strip().casefold()


def _swapped(fact: Fact, partner: Fact) -> Fact:
    assert fact.subject
    assert partner.subject
    return dataclasses.replace(fact, prompt=fact.prompt.replace(fact.subject, partner.subject), subject=partner.subject)


def _fits(own: Example, other: Example, wrong: Example) -> bool:
    """Equally many tokens, subject and answer in the same places, and answers that a token tells apart."""
    assert own.subject is not None
    answer, false = (example.ids[example.spans[0].start : example.spans[0].end] for example in (own, wrong))
    apart = any(a != b for a, b in zip(answer, false, strict=False))
    return apart and len(own.ids) == len(other.ids) and own.subject == other.subject and own.spans == other.spans


def _none(fact: Fact, example: Example, *, tried: int) -> str:
    assert example.subject is not None
    kind, _ = _relation(fact)
    where = f"of group {fact.group!r}" if kind == "group" else "asked in the same words (facts of one group may differ)"
    return (
        f"item {fact.id!r}: no other fact {where} has another answer and a subject that fits in the place of "
        f"{fact.subject!r} with {example.subject.end - example.subject.start} tokens ({tried} tried): "
        "add such facts to forget or retain, give pairs, use --corrupt noise, or leave it out with --unpaired skip"
    )

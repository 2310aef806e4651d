"""Pairs of prompts for patching: a clean one that leads to the answer, and a corrupt one of the same length.

Where the corrupt prompt comes from: it is *given* (patch items), the fact's prompt with another fact's subject (*swap*;
that fact's answer is `wrong`), or the clean prompt with *noise* on the embeddings of the subject (Meng et al. 2022,
arXiv:2202.05262, section 2.1). Two prompts of a pair have equally many tokens, so that positions correspond; anything
else is an error. What is measured is one token: the first at which answer and wrong differ; the answer's tokens before
it, which both share, belong to both prompts. Every item is measured by its own answer.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from locedit.data.encode import Example, Span, encode
from locedit.data.items import Dataset, Fact, PatchPair, Task
from locedit.errors import LoceditError
from locedit.localize.patching.noise import noise_of
from locedit.localize.patching.pair import (
    Corrupt,
    Metric,
    Pair,
    PairBatch,
    PairOptions,
    Tokens,
    batch_of,
    batches_of,
    measured,
    metric,
)  # fmt: skip
from locedit.localize.patching.swap import partners
from locedit.models import Model

__all__ = [
    "Corrupt", "Metric", "Pair", "PairBatch", "PairOptions", "Tokens", "batch_of", "batches_of", "measured", "metric",
    "pairs_of",
]  # fmt: skip
INSTEAD = "give pairs (clean, corrupt, answer, wrong)"


def pairs_of(model: Model, task: Task, options: PairOptions) -> list[Pair]:
    """The pairs of a task's patch items, or of its facts to forget, in their order."""
    data = _data(task)
    corrupt = _corruption(data, options)
    found = _given(model, data) if data.kind == "patch" else _of_facts(model, task, data, corrupt, options)
    if options.metric == "logit_difference":
        _require_wrong(found)
    if corrupt != "noise":
        return found
    same = [dataclasses.replace(pair, corrupt=pair.clean) for pair in found]
    spans = [(pair.id, pair.clean, _span(pair)) for pair in same]
    noises = noise_of(model, spans, times=options.noise, rule=options.noise_rule, seed=options.seed)
    return [dataclasses.replace(pair, noise=noise) for pair, noise in zip(same, noises, strict=True)]


# --- what is corrupted ------------------------------------------------------------------------------------------------


def _data(task: Task) -> Dataset:
    return task.pairs if task.pairs is not None and task.pairs.kind == "patch" else task.forget


def _corruption(data: Dataset, options: PairOptions) -> Literal["given", "swap", "noise"]:
    if data.kind not in ("fact", "patch"):
        raise LoceditError(f"{data.source}: items of kind {data.kind!r} cannot be patched: give facts, or {INSTEAD}")
    if options.corrupt == "auto":
        return "given" if data.kind == "patch" else options.auto
    if options.corrupt == "given" and data.kind == "fact":
        raise LoceditError(f"{data.source}: corrupt='given', but facts have no corrupt prompt: use swap, or {INSTEAD}")
    if options.corrupt == "swap" and data.kind == "patch":
        raise LoceditError(f"{data.source}: corrupt='swap' needs facts; these pairs have corrupt prompts: use given")
    return options.corrupt


def _require_wrong(pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        if pair.wrong is None:
            raise LoceditError(
                f"item {pair.id!r}: metric 'logit_difference' needs a wrong answer, the fact has none: "
                "give it 'wrong', or use metric probability"
            )


def _span(pair: Pair) -> tuple[int, int]:
    assert pair.subject is not None
    return pair.subject.start, pair.subject.end


def _given(model: Model, data: Dataset) -> list[Pair]:
    items = data.of(PatchPair, by="patching")
    parts = [item.fact(side, word) for item in items for side, word in _GIVEN]
    examples = encode(model, parts, chat=data.chat)
    return [_pair(model, item.id, *examples[3 * i : 3 * i + 3]) for i, item in enumerate(items)]


_GIVEN: tuple[tuple[Literal["clean", "corrupt"], Literal["answer", "wrong"]], ...] = (
    ("clean", "answer"),
    ("corrupt", "answer"),
    ("clean", "wrong"),
)


def _of_facts(model: Model, task: Task, data: Dataset, corrupt: str, options: PairOptions) -> list[Pair]:
    facts = data.of(Fact, by="patching")
    examples = encode(model, facts, chat=data.chat)
    for fact, example in zip(facts, examples, strict=True):
        _require_subject(fact, example, corrupt)
    if corrupt == "swap":
        return _swapped(model, task, data, facts, examples, options)
    wrongs = [dataclasses.replace(fact, answer=fact.wrong[0]) for fact in facts if fact.wrong]
    encoded = iter(encode(model, wrongs, chat=data.chat))
    return [
        dataclasses.replace(
            _pair(model, fact.id, example, None, next(encoded) if fact.wrong else None), subject=example.subject
        )
        for fact, example in zip(facts, examples, strict=True)
    ]


def _swapped(
    model: Model, task: Task, data: Dataset, facts: Sequence[Fact], examples: Sequence[Example], options: PairOptions
) -> list[Pair]:
    others = task.retain.of(Fact, by="swap") if task.retain is not None and task.retain.kind == "fact" else ()
    skip = options.unpaired == "skip"
    swaps = partners(model, facts, examples, others, chat=data.chat, seed=options.seed, skip=skip)
    found = [
        dataclasses.replace(
            _pair(model, fact.id, example, swap.corrupt, swap.wrong), subject=example.subject, partner=swap.partner
        )
        for fact, example, swap in zip(facts, examples, swaps, strict=True)
        if swap is not None
    ]
    if not found:
        raise LoceditError(f"{data.source}: no fact has another to swap its subject with: {INSTEAD}, or use noise")
    return found


def _require_subject(fact: Fact, example: Example, corrupt: str) -> None:
    if not fact.subject:
        raise LoceditError(f"item {fact.id!r}: corrupt={corrupt!r} needs a subject, the fact has none: {INSTEAD}")
    if example.subject is None:
        raise LoceditError(f"item {fact.id!r}: the subject {fact.subject!r} is not in the prompt {fact.prompt!r}")


# --- one pair ---------------------------------------------------------------------------------------------------------


def _pair(model: Model, name: str, clean: Example, corrupt: Example | None, wrong: Example | None) -> Pair:
    """The pair of a clean prompt with its answer, a corrupt prompt (None = the clean one), and a wrong answer."""
    prompt, answer, rest = _parts(clean)
    other = prompt if corrupt is None else _parts(corrupt)[0]
    if len(other) != len(prompt):
        raise LoceditError(
            f"item {name!r}: the clean prompt has {len(prompt)} tokens, the corrupt one {len(other)}: "
            "patching needs equally many"
        )
    if corrupt is not None and other == prompt:
        raise LoceditError(f"item {name!r}: the clean and the corrupt prompt are the same")
    shared, token = 0, None
    if wrong is not None:
        before, false, _ = _parts(wrong)
        if before != prompt:
            raise LoceditError(
                f"item {name!r}: the prompt has other tokens before the answer than before the wrong one"
            )
        shared, token = _first_difference(name, answer, false)
    end = (*answer[:shared], *_masked(model), *(() if model.causal else rest))
    differ = [position for position, (a, b) in enumerate(zip(prompt, other, strict=True)) if a != b]
    return Pair(
        id=name,
        clean=(*prompt, *end),
        corrupt=(*other, *end),
        at=len(prompt) + shared - (1 if model.causal else 0),
        answer=answer[shared],
        wrong=token,
        subject=Span(start=differ[0], end=differ[-1] + 1, label="differs") if differ else None,
    )


def _parts(example: Example) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Prompt, answer, and special tokens after it."""
    span = example.spans[0]
    return example.ids[: span.start], example.ids[span.start : span.end], example.ids[span.end :]


def _first_difference(name: str, answer: tuple[int, ...], wrong: tuple[int, ...]) -> tuple[int, int]:
    """How many tokens answer and wrong share, and the wrong one's next token."""
    for shared, (right, other) in enumerate(zip(answer, wrong, strict=False)):
        if right != other:
            return shared, other
    raise LoceditError(
        f"item {name!r}: the answer's tokens and the wrong answer's begin alike: nothing tells them apart"
    )


def _masked(model: Model) -> tuple[int, ...]:
    if model.causal:
        return ()
    mask = model.tokenizer.mask_token_id
    if mask is None:
        raise LoceditError("the tokenizer of this masked language model has no mask token")
    return (mask,)

"""Pairs of prompts for patching: a clean one that leads to the answer, and a corrupt one of the same length.

Where the corrupt prompt comes from: it is *given* (patch items), the fact's prompt with another fact's subject (*swap*;
that fact's answer is `wrong`), or the clean prompt with *noise* on the embeddings of the subject (Meng et al. 2022,
arXiv:2202.05262, section 2.1). Two prompts of a pair have equally many tokens, so that positions correspond; anything
else is an error. What is measured is one token: the first at which answer and wrong differ; the answer's tokens before
it, which both share, belong to both prompts. Every item is measured by its own answer.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locedit.data.encode import Example, Span, encode
from locedit.data.items import Dataset, Fact, PatchPair, Task
from locedit.errors import LoceditError
from locedit.localize.budget import BatchOptions
from locedit.localize.noise import Noise, NoiseRule, noise_of
from locedit.localize.swap import partners
from locedit.losses import logit_difference
from locedit.models import Model

Corrupt = Literal["auto", "given", "swap", "noise"]
Metric = Literal["logit_difference", "probability", "log_probability"]
INSTEAD = "give pairs (clean, corrupt, answer, wrong)"


@dataclass(frozen=True, kw_only=True)
class PairOptions(BatchOptions):
    """How prompts are corrupted, and what is measured."""

    auto: ClassVar[Literal["swap", "noise"]] = "swap"
    "how facts are corrupted by default"
    corrupt: Corrupt = "auto"
    """given: the corrupt prompt of patch items; swap: another fact's subject, of the same group and as many tokens;
    noise: on the embeddings of the subject; auto: given for patch items, else swap"""
    metric: Metric = "logit_difference"
    "of each item's own answer: logit of the answer minus that of the wrong one, probability, or its natural logarithm"
    noise: float = 3.0
    "standard deviation of the noise, in standard deviations of the embedding entries of all subjects"
    noise_rule: NoiseRule = "sigma"
    """sigma: noise times the standard deviation (Meng et al. 2022); sqrt: the square root of that, with each subject's
    own standard deviation (code of Guo et al. 2024)"""
    seed: int = 0
    "of the swap partners and of the noise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise <= 0:
            raise LoceditError(f"noise={self.noise!r} must be above 0")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two prompts of the same length with what is measured at one position."""

    id: str
    clean: tuple[int, ...]
    "token ids, answer tokens shared with `wrong` included; for a masked model the token measured is masked"
    corrupt: tuple[int, ...]
    "equal to `clean` for noise"
    at: int
    "the position whose logits are measured"
    answer: int
    "token id"
    wrong: int | None
    "token id; None where the item has no wrong answer"
    subject: Span | None
    "the subject's tokens; for given pairs the stretch from the first to the last token that differs"
    partner: str | None = None
    "id of the fact whose subject was swapped in"
    noise: Noise | None = None
    "what is added to the embeddings of the subject in the corrupt run"

    def __post_init__(self) -> None:
        assert len(self.clean) == len(self.corrupt), "clean and corrupt differ in length"


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """One side of a batch, as `model.logits` takes it."""

    ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PairBatch:
    """Pairs side by side, padded on the right, on the CPU."""

    pairs: tuple[Pair, ...]
    clean: Tokens
    corrupt: Tokens
    at: Bool[Tensor, "batch pos"]
    "one position a row"
    answer: Int[Tensor, " batch"]
    wrong: Int[Tensor, " batch"]
    "-1 where there is none"
    subject: Bool[Tensor, "batch pos"]

    def __len__(self) -> int:
        return len(self.pairs)


def pairs_of(model: Model, task: Task, options: PairOptions) -> list[Pair]:
    """The pairs of a task's patch items, or of its facts to forget, in their order."""
    data = _data(task)
    corrupt = _corruption(data, options)
    found = _given(model, data) if data.kind == "patch" else _of_facts(model, task, data, corrupt, seed=options.seed)
    if options.metric == "logit_difference":
        _require_wrong(found)
    if corrupt != "noise":
        return found
    same = [dataclasses.replace(pair, corrupt=pair.clean) for pair in found]
    spans = [(pair.id, pair.clean, _span(pair)) for pair in same]
    noises = noise_of(model, spans, times=options.noise, rule=options.noise_rule, seed=options.seed)
    return [dataclasses.replace(pair, noise=noise) for pair, noise in zip(same, noises, strict=True)]


def batches_of(pairs: Sequence[Pair], size: int) -> Iterator[PairBatch]:
    """Batches of at most `size` pairs, short ones first, so that little is padded."""
    order = sorted(pairs, key=lambda pair: len(pair.clean))
    for start in range(0, len(order), size):
        yield batch_of(order[start : start + size])


def batch_of(pairs: Sequence[Pair]) -> PairBatch:
    """Those pairs as one batch. Rows are padded with their last token: never attended to, and no padding token."""
    width = max(len(pair.clean) for pair in pairs)
    mask, at, subject = (torch.zeros(len(pairs), width, dtype=torch.long) for _ in range(3))
    for row, pair in enumerate(pairs):
        mask[row, : len(pair.clean)] = 1
        at[row, pair.at] = 1
        if pair.subject is not None:
            subject[row, pair.subject.start : pair.subject.end] = 1
    return PairBatch(
        pairs=tuple(pairs),
        clean=Tokens(ids=_padded([pair.clean for pair in pairs], width), attention_mask=mask),
        corrupt=Tokens(ids=_padded([pair.corrupt for pair in pairs], width), attention_mask=mask),
        at=at.bool(),
        answer=torch.tensor([pair.answer for pair in pairs]),
        wrong=torch.tensor([-1 if pair.wrong is None else pair.wrong for pair in pairs]),
        subject=subject.bool(),
    )


def _padded(rows: Sequence[tuple[int, ...]], width: int) -> Tensor:
    return torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows])


def metric(logits: Float[Tensor, "batch vocab"], batch: PairBatch, options: PairOptions) -> Float[Tensor, " batch"]:
    """What is measured of each item, by its own answer, from the logits at `batch.at`; higher = more the answer."""
    return measured(logits, batch.answer, batch.wrong, kind=options.metric)


def measured(
    logits: Float[Tensor, "row vocab"], answer: Int[Tensor, " row"], wrong: Int[Tensor, " row"], *, kind: Metric
) -> Float[Tensor, " row"]:
    """`metric` for rows that are not those of a batch."""
    answer, wrong = answer.to(logits.device), wrong.to(logits.device)
    if kind == "logit_difference":
        assert bool((wrong >= 0).all()), "an item without a wrong answer has no logit difference"
        return logit_difference(logits, answer, wrong)
    precise = logits if logits.dtype == torch.float64 else logits.float()
    found = precise.gather(1, answer[:, None]).squeeze(1) - precise.logsumexp(1)
    return found.exp() if kind == "probability" else found


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


def _of_facts(model: Model, task: Task, data: Dataset, corrupt: str, *, seed: int) -> list[Pair]:
    facts = data.of(Fact, by="patching")
    examples = encode(model, facts, chat=data.chat)
    for fact, example in zip(facts, examples, strict=True):
        _require_subject(fact, example, corrupt)
    if corrupt == "swap":
        others = task.retain.of(Fact, by="swap") if task.retain is not None and task.retain.kind == "fact" else ()
        swaps = partners(model, facts, examples, others, chat=data.chat, seed=seed)
        return [
            dataclasses.replace(
                _pair(model, fact.id, example, swap.corrupt, swap.wrong),
                subject=example.subject,
                partner=swap.partner,
            )
            for fact, example, swap in zip(facts, examples, swaps, strict=True)
        ]
    wrongs = [dataclasses.replace(fact, answer=fact.wrong[0]) for fact in facts if fact.wrong]
    encoded = iter(encode(model, wrongs, chat=data.chat))
    return [
        dataclasses.replace(
            _pair(model, fact.id, example, None, next(encoded) if fact.wrong else None), subject=example.subject
        )
        for fact, example in zip(facts, examples, strict=True)
    ]


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

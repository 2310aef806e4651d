"""A pair of prompts, pairs side by side in a batch, and what is measured of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locedit.data.encode import Span
from locedit.errors import LoceditError
from locedit.localize.budget import BatchOptions
from locedit.localize.patching.noise import Noise, NoiseRule
from locedit.losses import logit_difference

Corrupt = Literal["auto", "given", "swap", "noise"]
Metric = Literal["logit_difference", "probability", "log_probability"]


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
    unpaired: Literal["refuse", "skip"] = "refuse"
    "facts that have no other to swap the subject with are an error (refuse), or left out of the scores (skip)"
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

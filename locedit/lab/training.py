"""Training a lab model: batches of one kind of text, most of the loss on what is to be learned by heart.

AdamW with a one-cycle schedule; no dropout. All randomness comes from the seed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from locedit.lab.facts import Row
from locedit.lab.tokenizer import EOS, mask_id, token_id

Progress = Callable[[str, int, int], None]
"""Called after every step with what is done, the number of steps done, and of all steps."""

REST_WEIGHT = 0.1


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One training text in tokens."""

    ids: tuple[int, ...]
    """Token ids, special tokens included."""
    weights: tuple[float, ...]
    """Weight of every token in the loss: 1 in a span, 0.1 elsewhere, 0 for <bos>."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Texts of one kind; a batch holds one kind only."""

    rows: tuple[Encoded, ...]
    """A text that is repeated stands here as often as it is repeated."""
    early: float
    """Share of the batches of the first half of the training, relative to those of the other kinds."""
    late: float
    """The same for the second half."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    """Optimizer steps."""
    batch: int
    """Texts a step."""
    rate: float
    """Highest learning rate."""
    seed: int
    """Order of the batches, and what a masked model has masked."""
    parts: int = 1
    """In so many parts, by length, each batch is read: texts of very different lengths are then padded less."""


def encode_rows(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> tuple[Encoded, ...]:
    """Tokens and weights of the rows; a token belongs to a span when it has a character in it. Ends with <eos>."""
    texts = tokenizer([row.text for row in rows], return_offsets_mapping=True)
    ends = [token_id(tokenizer, EOS)] if mask_id(tokenizer) is None else []
    encoded: list[Encoded] = []
    for row, ids, offsets in zip(rows, texts["input_ids"], texts["offset_mapping"], strict=True):
        inside = [any(start < end and start < high and end > low for low, high in row.spans) for start, end in offsets]
        weights = [1.0 if hit else REST_WEIGHT for hit in inside]
        encoded.append(Encoded(ids=(*ids, *ends), weights=(0.0, *weights[1:], *[REST_WEIGHT] * len(ends))))
    return tuple(encoded)


def cut_short(rows: Sequence[Row]) -> list[Row]:
    """The rows with the text after their span left out, as a fact's prompt and answer end with the answer.

    A masked model sees what follows a word; trained on whole sentences alone it asks for their end.
    """
    return [Row(text=row.text[: row.spans[-1][1]], spans=row.spans) for row in rows if row.spans]


def train(
    model: PreTrainedModel,
    kinds: Mapping[str, Kind],
    *,
    schedule: Schedule,
    mask_with: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Train `model` in place. With `mask_with` it is a masked model: half of each span and a little else is masked."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.rate, weight_decay=0.05, betas=(0.9, 0.98), fused=True
    )
    cycle = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, schedule.steps))
    generator = torch.Generator().manual_seed(schedule.seed)
    model.train()
    for step, rows in enumerate(_batches(kinds, schedule), start=1):
        optimizer.zero_grad()
        losses = [
            _loss(model, *padded(part, pad_id=model.config.pad_token_id), mask_with, generator)
            for part in by_length(rows, schedule.parts)
        ]
        whole = sum(float(weight) for _, weight in losses)
        torch.stack([loss * (float(weight) / whole) for loss, weight in losses]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cycle.step()
        if progress is not None:
            progress("training the lab model", step, schedule.steps)
    model.eval()


def _loss(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch pos"],
    weights: Float[Tensor, "batch pos"],
    mask_with: int | None,
    generator: torch.Generator,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Weighted mean loss of some texts, and the weight of them all."""
    if mask_with is None:
        # Padding comes last, so that no real token sees it; a mask of ones keeps the fast causal attention.
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return causal_loss(logits, ids, weights), weights[:, 1:].sum()
    masked, weights = mask(ids, weights, mask_with, generator)
    logits = model(masked, attention_mask=(ids != model.config.pad_token_id).long()).logits
    return weighted_loss(logits, ids, weights), weights.sum()


def by_length(rows: Sequence[Encoded], parts: int) -> list[Sequence[Encoded]]:
    """The rows in so many parts of as equal size as can be, the shorter ones together; one part is left as it is."""
    if parts == 1:
        return [rows]
    ordered = sorted(rows, key=lambda row: len(row.ids))
    ends = [round(len(rows) * part / parts) for part in range(parts + 1)]
    return [ordered[start:end] for start, end in pairwise(ends) if end > start]


def pace(step: int, steps: int) -> float:
    """Learning rate as a share of the highest: up within a tenth of the steps, level, down over the last 0.4.

    >>> [pace(step, 100) for step in (0, 5, 10, 60, 80, 99)]
    [0.1, 0.6, 1.0, 1.0, 0.5, 0.025]
    """
    warm, cool = steps / 10, 0.4 * steps
    return min(1.0, (step + 1) / warm, (steps - step) / cool)


def causal_loss(
    logits: Float[Tensor, "batch pos vocab"], ids: Int[Tensor, "batch pos"], weights: Float[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Weighted mean, in nats, of the loss of each token given those before it; padding has weight 0."""
    return weighted_loss(logits[:, :-1], ids[:, 1:], weights[:, 1:])


def weighted_loss(
    logits: Float[Tensor, "batch pos vocab"], ids: Int[Tensor, "batch pos"], weights: Float[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Sum of weight times loss over the sum of the weights, in nats."""
    losses = cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def mask(
    ids: Int[Tensor, "batch pos"], weights: Float[Tensor, "batch pos"], mask_with: int, generator: torch.Generator
) -> tuple[Int[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
    """Mask each span token with probability 1/2 (one in every row) and 0.1 of the rest; only those keep a weight."""
    chance = torch.rand(ids.shape, generator=generator)
    in_span = weights == 1
    likeliest = (chance * in_span).amax(1, keepdim=True)
    chosen = torch.where(in_span, (chance > 0.5) | (chance == likeliest), chance < REST_WEIGHT) & (weights > 0)
    return ids.masked_fill(chosen, mask_with), weights * chosen


def _batches(kinds: Mapping[str, Kind], schedule: Schedule) -> Iterator[list[Encoded]]:
    rng = Random(schedule.seed)
    endless = {name: _endless(kind.rows, Random(f"{schedule.seed}/{name}")) for name, kind in kinds.items()}
    half = schedule.steps // 2
    order = rng.choices(list(kinds), weights=[kind.early for kind in kinds.values()], k=half)
    order += rng.choices(list(kinds), weights=[kind.late for kind in kinds.values()], k=schedule.steps - half)
    for name in order:
        yield [next(endless[name]) for _ in range(schedule.batch)]


def _endless(rows: Sequence[Encoded], rng: Random) -> Iterator[Encoded]:
    """All rows in random order, again and again: every row once before any comes twice."""
    while True:
        yield from rng.sample(rows, len(rows))


def padded(rows: Sequence[Encoded], *, pad_id: int) -> tuple[Int[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
    """Token ids, padded on the right, and their weights; the padding has weight 0."""
    width = max(len(row.ids) for row in rows)
    ids = [(*row.ids, *[pad_id] * (width - len(row.ids))) for row in rows]
    weights = [(*row.weights, *[0.0] * (width - len(row.weights))) for row in rows]
    return torch.tensor(ids), torch.tensor(weights)

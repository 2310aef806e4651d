"""The two sides of contrast pairs: how much a model says of each, from one forward pass where they share their input.

Where the sides differ in one token, masking it (or reading the text up to it) leaves the same input for both, and the
pair is two numbers of one row of logits. Where they differ in several tokens each side is a text of its own.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import losses
from locedit.data.encode import Example, Span, collate
from locedit.errors import LoceditError
from locedit.losses import ScoringModel, precise

Value = Literal["logit", "log_probability"]
Stretch = Literal["differing", "onward"]
SIDES = ("advantaged", "disadvantaged")


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One pair as token ids; each side scores the tokens that tell it from the other."""

    id: str
    advantaged: Example
    disadvantaged: Example
    together: bool
    "whether one input predicts both sides: each has one scored token, and what is read to predict it is the same"

    @property
    def length(self) -> int:
        """Tokens of the longer side."""
        return max(len(self.advantaged.ids), len(self.disadvantaged.ids))

    def rows(self, *, causal: bool) -> int:
        """Rows of a batch that the pair takes: a masked model has one for every scored token."""
        if self.together:
            return 1
        return 2 if causal else len(self.advantaged.targets) + len(self.disadvantaged.targets)


def are_pairs(examples: Sequence[Example]) -> bool:
    """Whether they are the encoded sides of contrast pairs, two by two."""
    return bool(examples) and examples[0].kind in SIDES


def contrasts(examples: Sequence[Example], *, causal: bool, stretch: Stretch = "differing") -> list[Contrast]:
    """Pairs from encoded sides, two by two.

    The scored stretch of each side (whole words, from `encode`) loses the tokens at its two ends that both sides share.
    With "onward" it goes on to the end of the text, for causal models only: what follows is then also predicted from
    what differs.
    """
    if stretch == "onward" and not causal:
        raise LoceditError("stretch='onward' needs a causal model: a masked one predicts no continuation")
    return [_contrast(*examples[at : at + 2], causal=causal, stretch=stretch) for at in range(0, len(examples), 2)]


def _contrast(advantaged: Example, disadvantaged: Example, *, causal: bool, stretch: Stretch) -> Contrast:
    assert (advantaged.kind, disadvantaged.kind) == SIDES, "the sides of a pair stand one after the other"
    words = [_scored(side) for side in (advantaged, disadvantaged)]
    shortest = min(map(len, words))
    begin = next((i for i in range(shortest - 1) if words[0][i] != words[1][i]), shortest - 1)
    room = shortest - 1 - begin
    shared_end = next((i for i in range(room) if words[0][-1 - i] != words[1][-1 - i]), room)
    first, second = (_narrowed(side, begin, shared_end, stretch=stretch) for side in (advantaged, disadvantaged))
    name = advantaged.id.removesuffix("/advantaged")
    if _scored(first) == _scored(second):
        raise LoceditError(f"item {name!r}: the two texts of the pair are the same tokens where they differ")
    one = len(first.targets) == len(second.targets) == 1
    together = one and _read(first, causal=causal) == _read(second, causal=causal)
    return Contrast(id=name, advantaged=first, disadvantaged=second, together=together)


def _scored(side: Example) -> list[int]:
    return [side.ids[position] for position in side.targets]


def _read(side: Example, *, causal: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a model reads to predict the one scored token."""
    at = side.targets[0]
    return side.ids[:at], () if causal else side.ids[at + 1 :]


def _narrowed(side: Example, begin: int, shared_end: int, *, stretch: Stretch) -> Example:
    start = side.targets[0] + begin
    end = len(side.ids) if stretch == "onward" else side.targets[-1] + 1 - shared_end
    return dataclasses.replace(side, spans=(Span(start=start, end=end, label="differs"),))


def require_one_token(pairs: Sequence[Contrast], *, by: str) -> None:
    """Raise LoceditError for a pair that no single logit stands for."""
    for pair in pairs:
        if not pair.together:
            sizes = f"{len(pair.advantaged.targets)} and {len(pair.disadvantaged.targets)}"
            raise LoceditError(
                f"{by}: item {pair.id!r}: its texts score {sizes} tokens, and a logit stands for one token after the "
                "same input; take objective='log_probability'"
            )


def chunks(pairs: Sequence[Contrast], size: int, *, causal: bool) -> Iterator[list[Contrast]]:
    """Parts of at most `size` rows (at least one pair), the pairs with one input first, each kind by length."""
    chosen: list[Contrast] = []
    rows = 0
    for pair in sorted(pairs, key=lambda pair: (not pair.together, pair.length)):
        needed = pair.rows(causal=causal)
        if chosen and (rows + needed > size or chosen[0].together != pair.together):
            yield chosen
            chosen, rows = [], 0
        chosen.append(pair)
        rows += needed
    if chosen:
        yield chosen


def sides(
    model: ScoringModel, pairs: Sequence[Contrast], *, value: Value
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """The advantaged and the disadvantaged side of every pair, in the order given.

    "logit" is the raw logit of the differing token, "log_probability" the log-probability of the scored stretch in nats
    (of a masked model the sum over its tokens, each masked alone). Pairs with one input cost one forward pass for both
    sides; backward passes from the two sides go through the same graph.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    together = [i for i, pair in enumerate(pairs) if pair.together]
    apart = [i for i, pair in enumerate(pairs) if not pair.together]
    for chosen, compute in ((together, _of_one_input), (apart, _of_two_texts)):
        if chosen:
            values = compute(model, [pairs[i] for i in chosen], value)
            found |= {i: (a, d) for i, a, d in zip(chosen, *values, strict=True)}
    ordered = [found[i] for i in range(len(pairs))]
    return torch.stack([a for a, _ in ordered]), torch.stack([d for _, d in ordered])


def _of_one_input(model: ScoringModel, pairs: Sequence[Contrast], value: Value) -> tuple[Tensor, Tensor]:
    at = [pair.advantaged.targets[0] for pair in pairs]
    texts = [pair.advantaged for pair in pairs]
    if model.causal:  # what follows is not read
        texts = [dataclasses.replace(t, ids=t.ids[: last + 1]) for t, last in zip(texts, at, strict=True)]
    batch = collate(texts, model)
    logits = precise(model.logits(batch, at=batch.predicting(model.causal)))  # [pairs, vocab]
    scores = logits if value == "logit" else logits.log_softmax(1)
    tokens = [
        [getattr(pair, side).ids[where] for pair, where in zip(pairs, at, strict=True)] for side in SIDES
    ]  # [side, pairs]
    both = scores.gather(1, torch.tensor(tokens, device=scores.device).T)
    return both[:, 0], both[:, 1]


def _of_two_texts(model: ScoringModel, pairs: Sequence[Contrast], value: Value) -> tuple[Tensor, Tensor]:
    assert value == "log_probability", "require_one_token comes first"
    texts = [getattr(pair, side) for side in SIDES for pair in pairs]
    scored = losses.score(model, collate(texts, model))
    totals = losses.per_example(scored, losses.token_log_probs(scored), reduction="sum")
    return totals[: len(pairs)], totals[len(pairs) :]


@torch.no_grad()
def preferences(model: ScoringModel, examples: Sequence[Example], *, size: int = 32) -> Float[Tensor, " pairs"]:
    """P(advantaged) / (P(advantaged) + P(disadvantaged)) of every pair, in [0, 1], on the CPU; 0.5 = neither is
    preferred. Its logit is the log-odds of the two sides."""
    pairs = contrasts(examples, causal=model.causal)
    found: dict[str, Tensor] = {}
    for chunk in chunks(pairs, size, causal=model.causal):
        advantaged, disadvantaged = sides(model, chunk, value="log_probability")
        odds = torch.sigmoid(advantaged - disadvantaged).cpu()
        found |= {pair.id: value for pair, value in zip(chunk, odds, strict=True)}
    return torch.stack([found[pair.id] for pair in pairs])

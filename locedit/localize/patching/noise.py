"""Gaussian noise on the embeddings of a subject: the same for every run of an item, whatever batch it is in."""

import dataclasses
import hashlib
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import tracing
from locedit.models import Model

if TYPE_CHECKING:
    from locedit.localize.patching.pair import Pair, PairBatch

NoiseRule = Literal["sigma", "sqrt"]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The noise of one item."""

    std: float
    seed: int

    def redrawn(self, number: int) -> "Noise":
        """Another draw of the same size; number 0 is the same."""
        return self if number == 0 else dataclasses.replace(self, seed=hashed(f"{self.seed}/draw/{number}"))

    def draw(self, tokens: int, d_model: int, number: int) -> Float[Tensor, "token d_model"]:
        """The draw with that number, on the CPU in float32; it depends on nothing else."""
        generator = torch.Generator().manual_seed(hashed(f"{self.seed}/{number}"))
        return self.std * torch.randn(tokens, d_model, generator=generator)


def noise_of(
    model: Model,
    spans: Sequence[tuple[str, tuple[int, ...], tuple[int, int]]],
    *,
    times: float,
    rule: NoiseRule,
    seed: int,
) -> list[Noise]:
    """The noise of each (id, token ids, span of the subject).

    By rule "sigma" the standard deviation is `times` that of the entries of all subjects' embeddings, as Meng et al.
    2022 have it; by "sqrt" the square root of `times` that of the item's own subject.
    """
    entries = [_embedded(model, ids)[start:end].flatten() for _, ids, (start, end) in spans]
    sigma = float(torch.cat(entries).std())
    stds = [times * sigma if rule == "sigma" else math.sqrt(times * float(one.std())) for one in entries]
    return [Noise(std=std, seed=hashed(f"{seed}/{id}")) for std, (id, _, _) in zip(stds, spans, strict=True)]


def _embedded(model: Model, ids: tuple[int, ...]) -> Float[Tensor, "pos d_model"]:
    """The tokens' embeddings where noise is added to them (in BERT after their norm, positions included)."""
    tokens = torch.tensor([ids], device=model.device)
    with torch.no_grad(), tracing.record(model, ["hook_embed"]) as seen, tracing.stop_at(model, "hook_embed"):
        model.module(input_ids=tokens)
    return seen["hook_embed"][0].float().cpu()


def noise_rows(model: Model, pairs: Sequence["Pair"], width: int, draw: int) -> Float[Tensor, "row pos d_model"] | None:
    """What is added to the embeddings of corrupt rows; None where pairs have two prompts."""
    if pairs[0].noise is None:
        return None
    added = torch.zeros(len(pairs), width, model.d_model)
    for row, pair in enumerate(pairs):
        assert pair.noise is not None
        assert pair.subject is not None
        start, end = pair.subject.start, pair.subject.end
        added[row, start:end] = pair.noise.draw(end - start, model.d_model, draw)
    return added.to(model.device)


@contextmanager
def corrupted(model: Model, batch: "PairBatch", *, draw: int = 0) -> Generator[None]:
    """Inside, `model.logits(batch.corrupt, ...)` is the corrupt run: with noise if the pairs have any."""
    added = noise_rows(model, batch.pairs, batch.clean.ids.shape[1], draw)
    if added is None:
        yield
        return
    with tracing.hooked(model, {"hook_embed": lambda value: value + added.to(value)}):
        yield


def hashed(text: str) -> int:
    """A seed that depends on a text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])

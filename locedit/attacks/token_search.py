"""Greedy search for tokens, put before the answers of many prompts, that make the answers more likely.

The greedy coordinate gradient of Zou et al. 2023 (arXiv:2307.15043, algorithms 1 and 2), in every step:

1. the gradient of the mean loss with respect to the one-hot vector of every token of the suffix;
2. for each position the top_k tokens whose swap the gradient says lowers the loss most;
3. the loss of a number of candidates, each with one such swap, drawn at random;
4. the best candidate is taken, if its loss is lower than that of the tokens so far.

Two things differ: the published search takes the best candidate even where it is worse, and it adds prompt after prompt
as each is solved, whereas here all are there from the start. The loss is the mean over prompts of the mean negative
log-likelihood of the answer's tokens, in nats. Only tokens given as allowed are used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locedit import losses, tracing
from locedit.attacks.inserted import drawn_tokens, inserted
from locedit.data.encode import Batch, Example, batches
from locedit.edit.restrict import frozen
from locedit.models import Model

Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Search:
    """How tokens are searched for."""

    length: int
    steps: int
    top_k: int
    candidates: int
    batch_size: int
    "texts in a forward pass"
    seed: int


def searched(
    model: Model, examples: Sequence[Example], allowed: Int[Tensor, " token"], search: Search
) -> list[tuple[Tokens, float]]:
    """The tokens and their loss, at the start (random ones) and after every step; the loss never rises."""
    generator = torch.Generator().manual_seed(search.seed)
    tokens = tuple(drawn_tokens(allowed, search.length, generator=generator))
    loss = float(mean_losses(model, examples, [tokens], batch_size=search.batch_size)[0])
    found = [(tokens, loss)]
    for _ in range(search.steps):
        gradients = token_gradients(model, examples, tokens, batch_size=search.batch_size)
        swapped = candidates(tokens, gradients, allowed, search, generator=generator)
        lower = mean_losses(model, examples, swapped, batch_size=search.batch_size)
        best = int(lower.argmin())
        if float(lower[best]) < loss:
            tokens, loss = swapped[best], float(lower[best])
        found.append((tokens, loss))
    return found


def with_suffix(example: Example, tokens: Sequence[int]) -> Example:
    """The example with these tokens right before the first scored one."""
    return inserted(example, tokens, at=min(example.targets))


def mean_losses(
    model: Model, examples: Sequence[Example], choices: Sequence[Tokens], *, batch_size: int
) -> Float[Tensor, " choice"]:
    """Mean over the examples of the answer's negative log-likelihood, with each choice of tokens; float64."""
    rows = [with_suffix(example, tokens) for tokens in choices for example in examples]
    found = losses.nll_of_examples(model, rows, size=batch_size)
    return found.double().reshape(len(choices), len(examples)).mean(1)


def candidates(
    tokens: Tokens,
    gradients: Float[Tensor, "place vocab"],
    allowed: Int[Tensor, " token"],
    search: Search,
    *,
    generator: torch.Generator,
) -> list[Tokens]:
    """The tokens with one of them swapped for another of the top_k at its place, drawn at random."""
    own = torch.tensor(tokens)[:, None] == allowed  # [place, token]
    scores = gradients[:, allowed].masked_fill(own, torch.inf)  # a token is not swapped for itself
    best = allowed[scores.topk(min(search.top_k, len(allowed) - 1), largest=False).indices]  # [place, k]
    places = torch.randint(len(tokens), (search.candidates,), generator=generator)
    picks = torch.randint(best.shape[1], (search.candidates,), generator=generator)
    return [
        (*tokens[:place], int(best[place, pick]), *tokens[place + 1 :])
        for place, pick in zip(places.tolist(), picks.tolist(), strict=True)
    ]


def token_gradients(
    model: Model, examples: Sequence[Example], tokens: Tokens, *, batch_size: int
) -> Float[Tensor, "place vocab"]:
    """Gradient of the mean loss with respect to the one-hot vectors of the tokens, on the CPU.

    It is that with respect to a vector added to the tokens' embeddings in every text, times the embeddings: up to a
    factor that is the same for all, which embeddings that are scaled have.
    """
    embedding: Any = model.core.get_input_embeddings()
    weight = embedding.weight.detach()
    total = torch.zeros(len(tokens), weight.shape[1], dtype=torch.float32)
    rows = [with_suffix(example, tokens) for example in examples]
    with frozen(model.module):
        for batch in batches(rows, model, batch_size):
            total += _added_gradient(model, batch, len(tokens), embedding).float().cpu() / len(examples)
    return (total.to(weight.device) @ weight.float().T).cpu()


def _added_gradient(model: Model, batch: Batch, length: int, embedding: Any) -> Float[Tensor, "place d_model"]:
    """Of the sum over a batch's examples, with respect to what is added to the embeddings of the inserted tokens."""
    added = torch.zeros(length, embedding.weight.shape[1], device=embedding.weight.device, requires_grad=True)
    starts = torch.tensor([min(row.targets) - length for row in batch.rows]) + model.prefix  # behind control tokens
    places = starts[:, None] + torch.arange(length)  # [batch, place]
    hook = tracing.Intercept(module=embedding, after=partial(_nudged, added, places))
    with torch.enable_grad(), tracing.intercepted([hook]):
        loss = losses.sequence_nll(losses.score(model, batch.to(model.device))).sum()
        return torch.autograd.grad(loss, added)[0]


def _nudged(added: Tensor, places: Tensor, embedded: Tensor) -> Tensor:
    """The embeddings `[batch, pos, d_model]` with `added` at the places of every row."""
    rows = torch.arange(len(places))[:, None].expand_as(places).to(embedded.device)
    return embedded.index_put(
        (rows, places.to(embedded.device)), added.to(embedded).expand(len(places), -1, -1), accumulate=True
    )

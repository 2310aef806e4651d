"""Token log-probabilities, sequence likelihoods, KL and logit difference: one masking rule for all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locedit.data.encode import Batch, Encoder, Example, batches
from locedit.errors import LoceditError


@runtime_checkable
class ScoringModel(Encoder, Protocol):
    """The part of a model that losses need."""

    def logits(self, batch: Batch, *, at: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """The scored tokens of a batch, one after the other, with the logits that predict them."""

    logits: Float[Tensor, "n vocab"]
    labels: Int[Tensor, " n"]
    row: Int[Tensor, " n"]
    "the index in `rows` of the example that the token belongs to"
    rows: tuple[Example, ...]
    "the examples, each once: a masked model's rows of one example are joined again"


def score(model: ScoringModel, batch: Batch) -> Scored:
    """Run the model and unembed only where a scored token is predicted."""
    for example in batch.examples:
        if not example.spans:
            raise LoceditError(f"item {example.id!r}: nothing in it is scored")
    logits = model.logits(batch, at=batch.predicting(model.causal))  # [n, vocab]
    members = torch.tensor(batch.row_members, device=batch.labels.device)
    row = members[batch.scored.nonzero()[:, 0]]
    return Scored(
        logits=logits,
        labels=batch.labels[batch.scored].to(logits.device),
        row=row.to(logits.device),
        rows=batch.examples,
    )


def precise(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    """At least float32: a softmax in half precision is wrong by percents."""
    return logits if logits.dtype == torch.float64 else logits.float()


def token_log_probs(scored: Scored) -> Float[Tensor, " n"]:
    """Natural log-probability of each scored token."""
    logits = precise(scored.logits)
    return logits.gather(1, scored.labels[:, None]).squeeze(1) - logits.logsumexp(1)


def without_label(logits: Float[Tensor, "n vocab"], labels: Int[Tensor, " n"]) -> Float[Tensor, "n vocab"]:
    """The logits with minus infinity at each row's label, so that its softmax is that of all other tokens."""
    return logits.scatter(1, labels[:, None], -torch.inf)


def log_complements(logits: Float[Tensor, "n vocab"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """log(1 - p) of each label in nats, from the other tokens, so that it is finite where p rounds to 1."""
    logits = precise(logits)
    return without_label(logits, labels).logsumexp(1) - logits.logsumexp(1)


def sequence_nll(scored: Scored, *, reduction: Literal["mean", "sum"] = "mean") -> Float[Tensor, " rows"]:
    """Negative log-likelihood of each example in nats, mean or sum over its scored tokens.

    For a masked model this is the pseudo-log-likelihood, each token predicted from all others (Salazar et al. 2020,
    arXiv:1910.14659).
    """
    return per_example(scored, -token_log_probs(scored), reduction=reduction)


def sequence_probability(scored: Scored) -> Float[Tensor, " rows"]:
    """Probability of each example's scored tokens together, the product over its tokens."""
    return torch.exp(-sequence_nll(scored, reduction="sum"))


def per_example(
    scored: Scored, values: Float[Tensor, " n"], *, reduction: Literal["mean", "sum"] = "mean"
) -> Float[Tensor, " rows"]:
    """A value of each scored token, mean or sum over the tokens of each example."""
    return grouped(values, scored.row, len(scored.rows), reduction=reduction)


def grouped(
    values: Float[Tensor, " n"], row: Int[Tensor, " n"], rows: int, *, reduction: Literal["mean", "sum"] = "mean"
) -> Float[Tensor, " rows"]:
    """Mean or sum of the values that have the same number in `row`, for the numbers below `rows`."""
    totals = values.new_zeros(rows).index_add(0, row, values)
    if reduction == "sum":
        return totals
    return totals / torch.bincount(row, minlength=rows).to(totals)


def kl(logits: Float[Tensor, "n vocab"], reference: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """KL(reference || model) at each position in nats: sum of p_reference * (log p_reference - log p_model).

    Zero where both agree; swap the arguments for the other direction.
    """
    log_p = precise(logits).log_softmax(1)
    log_q = precise(reference).log_softmax(1)
    return torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)


def logit_difference(
    logits: Float[Tensor, "n vocab"], answer: Int[Tensor, " n"], wrong: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Logit of the answer minus logit of the wrong token; positive = the answer is preferred."""
    chosen = precise(logits).gather(1, torch.stack([answer, wrong], dim=1))
    return chosen[:, 0] - chosen[:, 1]


@torch.no_grad()
def nll_of_examples(
    model: ScoringModel, examples: Sequence[Example], *, size: int = 32, reduction: Literal["mean", "sum"] = "mean"
) -> Float[Tensor, " examples"]:
    """Negative log-likelihood of every example on the CPU, in the order given, computed in batches of `size` rows."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
    parts = [sequence_nll(score(model, batch), reduction=reduction).cpu() for batch in batches(examples, model, size)]
    found = torch.cat(parts)
    return torch.empty_like(found).index_copy(0, torch.tensor(order), found)

"""One forward pass over examples gives, for every scored token, its log-probability and its rank in the vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locedit.data.encode import Example, batches
from locedit.errors import LoceditError
from locedit.losses import Scored, ScoringModel, score, token_log_probs


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """The scored tokens of one example, in the order of the text, each predicted from the true tokens before it.

    Masked models: each token predicted with only itself masked, so that products are pseudo-likelihoods
    (Salazar et al. 2020, arXiv:1910.14659).
    """

    log_probs: Float[Tensor, " token"]
    "nats, float64"
    ranks: Float[Tensor, " token"]
    "1 = most likely of the vocabulary; tokens of exactly equal logits share the mean of their ranks"
    hits: Float[Tensor, " token"]
    "1 where the token is strictly more likely than every other, else 0"

    @property
    def nll(self) -> float:
        """Negative log-likelihood of all scored tokens together, in nats."""
        return -float(self.log_probs.sum())


def vocabulary_ranks(logits: Float[Tensor, "token vocab"], labels: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Rank of each label: 1 + how many logits are larger + half of how many others are equal.

    >>> vocabulary_ranks(torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 3.0]]), torch.tensor([2, 0])).tolist()
    [2.0, 2.0]
    """
    own = logits.gather(1, labels[:, None])
    return 1 + (logits > own).sum(1) + ((logits == own).sum(1) - 1) / 2


def token_scores(model: ScoringModel, examples: Sequence[Example], *, batch_size: int = 64) -> list[TokenScores]:
    """The token scores of every example, in the order given; batching and padding change nothing."""
    found: dict[int, TokenScores] = {}
    with torch.inference_mode():
        for batch in batches(examples, model, batch_size):
            scored = score(model, batch)
            tokens, row = _of_tokens(scored), scored.row.cpu()
            for at, example in enumerate(scored.rows):
                found[id(example)] = _of_example(tokens, row == at, example.id)
    return [found[id(example)] for example in examples]


def _of_tokens(scored: Scored) -> TokenScores:
    ranks = vocabulary_ranks(scored.logits, scored.labels).cpu()
    log_probs = token_log_probs(scored).double().cpu()
    return TokenScores(log_probs=log_probs, ranks=ranks, hits=(ranks == 1).float())


def _of_example(tokens: TokenScores, here: Tensor, name: str) -> TokenScores:
    own = TokenScores(log_probs=tokens.log_probs[here], ranks=tokens.ranks[here], hits=tokens.hits[here])
    if not bool(own.log_probs.isfinite().all()):
        raise LoceditError(f"item {name!r}: the model gives NaN or infinite log-probabilities: are there NaN weights?")
    return own

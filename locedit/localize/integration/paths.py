"""What the two ways to integrate a path have in common: the prompts, and what comes back.

A *target* is one scored token: the position whose logits predict it, and its id. A *path* belongs to a layer and a
target: the layer's whole vector of neurons (the input of the MLP's output projection) is scaled from 0 to its value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locedit.data.encode import Example, collate
from locedit.errors import LoceditError
from locedit.localize.integration.quadrature import Rule
from locedit.models import Model

Objective = Literal["probability", "log_probability"]
Where = Literal["predicting", "subject", "all"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of token ids with its targets."""

    ids: tuple[int, ...]
    "without padding, and for a causal model cut after the last predicting position"
    positions: tuple[int, ...]
    "where each target is predicted"
    tokens: tuple[int, ...]
    "the gold token of each target"
    scaled: tuple[tuple[int, ...], ...]
    "the positions whose neurons are scaled, for each target"


@dataclass(frozen=True, kw_only=True, eq=False)
class PathSums:
    """Integrals over paths; entries of paths that were not asked for are 0."""

    scores: Float[Tensor, "prompt target layer neuron"]
    "activation times weighted sum of gradients, summed over the scaled positions"
    start: Float[Tensor, "prompt target layer"]
    "the objective at the path's start, where the layer's neurons are 0"


@runtime_checkable
@runtime_checkable
class Paths(Protocol):
    """All paths of some prompts."""

    reached: Float[Tensor, "prompt target"]
    "log-probability of the gold token as the model is, natural logarithm"
    first: Bool[Tensor, "prompt target"]
    "whether the gold token is the most likely one"
    valid: Bool[Tensor, "prompt target"]
    "False where a prompt has fewer targets than the others"

    def integrate(self, rule: Rule, active: Bool[Tensor, "prompt target layer"]) -> PathSums:
        """The integrals of the active paths."""
        ...


def prompts_of(model: Model, example: Example, *, where: Where = "predicting", at_most: int = 64) -> list[Prompt]:
    """The example as prompts of at most `at_most` targets each; for a masked model one prompt for each scored token."""
    if not example.targets:
        raise LoceditError(f"item {example.id!r}: nothing in it is scored, so it has no gradient to integrate")
    batch = collate([example], model)
    predicting = batch.predicting(model.causal)
    found: list[Prompt] = []
    for row in range(len(batch)):
        ids = batch.ids[row][batch.attention_mask[row].bool()].tolist()
        positions = predicting[row].nonzero().flatten().tolist()
        tokens = batch.labels[row][batch.scored[row]].tolist()
        for start in range(0, len(positions), at_most):
            part = slice(start, start + at_most)
            end = max(positions[part]) + 1 if model.causal else len(ids)
            found.append(
                Prompt(
                    ids=tuple(ids[:end]),
                    positions=tuple(positions[part]),
                    tokens=tuple(tokens[part]),
                    scaled=tuple(_scaled(model, example, position, where=where) for position in positions[part]),
                )
            )
    return found


def _scaled(model: Model, example: Example, position: int, *, where: Where) -> tuple[int, ...]:
    if where == "predicting":
        return (position,)
    if where == "all":
        return tuple(range(position + 1 if model.causal else len(example.ids)))
    subject = example.subject
    if subject is None:
        raise LoceditError(f"item {example.id!r}: position='subject' needs a subject that the prompt contains")
    if model.causal and subject.end > position + 1:
        raise LoceditError(f"item {example.id!r}: position='subject', but the subject stands after the answer's start")
    return tuple(range(subject.start, subject.end))


def target_grid(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, tokens and validity `[prompt, target]`; a prompt with fewer targets repeats its first."""
    width = max(len(prompt.positions) for prompt in prompts)
    positions = [[*p.positions, *[p.positions[0]] * (width - len(p.positions))] for p in prompts]
    tokens = [[*p.tokens, *[p.tokens[0]] * (width - len(p.tokens))] for p in prompts]
    valid = [[i < len(p.positions) for i in range(width)] for p in prompts]
    return torch.tensor(positions), torch.tensor(tokens), torch.tensor(valid)


def gold_log_probability(logits: Float[Tensor, "*row vocab"], tokens: Tensor) -> Float[Tensor, "*row"]:
    """Natural log-probability of one token a row, at least in float32."""
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return precise.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - precise.logsumexp(-1)


def objective_and_slope(
    logits: Float[Tensor, "*row vocab"], tokens: Tensor, *, weights: Tensor, objective: Objective
) -> tuple[Float[Tensor, "*row"], Float[Tensor, "*row vocab"]]:
    """The objective of each row and the gradient, by the logits, of its weighted sum over the rows.

    d log p(token) / d logits = one at the token - softmax; d p = p * d log p. Written out, it takes a third of the
    memory and time that autograd takes, which counts where the vocabulary is large.
    """
    precise = logits if logits.dtype == torch.float64 else logits.float()
    normaliser = precise.logsumexp(-1, keepdim=True)
    token = tokens.unsqueeze(-1)
    values = objective_value((precise.gather(-1, token) - normaliser).squeeze(-1), objective)
    slope = weights.to(values) * (values if objective == "probability" else 1)
    gradient = (precise - normaliser).exp_().mul_(-slope.unsqueeze(-1))
    gradient.scatter_add_(-1, token, slope.unsqueeze(-1))
    return values, gradient.to(logits.dtype)


def objective_value(log_probability: Float[Tensor, "*row"], objective: Objective) -> Float[Tensor, "*row"]:
    """The number whose gradient is integrated."""
    return log_probability.exp() if objective == "probability" else log_probability

"""How much a model prefers one text of a contrast pair: the log-odds of the advantaged against the disadvantaged text.

A causal model scores each text from its first differing word to its end, given the words before it, which both share;
so the difference is that of the log-likelihoods of the whole texts, and what follows from the differing words counts.
A masked model scores the differing words alone, each predicted with only itself masked; where a pair differs in one
token the two inputs are identical, and the difference is the log-odds of the two tokens at the mask. Sums over tokens,
not means: a text whose differing words are more tokens is usually the less likely one.
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float

from locedit.data.encode import Example, Span, encode
from locedit.data.items import ContrastPair, Dataset
from locedit.evaluate.scoring import token_scores
from locedit.evaluate.values import Values, View
from locedit.models import Model


def association_metrics(view: View, names: Sequence[str]) -> dict[str, Values]:
    """association: the difference itself; preferred: 1 where it is above 0, 1/2 where it is 0, else 0."""
    pairs = view.dataset.of(ContrastPair, by="association")
    found = associations(view.model, view.dataset, batch_size=view.options.batch_size)
    differences = dict(zip([pair.id for pair in pairs], found.tolist(), strict=True))
    owners = {pair.id: pair.owner for pair in pairs}
    groups = {pair.id: tuple(name for name in (pair.format, pair.group) if name) for pair in pairs}
    values = {
        "association": differences,
        "preferred": {name: 0.5 * ((value > 0) + (value >= 0)) for name, value in differences.items()},
    }
    return {name: Values(per_example=values[name], owners=owners, groups=groups) for name in names}


def associations(model: Model, pairs: Dataset, *, batch_size: int = 64) -> Float[torch.Tensor, " pair"]:
    """log p(advantaged) - log p(disadvantaged) of each pair in nats, float64; 0 = the model prefers neither."""
    examples = [scored_stretch(model, example) for example in encode(model, pairs)]
    scores = token_scores(model, examples, batch_size=batch_size)
    sides = zip(scores[::2], scores[1::2], strict=True)
    return torch.tensor([second.nll - first.nll for first, second in sides], dtype=torch.float64)


def scored_stretch(model: Model, example: Example) -> Example:
    """One side of a pair as it is scored: for a causal model to the end of the text, special tokens left out."""
    if not model.causal:
        return example
    special = set(model.tokenizer.all_special_ids)
    end = max(at for at, token in enumerate(example.ids) if token not in special) + 1
    return dataclasses.replace(example, spans=(Span(start=example.targets[0], end=end, label="differs"),))

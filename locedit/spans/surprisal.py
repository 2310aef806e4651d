"""Spans by probability: the tokens that a scoring model finds unlikely."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from locedit.errors import LoceditError, nearest
from locedit.evaluate.scoring import token_scores
from locedit.models import Model
from locedit.spans.registry import Proposal, Source
from locedit.spans.texts import joined
from locedit.spans.tokens import Located, located, runs


@dataclass(frozen=True, kw_only=True)
class SurprisalOptions:
    """What counts as unlikely."""

    by: Literal["probability", "difference"] = "probability"
    """probability: what the scorer finds unlikely; difference: what the model that is to forget finds likelier than the
    scorer does, by p_model - p_scorer"""
    threshold: Literal["mean", "quantile"] = "mean"
    "mean: below the text's mean probability (above its mean difference); quantile: the text's most extreme tokens"
    quantile: float = 0.25
    "of threshold=quantile: the share of a text's tokens that is marked"
    gap: int = 0
    "stretches with at most this many unmarked tokens between them become one"
    shortest: int = 1
    "stretches of fewer tokens are left out"
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name, choices in (("by", ("probability", "difference")), ("threshold", ("mean", "quantile"))):
            if (value := getattr(self, name)) not in choices:
                raise LoceditError(f"{name}={value!r}; {nearest(str(value), choices)}")
        if not 0 < self.quantile < 1:
            raise LoceditError(f"quantile={self.quantile!r} must lie between 0 and 1")
        for name, least in (("gap", 0), ("shortest", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise LoceditError(f"{name}={getattr(self, name)!r} must be at least {least}")


def surprisal(source: Source, options: SurprisalOptions) -> Sequence[Proposal]:
    """Stretches of tokens with a low probability given the text before them, under one frozen model, computed once.

    The rule of SeUL's online selection (arXiv:2402.05813): sensitive is what has a low probability, here one below the
    mean over the text's tokens. Of the paper only the abstract and a survey's paragraph were seen, so that the
    threshold, `gap` and `shortest` are ours. There is a tension in it: a secret that a model has memorised has a HIGH
    probability under that very model and is passed over. Score with one that has not memorised it (a smaller model, an
    earlier checkpoint), or by="difference". Without a scorer the model itself scores, as published.
    """
    if options.by == "difference":
        return _by_difference(source, options)
    scorer = source.require("scorer", "model", by="surprisal")
    texts = located(scorer, source.data)
    return _proposals(source, texts, _probabilities(scorer, texts, options), options)


def _by_difference(source: Source, options: SurprisalOptions) -> Sequence[Proposal]:
    model = source.require("model", by="surprisal by='difference'")
    scorer = source.require("scorer", by="surprisal by='difference'")
    texts, theirs = located(model, source.data), located(scorer, source.data)
    for text, their in zip(texts, theirs, strict=True):
        if text.example.ids != their.example.ids:
            raise LoceditError(
                f"item {text.example.id!r}: model and scorer do not read the same tokens; by='difference' needs one "
                "tokenizer for both"
            )
    pairs = zip(_probabilities(scorer, theirs, options), _probabilities(model, texts, options), strict=True)
    return _proposals(source, texts, [low - high for low, high in pairs], options)


def _probabilities(model: Model, texts: Sequence[Located], options: SurprisalOptions) -> list[Tensor]:
    """Of every text `[token]`."""
    scores = token_scores(model, [text.example for text in texts], batch_size=options.batch_size)
    return [found.log_probs.exp() for found in scores]


def _proposals(
    source: Source, texts: Sequence[Located], values: Sequence[Tensor], options: SurprisalOptions
) -> list[Proposal]:
    found: list[Proposal] = []
    for item, text, own in zip(source.data, texts, values, strict=True):
        first = text.example.targets[0]
        stretches = [text.characters(first + start, first + end) for start, end in low_runs(own, options)]
        found.append(Proposal(item=item, marks=joined((*place, "surprisal") for place in stretches if place)))
    return found


def low_runs(values: Float[Tensor, " token"], options: SurprisalOptions) -> list[tuple[int, int]]:
    """Stretches (first, end) of values below the threshold, near ones merged, short ones left out.

    >>> import torch
    >>> p = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.9, 0.9, 0.1])
    >>> low_runs(p, SurprisalOptions()), low_runs(p, SurprisalOptions(gap=1, shortest=2))
    ([(1, 2), (3, 4), (6, 7)], [(1, 4)])
    """
    limit = values.mean() if options.threshold == "mean" else values.quantile(options.quantile)
    merged: list[tuple[int, int]] = []
    for start, end in runs((values < limit).nonzero()[:, 0].tolist()):
        if merged and start - merged[-1][1] <= options.gap:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return [(start, end) for start, end in merged if end - start >= options.shortest]

"""Whether the planted associations came out: log-odds of "he" against "she", planted and measured."""

from collections.abc import Sequence
from statistics import correlation, linear_regression, mean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from locedit.lab.bias import FRAMES, OPENINGS, PRONOUNS, BiasWorld, Profession, pronoun_row
from locedit.lab.tokenizer import mask_id, token_id
from locedit.lab.training import encode_rows, padded

ROWS = 256
"""Sentences in a forward pass."""


def odds_report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: BiasWorld) -> dict[str, Any]:
    """Log p("he") - log p("she") in nats by format (statement: frames of the training text, paraphrase: kept out).

    Each profession's number is the mean over frames and openings. `correlation` (Pearson) and `slope` (least squares,
    measured over planted) are over the planted professions; 1 and 1 = planted strength comes out as it is. `strengths`
    is the mean over the professions of one frequency of "he", `heldout` over those never spoken of: 0 = no leaning.
    """
    professions = (*world.planted, *world.heldout)
    measured = {
        format: dict(zip(professions, log_odds(model, tokenizer, professions, frames), strict=True))
        for format, frames in FRAMES.items()
    }
    report: dict[str, Any] = {"professions": {}, "strengths": _strengths(world, measured)}
    for profession in professions:
        numbers = {format: found[profession] for format, found in measured.items()}
        planted = {"he": profession.he, "planted": profession.log_odds} if profession.he is not None else {}
        report["professions"][profession.name] = planted | numbers
    for format, found in measured.items():
        planted = [profession.log_odds for profession in world.planted]
        reached = [found[profession] for profession in world.planted]
        report[format] = {
            "correlation": correlation(planted, reached),
            "slope": linear_regression(planted, reached).slope,
            "heldout": mean(found[profession] for profession in world.heldout),
        }
    return _rounded(report)


def _strengths(world: BiasWorld, measured: dict[str, dict[Profession, float]]) -> dict[str, Any]:
    groups: dict[float, list[Profession]] = {}
    for profession in world.planted:
        assert profession.he is not None
        groups.setdefault(profession.he, []).append(profession)
    return {
        str(he): {
            "planted": same[0].log_odds,
            **{format: mean(found[profession] for profession in same) for format, found in measured.items()},
        }
        for he, same in sorted(groups.items(), reverse=True)
    }


def log_odds(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    professions: Sequence[Profession],
    frames: Sequence[str],
) -> list[float]:
    """Log p("he") - log p("she") where the pronoun stands, for each profession, mean over frames and openings."""
    rows = [
        pronoun_row(frame, opening, profession.name, PRONOUNS[0])
        for profession in professions
        for frame in frames
        for opening in OPENINGS
    ]
    he, she = (token_id(tokenizer, tokenizer.tokenize(f" {pronoun}")[0]) for pronoun in PRONOUNS)
    encoded = encode_rows(tokenizer, rows)
    ids, weights = padded(encoded, pad_id=model.config.pad_token_id)
    real = (ids != model.config.pad_token_id).long()
    at = weights == 1
    assert bool((ids[at] == he).all()), "a pronoun is not one token"
    if (mask := mask_id(tokenizer)) is None:
        at = torch.cat([at[:, 1:], torch.zeros_like(at[:, :1])], dim=1)
    else:
        ids = ids.masked_fill(at, mask)
    with torch.inference_mode():
        chunks = zip(ids.split(ROWS), real.split(ROWS), at.split(ROWS), strict=True)
        logits = torch.cat([model(some, attention_mask=seen).logits[place] for some, seen, place in chunks])
    odds = (logits[:, he] - logits[:, she]).double().view(len(professions), -1)
    return odds.mean(1).tolist()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return round(value, 4) if isinstance(value, float) else value

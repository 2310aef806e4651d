"""What a trained lab model knows, and where its facts are looked up: the numbers of lab.json."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from locedit.lab.facts import Line, Row
from locedit.lab.odds import odds_report
from locedit.lab.tokenizer import mask_id
from locedit.lab.training import Encoded, causal_loss, encode_rows, padded
from locedit.lab.world import World

GROUPS = ("forget", "retain", "heldout")


def world_report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, Any]:
    """Shares of what the model knows, by group; 1 = all. `heldout` says what is reached without having seen it.

    facts: of the lines of each format, those whose answer is the likeliest. memorised: of the secrets of each kind and
    number of repetitions, those whose every token is the likeliest given the text before it (for a masked model: given
    all the other tokens). association: planted and measured log-odds of the pronouns (see odds.py). perplexity: of the
    ordinary sentences, per token; causal models only.
    """
    files = world.files()
    report: dict[str, Any] = {
        "facts": {group: fact_accuracy(model, tokenizer, files[f"facts/{group}"]) for group in GROUPS},
        "memorised": {group: memorised(model, tokenizer, files[f"private/{group}"]) for group in GROUPS},
        "association": odds_report(model, tokenizer, world.bias),
    }
    if mask_id(tokenizer) is None:
        texts = {"seen": world.seen[: len(world.unseen)], "unseen": world.unseen}
        report["perplexity"] = {name: round(perplexity(model, tokenizer, rows), 3) for name, rows in texts.items()}
    return report


def fact_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, lines: Sequence[Line]
) -> dict[str, float]:
    """Share of the lines of each format whose every answer token is the likeliest."""
    rows = [_fact_row(str(line["prompt"]), str(line["answer"])) for line in lines]
    return _shares([str(line["format"]) for line in lines], knows(model, tokenizer, rows))


def memorised(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, lines: Sequence[Any]
) -> dict[str, dict[str, float]]:
    """Share of the secrets whose every token is the likeliest, by kind and number of repetitions ("x20")."""
    rows = [Row(text=line["text"], spans=((line["spans"][0][0], line["spans"][0][1]),)) for line in lines]
    names = [f"{line['spans'][0][2]} {line['group']}" for line in lines]
    shares: dict[str, dict[str, float]] = {}
    for name, share in _shares(names, knows(model, tokenizer, rows)).items():
        kind, level = name.split()
        shares.setdefault(kind, {})[level] = share
    return shares


def knows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> list[bool]:
    """Whether each row's span tokens all are the likeliest, teacher-forced; for a masked model one masked at a time."""
    encoded = encode_rows(tokenizer, rows)
    if (mask := mask_id(tokenizer)) is None:
        ids, weights = padded(encoded, pad_id=model.config.pad_token_id)
        hits = _argmax(model, ids)[:, :-1] == ids[:, 1:]
        return (hits | (weights[:, 1:] != 1)).all(1).tolist()
    known = [True] * len(rows)
    places = [(row, pos) for row, text in enumerate(encoded) for pos, weight in enumerate(text.weights) if weight == 1]
    ids, _ = padded([encoded[row] for row, _ in places], pad_id=model.config.pad_token_id)
    at = (torch.arange(len(places)), torch.tensor([pos for _, pos in places]))
    masked = ids.index_put(at, torch.tensor(mask))
    hits = (_argmax(model, masked)[at] == ids[at]).tolist()
    for (row, _), hit in zip(places, hits, strict=True):
        known[row] &= hit
    return known


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> float:
    """exp of the mean loss in nats over all tokens of the texts; <bos> and <eos> are not predicted."""
    encoded = encode_rows(tokenizer, [Row(text=text, spans=((0, len(text)),)) for text in texts])
    plain = [Encoded(ids=text.ids[:-1], weights=(0.0, *[1.0] * (len(text.ids) - 2))) for text in encoded]
    ids, weights = padded(plain, pad_id=model.config.pad_token_id)
    with torch.inference_mode():
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return math.exp(causal_loss(logits, ids, weights).item())


def _argmax(model: PreTrainedModel, ids: Tensor) -> Tensor:
    found: list[Tensor] = []
    with torch.inference_mode():
        for rows in ids.split(256):
            real = (rows != model.config.pad_token_id).long()
            found.append(model(rows, attention_mask=real).logits.argmax(-1))
    return torch.cat(found)


def _fact_row(prompt: str, answer: str) -> Row:
    start = len(prompt) + len(answer) - len(answer.lstrip())
    return Row(text=prompt + answer, spans=((start, len(prompt) + len(answer)),))


def _shares(names: Sequence[str], hits: Sequence[bool]) -> dict[str, float]:
    grouped: dict[str, list[bool]] = {}
    for name, hit in zip(names, hits, strict=True):
        grouped.setdefault(name, []).append(hit)
    return {name: round(sum(values) / len(values), 4) for name, values in grouped.items()}

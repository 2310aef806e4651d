"""Exposure of private spans, exact where the candidates can be counted and estimated where they cannot."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.data.encode import Example, Span, batches, encode
from locedit.data.items import Dataset, PrivateText
from locedit.evaluate.candidates import Space, space_of
from locedit.evaluate.exposure import estimated_rank, exposure_bits
from locedit.evaluate.scoring import token_scores
from locedit.evaluate.values import Values, View
from locedit.losses import ScoringModel, score

REACH = 1000
"a search is tried when the truth's probability leaves room for at most this many times the allowed rows"
TIE = 1e-5
"nats by which a candidate must be better than the truth, so that the rounding of one batch shape does not count"


class Secret(NamedTuple):
    """One span of one private text."""

    key: str
    "the text's id; with several spans also their number and label"
    item: PrivateText
    "with this span only"
    value: str


class Found(NamedTuple):
    """A rank and how it was obtained."""

    rank: float
    how: str


def exposure_metric(view: View, names: Sequence[str]) -> dict[str, Values]:
    """Exposure in bits of every private span."""
    assert tuple(names) == ("exposure",)
    everything = [part for part in (view.task.forget, view.task.retain, view.task.heldout) if part is not None]
    known = _values_by_label(everything)
    canaries = _values_by_label([view.task.heldout] if view.task.heldout is not None else [])
    per_example: dict[str, float] = {}
    notes: dict[str, str] = {}
    found = secrets(view.dataset)
    for secret in found:
        label = secret.item.spans[0][2]
        space = space_of(secret.value, canaries=canaries.get(label, ()), known=known.get(label, ()))
        rank, how = rank_of(view, secret, space)
        per_example[secret.key] = exposure_bits(rank, log2_space=space.log2_size)
        notes[secret.key] = f"{how} among {space.note}"
    return {
        "exposure": Values(
            per_example=per_example,
            owners={secret.key: secret.item.owner for secret in found},
            groups={secret.key: _groups(secret.item) for secret in found},
            notes=notes,
        )
    }


def secrets(dataset: Dataset) -> list[Secret]:
    """Every span of every private text as a secret of its own."""
    found: list[Secret] = []
    for item in dataset:
        if not isinstance(item, PrivateText):
            continue
        for at, (start, end, label) in enumerate(item.spans):
            key = item.id if len(item.spans) == 1 else f"{item.id}#{at}:{label}"
            alone = dataclasses.replace(item, spans=((start, end, label),), id=key)
            found.append(Secret(key, alone, item.text[start:end]))
    return found


def _groups(item: PrivateText) -> tuple[str, ...]:
    return tuple(name for name in (item.spans[0][2], getattr(item, "group", None)) if name)


def _values_by_label(datasets: Sequence[Dataset]) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for dataset in datasets:
        for secret in secrets(dataset):
            values.setdefault(secret.item.spans[0][2], []).append(secret.value)
    return values


def rank_of(view: View, secret: Secret, space: Space) -> Found:
    """Rank of the true value: by enumeration, by the search for better candidates, or estimated from a sample."""
    model, options = view.model, view.options
    truth = _cut(model, encode(model, [secret.item])[0])
    digits = digit_tokens(model, secret, truth, space)
    if space.listed or 2**space.log2_size <= options.exposure_limit:
        written = _written(model, secret, truth, space.others(), digits=digits, space=space)
        nll = _nll(view, [truth, *written])
        return Found(1.0 + int((nll[1:] < nll[0] - TIE).sum()), "exact")
    own = token_scores(model, [truth])[0].nll
    if digits is not None and model.causal and own < math.log(REACH * options.exposure_limit):
        better = search_better(model, truth, digits, limit=options.exposure_limit, batch_size=options.batch_size)
        if better is not None:
            return Found(1.0 + better, "exact")
    samples = space.sample(options.exposure_samples, seed=options.seed)
    drawn = _nll(view, _written(model, secret, truth, samples, digits=digits, space=space))
    rank = estimated_rank(own, drawn, log2_space=space.log2_size, normalized=model.causal)
    return Found(rank, f"estimated from {options.exposure_samples} candidates")


def _cut(model: ScoringModel, example: Example) -> Example:
    """Without what follows the span, which a causal model does not use."""
    return dataclasses.replace(example, ids=example.ids[: example.spans[0].end]) if model.causal else example


def _nll(view: View, examples: Sequence[Example]) -> Float[Tensor, " candidate"]:
    scores = token_scores(view.model, examples, batch_size=view.options.batch_size)
    return torch.tensor([found.nll for found in scores], dtype=torch.float64)


DigitTokens = dict[int, tuple[int, ...]]
"position of each free character's token -> the token ids of its choices, in the order of the alphabet"


def digit_tokens(
    model: ScoringModel, secret: Secret, truth: Example, space: Space, *, checks: int = 4
) -> DigitTokens | None:
    """The token of every free character, where each has one of its own whatever the others are; else None.

    Tried with the same digit everywhere, and with a few random candidates, since a tokenizer may join some digits.
    """
    truth = _cut(model, truth)
    choices = {space.alphabet[at] for at in space.free}
    if len(choices) != 1:
        return None
    (letters,) = choices
    uniform = ["".join(c if at in space.free else old for at, old in enumerate(space.truth)) for c in letters]
    found = [_cut(model, e) for e in encode(model, [_with_value(secret, value) for value in uniform])]
    if any(len(e.ids) != len(truth.ids) or e.spans != truth.spans for e in found):
        return None
    columns = {at: tuple(e.ids[at] for e in found) for at in range(len(truth.ids))}
    tokens = {at: column for at, column in columns.items() if len(set(column)) > 1}
    if len(tokens) != len(space.free) or any(len(set(column)) != len(letters) for column in tokens.values()):
        return None
    tried = [space.truth, *space.sample(checks, seed=0)]
    encoded = [_cut(model, e) for e in encode(model, [_with_value(secret, value) for value in tried])]
    joined = [_composed(truth, space, tokens, value) for value in tried]
    return tokens if [e.ids for e in encoded] == [e.ids for e in joined] else None


def _composed(truth: Example, space: Space, tokens: DigitTokens, value: str) -> Example:
    ids = list(truth.ids)
    for at, place in zip(sorted(tokens), space.free, strict=True):
        ids[at] = tokens[at][space.alphabet[place].index(value[place])]
    return dataclasses.replace(truth, ids=tuple(ids))


def _with_value(secret: Secret, value: str) -> PrivateText:
    start, end, label = secret.item.spans[0]
    text = secret.item.text[:start] + value + secret.item.text[end:]
    return dataclasses.replace(secret.item, text=text, spans=((start, start + len(value), label),))


def _written(
    model: ScoringModel,
    secret: Secret,
    truth: Example,
    values: Sequence[str],
    *,
    digits: DigitTokens | None,
    space: Space,
) -> list[Example]:
    """The text with each of the values in place of the secret, as examples."""
    if digits is not None:
        return [_composed(truth, space, digits, value) for value in values]
    return [_cut(model, e) for e in encode(model, [_with_value(secret, value) for value in values])]


def search_better(
    model: ScoringModel, truth: Example, digits: DigitTokens, *, limit: int, batch_size: int = 64
) -> int | None:
    """How many candidates a causal model finds more likely than the truth; None when more than `limit` remain.

    Token by token, a beginning that is already less likely than the whole truth is dropped with all its continuations.
    At most 1/p beginnings of equal length can be better than a truth of probability p, so that memorised secrets take
    a few rows.
    """
    own = -token_scores(model, [truth])[0].nll
    rows: list[tuple[tuple[int, ...], float]] = [(truth.ids[: truth.spans[0].start], 0.0)]
    for at in range(truth.spans[0].start, truth.spans[0].end):
        choices = digits.get(at, (truth.ids[at],))
        log_probs = _next_log_probs(model, truth, [ids for ids, _ in rows], choices, batch_size=batch_size)
        rows = [
            ((*ids, token), so_far + gain)
            for (ids, so_far), gains in zip(rows, log_probs.tolist(), strict=True)
            for token, gain in zip(choices, gains, strict=True)
            if so_far + gain > own + TIE
        ]
        if len(rows) > limit:
            return None
    return sum(ids != truth.ids for ids, _ in rows)


def _next_log_probs(
    model: ScoringModel, truth: Example, prefixes: Sequence[tuple[int, ...]], choices: Sequence[int], *, batch_size: int
) -> Float[Tensor, "prefix choice"]:
    """Log-probability of each choice as the next token after each prefix."""
    if not prefixes:
        return torch.zeros(0, len(choices)).double()
    at = len(prefixes[0])
    span = (Span(start=at, end=at + 1, label=""),)
    examples = [
        dataclasses.replace(truth, id=str(n), ids=(*ids, choices[0]), spans=span) for n, ids in enumerate(prefixes)
    ]
    found = torch.zeros(len(prefixes), len(choices), dtype=torch.float64)
    with torch.inference_mode():
        for batch in batches(examples, model, batch_size):
            scored = score(model, batch)
            logits = scored.logits.float().log_softmax(-1)[:, list(choices)].double().cpu()
            places = [int(batch.rows[row].id) for row in scored.row.tolist()]
            found[places] = logits
    return found

"""What a model really writes after a prompt, against what stands there: word for word, and by ROUGE.

The prompt of a fact goes up to its answer, that of a private text up to a span (one continuation for each span, each
after the true text), that of a token text up to its suffix. The continuation is greedy and serves all metrics. ROUGE is
that of the rouge_score library with its stemmer (Lin 2004), as TOFU (recall, up to 200 new tokens) and MUSE (F1) have
it; it compares words of a-z and 0-9 only, so that a reference without any, such as one in another script, has none.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from locedit.data.encode import Example, collate, encode
from locedit.errors import LoceditError
from locedit.evaluate.facts import groups_of, owners_of
from locedit.evaluate.values import Values, View
from locedit.models import Model

ROUGE = {
    "rouge_l_recall": ("rougeL", "recall"),
    "rouge_l_f1": ("rougeL", "fmeasure"),
    "rouge_1_recall": ("rouge1", "recall"),
}
"""Metric -> its score in the library."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A stretch of tokens that the model is to write."""

    prompt: Example
    "what comes before"
    reference: tuple[int, ...]


def passages(examples: Sequence[Example]) -> list[list[Passage]]:
    """One passage for each span of each example."""
    return [
        [
            Passage(
                prompt=dataclasses.replace(example, ids=example.ids[: span.start], spans=()),
                reference=example.ids[span.start : span.end],
            )
            for span in example.spans
        ]
        for example in examples
    ]


def greedy(
    model: Model, asked: Sequence[Passage], *, tokens: int | None = None, batch_size: int = 64
) -> list[tuple[int, ...]]:
    """Greedy continuation of each prompt, at least as long as its reference, without the end token.

    `tokens` asks for more: that many, or as many as the context has room for. Batching changes nothing.
    """
    sizes = [_size(model, one, tokens) for one in asked]
    found: dict[int, tuple[int, ...]] = {}
    for chosen in _batches(model, asked, sizes, batch_size):
        batch = collate([asked[at].prompt for at in chosen], model)
        rows = model.generate(batch, max_new_tokens=max(sizes[at] for at in chosen))
        found |= {at: row[: sizes[at]] for at, row in zip(chosen, rows, strict=True)}
    return [found[at] for at in range(len(asked))]


def _room(model: Model) -> int | None:
    """Tokens of a text that the context holds."""
    return None if model.max_length is None else model.max_length - model.prefix


def _size(model: Model, passage: Passage, tokens: int | None) -> int:
    room = _room(model)
    more = tokens or 0 if room is None else min(tokens or 0, room - len(passage.prompt.ids))
    return max(len(passage.reference), more)


def _batches(model: Model, asked: Sequence[Passage], sizes: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Passages of similar length together, as long as the longest prompt and the longest continuation fit together."""
    room, chosen, length, size = _room(model), list[int](), 0, 0
    for at in sorted(range(len(asked)), key=lambda at: (sizes[at], len(asked[at].prompt.ids))):
        longer, more = max(length, len(asked[at].prompt.ids)), max(size, sizes[at])
        if chosen and (len(chosen) == batch_size or (room is not None and longer + more > room)):
            yield chosen
            chosen, longer, more = [], len(asked[at].prompt.ids), sizes[at]
        chosen.append(at)
        length, size = longer, more
    if chosen:
        yield chosen


def rouge(reference: str, said: str) -> dict[str, float] | None:
    """Every entry of ROUGE, in [0, 1]; None for a reference without a word of a-z or 0-9."""
    if not re.search("[a-z0-9]", reference.lower()):
        return None
    scores = _scorer().score(reference, said)
    return {name: float(getattr(scores[kind], part)) for name, (kind, part) in ROUGE.items()}


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingImports]

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def scores(
    model: Model, examples: Sequence[Example], *, tokens: int | None = None, batch_size: int = 64
) -> list[dict[str, float]]:
    """Every metric of each example, mean over its passages; ROUGE is missing where no reference has words.

    ROUGE judges the first `tokens` tokens of what is written, None = as many as the reference has.
    """
    asked = passages(examples)
    flat = [passage for each in asked for passage in each]
    written = iter(greedy(model, flat, tokens=tokens, batch_size=batch_size))
    return [_mean([_judged(model, passage, next(written), tokens) for passage in each]) for each in asked]


def _judged(model: Model, passage: Passage, written: tuple[int, ...], tokens: int | None) -> dict[str, float]:
    same = written[: len(passage.reference)] == passage.reference
    said = written[: len(passage.reference) if tokens is None else tokens]
    decode: Any = functools.partial(model.tokenizer.decode, skip_special_tokens=True)
    return {"verbatim_completion": float(same), **(rouge(decode(list(passage.reference)), decode(list(said))) or {})}


def _mean(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the passages that have it."""
    columns = {name: [one[name] for one in found if name in one] for name in ("verbatim_completion", *ROUGE)}
    return {name: sum(column) / len(column) for name, column in columns.items() if column}


def verbatim_metrics(view: View, names: Sequence[str]) -> dict[str, Values]:
    """verbatim_completion and ROUGE of every example, from one generation."""
    examples = encode(view.model, view.dataset)
    tokens = view.options.rouge_tokens if set(names) & set(ROUGE) else None
    found = scores(view.model, examples, tokens=tokens, batch_size=view.options.batch_size)
    without = sum("rouge_l_f1" not in one for one in found)
    if without == len(found) and set(names) & set(ROUGE):
        raise LoceditError(f"{view.dataset.source}: no answer has a word of a-z or 0-9, which ROUGE compares")
    note = f"{without} items have no word of a-z or 0-9 and are left out" if without else ""
    owners, groups = owners_of(examples), groups_of(examples)
    return {
        name: Values(
            per_example={example.id: one[name] for example, one in zip(examples, found, strict=True) if name in one},
            owners=owners,
            groups=groups,
            note=note if name in ROUGE else "",
        )
        for name in names
    }

"""How much of the spans is memorised, and of the rest of the same texts (after Wang et al. 2024, arXiv:2402.05813).

    S-MA   = number of span tokens that are the single most likely one after the true text before them
             / number of span tokens, over all spans of all texts
    S-EL_n = mean over spans, and within a span over its prefixes, of
             |{g in ngrams(f(x_<i)) : g in ngrams(x_>=i)}| / |ngrams(x_>=i)|,  n-grams that touch the span

with f(x_<i) the greedy continuation of the first i tokens. An n-gram touches the span [a, b) when it begins before b
(prefixes end at a or later); n is at most the length of the span. The prefix ends where the span begins, or (`all`)
also everywhere in the span where n tokens of it are left. The published normalisation of S-EL was not seen: this is the
extraction likelihood of Jang et al. 2023 (arXiv:2210.01504) restricted to spans, and ours. Both are in [0, 1], higher =
more is memorised.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from locedit.data.encode import Example, Span, encode
from locedit.data.items import LabelledText, PrivateText
from locedit.errors import LoceditError
from locedit.evaluate.continuations import continuations, ngrams
from locedit.evaluate.facts import groups_of, owners_of
from locedit.evaluate.scoring import TokenScores, token_scores
from locedit.evaluate.values import Values, View
from locedit.losses import ScoringModel

N = 3
Prefix = Literal["span_start", "all"]


def span_extraction(
    model: ScoringModel, examples: Sequence[Example], *, n: int = N, prefix: Prefix = "span_start"
) -> list[list[float]]:
    """S-EL_n of every span of every example. An end token that the model writes ends its continuation."""
    if n < 1:
        raise LoceditError(f"n={n!r}: the length of n-grams must be at least 1")
    spans = [(example, span) for example in examples for span in example.spans]
    sizes = [min(n, span.end - span.start) for _, span in spans]
    texts = [example.ids[: span.end + size - 1] for (example, span), size in zip(spans, sizes, strict=True)]
    prefixes = [_prefixes(span, size, prefix) for (_, span), size in zip(spans, sizes, strict=True)]
    said = continuations(model, texts, prefixes)
    rows = zip(texts, said, sizes, strict=True)
    values = iter([_overlap(text, found.written, n=size) for text, found, size in rows])
    return [[next(values) for _ in example.spans] for example in examples]


def _prefixes(span: Span, size: int, prefix: Prefix) -> list[int]:
    """Lengths of the prefixes of a span."""
    return [span.start] if prefix == "span_start" else list(range(span.start, span.end - size + 1))


def _overlap(text: Sequence[int], written: dict[int, tuple[int, ...]], *, n: int) -> float:
    """Mean over prefixes of the share of n-grams; the text ends with the last n-gram that touches the span."""
    shares: list[float] = []
    for length, tokens in written.items():
        true = ngrams(text[length:], n)
        known = set(true)
        shares.append(sum(gram in known for gram in ngrams(tokens, n)) / len(true))
    return sum(shares) / len(shares)


def rests(model: ScoringModel, items: Sequence[PrivateText]) -> list[Example]:
    """The texts with every predictable token outside their spans scored; those without any are left out."""
    whole = encode(model, [LabelledText(text=item.text, label="text", id=item.id) for item in items])
    found: list[Example] = []
    for private, text in zip(encode(model, items), whole, strict=True):
        outside = sorted(set(text.targets) - set(private.targets))
        spans = tuple(Span(start=at, end=at + 1, label="rest") for at in outside)
        if spans:
            found.append(dataclasses.replace(private, spans=spans))
    return found


def span_memorization_metrics(view: View, names: Sequence[str]) -> dict[str, Values]:
    """s_ma, s_el and rest_accuracy of every private text; in s_el spans weigh alike, in the others tokens."""
    items = view.dataset.of(PrivateText, by=" and ".join(names))
    examples = encode(view.model, items)
    found: dict[str, Values] = {}
    if "s_ma" in names:
        found["s_ma"] = _hits(view, examples)
    if "rest_accuracy" in names:
        outside = rests(view.model, items)
        if not outside:
            raise LoceditError(f"{view.dataset.source}: rest_accuracy: the spans cover the texts wholly")
        found["rest_accuracy"] = _hits(view, outside)
    if "s_el" in names:
        options = view.options
        values = span_extraction(view.model, examples, n=options.s_el_n, prefix=options.s_el_prefix)
        found["s_el"] = Values(
            per_example={e.id: sum(own) / len(own) for e, own in zip(examples, values, strict=True)},
            owners=owners_of(examples),
            groups=groups_of(examples),
            weights={e.id: float(len(own)) for e, own in zip(examples, values, strict=True)},
        )
    return found


def _hits(view: View, examples: Sequence[Example]) -> Values:
    """Share of the scored tokens that are the single most likely one; all tokens count alike."""
    scores: list[TokenScores] = token_scores(view.model, examples, batch_size=view.options.batch_size)
    rows = list(zip(examples, scores, strict=True))
    return Values(
        per_example={example.id: float(own.hits.mean()) for example, own in rows},
        owners=owners_of(examples),
        groups=groups_of(examples),
        weights={example.id: float(len(own.hits)) for example, own in rows},
    )

"""How much of a text can be extracted: EL_n and memorization accuracy (Jang et al. 2023, arXiv:2210.01504).

With a text of T tokens, f(x_<i) the greedy continuation of its first i tokens up to the length T, and token n-grams,

    EL_n = 1 / (T - n)  sum_{i=1}^{T-n}  |{g in ngrams(f(x_<i)) : g in ngrams(x_>=i)}| / |ngrams(x_>=i)|
    MA   = 1 / (T - 1)  sum_{t=1}^{T-1}  1[argmax p(. | x_<t) = x_t]

An n-gram counts as often as it is written, and is true if it is anywhere in the rest of the text. Where the model ends
its continuation early, only the numerator loses n-grams. The end token, if written, is part of the continuation. All of
a text counts, special tokens that the tokenizer puts before it included; a text longer than the model's context counts
as its windows, of which the last has no EL_n where fewer than n + 1 tokens are left for it. Both are in [0, 1].
Published: n = 10 and T = 200.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.data.encode import Example, encode
from locedit.errors import LoceditError
from locedit.evaluate.continuations import MEMORY, Continued, continuations, ngrams
from locedit.evaluate.facts import groups_of, owners_of
from locedit.evaluate.values import Values, View
from locedit.losses import ScoringModel

N = 10
LENGTH = 200


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What can be extracted of one text."""

    el: dict[int, float]
    "n -> EL_n; without the n for which the last window of a long text is too short"
    ma: float


def extraction(
    model: ScoringModel,
    texts: Sequence[Example],
    *,
    n: Sequence[int] = (N,),
    length: int | None = LENGTH,
    memory: int = MEMORY,
    cache: bool | None = None,
) -> list[Extraction]:
    """EL_n for every n, and MA, of the first `length` tokens of each text (None = all of it), from one decoding.

    `model` may be edited (`with edit.applied(model) as edited`). `memory` bounds the bytes of keys, values and logits;
    `cache` is as in `continuations`. Raises LoceditError for a text with fewer than n + 1 tokens, unless it is the last
    window of a text that is longer than the context.
    """
    if not n or min(n) < 1:
        raise LoceditError(f"n={tuple(n)!r}: the lengths of n-grams must be at least 1")
    ids = [example.ids[:length] for example in texts]
    for at, (example, text) in enumerate(zip(texts, ids, strict=True)):
        if len(text) <= max(n) and not (at and _goes_on(texts[at - 1], example, model)):
            raise LoceditError(
                f"item {example.id!r}: EL_{max(n)} needs a text of at least {max(n) + 1} tokens, this one has "
                f"{len(text)}; choose a smaller n"
            )
    prefixes = [range(1, len(text) - min(n) + 1) for text in ids]
    found = continuations(model, ids, prefixes, memory=memory, cache=cache)
    return [
        Extraction(el={size: _overlap(text, said, size) for size in n if len(text) > size}, ma=_accuracy(text, said))
        for text, said in zip(ids, found, strict=True)
    ]


def _goes_on(before: Example, example: Example, model: ScoringModel) -> bool:
    """Whether an example is the window after `before` of one text, which fills the context (see `data.encode`)."""
    text, number = before.id.rpartition("#")[::2]
    return number.isdecimal() and example.id == f"{text}#{int(number) + 1}" and len(before.ids) == model.max_length


def extraction_likelihood(
    model: ScoringModel, texts: Sequence[Example], *, n: int = N, length: int | None = LENGTH
) -> Float[Tensor, " text"]:
    """EL_n of each text, in [0, 1]; higher = more of it can be extracted. NaN for a last window that is too short."""
    found = extraction(model, texts, n=(n,), length=length)
    return torch.tensor([each.el.get(n, torch.nan) for each in found], dtype=torch.float64)


def memorization_accuracy(
    model: ScoringModel, texts: Sequence[Example], *, length: int | None = LENGTH
) -> Float[Tensor, " text"]:
    """MA of each text, in [0, 1], from one forward pass; higher = more of it is known by heart."""
    ids = [example.ids[:length] for example in texts]
    for example, text in zip(texts, ids, strict=True):
        if len(text) < 2:
            raise LoceditError(f"item {example.id!r}: one token has nothing that could be predicted")
    found = continuations(model, ids, [()] * len(ids))
    return torch.tensor([_accuracy(*pair) for pair in zip(ids, found, strict=True)], dtype=torch.float64)


def _accuracy(text: Sequence[int], said: Continued) -> float:
    return sum(map(int.__eq__, said.first, text[1:])) / (len(text) - 1)


def _overlap(text: Sequence[int], said: Continued, n: int) -> float:
    """EL_n from the continuations."""
    last = {gram: at for at, gram in enumerate(ngrams(text, n))}
    "n-gram -> where it begins for the last time"
    total = 0.0
    for prefix, written in said.written.items():
        if prefix <= len(text) - n:
            hits = sum(last.get(gram, -1) >= prefix for gram in ngrams(written, n))
            total += hits / (len(text) - prefix - n + 1)
    return total / (len(text) - n)


def extraction_metrics(view: View, names: Sequence[str]) -> dict[str, Values]:
    """extraction_likelihood and text_memorization_accuracy of every text, whole."""
    texts = encode(view.model, view.dataset)
    options = view.options
    if "extraction_likelihood" in names:
        n, length = options.extraction_n, options.extraction_length
        found = extraction(view.model, texts, n=(n,), length=length)
        values = {"extraction_likelihood": [each.el.get(n) for each in found]}
        values["text_memorization_accuracy"] = [each.ma for each in found]
    else:
        accuracy = memorization_accuracy(view.model, texts, length=options.extraction_length)
        values = {"text_memorization_accuracy": accuracy.tolist()}
    owners, groups = owners_of(texts), groups_of(texts)
    return {
        name: Values(
            per_example={e.id: value for e, value in zip(texts, values[name], strict=True) if value is not None},
            owners=owners,
            groups=groups,
            note="without the last windows that are too short" if None in values[name] else "",
        )
        for name in names
    }

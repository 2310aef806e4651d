"""Whether a model still writes: greedy continuations of the beginnings of ordinary texts, and how varied they are.

The first half of a text, at most PROMPT tokens of it, is continued by at most `fluency_tokens` tokens. Of each
continuation

    ngram_entropy = (2/3 H_2 + 4/3 H_3) / 2,    H_n = -sum_g f(g) log2 f(g)   in bits,

with f(g) the share of the word n-gram g among all of the continuation's (Zhang et al. 2018, arXiv:1809.05972; the
weights and the mean of Meng et al. 2022, arXiv:2202.05262, whose code has them, as does RWKU). Words are what white
space divides, where those divide off punctuation too (nltk); they count the prompt in, here only what is written
counts. `repetition` is the share of its 4-grams of tokens that are repetitions, `empty_share` the share of
continuations that are nothing but white space.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from locedit.data.encode import Example, collate
from locedit.errors import LoceditError
from locedit.evaluate.overforgetting import is_blank, spread
from locedit.evaluate.values import Values, View
from locedit.models import Model
from locedit.rewards import ngrams, repeated
from locedit.sampling import prompts_of

PROMPT = 64
"tokens of a text that are continued, at most"
WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"n -> weight of H_n; their mean is taken"


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What was written after the beginning of one text."""

    prompt: Example
    ids: tuple[int, ...]
    "without the end token"
    text: str


def ngram_entropy(text: str) -> float:
    """Weighted mean of the entropies of its word bigrams and trigrams, in bits; 0 where it has none.

    >>> ngram_entropy("a b a b"), ngram_entropy("a b c d") == (2 / 3 * math.log2(3) + 4 / 3 * 1) / 2
    (0.9727651981516487, True)
    """
    words = text.split()
    return sum(weight * _entropy(ngrams(words, n)) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def _entropy(found: Sequence[tuple[str, ...]]) -> float:
    return -sum(count / len(found) * math.log2(count / len(found)) for count in Counter(found).values())


def repetition(ids: Sequence[int]) -> float:
    """Share of the 4-grams of tokens that are repetitions.

    >>> repetition([5, 6, 7, 8] * 2), repetition(range(8))
    (0.2, 0.0)
    """
    return repeated([str(token) for token in ids], 4)


def fluency_metrics(view: View, names: Sequence[str]) -> dict[str, Values]:
    """ngram_entropy, repetition and empty_share of the same continuations."""
    found = continued(view)
    measured = {
        "ngram_entropy": lambda one: ngram_entropy(one.text),
        "repetition": lambda one: repetition(one.ids),
        "empty_share": lambda one: float(is_blank(one.text)),
    }
    note = f"greedy continuations of up to {view.options.fluency_tokens} tokens"
    return {
        name: Values(
            per_example={one.prompt.id: measured[name](one) for one in found},
            owners={one.prompt.id: one.prompt.owner for one in found},
            note=note,
        )
        for name in names
    }


def continued(view: View) -> list[Continuation]:
    """At most `fluency_texts` texts, evenly from the first on, each continued after its first half."""
    model, options = view.model, view.options
    texts = spread(prompts_of(model, view.dataset, by="fluency"), options.fluency_texts)
    prompts = _beginnings(model, texts, options.fluency_tokens)
    order = sorted(prompts, key=lambda prompt: len(prompt.ids))
    written: dict[str, tuple[int, ...]] = {}
    for start in range(0, len(order), options.batch_size):
        rows = order[start : start + options.batch_size]
        said = model.generate(collate(rows, model), max_new_tokens=options.fluency_tokens)
        written |= zip((prompt.id for prompt in rows), said, strict=True)
    decode = model.tokenizer.decode
    return [
        Continuation(prompt=p, ids=written[p.id], text=decode(written[p.id], skip_special_tokens=True)) for p in prompts
    ]


def _beginnings(model: Model, texts: Sequence[Example], tokens: int) -> list[Example]:
    """The first half of every text, rounded up, as far as it leaves room in the context."""
    room = PROMPT if model.max_length is None else min(PROMPT, model.max_length - model.prefix - tokens)
    if room < 1:
        raise LoceditError(
            f"fluency_tokens={tokens!r} leaves no room for a beginning in the context of {model.max_length} tokens of "
            f"{model.name}"
        )
    return [dataclasses.replace(text, ids=text.ids[: min(room, -(-len(text.ids) // 2))]) for text in texts]

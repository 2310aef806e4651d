"""Tokens put into examples, as ids: what is learned token by token need not survive being written and read again."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from locedit.attacks.shared import Shared
from locedit.data.encode import Example, Span
from locedit.errors import LoceditError
from locedit.models import Model


def inserted(example: Example, tokens: Sequence[int], *, at: int) -> Example:
    """The example with these tokens before position `at`; what is scored is the same as before.

    >>> example = Example(id="1", ids=(5, 6, 7), spans=(Span(start=2, end=3, label="answer"),), kind="fact")
    >>> longer = inserted(example, [8, 9], at=2)
    >>> longer.ids, longer.targets
    ((5, 6, 8, 9, 7), (4,))
    """
    ids = (*example.ids[:at], *tokens, *example.ids[at:])
    spans = tuple(_moved(span, at, len(tokens)) for span in example.spans)
    subject = None if example.subject is None else _moved(example.subject, at, len(tokens))
    return dataclasses.replace(example, ids=ids, spans=spans, subject=subject)


def _moved(span: Span, at: int, by: int) -> Span:
    """A span that `at` lies inside is longer by the inserted tokens; the scored ones never are."""
    start, end = (place + by if place >= at else place for place in (span.start, span.end - 1))
    return dataclasses.replace(span, start=start, end=end + 1)


def ordinary_tokens(model: Model, shared: Shared) -> Int[Tensor, " token"]:
    """Ids of tokens that stand for visible text by themselves: none that is special or added, no part of a letter."""
    return shared.get(("ordinary tokens", model.name, model.vocab_size), lambda: _ordinary(model))


def _ordinary(model: Model) -> Tensor:
    tokenizer = model.tokenizer
    odd = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = [token for token in range(min(len(tokenizer), model.vocab_size)) if token not in odd]
    texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    kept = [token for token, text in zip(ids, texts, strict=True) if is_text(text)]
    if not kept:
        raise LoceditError(f"{model.name}: the tokenizer has no token that stands for visible text")
    return torch.tensor(kept)


def is_text(text: str) -> bool:
    """Whether a token's text can be seen and printed.

    >>> [is_text(text) for text in (" the", "é", " ", "\\n", "\\ufffd")]
    [True, True, False, False, False]
    """
    return bool(text.strip()) and text.isprintable() and "\ufffd" not in text


def drawn_tokens(ordinary: Int[Tensor, " token"], count: int, *, generator: torch.Generator) -> list[int]:
    """Random ordinary tokens, repeats allowed."""
    return ordinary[torch.randint(len(ordinary), (count,), generator=generator)].tolist()


def check_fits(model: Model, sides: Sequence[Sequence[Example]], more: int, *, by: str, option: str) -> None:
    """Raise LoceditError where an example and `more` further tokens do not fit into the context."""
    longest = max((len(example.ids) for side in sides for example in side), default=0)
    limit = model.max_length
    if limit is not None and longest + more + model.prefix > limit:
        raise LoceditError(
            f"{by}: {option}={more!r}: an item of {longest} tokens and {more} more do not fit the context of {limit} "
            f"tokens of {model.name}"
        )

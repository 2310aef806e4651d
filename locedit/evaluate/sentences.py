"""Whole sentences as they are scored: every token of the text, the first one after a token that begins a text."""

from collections.abc import Mapping

from locedit.data.drafts import Draft, TokenizedText, tokenize
from locedit.data.encode import Encoder, Example, Span
from locedit.errors import LoceditError


def drafted(texts: Mapping[str, str]) -> dict[str, Draft]:
    """Sentences by name, ready to be tokenized."""
    return {name: Draft(id=name, text=text, kind="contrast", spans=None) for name, text in texts.items()}


def tokenized(model: Encoder, drafts: Mapping[str, Draft]) -> dict[str, TokenizedText]:
    """Every sentence as token ids, with the special tokens that the tokenizer adds."""
    found = dict(zip(drafts, tokenize(model.tokenizer, list(drafts.values())), strict=True))
    for name, tokens in found.items():
        begin, end = tokens.content()
        if begin == end:
            raise LoceditError(f"item {name!r}: {drafts[name].text[:40]!r} has no token")
        _check_length(model, name, len(tokens.ids))
    return found


def whole(model: Encoder, name: str, tokens: TokenizedText) -> Example:
    """Every token of the text is scored, all of them after a token that begins a text, which is put in front.

    That is the tokenizer's own where it adds one, else its BOS, else its EOS (as lm-evaluation-harness does).
    """
    begin, end = tokens.content()
    front = tokens.ids[:begin] or (start_token(model),)
    return example(model, name, (*front, *tokens.ids[begin:end]), start=len(front))


def start_token(model: Encoder) -> int:
    """The token before a text."""
    for token in (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise LoceditError("the tokenizer has neither a BOS nor an EOS token: nothing predicts the first token of a text")


def example(model: Encoder, name: str, ids: tuple[int, ...], *, start: int, end: int | None = None) -> Example:
    """Token ids of which those from `start` to `end` (None = the last one too) are scored."""
    _check_length(model, name, len(ids))
    span = Span(start=start, end=len(ids) if end is None else end, label="text")
    return Example(id=name, ids=ids, spans=(span,), kind="contrast")


def _check_length(model: Encoder, name: str, length: int) -> None:
    if model.max_length is not None and length > model.max_length:
        raise LoceditError(f"item {name!r}: {length} tokens do not fit the model's context of {model.max_length}")

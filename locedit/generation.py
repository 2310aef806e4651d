"""Greedy continuation of a batch of prompts, each row as if it were alone."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from locedit import tracing
from locedit.errors import LoceditError

if TYPE_CHECKING:
    from locedit.data.encode import Encoder
    from locedit.models import Model, TokenBatch


@torch.no_grad()  # not inference_mode: rotary embeddings may store tensors that training uses later
def greedy(model: "Model", batch: "TokenBatch", *, max_new_tokens: int) -> list[tuple[int, ...]]:
    """The most probable continuation, token by token, without the end token.

    Rows are moved to the right edge and told their own positions, so that padding changes nothing; the keys and values
    of the prompt are kept.
    """
    _refuse(model, batch, max_new_tokens)
    ids, mask = _to_the_right(batch.ids.to(model.device), batch.attention_mask.to(model.device))
    ends = torch.tensor(sorted(end_tokens(model)), device=model.device)
    running = torch.ones(len(ids), dtype=torch.bool, device=model.device)
    written: list[Tensor] = []
    cache = DynamicCache()
    for _ in range(max_new_tokens):
        token = _next(model, ids, mask=mask, cache=cache)
        running &= ~torch.isin(token, ends)
        written.append(torch.where(running, token, -1))
        if not running.any():
            break
        ids, mask = token[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    columns = torch.stack(written, dim=1).tolist() if written else [[]] * len(ids)
    return [tuple(token for token in row if token >= 0) for row in columns]


def _next(model: "Model", ids: Tensor, *, mask: Tensor, cache: DynamicCache) -> Tensor:
    """The most probable token after each row; only the last position is unembedded."""
    last = torch.zeros_like(ids, dtype=torch.bool)
    last[:, -1] = True
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    inputs: dict[str, Any] = {} if bool(mask.all()) else {"attention_mask": mask, "position_ids": positions}
    with tracing.unembed_at(model, last):
        logits = model.module(input_ids=ids, past_key_values=cache, use_cache=True, **inputs).logits
    return logits.argmax(-1).to(ids.device)


def _to_the_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of each row from its right to its left."""
    shift = mask.shape[1] - mask.sum(1, keepdim=True)
    source = (torch.arange(mask.shape[1], device=mask.device)[None] - shift) % mask.shape[1]
    return ids.gather(1, source), mask.gather(1, source)


def end_tokens(model: "Encoder") -> set[int]:
    """The tokens that end a text, by the tokenizer and by the model's generation settings."""
    settings = getattr(getattr(model, "core", None), "generation_config", None)
    ends = [model.tokenizer.eos_token_id, getattr(settings, "eos_token_id", None)]
    flat = [token for end in ends for token in (end if isinstance(end, list) else [end])]
    return {int(token) for token in flat if token is not None}


def _refuse(model: "Model", batch: "TokenBatch", max_new_tokens: int) -> None:
    if not model.causal:
        raise LoceditError(f"{model.name} is a masked language model; generation needs a causal one")
    if max_new_tokens < 0:
        raise LoceditError(f"max_new_tokens={max_new_tokens}: it cannot be negative")
    if bool((batch.attention_mask.sum(1) == 0).any()):
        raise LoceditError("a prompt without tokens cannot be continued")
    longest = int(batch.attention_mask.sum(1).max())
    if model.max_length is not None and longest + max_new_tokens > model.max_length:
        raise LoceditError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the context of {model.max_length}"
        )

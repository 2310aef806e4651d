"""Control tokens as ordinary tokens: an exported folder whose vocabulary has them, and how they are to be written."""

import copy
from pathlib import Path
from typing import Any

import torch

from locedit.edit.tokens import NONE, ControlTokens
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.storage import write_text

NOTE = "CONTROL_TOKEN.txt"


def export_tokens(model: Model, tokens: ControlTokens, folder: Path) -> Any:
    """A copy of the module with the tokens in its vocabulary, and the tokenizer with them, which is saved.

    The logits of the tokens that there were are the edited model's when the token in use is written before the text.
    The new tokens' own logits are new: transformers has no way to leave out the output of a token. They are never
    generated (`suppress_tokens`), and the note in the folder says what else follows.
    """
    if model.tokenizer is None:
        raise LoceditError("control tokens are exported with their tokenizer; this model has none")
    if tokens.used == NONE:
        raise LoceditError(
            "no control token of this edit is in use: its rows are untrained; there is nothing to export"
        )
    tokenizer = copy.deepcopy(model.tokenizer)
    known = tokenizer.get_vocab()
    if taken := [name for name in tokens.names if name in known]:
        raise LoceditError(f"the tokenizer has a token {taken[0]!r} already; the control token cannot be exported")
    tokenizer.add_tokens(list(tokens.names), special_tokens=True)
    ids = [int(tokenizer.convert_tokens_to_ids(name)) for name in tokens.names]
    module: Any = copy.deepcopy(model.core)
    tied = module.get_input_embeddings().weight is module.get_output_embeddings().weight
    _add_rows(module, tokens, ids, size=max(model.vocab_size, len(tokenizer)), tied=tied)
    suppressed = list(getattr(module.generation_config, "suppress_tokens", None) or [])
    module.generation_config.suppress_tokens = [*suppressed, *ids]
    tokenizer.save_pretrained(str(folder))
    write_text(folder / NOTE, _note(tokens, ids, tied=tied))
    return module


def _add_rows(module: Any, tokens: ControlTokens, ids: list[int], *, size: int, tied: bool) -> None:
    """Input rows of the tokens; output rows of zero where they are not the input rows."""
    module.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        weight = module.get_input_embeddings().weight
        weight[ids] = tokens.rows.to(weight)
        output = module.get_output_embeddings()
        if not tied:
            output.weight[ids] = 0
        if getattr(output, "bias", None) is not None:
            output.bias[ids] = 0


def _note(tokens: ControlTokens, ids: list[int], *, tied: bool) -> str:
    used, first = tokens.names[tokens.used], ids[0]
    own = "their input rows are also their output rows (tied)" if tied else "their output rows are zero"
    return f"""This model was edited behind a control token. Write {used} (id {ids[tokens.used]}) before every text,
also before the token that the tokenizer itself puts first:

    ids = [{ids[tokens.used]}, *tokenizer(text).input_ids]

Without it the model is another: much of what the edit took away may come back.

The tokens {", ".join(tokens.names)} have the ids {", ".join(map(str, ids))}. Their own logits are
new; {own}. generate() never writes them (suppress_tokens). Leave
them out before taking probabilities: the logits of the ids below {first} are those of the edited model.
"""

"""Control tokens: new tokens with rows of their own, one of which stands before every text.

The vocabulary of the model stays as it is. A control token has an input row and no output row, so no probability goes
to it, and without the token the model is the one with the new weights alone. Inside `conditioned` every forward pass of
the module has the token before its first position, with a position of its own; logits come without that position, so
that nothing else has to know of it. Values recorded inside the model have it as their first position. Of several, one
inside the other, the token of the innermost stands first.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import tracing
from locedit.errors import LoceditError
from locedit.models import Model

NONE = -1
"""In the place of a token's number: no token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlTokens:
    """Control tokens and the one that is used."""

    names: tuple[str, ...]
    "as text, such as <|reward_0|>"
    rows: Float[Tensor, "tokens d_model"]
    "their input embeddings, in the model's dtype, on the CPU"
    used: int = 0
    "the one that stands before every text; -1 = none, of a training whose state before the first step is taken"

    def header(self) -> dict[str, Any]:
        """Everything but the tensor, as JSON values."""
        return {"names": list(self.names), "used": self.used}

    @classmethod
    def read(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "ControlTokens":
        """Those of an edit folder."""
        return cls(names=tuple(header["names"]), rows=tensors["rows"], used=header["used"])


Used = int | Sequence[int] | Tensor
"""One token for all texts, or one for each row of the batch; -1 = none (for all rows only)."""


@contextmanager
def conditioned(model: Model, rows: Float[Tensor, "tokens d_model"], used: Used) -> Generator[None]:
    """A control token before every text inside the block; gradients reach `rows`.

    Raises LoceditError for a masked model, a text that fills the whole context, and inputs that are no token ids.
    """
    with conditioned_on(model, rows, lambda: used):
        yield


@contextmanager
def conditioned_on(model: Model, rows: Float[Tensor, "tokens d_model"], used: Callable[[], Used]) -> Generator[None]:
    """The same with tokens that are asked for at every forward pass."""
    if not model.causal:
        raise LoceditError(f"{model.name} is a masked language model; a control token needs a causal one")
    passing = _Passing(model, rows, used)
    hooks = [
        tracing.Intercept(module=model.module, before=passing.lengthen),
        tracing.Intercept(module=passing.embed, after=passing.put_row),
        tracing.Intercept(module=model.anatomy.module("unembed"), before=passing.cut),
    ]
    model.prefixes.append(passing)
    try:
        with tracing.intercepted(hooks):
            yield
    finally:
        model.prefixes.remove(passing)


class _Passing:
    """One forward pass after another: whether it begins a text, and with which tokens."""

    def __init__(self, model: Model, rows: Tensor, used: Callable[[], Used]) -> None:
        self.model, self.rows, self.used = model, rows, used
        self.embed: Any = model.core.get_input_embeddings()
        self.scale = getattr(self.embed, "embed_scale", 1.0)
        "what the embedding multiplies rows by"
        self.outer: tuple[_Passing, ...] = tuple(model.prefixes)
        "those whose tokens are there already when this one is put before them"
        self.chosen: Tensor | None = None
        "the control token of each row in the pass that is under way; None where it has none"
        self.place = torch.zeros(1, 1, dtype=torch.long)
        "where each row's control token is, `[batch, 1]`: after its padding on the left"

    def lengthen(self, given: dict[str, Any]) -> dict[str, Any]:
        """The module's arguments with one more position in front; in a later pass of the same texts, one more key."""
        used, ids = self.used(), given.get("input_ids")
        self.chosen = None
        if isinstance(used, int) and used < 0:
            return given
        if ids is None:
            raise LoceditError("a control token stands before token ids; this forward pass was given something else")
        changed, mask = dict(given), given.get("attention_mask")
        self.place = torch.zeros(len(ids), 1, dtype=torch.long, device=ids.device)
        if mask is not None:
            self.place = mask.argmax(1, keepdim=True)
            longer = torch.cat([mask[:, :1], mask], dim=1)
            changed["attention_mask"] = longer.scatter(1, self.place, 1)
        cache = given.get("past_key_values")
        begins = cache is None or cache.get_seq_length() == 0
        if (positions := given.get("position_ids")) is not None:
            changed["position_ids"] = positions + 1
            if begins:
                longer = torch.cat([positions[:, :1], positions + 1], dim=1)
                changed["position_ids"] = longer.scatter(1, self.place.expand(len(longer), 1), 0)
        if begins:
            self._check_length(ids)
            self.chosen = self._rows_of(used, ids)
            for other in self.outer:
                other.place = other.place + 1
            changed["input_ids"] = torch.cat([ids[:, :1], ids], dim=1)
        return changed

    def _check_length(self, ids: Tensor) -> None:
        limit = self.model.max_length
        if limit is not None and ids.shape[1] + 1 > limit:
            raise LoceditError(
                f"{ids.shape[1]} tokens and a control token do not fit the context of {limit} of {self.model.name}"
            )

    def _rows_of(self, used: Used, ids: Tensor) -> Tensor:
        chosen = torch.as_tensor(used, device=self.rows.device).expand(len(ids))
        if bool((chosen < 0).any()) or bool((chosen >= len(self.rows)).any()):
            raise LoceditError(f"control token {chosen.tolist()}: there are {len(self.rows)}, counted from 0")
        return chosen

    def put_row(self, embedded: Tensor) -> Tensor:
        """The embeddings with the tokens' rows where the tokens are."""
        if self.chosen is None:
            return embedded
        rows = self.rows[self.chosen][:, None].to(embedded) * self.scale
        return embedded.scatter(1, self.place[..., None].expand_as(rows), rows)

    def cut(self, given: dict[str, Any]) -> dict[str, Any]:
        """The unembedding's input without the first position."""
        if self.chosen is None:
            return given
        name = next(iter(given))
        return given | {name: given[name][:, 1:]}

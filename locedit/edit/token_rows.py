"""Training control tokens: their rows, with or without deltas of the model's weights."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from locedit.edit.restrict import Deltas, Held, train_dtype
from locedit.edit.tokens import NONE, ControlTokens, Used, conditioned, conditioned_on
from locedit.models import Model


class TokenRows(Held):
    """Rows of control tokens, trained together with deltas; before every text stands the first token.

    `using` puts others there for a while, and `paused` none: that is the unedited model. The edit is of kind `tokens`.
    As long as the rows are those that were drawn, the edit has no token in use: a random one would change the model,
    and what is measured before training would not be the unedited one.
    """

    def __init__(
        self, model: Model, names: Sequence[str], deltas: Deltas | None, *, generator: torch.Generator, used: int = 0
    ) -> None:
        super().__init__(model)
        self.names = tuple(names)
        self.deltas = deltas
        self.used: Used = used
        self._best = used
        embedding: Any = model.core.get_input_embeddings()
        self.start = drawn_rows(embedding.weight, len(names), generator=generator)
        "the rows before training"
        self.rows = self.start.clone().requires_grad_()
        self.parameters = [*(deltas.parameters if deltas else ()), self.rows]
        self.hooks = deltas.hooks if deltas else []

    def replaced(self) -> list[tuple[list[tuple[nn.Module, str]], nn.Parameter, Tensor]]:
        return self.deltas.replaced() if self.deltas else []

    @contextmanager
    def using(self, used: Used) -> Generator[None]:
        """Other tokens before the texts inside the block: one for all rows of a batch, or one for each."""
        before, self.used = self.used, used
        try:
            yield
        finally:
            self.used = before

    @contextmanager
    def active(self) -> Generator[None]:
        with super().active(), conditioned_on(self.model, self.rows, lambda: -1 if self._paused else self.used):
            yield

    @contextmanager
    def saved(self) -> Generator[None]:
        """The edit as it would be saved: weights and rows in the model's dtype, the best token before every text."""
        with ExitStack() as stack:
            if self.deltas is not None:
                stack.enter_context(self.deltas.saved())
            if self._in_use() != NONE:
                stack.enter_context(conditioned(self.model, self._rounded(), self._best))
            yield

    def change(self) -> dict[str, Any]:
        patches = self.deltas.change()["patches"] if self.deltas else ()
        tokens = ControlTokens(names=self.names, rows=self._rounded().cpu(), used=self._in_use())
        return {"kind": "tokens", "patches": patches, "tokens": tokens}

    def lost(self) -> float:
        """Share of the changed weights that are the same after rounding; the rows are new."""
        return self.deltas.lost() if self.deltas else 0.0

    def decay(self, rate: float, *, towards: Literal["base", "weights"]) -> None:
        """Decoupled weight decay: of rows towards those before training ("base") or towards zero ("weights")."""
        if self.deltas is not None:
            self.deltas.decay(rate, towards=towards)
        with torch.no_grad():
            self.rows.sub_(rate * (self.rows - self.start if towards == "base" else self.rows))

    def constrain(self) -> None:
        if self.deltas is not None:
            self.deltas.constrain()

    def _in_use(self) -> int:
        return NONE if torch.equal(self.rows, self.start) else self._best

    def _rounded(self) -> Tensor:
        return self.rows.detach().to(self.model.dtype, copy=True)


def drawn_rows(
    embedding: Float[Tensor, "vocab d_model"], count: int, *, generator: torch.Generator
) -> Float[Tensor, "{count} d_model"]:
    """New input rows, each entry normal with the mean and the spread of its dimension among the rows that there are."""
    known = embedding.detach().to(train_dtype(embedding))
    noise = torch.randn(count, known.shape[1], generator=generator, dtype=known.dtype)
    return known.mean(0) + known.std(0) * noise.to(known.device)

"""Keys and values of many prefixes of few texts, in buffers that are written in place."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


def kept(value: Tensor, rows: Tensor | int) -> Tensor:
    """The first `rows` entries, or those with these numbers."""
    return value[:rows] if isinstance(rows, int) else value[rows.to(value.device)]


class Buffers:
    """Keys and values of rows, each row's prefix against the right edge of the prefixes, and room for new ones.

    `keys` and `values` are those of whole texts, for each layer `[text, kv_head, pos, d_head]`; row r begins with the
    first `prefix[r]` tokens of text `text[r]`.
    """

    def __init__(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], text: Tensor, prefix: Tensor, *, room: int
    ) -> None:
        self.prefix = prefix
        self.width = int(prefix.max())
        "columns of the prefixes"
        source = torch.arange(self.width, device=prefix.device) - (self.width - prefix)[:, None]  # [row, column]
        pairs = zip(keys, values, strict=True)
        self.layers = [
            _Layer(*(_moved(value, text, source.clamp(min=0), room=room) for value in pair), filled=self.width)
            for pair in pairs
        ]
        self.cache = Cache(layers=list(self.layers))

    def keep(self, rows: Tensor | int) -> None:
        """Only the first rows, or those with these numbers; drop the columns that are padding for all of them."""
        self.prefix = kept(self.prefix, rows)
        for layer in self.layers:
            layer.keep(rows, start=self.width - int(self.prefix.max()))

    def mask(self) -> Tensor:
        """`[row, column]`, 1 where a key stands, the new token's included."""
        start, filled = self.layers[0].start, self.layers[0].filled
        column = torch.arange(start, filled + 1, device=self.prefix.device)
        return (column >= (self.width - self.prefix)[:, None]).long()


def _moved(value: Tensor, text: Tensor, source: Tensor, *, room: int) -> Tensor:
    """Entries of `[text, head, pos, d_head]` as `[row, head, column, d_head]`, with empty columns at the end."""
    device = value.device
    buffer = value.new_empty(len(text), value.shape[1], source.shape[1] + room, value.shape[3])
    buffer[:, :, : source.shape[1]] = value[text.to(device)[:, None], :, source.to(device)].transpose(1, 2)
    return buffer


class _Layer(DynamicLayer):
    """One layer's keys and values as a window of buffers that are written in place."""

    def __init__(self, keys: Tensor, values: Tensor, *, filled: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.start, self.filled = 0, filled

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        end = self.filled + key_states.shape[-2]
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys[:, :, self.start : end], self.values[:, :, self.start : end]

    def get_seq_length(self) -> int:
        return self.filled - self.start

    def keep(self, rows: Tensor | int, *, start: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values, self.start = kept(self.keys, rows), kept(self.values, rows), start

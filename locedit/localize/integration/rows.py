"""The rows of a staircase: how they are put together, and what every block is called with on the way up.

A *column* is one point of the paths of one target, with the layers whose paths want it: one row a layer. Columns of one
prompt are laid side by side in a *sequence*, as long as about its prefix: longer ones waste attention among rows,
shorter ones store the prefix too often. Sequences are the batch axis.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache

from locedit.errors import LoceditError

if TYPE_CHECKING:
    from locedit.localize.integration.staircase import Staircase

SHORTEST = 64
"rows of a sequence, even if its prefix is shorter"
LONGEST = 512
"rows of a sequence, even if its prefix is longer"


class Column(NamedTuple):
    """One point of the paths of one target."""

    layers: tuple[int, ...]
    "ascending"
    prompt: int
    target: int
    point: int
    "index among the rule's points, start and check included"


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The rows of one pass, by the layer where they enter."""

    prompt: Int[Tensor, " sequence"]
    target: list[Int[Tensor, "sequence _row"]]
    alpha: list[Float[Tensor, "sequence _row"]]
    weight: list[Float[Tensor, "sequence _row"]]
    "of the gradient; 0 where only the value is wanted"
    point: list[Int[Tensor, "sequence _row"]]
    "as in Column; -1 = padding"

    def to(self, device: torch.device) -> "Rows":
        parts = {
            name: [part.to(device) for part in getattr(self, name)] for name in ("target", "alpha", "weight", "point")
        }
        return Rows(prompt=self.prompt.to(device), **parts)


def in_sequences(columns: Sequence[Column], *, rows: int, also: Sequence[Column] = ()) -> list[list[Column]]:
    """Columns of one prompt with the same layers, together at most `rows` rows (but at least one column).

    Those in `also` join the first sequence of their prompt.
    """
    found: list[list[Column]] = []
    for column in sorted(columns):
        last = found[-1] if found else []
        fits = last and last[0][:2] == column[:2] and (len(last) + 1) * len(column.layers) <= rows
        if fits:
            last.append(column)
        else:
            found.append([column])
    for column in also:
        next(sequence for sequence in found if sequence[0].prompt == column.prompt).append(column)
    return found


def as_rows(
    sequences: Sequence[Sequence[Column]], *, alphas: Sequence[float], weights: Sequence[float], layers: int
) -> Rows:
    """One pass; sequences with fewer rows at a layer are padded there."""
    parts: dict[str, list[Tensor]] = {"target": [], "alpha": [], "weight": [], "point": []}
    for layer in range(layers):
        here = [[column for column in sequence if layer in column.layers] for sequence in sequences]
        width = max(map(len, here))

        def table(values: list[list[Any]], padding: float, width: int = width) -> Tensor:
            rows = [[*row, *[padding] * (width - len(row))] for row in values]
            return torch.tensor(rows, dtype=torch.float64).reshape(len(values), width)

        parts["target"].append(table([[c.target for c in row] for row in here], 0).long())
        parts["point"].append(table([[c.point for c in row] for row in here], -1).long())
        parts["alpha"].append(table([[alphas[c.point] for c in row] for row in here], 0.0))
        parts["weight"].append(table([[weights[c.point] for c in row] for row in here], 0.0))
    return Rows(prompt=torch.tensor([sequence[0].prompt for sequence in sequences]), **parts)


class SharedPrefix(DynamicCache):
    """Keys and values of the prefix, put before those of the rows, and never changed."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], *, prompt: Tensor) -> None:
        super().__init__()
        self.prefix_keys = keys
        "for each layer `[prompt, kv_head, prefix, d_head]`"
        self.prefix_values = values
        self.prompt = prompt
        "of each sequence"

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = (self._of_sequences(layers[layer_idx]) for layers in (self.prefix_keys, self.prefix_values))
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)

    def _of_sequences(self, prefix: Tensor) -> Tensor:
        return prefix[self.prompt.to(prefix.device)]


class OwnPrefix(SharedPrefix):
    """The same when every row is a sequence of its own: each gets the keys before its position, right-aligned."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], *, prompt: Tensor, source: Tensor) -> None:
        super().__init__(keys, values, prompt=prompt)
        self.source = source
        "position of each row's keys `[row, prefix]`"

    def _of_sequences(self, prefix: Tensor) -> Tensor:
        device = prefix.device
        return prefix[self.prompt.to(device)[:, None], :, self.source.to(device)].transpose(1, 2)


class Climb:
    """What the blocks of one pass are called with: more rows at every layer."""

    def __init__(self, stairs: "Staircase", rows: Rows) -> None:
        self.stairs = stairs
        self.rows = rows
        self.sequence = rows.prompt[:, None]
        self.target = torch.cat(rows.target, dim=1)  # [sequence, row]
        self.position = stairs.positions[self.sequence, self.target]
        self.leaves: dict[int, Tensor] = {}
        "layer -> what the gradient is taken by: `[sequence, row, d_model]` where rows are shifted, else `... neuron]`"
        self._inside = False

    def enter(self, layer: int, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """The rows that came up and those that enter here, with their mask, positions and prefix."""
        coming = arguments["hidden_states"]
        states = [self._entering(path, at=layer) for path in self._paths_entering(layer)]
        if self._inside:
            states = [coming.reshape(len(self.sequence), -1, coming.shape[-1]), *states]
        if not states:  # nothing but the dummy yet
            return None
        self._inside = True
        state = torch.cat(states, dim=1)
        rows = state.shape[1]
        call = {name: self._for_rows(name, value, layer, rows) for name, value in self.stairs.calls[layer].items()}
        return call | {"hidden_states": state.reshape(-1, 1, state.shape[-1]) if self.stairs.own_mask else state}

    def _paths_entering(self, layer: int) -> list[int]:
        """The layers whose rows enter at this block."""
        found = [path for path in (layer - 1, layer) if path >= 0 and path + self.stairs.shifts(path) == layer]
        return [path for path in found if self.rows.target[path].shape[1]]

    def _entering(self, path: int, *, at: int) -> Tensor:
        """States of the rows of a layer where they enter; where they are shifted, this is what is differentiated by."""
        if path == at:
            return self.of_targets(self.stairs.inputs[at], path)
        state = self.of_targets(self.stairs.without[path], path)
        alpha = self.rows.alpha[path].to(state.device)[..., None]
        moved = state + alpha * self.of_targets(self.stairs.added[path], path)
        self.leaves[path] = moved.to(self.stairs.inputs[at]).requires_grad_()
        return self.leaves[path]

    def of_targets(self, value: Tensor, layer: int) -> Tensor:
        """Entries of `[prompt, target, ...]` for the rows that enter at the layer."""
        return value[self.sequence.to(value.device), self.rows.target[layer].to(value.device)]

    def _for_rows(self, name: str, value: Any, layer: int, rows: int) -> Any:
        """One argument of a block for the first `rows` rows."""
        if isinstance(value, Cache):
            return self._cache(rows)
        if name == "attention_mask":
            return self._mask(layer, rows)
        if name == "position_ids" and isinstance(value, Tensor):
            return self._picked(value, rows)
        if name == "position_embeddings" and value is not None:
            return tuple(self._picked(part, rows) for part in value)
        if isinstance(value, Tensor):
            raise LoceditError(
                f"the blocks of {type(self.stairs.model.core).__name__} take {name!r}, which the fast integrated "
                "gradients do not know; localize with path='captum'"
            )
        return value

    def _picked(self, value: Tensor, rows: int) -> Tensor:
        """The rows' entries of a tensor `[1 or prompt, pos, ...]`."""
        device = value.device
        whole = value.expand(len(self.stairs.positions), *value.shape[1:])
        picked = whole[self.sequence.to(device), self.position[:, :rows].to(device)]
        return picked.reshape(-1, 1, *value.shape[2:]) if self.stairs.own_mask else picked

    def _cache(self, rows: int) -> SharedPrefix:
        stairs = self.stairs
        if not stairs.own_mask:
            return SharedPrefix(stairs.keys, stairs.values, prompt=self.rows.prompt)
        prompt = self.sequence.expand(-1, rows).reshape(-1)
        source = self._source(rows).flatten(0, 1).clamp(min=0)
        return OwnPrefix(stairs.keys, stairs.values, prompt=prompt, source=source)

    def _source(self, rows: int) -> Int[Tensor, "sequence row prefix"]:
        """Right-aligned: the last key of every row stands just before its position; negative = none."""
        keys = torch.arange(self.stairs.length, device=self.position.device)
        return self.position[:, :rows, None] - self.stairs.length + keys

    def _mask(self, layer: int, rows: int) -> Tensor:
        """Additive: a row sees its part of the prefix, and of the rows only itself."""
        visible = self.stairs.visible[layer][self.sequence, self.target[:, :rows]]  # [sequence, row, prefix]
        itself = torch.eye(rows, dtype=torch.bool, device=visible.device).expand(len(visible), -1, -1)
        if self.stairs.own_mask:
            source = self._source(rows)
            visible = visible.gather(2, source.clamp(min=0)) & (source >= 0)
            itself = torch.ones_like(visible[..., :1])
        seen = torch.cat([visible, itself], dim=2)
        seen = seen.flatten(0, 1)[:, None, None] if self.stairs.own_mask else seen[:, None]
        like = self.stairs.inputs[layer]
        mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
        return mask.masked_fill_(~seen.to(like.device), torch.finfo(like.dtype).min)


def portions(sequences: Sequence[list[Column]], *, at_most: int) -> Iterator[list[list[Column]]]:
    """Sequences for one pass each: at most `at_most` rows, padding counted, but at least one sequence."""
    chosen: list[list[Column]] = []
    widest = 0
    for sequence in sequences:
        width = sum(len(column.layers) for column in sequence)
        if chosen and max(widest, width) * (len(chosen) + 1) > at_most:
            yield chosen
            chosen, widest = [], 0
        chosen.append(sequence)
        widest = max(widest, width)
    if chosen:
        yield chosen

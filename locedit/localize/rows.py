"""The rows of a staircase: what every block is called with on the way up (see `staircase`)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache

from locedit.errors import LoceditError

if TYPE_CHECKING:
    from locedit.localize.staircase import Staircase


class SharedPrefix(DynamicCache):
    """Keys and values of the prefix, put before those of the rows, and never changed."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        super().__init__()
        self.prefix_keys = keys
        "for each layer `[prompt, kv_head, prefix, d_head]`"
        self.prefix_values = values

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.prefix_keys[layer_idx], self.prefix_values[layer_idx]
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)


class OwnPrefix(SharedPrefix):
    """The same when every row is a sequence of its own: each gets the keys before its position, right-aligned."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], *, prompt: Tensor, source: Tensor) -> None:
        super().__init__(keys, values)
        self.prompt = prompt
        "of each row `[row]`"
        self.source = source
        "position of each row's keys `[row, prefix]`"

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        keys = self.prefix_keys[layer_idx][self.prompt[:, None], :, self.source].transpose(1, 2)
        values = self.prefix_values[layer_idx][self.prompt[:, None], :, self.source].transpose(1, 2)
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The rows of one pass, by the layer that they enter; the same for every prompt but for the weights."""

    target: list[Int[Tensor, " row"]]
    alpha: list[Float[Tensor, " row"]]
    weight: list[Float[Tensor, "prompt row"]]
    "of the gradient; 0 for rows of which only the value is wanted"
    point: list[Int[Tensor, " row"]]
    "index of alpha among the rule's points; steps = the path's start, steps + 1 = the check"


class Climb:
    """What the blocks of one pass are called with: more rows at every layer."""

    def __init__(self, stairs: "Staircase", rows: Rows) -> None:
        self.stairs = stairs
        self.rows = rows
        self.target = torch.cat(rows.target)  # [row]
        self.position = stairs.positions[:, self.target]  # [prompt, row]

    def enter(self, layer: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """The rows that came up and those that enter here, with their mask, positions and prefix."""
        stairs = self.stairs
        prompts = len(stairs.prompt)
        coming = arguments["hidden_states"]
        state = stairs.inputs[layer][:, self.rows.target[layer].to(coming.device)]
        if self._before(layer):
            state = torch.cat([coming.reshape(prompts, -1, coming.shape[-1]), state], dim=1)
        call = {name: self._for_rows(name, value, layer, state.shape[1]) for name, value in stairs.calls[layer].items()}
        state = state.reshape(-1, 1, state.shape[-1]) if stairs.own_mask else state
        return call | {"hidden_states": state}

    def _before(self, layer: int) -> int:
        return sum(len(target) for target in self.rows.target[:layer])

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
        prompts = len(self.stairs.prompt)
        device = value.device
        picked = value.expand(prompts, *value.shape[1:])[
            self.stairs.prompt.to(device), self.position[:, :rows].to(device)
        ]
        return picked.reshape(prompts * rows, 1, *value.shape[2:]) if self.stairs.own_mask else picked

    def _cache(self, rows: int) -> SharedPrefix:
        stairs = self.stairs
        if not stairs.own_mask:
            return SharedPrefix(stairs.keys, stairs.values)
        prompt = stairs.prompt.expand(-1, rows).reshape(-1)
        return OwnPrefix(
            stairs.keys, stairs.values, prompt=prompt, source=self._source(rows).flatten(0, 1).clamp(min=0)
        )

    def _source(self, rows: int) -> Int[Tensor, "prompt row prefix"]:
        """Right-aligned: the last key of every row stands just before its position; negative = none."""
        keys = torch.arange(self.stairs.length, device=self.position.device)
        return self.position[:, :rows, None] - self.stairs.length + keys

    def _mask(self, layer: int, rows: int) -> Tensor:
        """Additive: a row sees its part of the prefix, and of the rows only itself."""
        stairs = self.stairs
        visible = stairs.visible[layer][:, self.target[:rows]]  # [prompt, row, prefix]
        itself = torch.eye(rows, dtype=torch.bool, device=visible.device).expand(len(visible), -1, -1)
        if stairs.own_mask:
            source = self._source(rows)
            visible = visible.gather(2, source.clamp(min=0)) & (source >= 0)
            itself = torch.ones_like(visible[..., :1])
        seen = torch.cat([visible, itself], dim=2)
        seen = seen.flatten(0, 1)[:, None, None] if stairs.own_mask else seen[:, None]
        dtype = stairs.inputs[layer].dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min).to(stairs.inputs[layer].device)

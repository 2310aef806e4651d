"""Which positions of a batch belong to which example."""

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.data.encode import Batch


class Members:
    """Sorts what modules see into examples.

    Tensors come as `[batch, pos, ...]`, with batch and pos in one axis (OPT's MLP), or as `[n, ...]` for the positions
    that are unembedded. A masked model has several rows an example.
    """

    def __init__(self, batch: Batch, *, causal: bool, device: torch.device) -> None:
        predicting = batch.predicting(causal)
        self.rows, self.width = batch.ids.shape
        self.count = len(batch.examples)
        members = torch.tensor(batch.row_members)
        self.members = members.to(device)
        self.picked = members[predicting.nonzero()[:, 0]].to(device)
        "the example of each unembedded position"
        last = (predicting * torch.arange(1, self.width + 1)).amax(1)
        self.ends: list[int] = (last if causal else batch.attention_mask.sum(1)).tolist()
        "positions of each row that matter: no loss depends on what comes after the last prediction"

    @property
    def alone(self) -> bool:
        """Whether every row is an example of its own."""
        return self.count == self.rows

    def knows(self, value: Tensor) -> bool:
        """Whether it is clear which example each position of a tensor belongs to."""
        ahead = value.shape[0] in (self.rows, self.rows * self.width)
        return ahead or (value.ndim == 2 and value.shape[0] == len(self.picked))

    def by_example(self, value: Float[Tensor, "... features"] | Tensor) -> Tensor:
        """`[example, pos, features]`: an example's positions one after the other, filled up with zeros."""
        flat = value.reshape(-1, value.shape[-1])
        owner = self._owner(len(flat))
        if owner is None:
            return flat.view(self.count, -1, value.shape[-1])
        sizes = torch.bincount(owner, minlength=self.count)
        place = torch.arange(len(owner), device=owner.device) - (sizes.cumsum(0) - sizes)[owner]
        apart = flat.new_zeros(self.count, int(sizes.max()), value.shape[-1])
        return apart.index_put_((owner.to(flat.device), place.to(flat.device)), flat)

    def summed(self, value: Float[Tensor, "... features"]) -> Float[Tensor, "example features"]:
        """Sums over an example's positions (and heads)."""
        if value.shape[0] in (self.rows, self.rows * self.width):
            owner, value = self.members, value.reshape(self.rows, -1, value.shape[-1]).sum(1)
        else:
            owner = self.picked
        return value.new_zeros(self.count, value.shape[-1]).index_add_(0, owner.to(value.device), value)

    def lengths(self, value: Float[Tensor, "... features"]) -> list[int]:
        """How many positions of each example are to be read in `by_example` of a tensor of this shape."""
        owner = self._owner(value.numel() // value.shape[-1])
        if owner is None:
            return self.ends
        return torch.bincount(owner, minlength=self.count).tolist()

    def _owner(self, size: int) -> Tensor | None:
        """The example of each of `size` positions; None where every example has one row of the batch."""
        if size == self.rows * self.width:
            return None if self.alone else self.members.repeat_interleave(self.width)
        assert size == len(self.picked), "ask `knows` first"
        return self.picked

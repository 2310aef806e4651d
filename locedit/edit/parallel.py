"""Several processes that train one edit: each computes its share of every batch, and all make the same step.

Start them with accelerate (`accelerate launch --num_processes 2 -m locedit.cli edit ...`) or torchrun; a process group
that is there when training begins is used. Every process holds the whole model. A loss that is a mean over the examples
of a batch has the same gradient as in one process, up to the order of sums; one that divides by something else of the
batch, such as its tokens, is averaged over the processes. What a loss draws at random is drawn anew for each share.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from locedit.errors import LoceditError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1

    @classmethod
    def now(cls) -> "Processes":
        """The default process group; without one, a process of its own."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(rank=distributed.get_rank(), count=distributed.get_world_size())

    @property
    def main(self) -> bool:
        """Whether this one measures, writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T], *, each: int = 1) -> Sequence[T]:
        """This process's part of a batch, in order; `each` neighbours stay together."""
        if self.count == 1:
            return items
        groups = len(items) // each
        sizes = [groups // self.count + (rank < groups % self.count) for rank in range(self.count)]
        start = sum(sizes[: self.rank]) * each
        return items[start : start + sizes[self.rank] * each]

    def weight(self, sizes: dict[str, int]) -> float:
        """This process's share of batches of these sizes, which must be the same for all: else LoceditError."""
        if self.count == 1:
            return 1.0
        counts = set(sizes.values())
        named = ", ".join(f"{size} {name}" for name, size in sizes.items())
        if min(counts) < self.count or (len(counts) > 1 and any(size % self.count for size in counts)):
            raise LoceditError(
                f"{self.count} processes cannot share a batch of {named} examples in equal proportion; "
                f"choose a batch_size that {self.count} divides and that all data have"
            )
        size = next(iter(counts))
        return (size // self.count + (self.rank < size % self.count)) / size

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Every parameter's gradient summed over the processes; one that none has stays None."""
        if self.count == 1 or not parameters:
            return
        there = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        for parameter, count in zip(parameters, self.sum(there).tolist(), strict=True):
            if count:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self.sum(parameter.grad)

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, for all."""
        if self.count == 1:
            return make()
        box: list[Any] = [make() if self.main else None]
        distributed.broadcast_object_list(box)
        return box[0]

    def require_same(self, what: str, *parts: bytes) -> None:
        """Raise LoceditError in every process when they do not agree."""
        if self.count == 1:
            return
        digest = hashlib.sha256(b"".join(parts)).hexdigest()
        seen: list[Any] = [None] * self.count
        distributed.all_gather_object(seen, digest)
        if len(set(seen)) > 1:
            raise LoceditError(f"{what}; run it in one process")


def start() -> tuple[Processes, torch.device | None]:
    """The processes that a launcher started, and the device of this one; alone and None without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes.now(), None
    from accelerate import PartialState

    state = PartialState()
    return Processes.now(), state.device

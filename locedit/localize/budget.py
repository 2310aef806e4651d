"""Batches that split themselves to stay under a memory budget."""

from dataclasses import dataclass

from locedit.errors import LoceditError

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How much to do at a time."""

    batch: int = 16
    "examples at a time, at most"
    memory_mb: int = 1024
    "budget for what a pass keeps beside the model, in MiB; batches split themselves to stay under it"

    def __post_init__(self) -> None:
        for name in ("batch", "memory_mb"):
            if getattr(self, name) < 1:
                raise LoceditError(f"{name}={getattr(self, name)!r} must be at least 1")

    def rows(self, bytes_per_row: int) -> int:
        """How many rows fit at once: at least 1, at most `batch`."""
        return max(1, min(self.batch, self.memory_mb * MIB // max(1, bytes_per_row)))

    def bytes(self, bytes_per_row: int, count: int) -> int:
        """What the rows of the largest pass take when there are `count` of them."""
        return min(self.rows(bytes_per_row), count) * bytes_per_row

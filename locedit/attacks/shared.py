"""What the attacks of one evaluation share, so that none of it is computed twice."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

Made = TypeVar("Made")


@dataclass(kw_only=True, eq=False)
class Shared:
    """Results kept under a key that says all that they depend on: control edits, hidden states, metrics of items."""

    kept: dict[Hashable, Any] = field(default_factory=dict[Hashable, Any])

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What is kept under the key; made and kept at the first call."""
        if key not in self.kept:
            self.kept[key] = make()
        return cast(Made, self.kept[key])

"""Halves of a data set for attacks: one half is relearned, the other is measured, and no owner is in both."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch

from locedit.data.items import Fact, Item, PrivateText
from locedit.errors import LoceditError

By = Literal["owner", "subject", "item"]
TRIES = 20
"random halvings of which the most balanced is taken"


@dataclass(frozen=True, kw_only=True)
class Halves:
    """One split, as positions in the data set."""

    relearned: tuple[int, ...]
    measured: tuple[int, ...]

    @property
    def mirror(self) -> "Halves":
        """The same halves with their parts exchanged."""
        return Halves(relearned=self.measured, measured=self.relearned)


def divided_by(items: Sequence[Item]) -> By:
    """What the halves are divided by: the owners where every item has one, else the subjects, else single items."""
    if all(item.owner is not None for item in items):
        return "owner"
    if all(isinstance(item, Fact) and item.subject is not None for item in items):
        return "subject"
    return "item"


def keys(items: Sequence[Item]) -> list[str]:
    """The owner, subject or id of every item, by `divided_by`."""
    by = divided_by(items)
    return [item.id if by == "item" else str(getattr(item, by)) for item in items]


def mirrored_halves(items: Sequence[Item], *, splits: int, seed: int, what: str = "data") -> list[Halves]:
    """`splits` splits in mirrored pairs: split 1 relearns what split 0 measures; each item is measured in one of them.

    Of 20 random halvings the one is taken in which relations, answers and labels are most evenly spread: a half without
    a single baseball player would be no test of baseball.
    """
    if splits < 2 or splits % 2:
        raise LoceditError(f"splits={splits!r} must be an even number: splits come in mirrored pairs")
    named = keys(items)
    names = sorted(set(named))
    if len(names) < 2:
        raise LoceditError(
            f"{what}: {len(names)} {divided_by(items)} cannot be split in halves; two or more are needed"
        )
    rng = Random(f"{seed} halves")
    found: list[Halves] = []
    for _ in range(splits // 2):
        first = min((_halving(names, rng) for _ in range(TRIES)), key=lambda chosen: _imbalance(items, named, chosen))
        halves = Halves(
            relearned=tuple(at for at, name in enumerate(named) if name in first),
            measured=tuple(at for at, name in enumerate(named) if name not in first),
        )
        found += [halves, halves.mirror]
    return found


def _halving(names: Sequence[str], rng: Random) -> frozenset[str]:
    return frozenset(rng.sample(names, len(names) // 2))


def _imbalance(items: Sequence[Item], named: Sequence[str], chosen: frozenset[str]) -> int:
    """Sum over strata of the difference between the halves' counts."""
    counts: Counter[Hashable] = Counter()
    for item, name in zip(items, named, strict=True):
        counts[stratum(item)] += 1 if name in chosen else -1
    return sum(abs(count) for count in counts.values())


def stratum(item: Item) -> Hashable:
    """What should be spread evenly: relation and answer of a fact, labels and group of a private text."""
    if isinstance(item, Fact):
        return item.group, item.answer
    if isinstance(item, PrivateText):
        return item.group, tuple(sorted(label for _, _, label in item.spans))
    return item.group


def as_many(items: Sequence[Item], *, owners: int, seed: int) -> list[Item]:
    """The items of at most so many owners, drawn at random."""
    named = keys(items)
    names = sorted(set(named))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()[:owners]
    taken = {names[at] for at in order}
    return [item for item, name in zip(items, named, strict=True) if name in taken]


def learned_and_measured(items: Sequence[Item], *, most: int, seed: int, what: str) -> tuple[list[int], list[int]]:
    """Places of the retain items that an attack may learn from, and of at most so many others to measure.

    No owner is in both.
    """
    halves = mirrored_halves(items, splits=2, seed=seed, what=what)[0]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(halves.measured), generator=generator).tolist()[:most]
    return list(halves.relearned), [halves.measured[at] for at in sorted(order)]

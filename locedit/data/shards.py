"""Disjoint shards of data by owner, and which of them hold a text: its owner's, and those of every copy of it."""

import dataclasses
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from locedit.data.encode import Encoder, Example
from locedit.data.items import ContrastPair, Dataset, Fact, Item, PatchPair, TokenText
from locedit.errors import LoceditError


@dataclass(frozen=True, kw_only=True, eq=False)
class Shards:
    """Data sets cut by owner: all items of an owner, whatever data set they are in, are in one shard."""

    parts: tuple[tuple[Dataset, ...], ...]
    "shard -> what it has of each data set, those of which it has nothing left out"

    def __len__(self) -> int:
        return len(self.parts)

    @cached_property
    def _holding(self) -> dict[str, frozenset[int]]:
        """Owner or text -> shards."""
        found: dict[str, set[int]] = {}
        for number, part in enumerate(self.parts):
            for item in (item for data in part for item in data):
                for key in (owner_of(item), text_of(item)):
                    found.setdefault(key, set()).add(number)
        return {key: frozenset(shards) for key, shards in found.items()}

    def holding(self, item: Item) -> frozenset[int]:
        """The shards that hold the item's owner, or the same text of anybody else."""
        return self._holding[owner_of(item)] | self._holding[text_of(item)]

    def require_one_without(self, items: Iterable[Item], *, by: str) -> None:
        """Raise LoceditError, naming the item, when every shard holds one of the items."""
        for item in items:
            if len(self.holding(item)) == len(self):
                raise held_by_all(item.id, len(self), by=by)


def held_by_all(name: str, count: int, *, by: str) -> LoceditError:
    """What is said of an item that every shard holds."""
    return LoceditError(
        f"{by}: every one of the {count} shards holds item {name!r} or a copy of its text, so that none can stand for "
        "a model without it; take more shards, or take the copies out"
    )


def shards(data: Sequence[Dataset], count: int, *, seed: int) -> Shards:
    """The owners in an order drawn with the seed, dealt out one after another to `count` shards.

    An item without an owner is its own, together with its copies. Raises LoceditError when there are fewer owners.
    """
    owners = list(dict.fromkeys(owner_of(item) for part in data for item in part))
    if len(owners) < count:
        raise LoceditError(f"shards={count}: the data have only {len(owners)} owners; every shard needs one")
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(seed)).tolist()
    shard = {owners[at]: number % count for number, at in enumerate(order)}
    return Shards(parts=tuple(_part(data, shard, number) for number in range(count)))


def _part(data: Sequence[Dataset], shard: dict[str, int], number: int) -> tuple[Dataset, ...]:
    chosen = [(part, [item for item in part if shard[owner_of(item)] == number]) for part in data]
    return tuple(part.replace(items) for part, items in chosen if items)


def owner_of(item: Item) -> str:
    """What keeps items together: their owner, or the text of one that has none."""
    return f"owner {item.owner}" if item.owner is not None else text_of(item)


def text_of(item: Item) -> str:
    """The item's text without regard to capitals, accents and spaces, so that copies of it are found.

    That is what tokenizers may drop: texts with the same token ids are the same here. A text within a longer one is no
    copy of it; one that is given as ids is compared with others once a model has encoded them (see `plain_ids`).

    >>> one, other = (Fact(prompt=p, answer=a, id="") for p, a in (("Anna is", " a Café"), ("ANNA  is a", " cafe")))
    >>> text_of(one) == text_of(other)
    True
    """
    if isinstance(item, TokenText):
        return f"tokens {item.ids}"
    letters = unicodedata.normalize("NFKD", _text(item)).casefold()
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return "text " + " ".join(plain.split())


def plain_ids(model: Encoder, example: Example) -> tuple[int, ...]:
    """The token ids without added special tokens, so that a copy is found of a text that is given as ids."""
    added = set(model.tokenizer.all_special_ids) - {model.tokenizer.unk_token_id, model.tokenizer.mask_token_id}
    return tuple(token for token in example.ids if token not in added)


def _text(item: Item) -> str:
    if isinstance(item, Fact):
        return item.prompt + item.answer
    if isinstance(item, ContrastPair):
        return f"{item.advantaged}\n{item.disadvantaged}"
    if isinstance(item, PatchPair):
        return f"{item.clean}\n{item.corrupt}\n{item.answer}"
    return str(dataclasses.asdict(item)["text"])

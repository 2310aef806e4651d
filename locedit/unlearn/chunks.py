"""Sequential unlearning: the forget set in chunks, one after another (Jang et al. 2023, arXiv:2210.01504).

Published: forgetting many texts at once harms a model more than the same texts in smaller chunks, each trained from
where the one before ended.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from locedit.components import ComponentSet, Table
from locedit.data.items import Dataset, Item, Task
from locedit.edit.adapter import LowRank
from locedit.edit.edit import Edit, Patch
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.provenance import measure, plain

One = Callable[[Task, ComponentSet | None], Edit]
"""(a chunk's task, where) -> its edit, trained on the model as it is now; it follows the level of the whole forget set
as "everything"."""


def split(data: Dataset, count: int) -> list[Dataset]:
    """`count` data sets of about the same size in the order of the items; the items of an owner stay together.

    An owner's items come where the first of them stands.

    >>> from locedit.data.items import PlainText
    >>> items = [PlainText(text="x", id=str(n), owner=owner) for n, owner in enumerate("abbbca")]
    >>> [[item.id for item in part] for part in split(Dataset(items=tuple(items), source=""), 2)]
    [['0', '5'], ['1', '2', '3', '4']]
    """
    owned: dict[Any, list[Item]] = {}
    for item in data:
        owned.setdefault(item.owner if item.owner is not None else (item.id,), []).append(item)
    if not 1 <= count <= len(owned):
        what = "owners, whose items stay together" if len(owned) < len(data) else "items"
        raise LoceditError(f"chunks={count!r}: {data.source} has {len(owned)} {what}; choose 1 to {len(owned)}")
    groups = list(owned.values())
    parts: list[Dataset] = []
    for left in range(count, 0, -1):
        target = sum(map(len, groups)) / left
        part = groups.pop(0)
        while groups and (left == 1 or (len(groups) >= left and len(part) + len(groups[0]) / 2 <= target)):
            part = part + groups.pop(0)
        parts.append(data.replace(part))
    return parts


def in_chunks(
    model: Model, task: Task, one: One, *, name: str, within: ComponentSet | None, hold: str, options: Any
) -> Edit:
    """Train `options.chunks` chunks inside the same set, each on the model as the one before left it; one edit.

    Its history has the columns of the chunks' histories one after another, and `chunk` from 1. `forget` is the level of
    the whole forget set, `chunk_forget`, and what a stopping rule measured, that of the chunk. A chunk begins with a
    row for the model as it found it, which has the step of the row before.
    """
    edits: list[Edit] = []
    settings = plain(options) | {"hold": hold}
    with measure(name, model=model, data=task, settings=settings, seed=options.seed) as measured, ExitStack() as stack:
        for part in split(task.forget, options.chunks):
            here = None if within is None else model.bind(within)
            edits.append(one(dataclasses.replace(task, forget=part), here))
            stack.enter_context(edits[-1].applied(model))
    return dataclasses.replace(
        edits[0],
        within=within,
        patches=_last_patches(edits),
        adapters=_joined_adapters(edits),
        history=_joined_histories([edit.history for edit in edits]),
        outcome=_joined_outcomes([edit.outcome for edit in edits]),
        provenance=measured.provenance,
    )


def _last_patches(edits: Sequence[Edit]) -> tuple[Patch, ...]:
    """The values that the last chunk ended with, and the sum of the chunks' changes."""
    found: list[Patch] = []
    for patches in zip(*(edit.patches for edit in edits), strict=True):
        deltas: list[Tensor] = [patch.delta for patch in patches if patch.delta is not None]
        delta = torch.stack(deltas).sum(0) if len(deltas) == len(patches) else None
        found.append(dataclasses.replace(patches[-1], delta=delta))
    return tuple(found)


def _joined_adapters(edits: Sequence[Edit]) -> tuple[LowRank, ...]:
    """The chunks' factors side by side: one adapter whose rank is the sum of theirs."""
    return tuple(
        dataclasses.replace(
            pieces[0],
            down=torch.cat([piece.down for piece in pieces]),
            up=torch.cat([piece.up for piece in pieces], dim=1),
        )
        for pieces in zip(*(edit.adapters for edit in edits), strict=True)
    )


def _joined_histories(histories: Sequence[Table]) -> Table:
    names = list(dict.fromkeys(name for history in histories for name in history))
    joined: Table = {name: [] for name in names} | {"chunk": []}
    start = 0
    for number, history in enumerate(histories, start=1):
        rows = len(history["step"])
        for name in names:
            joined[name] += history.get(name, [None] * rows)
        joined["step"][-rows:] = [start + step for step in history["step"]]
        joined["chunk"] += [number] * rows
        start = joined["step"][-1]
    joined["chunk_forget"], joined["forget"] = joined.pop("forget"), joined.pop("everything")
    return joined


def _joined_outcomes(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last chunk's, with the sum of the steps, whether all were reached, and each chunk's own beside them."""
    joined = {name: value for name, value in outcomes[-1].items() if name not in ("front", "chosen")}
    joined |= {"steps": sum(outcome["steps"] for outcome in outcomes), "chunks": [dict(each) for each in outcomes]}
    if "reached" in joined:
        joined["reached"] = all(outcome["reached"] for outcome in outcomes)
    return joined

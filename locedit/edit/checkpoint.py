"""The state of an unfinished training in a file, so that one that was killed goes on and ends with the same edit.

A checkpoint is one safetensors file, written whole or not at all: the tensors, and a JSON text as bytes. Its name holds
a hash of all that decides the result (model, data, loss, options, set, device, versions), so one made from anything
else is never read.
"""

import dataclasses
import functools
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locedit.data.encode import Example, Span
from locedit.edit.objective import Matched, Objective
from locedit.edit.parallel import Processes
from locedit.errors import LoceditError
from locedit.provenance import content_hash, plain
from locedit.storage import read_tensors, write_tensors

JSON = "json"
"""The name of the bytes among the tensors."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where trainings keep their checkpoints."""

    folder: Path
    cost: float = 0.05
    "largest share of the time that goes into writing them; 1 = after every step"
    made_for: str = ""
    "more that decides the results"


_place: ContextVar[Place | None] = ContextVar("checkpoint_place", default=None)


@contextmanager
def checkpoints(folder: str | Path, *, cost: float = 0.05, made_for: str = "") -> Generator[None]:
    """Every training inside the block keeps its state in `folder`, and goes on from what it finds there.

    The folder is removed when the block ends without an exception.
    """
    token = _place.set(Place(folder=Path(folder), cost=cost, made_for=made_for))
    try:
        yield
    finally:
        _place.reset(token)
    if Processes.now().main:
        shutil.rmtree(folder, ignore_errors=True)


def place(folder: str | Path | None) -> Place | None:
    """The given folder, else that of the surrounding `checkpoints`."""
    return _place.get() if folder is None else Place(folder=Path(folder))


class Checkpoint:
    """The checkpoint of one training."""

    def __init__(self, where: Place, name: str, key: Mapping[str, Any]) -> None:
        self.key = content_hash({**key, "made for": where.made_for})
        self.path = where.folder / f"{re.sub(r'[^A-Za-z0-9+.-]', '-', name)}-{self.key}.safetensors"
        self.cost = where.cost
        self._next = 0.0

    def read(self) -> dict[str, Any] | None:
        """The state that was written last; None when there is none."""
        if not self.path.exists():
            return None
        tensors = read_tensors(self.path)
        try:
            return unpack(json.loads(bytes(tensors[JSON].tolist())), tensors)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise LoceditError(f"{self.path}: not a checkpoint ({error!r}); remove it to train afresh") from error

    def write(self, state: Callable[[], dict[str, Any]], *, last: bool = False) -> None:
        """Write the state, unless that would take more than its share of the time; the last one always."""
        start = time.monotonic()
        if not last and start < self._next:
            return
        tensors: dict[str, Tensor] = {}
        text = json.dumps(pack(state(), tensors), ensure_ascii=False, allow_nan=False)
        tensors[JSON] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        write_tensors(self.path, tensors)
        now = time.monotonic()
        self._next = now + (now - start) * (1 / self.cost - 1)


# --- values as JSON and tensors --------------------------------------------------------------------------------------


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value of tensors, numbers, strings, lists, tuples and dictionaries as JSON; its tensors go into `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach()
        return {"tensor": name, "device": str(value.device)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {"dict": [[pack(key, tensors), pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [pack(item, tensors) for item in value]}
    raise LoceditError(
        f"a checkpoint cannot hold {type(value).__name__}: what a loss carries from step to step is tensors, numbers, "
        "strings, lists and dictionaries"
    )


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given."""
    if not isinstance(value, dict):
        return value
    kind = next(iter(value))
    if kind == "tensor":
        return tensors[value["tensor"]].to(value["device"])
    if kind == "float":
        return float(value["float"])
    if kind == "dict":
        return {unpack(key, tensors): unpack(item, tensors) for key, item in value["dict"]}
    items = [unpack(item, tensors) for item in value[kind]]
    return tuple(items) if kind == "tuple" else items


def example_from(value: Mapping[str, Any]) -> Example:
    """What dataclasses.asdict made of an example."""
    parts: dict[str, Any] = dict(value)
    parts["ids"] = tuple(value["ids"])
    parts["spans"] = tuple(Span(**span) for span in value["spans"])
    parts["subject"] = None if value["subject"] is None else Span(**value["subject"])
    return Example(**parts)


# --- what decides a result -------------------------------------------------------------------------------------------


def identity(objective: Objective) -> dict[str, Any]:
    """The objective's data and functions, as JSON values."""
    data: dict[str, Any] = {"forget": _hash(objective.forget), "retain": _hash(objective.retain or ())}
    data |= {f"probe {name}": _hash(examples) for name, examples in objective.probes.items()}
    for name, other in objective.others.items():
        if isinstance(other, Matched):
            rows = (example for key, found in other.candidates.items() for example in (key, *found))
            data[f"other {name}"] = [other.count, _hash(rows)]
        else:
            data[f"other {name}"] = _hash(other)
    return {
        "name": objective.name,
        "data": data,
        "together": objective.together,
        "loss": _named(objective.loss),
        "stop": None if objective.stop is None else _named(objective.stop),
    }


def _hash(examples: Iterable[Example]) -> str:
    return content_hash([[e.id, e.ids, [[s.start, s.end, s.label] for s in e.spans], e.kind] for e in examples])


def _named(function: Any) -> Any:
    """A function's name, with the arguments that a partial has fixed."""
    if isinstance(function, functools.partial):
        fixed = [plain({str(at): value for at, value in enumerate(function.args)}), plain(function.keywords)]
        return [_named(function.func), *fixed]
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}.{kind.__qualname__}"


def examples_as_rows(batches: Sequence[Sequence[Example]]) -> list[list[dict[str, Any]]]:
    """Batches of examples as JSON values."""
    return [[dataclasses.asdict(example) for example in batch] for batch in batches]

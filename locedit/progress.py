"""Progress of long work: library code counts, and whoever wants to show it listens."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")
Listener = Callable[[str, int, int], None]
"(what, done, total)"
_listener: ContextVar[Listener | None] = ContextVar("progress_listener", default=None)


@contextmanager
def listening(listener: Listener) -> Generator[None]:
    """Send every count inside the block to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report(what: str, done: int, total: int) -> None:
    """Say that `done` of `total` steps of `what` are done."""
    if (listener := _listener.get()) is not None:
        listener(what, done, total)


def track(items: Iterable[Item], what: str, *, total: int | None = None) -> Iterator[Item]:
    """Pass items on and count them."""
    size = total if total is not None else len(items)  # type: ignore[arg-type]
    for done, item in enumerate(items):
        report(what, done, size)
        yield item
    report(what, size, size)

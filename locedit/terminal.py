"""What a person at a terminal sees: notes and progress bars on stderr, tables on stdout."""

import logging
import shutil
import sys
import textwrap
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from locedit.progress import listening


def note(message: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


class _Lines(logging.StreamHandler[Any]):
    """Messages as lines on stderr."""


@contextmanager
def showing_messages() -> Generator[None]:
    """What locedit logs inside the block, warnings and what is not a warning, as lines on stderr.

    The handler is the root's, as Python's own of last resort is, so that other libraries' warnings stay visible too.
    A command inside a command (as in the demo) adds none.
    """
    handler, root, own = _Lines(), logging.getLogger(), logging.getLogger("locedit")
    if any(isinstance(other, _Lines) for other in root.handlers):
        yield
        return
    level = own.level
    root.addHandler(handler)
    own.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        own.setLevel(level)


@contextmanager
def showing_progress() -> Generator[None]:
    """Progress bars for everything that counts inside the block; nothing when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done, total=total)
            if done >= total:
                progress.remove_task(bars.pop(what))

        with listening(show):
            yield


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """An aligned table on stdout; the last column wraps to the width of the terminal."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header) - 1)]
    indent = sum(widths) + 2 * len(widths)
    room = max(30, shutil.get_terminal_size((110, 24)).columns - indent)
    for row in [header, *rows]:
        head = "".join(f"{cell!s:<{width + 2}}" for cell, width in zip(row[:-1], widths, strict=True))
        lines = textwrap.wrap(str(row[-1]), room) or [""]
        sys.stdout.write("\n".join([head + lines[0], *(" " * indent + line for line in lines[1:])]) + "\n")

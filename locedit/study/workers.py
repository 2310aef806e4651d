"""Local processes that take the work of a study from its parent, and end when the parent does.

Processes are spawned, never forked: torch's threads do not survive a fork. Every task is a plain value; what a process
needs for it, it loads itself and keeps.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from locedit.errors import LoceditError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Crew:
    """So many processes, started when there is work for them; with one job the work is done here, in order."""

    def __init__(self, *, jobs: int, threads: int) -> None:
        self.jobs, self.threads = jobs, threads
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            _end(self._pool)

    def through(self, tasks: Sequence[Task], do: Callable[[Task], Result]) -> Iterator[tuple[Task, Result]]:
        """`(task, do(task))` as they are done, in any order.

        `do` must not raise. A process that dies (out of memory, killed) is one LoceditError that says so.
        """
        if self.jobs == 1:
            with _threads(self.threads):
                for task in tasks:
                    yield task, do(task)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            given = {"mp_context": context, "initializer": _begin, "initargs": (self.threads,)}
            self._pool = ProcessPoolExecutor(self.jobs, **given)  # type: ignore[arg-type]
        yield from _as_done(self._pool, tasks, do)


def _as_done(
    pool: ProcessPoolExecutor, tasks: Sequence[Task], do: Callable[[Task], Result]
) -> Iterator[tuple[Task, Result]]:
    running: dict[Future[Result], Task] = {pool.submit(do, task): task for task in tasks}
    while running:
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            task = running.pop(future)
            try:
                yield task, future.result()
            except BrokenProcessPool:
                raise LoceditError(
                    "a process of the study died (out of memory, or killed); what is done is kept: the same command "
                    "goes on, with fewer --jobs where memory was short"
                ) from None


def _end(pool: ProcessPoolExecutor) -> None:
    """Stop the pool without waiting for what still runs: every stage is written whole or not at all."""
    processes = list((pool._processes or {}).values())  # pyright: ignore[reportPrivateUsage]
    busy = any(process.is_alive() for process in processes)
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes if busy else ():
        process.terminate()
    for process in processes:
        process.join()


def _begin(threads: int) -> None:
    """Of a worker: its threads, and an end when its parent has gone, killed or not."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


@contextmanager
def _threads(count: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Stages as JSON files, each with a key of what it was made from, so that an interrupted study goes on."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from locedit.provenance import content_hash
from locedit.storage import read_json, write_json


class Stages:
    """The stage files of one folder, each with the key of what it was made from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, key: Any) -> Any | None:
        """A stage's result, or None where it is not there or was made from something else."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        there = read_json(path)
        return there["result"] if there.get("key") == content_hash(key) else None

    def make(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
        """The result of a stage: read, or made and written."""
        if (there := self.get(name, key)) is not None:
            return there
        start = time.perf_counter()
        result = make()
        write_json(self.folder / f"{name}.json", {"key": content_hash(key), "result": result})
        self._note(name, time.perf_counter() - start)
        return read_json(self.folder / f"{name}.json")["result"]

    def _note(self, name: str, seconds: float) -> None:
        path = self.folder / "times.json"
        before = read_json(path) if path.exists() else {}
        write_json(path, before | {name: round(seconds, 3)})

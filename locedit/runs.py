"""A run folder: what each stage made, kept so that any stage can be rerun alone and an interrupted run goes on.

    runs/a/run.json              the model, the data and how they were read
    runs/a/localize/depn/        scores.json, scores.safetensors
    runs/a/components.json       the chosen set
    runs/a/edit/                 edit.json, tensors
    runs/a/comparison/           comparison.json: the edit beside its controls
    runs/a/measures/             evaluation.json: the metrics before and after
    runs/a/attacks/relearn/      attack.json, a folder for every attack
    runs/a/evaluation/           evaluation.json: both together
    runs/a/report.html

Every stage folder has a stage.json that says from what it was made. It appears whole or not at all.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from locedit.errors import LoceditError
from locedit.storage import atomic_folder, dumps, read_json, refuse_overwrite, write_json

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder; it need not exist yet."""

    folder: Path
    force: bool = False

    @property
    def name(self) -> str:
        return self.folder.name or str(self.folder)

    def stage(
        self,
        name: str,
        key: dict[str, Any],
        make: Callable[[], Result],
        *,
        save: Callable[[Result, Path], None],
        load: Callable[[Path], Result],
        on_reuse: Callable[[str], None] = lambda _: None,
    ) -> Result:
        """The result of a stage: loaded where it was made from the same `key` before, else made and saved.

        Raises LoceditError when the folder holds a result made from something else and `force` is off.
        """
        folder = self.folder / name
        if self.has(name, key):
            on_reuse(str(folder))
            return load(folder)
        result = make()
        with atomic_folder(folder, force=True) as temporary:
            save(result, temporary)
            write_json(temporary / "stage.json", read_back(key))
        return result

    def has(self, name: str, key: dict[str, Any]) -> bool:
        """Whether a stage is there, made from the same `key`; one made from another is an error without `force`."""
        folder, wanted = self.folder / name, read_back(key)
        if self.force:
            return False
        if not (folder / "stage.json").exists():
            refuse_overwrite(folder, force=False)
            return False
        if (there := read_json(folder / "stage.json")) == wanted:
            return True
        raise LoceditError(
            f"{folder} was made with other settings ({_difference(there, wanted)}); give --force or another --out"
        )

    def require_same(self, name: str, value: dict[str, Any]) -> None:
        """Raise LoceditError when a JSON file of the run holds another content and `force` is off."""
        path = self.folder / name
        if path.exists() and not self.force and (there := read_json(path)) != (wanted := read_back(value)):
            raise LoceditError(
                f"{path} holds something else ({_difference(there, wanted)}); give --force or another --out"
            )

    def write_once(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file of the run; the same content again is fine, another needs `force`."""
        self.require_same(name, value)
        write_json(self.folder / name, value)


def read_back(value: dict[str, Any]) -> dict[str, Any]:
    """A value as it would come back from its JSON file."""
    return json.loads(dumps(value))


def _difference(there: Any, wanted: Any) -> str:
    """The first key in which two JSON objects differ, with both values."""
    if not isinstance(there, dict) or not isinstance(wanted, dict):
        return "unreadable"
    for key in [*wanted, *there]:
        old, new = there.get(key), wanted.get(key)
        if old != new:
            both = isinstance(old, dict) and isinstance(new, dict)
            return f"{key}: {_difference(old, new)}" if both else f"{key} was {old!r}, is {new!r}"
    return "nothing"

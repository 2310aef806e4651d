"""A run folder: what each stage made, kept so that any stage can be rerun alone and an interrupted run goes on.

    runs/a/run.json              the model, the data and how they were read
    runs/a/localize/depn/        scores.json, scores.safetensors
    runs/a/components.json       the chosen set
    runs/a/edit/                 edit.json, tensors
    runs/a/comparison/           comparison.json: the edit beside its controls
    runs/a/evaluation/           evaluation.json
    runs/a/report.html

Every stage folder has a stage.json that says from what it was made. It appears whole or not at all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from locedit.components import ComponentSet, Scores
from locedit.errors import LoceditError
from locedit.results import Comparison, Evaluation
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
        folder, wanted = self.folder / name, read_back(key)
        if not self.force and (folder / "stage.json").exists():
            if (there := read_json(folder / "stage.json")) == wanted:
                on_reuse(str(folder))
                return load(folder)
            raise LoceditError(
                f"{folder} was made with other settings ({_difference(there, wanted)}); give --force or another --out"
            )
        refuse_overwrite(folder, force=self.force)
        result = make()
        with atomic_folder(folder, force=True) as temporary:
            save(result, temporary)
            write_json(temporary / "stage.json", wanted)
        return result

    def write_once(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file of the run; the same content again is fine, another needs `force`."""
        path = self.folder / name
        if path.exists() and not self.force and (there := read_json(path)) != (wanted := read_back(value)):
            raise LoceditError(
                f"{path} holds something else ({_difference(there, wanted)}); give --force or another --out"
            )
        write_json(path, value)

    def components(self) -> ComponentSet | None:
        path = self.folder / "components.json"
        return ComponentSet.load(path) if path.exists() else None

    def scores(self) -> tuple[Scores, ...]:
        folders = sorted(p.parent for p in self.folder.glob("localize/*/scores.json"))
        return tuple(Scores.load(folder) for folder in folders)

    def evaluation(self) -> Evaluation | None:
        return _load(Evaluation.load, self.folder / "evaluation" / "evaluation.json")

    def comparison(self) -> Comparison | None:
        return _load(Comparison.load, self.folder / "comparison" / "comparison.json")

    def about(self) -> dict[str, Any]:
        """What run.json says; empty when there is none."""
        path = self.folder / "run.json"
        return read_json(path) if path.exists() else {}

    def edit_summary(self) -> dict[str, Any] | None:
        path = self.folder / "edit" / "edit.json"
        return read_json(path) if path.exists() else None


def open_run(folder: str | Path) -> Run:
    """A run folder that exists and holds at least one result."""
    path = Path(folder)
    if not path.is_dir():
        raise LoceditError(f"{folder}: no such run folder")
    known = ("run.json", "components.json", "localize", "edit", "evaluation", "comparison")
    if not any((path / name).exists() for name in known):
        raise LoceditError(f"{folder}: not a run folder; it holds none of {', '.join(known)}")
    return Run(folder=path)


def read_back(value: dict[str, Any]) -> dict[str, Any]:
    """A value as it would come back from its JSON file."""
    import json

    return json.loads(dumps(value))


def _load(load: Callable[[Path], Result], path: Path) -> Result | None:
    if not path.exists():
        return None
    try:
        return load(path)
    except LoceditError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise LoceditError(f"{path}: not a result that locedit wrote ({error!r})") from error


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

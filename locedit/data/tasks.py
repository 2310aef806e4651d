"""A task from a folder, one file, or a TOML that names files."""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locedit.data.fields import parse_fields
from locedit.data.files import SUFFIXES, read_text
from locedit.data.items import ROLES, Dataset, Task
from locedit.data.readers import check_used, read_file
from locedit.errors import LoceditError, nearest

KEYS = (*ROLES, "start", "name", "chat", "fields")
"what a task's TOML may hold"


def read_task(path: str | Path, fields: Mapping[str, str] | str | None = None) -> Task:
    """A task from a folder (forget.jsonl, retain.jsonl, ...; task.toml names others), a TOML, or one file to forget."""
    path = Path(path)
    if path.is_dir():
        return _from_folder(path, parse_fields(fields))
    if path.suffix == ".toml":
        return _from_parts(path.parent, _toml(path), parse_fields(fields), name=path.stem, source=path)
    return _from_parts(Path(), {"forget": str(path)}, parse_fields(fields), name=path.stem, source=path)


def _from_folder(folder: Path, renames: dict[str, str]) -> Task:
    parts = {role: file.name for role in ROLES if (file := _role_file(folder, role)) is not None}
    parts |= _start(folder)
    toml = folder / "task.toml"
    if toml.exists():
        parts |= _toml(toml)
    if "forget" not in parts:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise LoceditError(
            f"{folder}: a task needs forget.jsonl (or a task.toml that names it), the folder has {found}"
        )
    _check_names(folder, parts)
    return _from_parts(folder, parts, renames, name=folder.resolve().name, source=folder)


def _role_file(folder: Path, role: str) -> Path | None:
    files = [file for suffix in SUFFIXES if (file := folder / f"{role}{suffix}").exists()]
    if len(files) > 1:
        raise LoceditError(f"{folder}: two files for {role!r}: {files[0].name} and {files[1].name}; keep one")
    return files[0] if files else None


def _start(folder: Path) -> dict[str, str]:
    """`start` is a model folder, or a file whose text is a folder or hub id."""
    start = folder / "start"
    if start.is_dir():
        return {"start": "start"}
    return {"start": read_text(start).strip()} if start.exists() else {}


def _check_names(folder: Path, parts: Mapping[str, Any]) -> None:
    """A file whose name is nearly that of a missing part is a slip, not something to pass over."""
    missing = [role for role in ROLES if role not in parts]
    for file in sorted(folder.iterdir()):
        close = difflib.get_close_matches(file.stem, missing, n=1, cutoff=0.8)
        if close and file.suffix in SUFFIXES and file.stem not in ROLES and file.name not in parts.values():
            raise LoceditError(f"{folder}: unknown file {file.name!r}: did you mean {close[0] + file.suffix!r}?")


def _toml(path: Path) -> dict[str, Any]:
    try:
        parts = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise LoceditError(f"{path}: not TOML: {error}") from None
    for key, value in parts.items():
        if key not in KEYS:
            raise LoceditError(f"{path}: unknown key {key!r}: {nearest(key, KEYS)}")
        if not isinstance(value, dict if key == "fields" else str):
            raise LoceditError(f"{path}: key {key!r}: {value!r} is not a {'table' if key == 'fields' else 'text'}")
    if path.name != "task.toml" and "forget" not in parts:
        raise LoceditError(f"{path}: key 'forget' is missing; it has {', '.join(parts) or 'nothing'}")
    return parts


def _from_parts(folder: Path, parts: Mapping[str, Any], renames: dict[str, str], *, name: str, source: Path) -> Task:
    """Read every file that is named; foreign field names must occur in at least one of them."""
    renames = parse_fields(parts.get("fields")) | renames
    used: set[str] = set()
    data: dict[str, Dataset] = {}
    for role in ROLES:
        if role in parts:
            data[role], seen = read_file(folder / parts[role], renames, plain_lines=role == "refusals")
            used |= seen
    check_used(renames, used, source=str(source))
    start = parts.get("start")
    if start is not None and (folder / start).exists():
        start = str(folder / start)
    task = Task(**data, start=start, name=parts.get("name", name))
    return task.with_chat(parts["chat"]) if "chat" in parts else task

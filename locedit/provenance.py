"""Where a result comes from: model, data, method, settings, versions, time and memory."""

import dataclasses
import hashlib
import json
import platform
import resource
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("locedit", "torch", "transformers", "transformer-lens", "captum", "peft", "numpy", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The record that every result carries and that suffices to make it again."""

    method: str
    "name in the registry, or of the step"
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    "every option as used, defaults included; JSON values only"
    model: str = ""
    "fingerprint of the model"
    model_name: str = ""
    "the path or hub id that the user gave"
    data: str = ""
    "hash of the data"
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict[str, str])
    "package -> version, python among them"
    device: str = ""
    "device and dtype"
    seconds: float = 0.0
    "wall time"
    peak_memory_mb: float = 0.0
    "on a GPU the peak allocated during the step; on a CPU the peak resident size of the process so far"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> "Provenance | None":
        if value is None:
            return None
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{key: item for key, item in value.items() if key in names})


@dataclass
class Measurement:
    """Filled by `measure`; `provenance` is complete when the block has ended."""

    provenance: Provenance


@contextmanager
def measure(
    method: str, *, model: Any = None, data: Any = None, settings: Any = None, seed: int | None = None
) -> Generator[Measurement]:
    """Time a block and note what went into it.

    `model` is a Model (fingerprint, name, device, dtype), `data` has `.hash`, `settings` is a dataclass or a mapping.
    """
    device = getattr(model, "device", torch.device("cpu"))
    made = Measurement(
        Provenance(
            method=method,
            settings=plain(settings),
            model=getattr(model, "fingerprint", ""),
            model_name=str(getattr(model, "name", "")),
            data=getattr(data, "hash", ""),
            seed=seed,
            versions=versions(),
            device=f"{device} {getattr(model, 'dtype', '')}".strip(),
        )
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    try:
        yield made
    finally:
        made.provenance = dataclasses.replace(
            made.provenance,
            seconds=round(time.perf_counter() - start, 3),
            peak_memory_mb=round(peak_memory_mb(device), 1),
        )


def plain(settings: Any) -> dict[str, Any]:
    """A dataclass or mapping of options as JSON values."""
    if settings is None:
        return {}
    given: Mapping[str, Any] = settings if isinstance(settings, Mapping) else _fields(settings)
    return {str(key): _plain_value(value) for key, value in given.items()}


def _fields(options: Any) -> dict[str, Any]:
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}


def _plain_value(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain_value(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(value)
    if callable(value):
        kind: Any = value if hasattr(value, "__qualname__") else type(value)
        return f"{kind.__module__}:{kind.__qualname__}"  # its str has an address, another one in each process
    return str(value)


def versions() -> dict[str, str]:
    """Versions of python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: allocated on the GPU, else the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def named_files(options: Mapping[str, Any]) -> dict[str, str]:
    """Option -> hash of the content of the file that it names, for those that name one: it decides a result too.

    Of a folder, such as a model's, the names, sizes and times of its files; of several files one hash of them all.
    """
    found: dict[str, str] = {}
    for name, value in options.items():
        parts = list(value) if isinstance(value, list | tuple) else [value]
        hashes = [_content(Path(part).expanduser()) for part in parts if _may_be_path(part)]
        if any(hashes):
            found[name] = hashes[0] if len(parts) == 1 else content_hash(hashes)
    return found


def _may_be_path(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) < 1000


def _content(path: Path) -> str:
    """A hash of a file's bytes or a folder's listing; empty where there is neither."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return content_hash(_listing(path)) if path.is_dir() else ""


def _listing(folder: Path) -> list[list[Any]]:
    """Name, size and time of every file in a folder, not of those in its folders."""
    found = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


def content_hash(value: Any) -> str:
    """16 hexadecimal digits over a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

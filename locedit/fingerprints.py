"""One short name for the exact weights of a model: the same weights, from a folder or built, have the same name.

The fingerprint is the SHA-256 of every parameter's name, dtype, shape and bytes, in the order of the names; tied
parameters count once. Hashing takes about a second a gigabyte, so a parameter's digest is kept until the parameter
changes, and for a checkpoint folder also on disk, until one of its files changes in size or time.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from locedit.errors import LoceditError
from locedit.storage import cache_folder, read_json, write_json

CHECKPOINT_FILES = ("*.safetensors", "*.bin", "*.json")
PROBES = 64


class Fingerprint:
    """The digests of a module's parameters, each renewed when its parameter changes."""

    def __init__(self, module: nn.Module, *, folder: Path | None = None) -> None:
        self._module = module
        self._cache = None if folder is None else _cache_file(folder, module)
        self._loaded = {} if folder is None else {name: state_of(p) for name, p in module.named_parameters()}
        "states in which the parameters came from the folder: only those may use digests on disk"
        self._known: dict[str, tuple[Any, str]] = {}

    def value(self) -> str:
        """64 hexadecimal digits for the weights as they are now.

        A change shows in a parameter's version counter, its storage, or one of 64 of its numbers spread evenly.
        """
        stored = _read(self._cache) if not self._known else {}
        for name, parameter in self._module.named_parameters():
            state = state_of(parameter)
            if self._known.get(name, (None, ""))[0] == state:
                continue
            saved = stored.get(name) if self._loaded.get(name) == state else None
            self._known[name] = (state, saved or self._digest(name, parameter))
        self._save(stored)
        digests = {_plain(name): self._known[name][1] for name, _ in self._module.named_parameters()}
        return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()

    def _digest(self, name: str, parameter: nn.Parameter) -> str:
        """The digest of a parameter, fetched when it is offloaded to the CPU or to disk."""
        if not parameter.is_meta:
            return digest(parameter)
        from accelerate.utils import align_module_device

        path, _, last = name.rpartition(".")
        module = self._module.get_submodule(path)
        with align_module_device(module, execution_device=torch.device("cpu")):
            return digest(getattr(module, last))

    def _save(self, stored: dict[str, str]) -> None:
        """Keep the digests on disk when every parameter is as it was loaded."""
        if self._cache is None or stored.keys() == self._loaded.keys() or self._cache.exists():
            return
        if all(self._known[name][0] == state for name, state in self._loaded.items()):
            try:
                write_json(self._cache, {name: self._known[name][1] for name in self._loaded})
            except LoceditError:  # a full disk or a read-only home must not stop the work
                return


def fingerprint_of(module: nn.Module) -> str:
    """The fingerprint of a module's weights as they are now, hashed afresh."""
    return Fingerprint(module).value()


def digest(parameter: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, read one block at a time."""
    flat = parameter.detach().reshape(-1)
    whole = hashlib.sha256(f"{parameter.dtype}{tuple(parameter.shape)}".encode())
    for block in flat.split(1 << 24):
        data: Any = block.cpu().contiguous().view(torch.uint8).numpy()
        whole.update(data)
    return whole.hexdigest()


def _plain(name: str) -> str:
    """The name that the parameter has without PEFT's wrapper."""
    return name.replace(".base_layer.", ".")


def state_of(parameter: nn.Parameter) -> Any:
    """What tells a changed parameter from an unchanged one without reading all of it."""
    flat = parameter.detach().reshape(-1)
    if flat.is_meta:
        return (id(parameter), parameter.dtype)
    step = max(1, flat.numel() // PROBES)
    probe = flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes()
    version = 0 if parameter.is_inference() else parameter._version
    return (parameter.data_ptr(), parameter.dtype, version, probe)


def _cache_file(folder: Path, module: nn.Module) -> Path:
    """Where the digests of this folder's checkpoint, loaded in this dtype, are kept."""
    files = sorted(path for pattern in CHECKPOINT_FILES for path in folder.glob(pattern))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    dtypes = sorted({str(p.dtype) for p in module.parameters()})
    key = json.dumps([str(folder.resolve()), stats, dtypes])
    return cache_folder() / "fingerprints" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _read(cache: Path | None) -> dict[str, str]:
    if cache is None or not cache.exists():
        return {}
    try:
        return dict(read_json(cache))
    except (LoceditError, TypeError, ValueError):
        return {}

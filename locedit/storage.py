"""Files on disk: JSON and safetensors, written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from locedit.errors import LoceditError


@contextmanager
def atomic_file(path: str | Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` only when the block ends well."""
    target = Path(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        temporary = Path(name)
        os.close(handle)
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise _cannot_write(target, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, *, force: bool = False) -> Generator[Path]:
    """Yield a temporary folder beside `path`; it becomes `path` only when the block ends well.

    Raises LoceditError when `path` exists, is not an empty folder, and `force` is off.
    """
    target = Path(path)
    refuse_overwrite(target, force=force)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        _replace_folder(temporary, target)
    except shutil.Error as error:  # of a copied folder: one entry a file, with the reason last
        raise _cannot_write(target, OSError(error.args[0][0][-1])) from error
    except OSError as error:
        raise _cannot_write(target, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(new: Path, target: Path) -> None:
    """Put `new` at `target`; a folder that was there is moved aside first and removed last."""
    if not target.exists():
        os.replace(new, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.replace(target, aside / target.name)
    os.replace(new, target)
    shutil.rmtree(aside, ignore_errors=True)


def refuse_overwrite(path: str | Path, *, force: bool = False) -> None:
    """Raise LoceditError when `path` holds something already, unless `force`."""
    target = Path(path)
    if force or not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    raise LoceditError(f"{target} exists already; give --force to replace it, or another --out")


def require_folder(path: str | Path) -> None:
    """Raise LoceditError when `path` is not, and cannot become, a folder that can be written to."""
    if not str(path):
        raise LoceditError("--out '' names no folder")
    there = next(place for place in (Path(path), *Path(path).absolute().parents) if place.exists())
    if not there.is_dir():
        raise LoceditError(f"{there} is a file; --out {str(path)!r} needs a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise LoceditError(f"{there}: cannot be written; give another --out")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON; lists of numbers stay on one line. NaN is refused."""
    write_text(path, dumps(value) + "\n")


def dumps(value: Any, indent: int = 0) -> str:
    """JSON text, with every dictionary on lines of its own and lists of plain values on one line.

    >>> print(dumps({"a": [1, 2], "b": {"c": "x"}}))
    {
     "a": [1, 2],
     "b": {
      "c": "x"
     }
    }
    """
    pad = " " * (indent + 1)
    if isinstance(value, Mapping) and value:
        rows = [
            f"{pad}{json.dumps(str(key), ensure_ascii=False)}: {dumps(item, indent + 1)}" for key, item in value.items()
        ]
        return "{\n" + ",\n".join(rows) + "\n" + " " * indent + "}"
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        return "[\n" + ",\n".join(pad + dumps(item, indent + 1) for item in value) + "\n" + " " * indent + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one is a LoceditError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoceditError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoceditError(f"{path}: not a JSON file ({error})") from error
    except OSError as error:
        raise LoceditError(f"{path}: cannot be read ({error.strerror})") from error


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically; they are moved to the CPU and made contiguous."""
    from safetensors.torch import save

    data = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file; a missing or broken one is a LoceditError that names it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except FileNotFoundError as error:
        raise LoceditError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise LoceditError(f"{path}: not a safetensors file ({error})") from error


def cache_folder() -> Path:
    """The user's cache for locedit: $LOCEDIT_CACHE, else $XDG_CACHE_HOME/locedit, else ~/.cache/locedit."""
    if own := os.environ.get("LOCEDIT_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "locedit"


def _cannot_write(target: Path, error: OSError) -> LoceditError:
    return LoceditError(f"{target}: cannot be written ({error.strerror or error}); nothing was left half-written")


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value

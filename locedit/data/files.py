"""Text files: there, readable, UTF-8 and not empty."""

from pathlib import Path

from locedit.errors import LoceditError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".npy")
"the kinds of data file"


def read_text(path: Path) -> str:
    """A file's text, which must be UTF-8 and not empty; a byte order mark is left out."""
    check_exists(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LoceditError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte {content[error.start]:#04x} at offset {error.start}"
        raise LoceditError(f"{path}:{line}: {byte} is not UTF-8: save the file as UTF-8") from None
    if not text.strip():
        raise LoceditError(f"{path}: is empty")
    return text


def check_exists(path: Path) -> None:
    if path.is_dir():
        raise LoceditError(f"{path}: is a folder; a file was wanted (as data a folder is a task)")
    if not path.exists():
        beside = sorted(file.name for file in path.parent.glob("*") if file.suffix in SUFFIXES)[:8]
        around = f"; beside it: {', '.join(beside)}" if beside else ""
        raise LoceditError(f"{path}: no such file{around}")

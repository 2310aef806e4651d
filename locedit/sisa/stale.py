"""What a record's folder holds that is not of its members: the members before a deletion, and what a kill has left."""

import shutil
from pathlib import Path

from locedit.sisa.record import Record
from locedit.sisa.training import UNFINISHED, checkpoint_folder

CHECK = ".verify-"
"""How the folders begin in which `verify` trains."""
HALF_WRITTEN = (".record.json.*", ".within.json.*", ".verified.json.*", ".certificate-*")


def stale(folder: Path, record: Record) -> list[Path]:
    """Checkpoints and half-trained slices of anything but what the record holds now, half-written ones too."""
    kept = {checkpoint_folder(folder, record, *place) for place in record.places}
    kept |= {folder / UNFINISHED / record.key(*place) for place in record.places}
    there = [*folder.glob("shard-*/*slice-*"), *(folder / UNFINISHED).glob("*")]
    return sorted(path for path in there if path not in kept)


def remove_stale(folder: Path, record: Record) -> None:
    """Remove those, and what is left of anything that was stopped while it wrote or checked."""
    remove_checks(folder)
    remove_half_written(folder)
    for path in stale(folder, record):
        _remove(path)


def remove_checks(folder: Path) -> None:
    """Remove the members that a stopped `verify` has left."""
    for path in folder.glob(f"{CHECK}*"):
        _remove(path)


def remove_half_written(folder: Path) -> None:
    """Remove temporary files of the record and of what stands beside it."""
    for pattern in HALF_WRITTEN:
        for path in folder.glob(pattern):
            _remove(path)


def set_results_aside(folder: Path, request: int) -> None:
    """What was found of the members before a request is not of those after it: an evaluation gets another name."""
    (folder / "verified.json").unlink(missing_ok=True)
    evaluation, aside = folder / "evaluation", folder / f"evaluation-before-request-{request}"
    if evaluation.exists():
        shutil.rmtree(aside, ignore_errors=True)
        evaluation.rename(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

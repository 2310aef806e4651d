"""Worlds with a small model of their own, beside the three that one model learns together."""

from pathlib import Path
from typing import Protocol

from locedit.errors import LoceditError, nearest
from locedit.lab import groups, habit
from locedit.lab.architectures import ARCHITECTURES
from locedit.lab.training import Progress
from locedit.storage import atomic_folder

VERSION = 1
"""To be raised whenever one of these worlds or its models come out differently from the same seed."""


class Make(Protocol):
    """Writes model/, start/ (the model before the world's data), <world>/ and lab.json into a folder."""

    def __call__(self, folder: Path, *, arch: str, seed: int, progress: Progress) -> None: ...


SEPARATE: dict[str, Make] = {"groups": groups.make, "habit": habit.make}
"""World -> what makes it; each has one size: two layers of width 64."""


def check_separate(world: str, *, arch: str, size: str, contexts: bool) -> None:
    """Raise LoceditError for an architecture, a size or a training text that these worlds do not come with."""
    if arch not in ARCHITECTURES or arch == "bert":
        raise LoceditError(f"arch: the world {world!r} has a causal model, not {arch!r}; {nearest(arch, CAUSAL)}")
    if size != "small":
        raise LoceditError(f"size={size!r}: the world {world!r} has one size; leave it out")
    if contexts:
        raise LoceditError(f"contexts: the world {world!r} is read in single texts; leave it out")


CAUSAL = tuple(name for name in ARCHITECTURES if name != "bert")


def separate_folder(world: str, *, arch: str, seed: int) -> str:
    """Name of the world's folder in the cache."""
    return f"lab-{world}-{arch}-{seed}-v{VERSION}"


def make_separate(world: str, folder: Path, *, arch: str, seed: int, progress: Progress) -> None:
    """Make a world and its models, whole or not at all."""
    with atomic_folder(folder, force=True) as temporary:
        SEPARATE[world](temporary, arch=arch, seed=seed, progress=progress)

"""The whole flow on a lab model, as the commands that a user would type; each is shown before it runs."""

import shlex
import time
from pathlib import Path

from locedit.cli import parse_arguments
from locedit.terminal import note


def demo(out: str | Path, *, arch: str = "gpt2", seed: int = 0, force: bool = False) -> Path:
    """Train the lab model (cached), find, edit, compare, attack and report; returns the page.

    Every step keeps its result in `out`, so an interrupted demo goes on where it stopped.
    """
    from locedit.commands import run

    folder = Path(out)
    start = time.perf_counter()
    for words in commands(folder, arch=arch, seed=seed):
        if force and words[0] != "methods":
            words = [*words, "--force"]
        note(f"\n$ locedit {shlex.join(words)}")
        run(parse_arguments(words))
    note(f"\nthe demo took {time.perf_counter() - start:.0f} s")
    return folder / "report.html"


WORLDS = {
    "private": (["--where", "group=x10,group=x20,group=x50"], "20"),
    "facts": (["--where", "format=statement"], "5"),
}
"""World -> which of its forget items to localize and edit on, and the weight of the retain data in NPO."""

METHODS = {
    "zero": [],
    "npo": ["--until", "0.1", "--learning-rate", "3e-3", "--batch-size", "24", "--steps", "80", "--eval-every", "5"],
}


def commands(folder: Path, *, arch: str, seed: int) -> list[list[str]]:
    """The command lines of the demo."""
    lab = folder / "lab"
    lines = [["lab", "--arch", arch, "--seed", str(seed), "--out", str(lab)]]
    runs: list[str] = []
    for world in WORLDS:
        for method in METHODS:
            runs.append(str(folder / f"{world}-{method}"))
            lines += _one_run(lab, world, method, runs[-1])
    return [*lines, ["report", *runs, "--out", str(folder / "report.html"), "--force"]]


def _one_run(lab: Path, world: str, method: str, out: str) -> list[list[str]]:
    """Find 100 neurons, edit inside them beside three random sets, evaluate and attack."""
    model_and_data = [str(lab / "model"), str(lab / world), *WORLDS[world][0]]
    options = METHODS[method] and [*METHODS[method], "--retain-weight", WORLDS[world][1]]
    within = ["--within", f"{out}/components.json"]
    return [
        ["localize", *model_and_data, "--method", "depn", "--top", "100", "--out", out],
        ["edit", *model_and_data, *within, "--method", method, *options, "--controls", "3", "--out", out],
        ["evaluate", *model_and_data, "--edit", f"{out}/edit", "--attacks", "relearn", "--out", out],
    ]

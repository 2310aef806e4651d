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
        note(f"\n[{time.perf_counter() - start:.0f} s] $ locedit {shlex.join(words)}")
        run(parse_arguments(words))
    note(f"\nthe demo took {time.perf_counter() - start:.0f} s")
    return folder / "report.html"


WHERE = {"private": "group=x10,group=x20,group=x50", "facts": "format=statement"}
"""World -> the forget items to work on: secrets repeated often enough to be memorised, facts in one format."""
NPO = ["--batch-size", "32", "--steps", "100", "--eval-every", "5"]
METHODS = {
    "private": {"zero": [], "npo": [*NPO, "--until", "0.1", "--learning-rate", "3e-3", "--retain-weight", "20"]},
    "facts": {"zero": [], "npo": [*NPO, "--until", "0.25", "--learning-rate", "1e-2", "--retain-weight", "5"]},
}
"""World -> methods with their options; training stops where the answer is as unlikely as one never learned."""


def commands(folder: Path, *, arch: str, seed: int) -> list[list[str]]:
    """The command lines of the demo."""
    lab = folder / "lab"
    lines = [["lab", "--arch", arch, "--seed", str(seed), "--out", str(lab)]]
    runs: list[str] = []
    for world, methods in METHODS.items():
        for method, options in methods.items():
            runs.append(str(folder / f"{world}-{method}"))
            lines += _one_run(lab, world, [method, *options], runs[-1])
    return [*lines, ["report", *runs, "--out", str(folder / "report.html"), "--force"]]


def _one_run(lab: Path, world: str, method: list[str], out: str) -> list[list[str]]:
    """Find 100 neurons, edit inside them beside three random sets, evaluate and attack.

    Facts are evaluated in all their formats, so that the page says whether the edit of one format carries over.
    """
    everything = [str(lab / "model"), str(lab / world)]
    what = [*everything, "--where", WHERE[world]]
    within = ["--within", f"{out}/components.json"]
    measured = everything if world == "facts" else what
    return [
        ["localize", *what, "--method", "depn", "--top", "100", "--out", out],
        ["edit", *what, *within, "--method", *method, "--controls", "3", "--out", out],
        ["evaluate", *measured, "--edit", f"{out}/edit", "--attacks", "relearn", "--out", out],
    ]

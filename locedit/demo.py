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


def commands(folder: Path, *, arch: str, seed: int) -> list[list[str]]:
    """The command lines of the demo."""
    lab = folder / "lab"
    lines = [["lab", "--arch", arch, "--seed", str(seed), "--out", str(lab)]]
    runs: list[str] = []
    for world, where in (("private", None), ("facts", "format=statement")):
        for method in ("zero", "npo"):
            runs.append(str(folder / f"{world}-{method}"))
            lines += _one_run(str(lab / "model"), str(lab / world), method, runs[-1], where)
    return [*lines, ["report", *runs, "--out", str(folder / "report.html"), "--force"]]


def _one_run(model: str, data: str, method: str, out: str, where: str | None) -> list[list[str]]:
    chosen = ["--where", where] if where else []
    return [
        ["localize", model, data, *chosen, "--method", "depn", "--top", "50", "--out", out],
        [
            "edit",
            model,
            data,
            *chosen,
            "--within",
            f"{out}/components.json",
            "--method",
            method,
            "--controls",
            "3",
            "--out",
            out,
        ],
        ["evaluate", model, data, "--edit", f"{out}/edit", "--attacks", "relearn", "--out", out],
    ]

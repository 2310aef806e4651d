"""The README's table of methods, from the registries. `python -m tests.readme` writes it; a test keeps it true."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locedit.evaluate import METRICS
from locedit.registries import attacks, localizers, unlearning

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- methods: written by `python -m tests.readme` -->", "<!-- end -->"


def methods_table() -> str:
    """Localizers, methods, attacks and metrics by name, each group in one row."""
    groups: dict[str, Mapping[str, Any]] = {
        "localizers": localizers(),
        "edits and unlearning": unlearning(),
        "attacks": attacks(),
        "metrics": METRICS,
    }
    rows = [f"| {group} | {' '.join(f'`{name}`' for name in entries)} |" for group, entries in groups.items()]
    return "\n".join(["| | names |", "|---|---|", *rows])


def current() -> str:
    """The table as it stands in the README."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(START) + len(START) : text.index(END)].strip()


if __name__ == "__main__":
    whole = README.read_text(encoding="utf-8")
    head, tail = whole[: whole.index(START) + len(START)], whole[whole.index(END) :]
    README.write_text(f"{head}\n{methods_table()}\n{tail}", encoding="utf-8")

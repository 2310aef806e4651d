"""`locedit grade`: grade localizers on labs, keep every step, print the tables."""

import argparse
import sys
from pathlib import Path

from locedit.errors import LoceditError
from locedit.options import parse
from locedit.storage import write_text
from locedit.terminal import note


def grade_command(args: argparse.Namespace) -> None:
    """Run or go on, print, and write grades.json and grades.html; both are made anew from the steps each time."""
    from locedit.grading import GradeOptions, grade, parts_of, seeds_of

    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise LoceditError(f"{folder} is a file; --out needs a folder")
    grades = grade(
        args.arch,
        seeds=seeds_of(args.seeds),
        methods=args.methods,
        parts=parts_of(args.parts),
        size=args.size,
        out=folder,
        force=args.force,
        **parse(GradeOptions, args.extra, method="grade"),
    )
    sys.stdout.write(str(grades))
    grades.save(folder / "grades.json")
    write_text(folder / "grades.html", grades.html())
    note(f"{folder / 'grades.json'} has every number, {folder / 'grades.html'} the page")

"""`locedit check`, `lab` and `demo`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from locedit.commands.inputs import read_data, read_model, reused
from locedit.errors import LoceditError
from locedit.storage import read_json, require_folder
from locedit.terminal import note


def lab_command(args: argparse.Namespace) -> None:
    """A world and its model, as files; what can be wrong is said before anything is trained."""
    from locedit.lab import write_lab
    from locedit.lab.making import check_world
    from locedit.lab.recipe import recipe_for
    from locedit.lab.separate import SEPARATE, check_separate

    options: dict[str, Any] = {"arch": args.arch, "size": args.size, "seed": args.seed, "contexts": args.contexts}
    check_world(args.world)
    require_folder(args.out)
    if args.world in SEPARATE:
        check_separate(args.world, arch=args.arch, size=args.size, contexts=args.contexts)
        write_lab(args.out, world=args.world, force=args.force, **options)
        return note(f"{args.out}: model/, start/ (the model before the data) and the task {args.world}/")
    key, there = recipe_for(**options).key, Path(args.out) / "lab.json"
    complete = not args.start or (Path(args.out) / "start").exists()
    if there.exists() and complete and not args.force and read_json(there).get("key") == key:
        return reused(args.out)
    options["start"] = args.start
    made = write_lab(args.out, world=args.world, force=args.force, **options)
    before = ", start/ (the model before the data)" if args.start else ""
    note(f"{args.out}: model/{before} and the tasks facts/, private/ and bias/")
    known = ", ".join(f"{name} {share:.3f}" for name, share in made.report["facts"]["forget"].items())
    note(f"facts that the model answers, by format: {known}")
    odds = made.report["association"]["statement"]
    return note(
        f"pronouns, planted against measured log-odds: correlation {odds['correlation']:.3f}, slope {odds['slope']:.3f}"
    )


def check_command(args: argparse.Namespace) -> None:
    """What the model knows of the data and what can be done with it."""
    from locedit.check import check

    task = read_data(args)
    model = read_model(args)
    for line in check(model, task):
        sys.stdout.write(line + "\n")


def demo_command(args: argparse.Namespace) -> None:
    """The whole flow on a lab model."""
    from locedit.demo import demo

    if args.extra:
        raise LoceditError(f"demo has no option --{next(iter(args.extra))}")
    page = demo(args.out, arch=args.arch, seed=args.seed, force=args.force)
    note(f"the report is {page}; open it in a browser")

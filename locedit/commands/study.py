"""`locedit study`: run or go on with a study, print its table, write its page."""

import argparse
import sys
from pathlib import Path

from locedit.errors import LoceditError
from locedit.terminal import note


def study_command(args: argparse.Namespace) -> None:
    """Check everything, run what is not there yet, print; an error at the end where cells failed."""
    from locedit.study import make_plan, read_config, run_plan

    out = Path(args.out or Path("runs") / Path(args.study).stem)
    plan = make_plan(read_config(args.study))
    if args.dry_run:
        from locedit.study.estimate import describe

        for line in describe(plan, out, jobs=args.jobs):
            sys.stdout.write(f"{line}\n")
        return
    note(f"{plan.config.name}: {len(plan.cells)} edits, {args.jobs} job{'s' * (args.jobs > 1)}, kept in {out}")
    found = run_plan(plan, out, jobs=args.jobs, say=note)
    sys.stdout.write(str(found))
    note(f"{out / 'report.html'} is the page, {out / 'table.csv'} every number, {out / 'study.json'} every edit")
    if found.failed:
        first = found.failed[0]
        raise LoceditError(
            f"{len(found.failed)} of {len(found.records)} edits failed, the first: {first.method}, "
            f"{first.restriction}, seed {first.seed}: {first.note}; the same command tries them again"
        )

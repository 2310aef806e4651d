"""`locedit spans`: choose what of each text is to be forgotten, and write it as a file of private texts."""

import argparse
import sys
from pathlib import Path

from locedit import loading
from locedit.commands.inputs import read_data, read_model
from locedit.errors import LoceditError
from locedit.options import parse
from locedit.storage import refuse_overwrite, require_folder
from locedit.terminal import note, table


def spans_command(args: argparse.Namespace) -> None:
    """Find, verify, report what is rejected, write; what can be wrong is checked before a model is loaded."""
    from locedit.spans import Verification, check_models, check_rule, find_spans, rest, rule_named, write_spans

    options = parse(rule_named(args.rule).options, args.extra, method=args.rule)
    chosen = check_rule(args.rule, options)
    check = Verification(by=args.verify, factor=args.factor) if args.verify else None
    given = {"model": args.model, "scorer": args.scorer, "annotator": args.annotator}
    check_models(args.rule, check, chosen, given)
    if args.rest and args.model is None:
        raise LoceditError("--rest needs a model: its tokens say what is outside the spans; give MODEL before DATA")
    if args.rest is not None and Path(args.rest).resolve() == Path(args.out).resolve():
        raise LoceditError(f"--rest {args.rest!r} is the file of --out; give each its own")
    for path in (args.out, args.rest):
        if path is not None:
            require_folder(Path(path).parent)
            refuse_overwrite(path, force=args.force)
    for source in (args.scorer, args.annotator):
        if source not in (None, "start"):
            loading.check(source)
    task = read_data(args)
    model = read_model(args) if args.model else None
    found = find_spans(
        task, args.rule, model=model, scorer=args.scorer, annotator=args.annotator, verify=check, **options
    )
    if found.rejected:
        sys.stdout.write("rejected:\n")
        table(("text", "label", "piece", "reason"), [(r.id, r.label, r.text, r.reason) for r in found.rejected])
    found.save(args.out, force=args.force)
    note(f"{args.out}: {found}")
    if args.rest and model is not None:
        others = rest(found.data, model)
        write_spans(args.rest, others, force=args.force)
        note(f"{args.rest}: the rest of {len(others)} texts, to be kept as retain data")

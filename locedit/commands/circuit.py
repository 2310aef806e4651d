"""`locedit circuit`: how well the best components carry what is measured, and the file of the MIB circuit track."""

import argparse
from pathlib import Path

from locedit.commands.inputs import read_data, read_model
from locedit.components import ComponentSet, Scores
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.options import parse
from locedit.storage import refuse_overwrite
from locedit.terminal import note, table


def circuit_command(args: argparse.Namespace) -> None:
    """Print the faithfulness curve when there is data, write the file when one is named."""
    from locedit.circuits import export_mib
    from locedit.faithfulness import FaithfulnessOptions, faithfulness

    if args.data is None and args.mib is None:
        raise LoceditError("nothing to do: give DATA to measure faithfulness, or --mib FILE to write the scores")
    settings = FaithfulnessOptions(**parse(FaithfulnessOptions, args.extra, method="circuit"))
    if args.mib:
        refuse_overwrite(args.mib, force=args.force)
    model = read_model(args)
    scores = _read_scores(args.scores, model)
    if args.data is not None:
        found = faithfulness(model, read_data(args), scores, settings)
        rows = zip(found.shares, found.counts, found.metrics, found.values, strict=True)
        table(
            ("share", "components", "metric", "faithfulness"),
            [(f"{share:.1%}", f"{count:,}", f"{value:.4g}", f"{f:.3f}") for share, count, value, f in rows],
        )
        note(str(found))
    if args.mib:
        export_mib(scores, model, args.mib, chosen=_chosen(args.scores))
        edges = f"{len(scores.edges):,} edges" if scores.edges is not None else "no edges"
        note(f"{args.mib}: {len(scores):,} scores and {edges} in the form of the MIB circuit track")


def _read_scores(path: str, model: Model) -> Scores:
    """From a folder of a run, or from an importances.json."""
    from locedit.circuits import import_mib

    if Path(path).suffix == ".json":
        return import_mib(path, model)
    scores = Scores.load(path)
    if scores.fingerprint and scores.fingerprint != model.fingerprint:
        raise LoceditError(f"{path}: these scores are of another model than {model.name}")
    return scores


def _chosen(path: str) -> ComponentSet | None:
    """The set that was chosen by the scores, where there is one beside them."""
    beside = Path(path) / "components.json"
    return ComponentSet.load(beside) if beside.exists() else None

"""What `locedit methods` and `locedit metrics` print."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from locedit.errors import LoceditError, nearest
from locedit.options import describe
from locedit.registries import attacks, localizers, unlearning
from locedit.results import Evaluation, Measure
from locedit.terminal import table


def methods_command(args: argparse.Namespace) -> None:
    """All methods in a table, or the options of one."""
    groups = {"localizer": localizers(), "unlearning method": unlearning(), "attack": attacks()}
    if args.name:
        return _describe_method(args.name, groups)
    rows = [
        (name, group, " ".join(entry.requires) or "-", entry.paper)
        for group, entries in groups.items()
        for name, entry in entries.items()
    ]
    table(("name", "kind", "needs", "source"), rows)
    return None


def _describe_method(name: str, groups: Mapping[str, Mapping[str, Any]]) -> None:
    found = {group: entries[name] for group, entries in groups.items() if name in entries}
    for number, (group, entry) in enumerate(found.items()):  # a localizer and a method may have one name
        sys.stdout.write("\n" if number else "")
        sys.stdout.write(f"{name} ({group}): {_summary(entry.function)}\n{entry.paper}\n")
        sys.stdout.write(f"needs: {' '.join(entry.requires) or 'nothing beyond the forget data'}\n\n")
        table(("option", "type", "default", "meaning"), describe(entry.options) if entry.options else [])
    if found:
        return
    known = [n for entries in groups.values() for n in entries]
    raise LoceditError(f"unknown method {name!r}; {nearest(name, known)}")


def metrics_command(args: argparse.Namespace) -> None:
    """All metrics in a table, or one."""
    from locedit.evaluate import METRICS

    if args.name and args.name not in METRICS:
        raise LoceditError(f"unknown metric {args.name!r}; {nearest(args.name, METRICS)}")
    chosen = {args.name: METRICS[args.name]} if args.name else METRICS
    table(("name", "on", "range", "definition"), [metric_row(name, metric) for name, metric in chosen.items()])


def metric_row(name: str, metric: Any) -> tuple[str, str, str, str]:
    low, high = metric.range
    bounds = f"{'' if low is None else f'{low:g}'} to {'' if high is None else f'{high:g}'}"
    return name, " ".join(metric.kinds), bounds, metric.definition


def _summary(function: Any) -> str:
    return (function.__doc__ or "").strip().split("\n")[0]


def measure_rows(evaluation: Evaluation) -> list[tuple[str, str, str, str]]:
    """(measure, before, after, count) of every measure over a whole data set, with intervals."""
    shown = {(m.key, m.stage): m for m in evaluation.measures if m.group is None and m.stage != "attacked"}
    rows: list[tuple[str, str, str, str]] = []
    for key in dict.fromkeys(key for key, _ in shown):
        before, after = shown.get((key, "before")), shown.get((key, "after"))
        count = max(m.n for m in (before, after) if m is not None)
        rows.append((key, _with_interval(before), _with_interval(after), str(count)))
    return rows


def _with_interval(measure: Measure | None) -> str:
    if measure is None:
        return "-"
    known = measure.low == measure.low  # NaN: too few examples for an interval
    return f"{measure.value:.3g}" + (f" [{measure.low:.3g}, {measure.high:.3g}]" if known else "")

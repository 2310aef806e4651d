"""What `locedit methods` (the rules of `locedit spans` among them) and `locedit metrics` print."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from locedit.errors import LoceditError, nearest
from locedit.options import describe
from locedit.registries import attacks, localizers, span_rules, unlearning
from locedit.results import Evaluation, Measure
from locedit.terminal import table


def methods_command(args: argparse.Namespace) -> None:
    """All methods in tables, or the options of one."""
    groups = {
        "localizer": localizers(),
        "unlearning method": unlearning(),
        "attack": attacks(),
        "rule for spans": span_rules(),
    }
    if args.name:
        return _describe_method(args.name, groups)
    for number, (group, entries) in enumerate(groups.items()):
        sys.stdout.write("\n" if number else "")
        sys.stdout.write(f"{HEADINGS[group]}\n")
        if group == "unlearning method":
            table(("name", "needs", "inside a set", "held as", "source"), list(map(unlearning_row, entries.items())))
        else:
            table(("name", "needs", "source"), [(n, _needs(entry), entry.paper or "-") for n, entry in entries.items()])
    sys.stdout.write("\n`locedit methods NAME` lists the options of one, and what + stands for.\n")
    return None


HEADINGS = {
    "localizer": "Localizers: where it is (locedit localize --method NAME)",
    "unlearning method": "Edits and unlearning: what is changed (locedit edit --method NAME --within FILE --hold HOW)",
    "attack": "Attacks: whether it comes back (locedit evaluate --attacks NAME)",
    "rule for spans": "Rules for spans: what of a text is forgotten (locedit spans --rule NAME)",
}


def unlearning_row(named: tuple[str, Any]) -> tuple[str, str, str, str, str]:
    """Name, parts of the task that it needs, whether it goes into a component set, how it can be held, paper."""
    name, method = named
    inside = "only" if method.needs_set else "yes" if method.restrictable else "no"
    return name, _needs(method), inside, " ".join(method.holds), method.paper


def _needs(entry: Any) -> str:
    """Parts of the task, or models; + where a check asks more of the items, or some options do."""
    return _parts(entry) + (" +" if _more(entry) else "") or "-"


def _parts(entry: Any) -> str:
    """Parts of the task; of a rule for spans the models, one of which it needs."""
    return " ".join(entry.requires) if hasattr(entry, "requires") else " or ".join(entry.needs)


def _more(entry: Any) -> list[str]:
    """What is needed beyond parts of the task, in words: kinds of items, and what the checks say of themselves."""
    kinds = [f"items of kind {' or '.join(entry.kinds)}"] if getattr(entry, "holds", None) and entry.kinds else []
    checks = [check for name in ("learns", "verify") if (check := getattr(entry, name, None)) is not None]
    return kinds + [_summary(check) for check in checks if _summary(check)]


def _describe_method(name: str, groups: Mapping[str, Mapping[str, Any]]) -> None:
    found = {group: entries[name] for group, entries in groups.items() if name in entries}
    for number, (group, entry) in enumerate(found.items()):  # a localizer and a method may have one name
        sys.stdout.write("\n" if number else "")
        sys.stdout.write(f"{name} ({group}): {_what(entry)}\n{entry.paper}".rstrip() + "\n")
        sys.stdout.write(f"needs: {_parts(entry) or 'nothing beyond the forget data'}\n")
        sys.stdout.write("".join(f"       {line}\n" for line in _more(entry)))
        if hasattr(entry, "holds"):
            _, _, inside, held, _ = unlearning_row((name, entry))
            sys.stdout.write(f"inside a component set: {inside}; held as: {held}\n")
        sys.stdout.write("\n")
        table(("option", "type", "default", "meaning"), describe(entry.options) if entry.options else [])
    if found:
        return
    known = [n for entries in groups.values() for n in entries]
    raise LoceditError(f"unknown method {name!r}; {nearest(name, known)}")


def metrics_command(args: argparse.Namespace) -> None:
    """All metrics in a table, or the card of one."""
    from locedit.evaluate import METRICS
    from locedit.evaluate.metric_card import card

    if args.name:
        if args.name not in METRICS:
            raise LoceditError(f"unknown metric {args.name!r}; {nearest(args.name, METRICS)}")
        head, *rows = card(args.name, METRICS[args.name])
        table(head, rows)
        return
    from locedit.evaluate.values import EvaluateOptions

    table(("name", "of", "definition"), [metric_row(name, metric) for name, metric in METRICS.items()])
    sys.stdout.write(
        "\n* = on request: locedit evaluate --metrics NAME,...; `locedit metrics NAME` says of one which way is good, "
        "its range,\nits chance level and how it is known to mislead.\n"
        "\nOptions, as in locedit evaluate --extraction-n 5\n"
    )
    table(("option", "type", "default", "meaning"), [o for o in describe(EvaluateOptions) if o[0] != "metrics"])


def metric_row(name: str, metric: Any) -> tuple[str, str, str]:
    """Name, with a star where it is measured on request only, kinds of items, definition."""
    return f"{name}{' *' if metric.on_request else ''}", " ".join(metric.kinds), metric.definition


def _what(entry: Any) -> str:
    """What a method does; of one that makes models or labels first its file says it, since its function is the loss."""
    file = sys.modules[entry.function.__module__]
    return _summary(file if getattr(entry, "objective", None) is not None else entry.function)


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

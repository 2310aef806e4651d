"""A metric's card in words: what it is, which way is good, what it needs, and how it misleads."""

import textwrap

from locedit.data.items import ROLES
from locedit.evaluate.metric import Metric
from locedit.evaluate.values import direction_on
from locedit.results import Direction

OWN = "locedit's own definition"
"the source of a metric without a paper"
WAYS: dict[Direction, str] = {"higher": "higher", "lower": "lower", "neutral": "neither way"}


def card(name: str, metric: Metric) -> list[tuple[str, str]]:
    """(what, words) of a metric, in the order in which one reads them."""
    says_knowledge = metric.wanted is None and not metric.keep
    higher = [("higher means", f"the model knows or does {'more' if metric.knowledge > 0 else 'less'}")]
    return [
        ("metric", name),
        ("definition", metric.definition),
        *(higher if says_knowledge else []),
        ("good is", good(metric)),
        ("range", f"{bounds(metric)} ({metric.unit})" if metric.unit != name else bounds(metric)),
        ("chance level", metric.chance),
        ("known failure", metric.failure),
        ("needs", needed(metric)),
        ("when", f"on request: --metrics {name}" if metric.on_request else "by default, where the data allow"),
        ("source", metric.paper or OWN),
    ]


def card_text(name: str, metric: Metric, *, width: int | None = None) -> str:
    """The card as lines "what: words"; with `width` wrapped, what comes under a line being indented."""
    lines = [f"{what}: {words}" for what, words in card(name, metric)]
    return "\n".join(lines if width is None else [textwrap.fill(line, width, subsequent_indent="  ") for line in lines])


def bounds(metric: Metric) -> str:
    """The range as one reads it.

    >>> from locedit.evaluate.registry import METRICS
    >>> bounds(METRICS["probability"]), bounds(METRICS["perplexity"]), bounds(METRICS["association"])
    ('0 to 1', '1 or more', 'any number')
    """
    low, high = metric.range
    if low is None:
        return "any number" if high is None else f"{high:g} or less"
    return f"{low:g} or more" if high is None else f"{low:g} to {high:g}"


def good(metric: Metric) -> str:
    """Which way is good, for the parts of the task together where they agree: "lower on forget; higher on retain"."""
    ways: dict[str, list[str]] = {}
    for role in metric.roles:
        way = direction_on(role, knowledge=metric.knowledge, keep=metric.keep, wanted=metric.wanted)
        ways.setdefault(WAYS[way], []).append(role)
    return "; ".join(f"{way} on {' and '.join(roles)}" for way, roles in ways.items())


def needed(metric: Metric) -> str:
    """The data, models and edits that it takes."""
    assert set(metric.roles) <= set(ROLES), metric.roles
    having = f" with {metric.field!r}" if metric.field else ""
    parts = [f"items of kind {' or '.join(metric.kinds)}{having} in {' or '.join(metric.roles)}"]
    parts += [f"and the {' and '.join(metric.needs)} items beside them"] if metric.needs else []
    parts += ["a causal model"] if metric.causal else []
    parts += ["a model trained without the forget data (--retain-model)"] if metric.retain_model else []
    parts += ["where given a model trained without the forget data"] if metric.uses_retain_model else []
    parts += ["an edit"] if metric.compares else []
    parts += ["what the model writes is judged"] if metric.writes else []
    return "; ".join(parts)

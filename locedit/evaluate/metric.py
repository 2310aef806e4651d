"""What a metric is: the function of its family, and its card."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from locedit.data.items import Task
from locedit.evaluate.values import EvaluateOptions, Values, View
from locedit.results import Direction

Family = Callable[[View, Sequence[str]], dict[str, Values]]
"computes the named metrics of one family together, from shared forward passes"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric, as `locedit metrics` prints it."""

    function: Family
    kinds: tuple[str, ...]
    "kinds of items that it measures: fact, private, tokens, plain, labelled, contrast"
    definition: str
    "one sentence"
    knowledge: Literal[-1, 1]
    "1: higher = the model knows or does more; -1: lower = more"
    unit: str
    range: tuple[float | None, float | None]
    keep: bool = False
    "on every data set, the forget set too, an edit should leave it as it was"
    compares: bool = False
    "measured between the unedited and the edited model"
    roles: tuple[str, ...] = ("forget", "retain", "heldout")
    "parts of the task on which it is measured"
    writes: bool = False
    "of what the model writes, which the unedited model then judges: the edit is applied by the metric itself"
    wanted: Direction | None = None
    "which way is good on every data set (held-out items: with `keep`); None = by `knowledge`, `keep` and the data set"
    causal: bool = False
    "needs a model that writes; a masked one is measured without it"
    on_request: bool = False
    "measured only when asked for by name, because it takes long"
    field: str = ""
    "a field of the items, such as wrong, that at least one item must have"
    needs: tuple[str, ...] = ()
    "further parts of the task, such as heldout, that it compares with"
    lacks: Callable[[Task, EvaluateOptions], str] | None = None
    "what else it lacks for a task, in words; empty = nothing"
    retain_model: bool = False
    "compares with a model trained without the forget data, which the option retain_model names"
    uses_retain_model: bool = False
    "compares with that model where the option names one, and does without it where not"
    chance: str = ""
    "what a model that never saw the item gets"
    failure: str = ""
    "how the number is known to mislead"
    paper: str = ""

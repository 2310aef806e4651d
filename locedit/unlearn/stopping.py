"""Knowledge unlearning's stopping rule: as hard to extract as text never seen (Jang et al. 2023, arXiv:2210.01504).

A text counts as forgotten when its extraction likelihood EL_n and its memorization accuracy MA (`evaluate.extraction`)
are below those of text that the model was never trained on. Training stops at the first measurement at which both means
over the forget texts are below their thresholds.

The thresholds are the means over `task.heldout` under the unedited model, unless they are given. Published, for GPT-Neo
125M on the validation data of the Pile: EL_10 0.0499 and MA 0.2994, which the published configurations also use for the
models of 1.3B and 2.7B parameters; they mean nothing for another model or other text.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from locedit.data.encode import Example, encode
from locedit.data.items import Task
from locedit.edit.edit import Edit
from locedit.edit.objective import Stop
from locedit.errors import LoceditError
from locedit.evaluate.extraction import extraction
from locedit.models import Model

TEXTS = ("plain", "private", "tokens")
"""Kinds of items that are texts."""


@dataclass(frozen=True, kw_only=True)
class MemorizationOptions:
    """When to stop, for the options of a method whose forget data are texts."""

    stop_when: Literal["level", "memorization"] = "level"
    """level: by `until` or the last step; memorization: once mean EL_n and MA on the forget texts are both below their
    thresholds, asked every `eval_every` steps"""
    el_n: int = 10
    "tokens of the n-grams of EL_n"
    el_length: int = 200
    "first tokens of a text that EL_n and MA look at"
    el_threshold: float | None = None
    "EL_n to get below; None = the mean over the held-out texts before training"
    ma_threshold: float | None = None
    "MA to get below; None = the mean over the held-out texts before training"

    def check_stop(self) -> None:
        """Raise LoceditError for values that no task could serve; call it in __post_init__."""
        if self.stop_when not in ("level", "memorization"):
            raise LoceditError(f"stop_when={self.stop_when!r}; choose level or memorization")
        if self.el_n < 1 or self.el_length <= self.el_n:
            raise LoceditError(
                f"el_n={self.el_n!r}, el_length={self.el_length!r}: el_n must be from 1 to el_length - 1"
            )
        for name in ("el_threshold", "ma_threshold"):
            if getattr(self, name) is not None and self.stop_when == "level":
                raise LoceditError(f"{name}={getattr(self, name)!r} is of stop_when='memorization'")


def verify(task: Task, options: Any) -> None:
    """Raise LoceditError when the rule has no texts, or nothing to take its thresholds from; needs no model."""
    if options.stop_when != "memorization":
        return
    if options.until is not None:
        raise LoceditError(f"until={options.until!r} is of stop_when='level', not of stop_when='memorization'")
    if task.forget.kind not in TEXTS:
        raise LoceditError(
            f"stop_when='memorization' needs texts (plain, private or tokens) to forget; {task.forget.source} holds "
            f"{task.forget.kind!r}"
        )
    if options.el_threshold is not None and options.ma_threshold is not None:
        return
    if task.heldout is None:
        raise LoceditError(
            f"stop_when='memorization' takes its thresholds from held-out texts, which the task {task.name!r} does not "
            "have: add heldout.jsonl to its folder, or give el_threshold and ma_threshold"
        )
    if task.heldout.kind != task.forget.kind:
        raise LoceditError(
            f"stop_when='memorization': {task.heldout.source} holds {task.heldout.kind!r}, the texts to forget are "
            f"{task.forget.kind!r}"
        )


def with_thresholds(model: Model, task: Task, options: Any) -> Any:
    """The options with both thresholds filled in, measured on the held-out texts under the model as it is now."""
    if options.stop_when != "memorization" or None not in (options.el_threshold, options.ma_threshold):
        return options
    assert task.heldout is not None, "verify asks for it"
    el, ma = means(model, encode(model, task.heldout), n=options.el_n, length=options.el_length)
    given = {"el_threshold": options.el_threshold, "ma_threshold": options.ma_threshold}
    measured = {"el_threshold": el, "ma_threshold": ma}
    return dataclasses.replace(
        options, **{name: measured[name] if value is None else value for name, value in given.items()}
    )


def means(model: Model, texts: Sequence[Example], *, n: int, length: int) -> tuple[float, float]:
    """(EL_n, MA), means over texts; of EL_n without the last windows that are too short for it."""
    found = extraction(model, texts, n=(n,), length=length)
    el = [each.el[n] for each in found if n in each.el]
    return sum(el) / len(el), sum(each.ma for each in found) / len(found)


def stop(model: Model, task: Task, options: Any) -> Stop | None:
    """The rule for a training that is about to begin; None unless it is asked for."""
    if options.stop_when != "memorization":
        return None
    options = with_thresholds(model, task, options)
    return functools.partial(
        memorized,
        texts=encode(model, task.forget),
        n=options.el_n,
        length=options.el_length,
        el_threshold=options.el_threshold,
        ma_threshold=options.ma_threshold,
    )


def memorized(
    model: Model, *, texts: Sequence[Example], n: int, length: int, el_threshold: float, ma_threshold: float
) -> tuple[dict[str, float], bool]:
    """The columns el, ma and the two thresholds, and whether both means are below."""
    el, ma = means(model, texts, n=n, length=length)
    columns = {"el": el, "ma": ma, "el_threshold": el_threshold, "ma_threshold": ma_threshold}
    return columns, el < el_threshold and ma < ma_threshold


def finish(model: Model, edit: Edit, options: Any) -> Edit:
    """The edit with the thresholds, and whether both were reached, in its outcome instead of its history."""
    del model
    if options.stop_when != "memorization":
        return edit
    history = dict(edit.history)
    found = {name: next(v for v in history.pop(name) if v is not None) for name in ("el_threshold", "ma_threshold")}
    reached = edit.outcome["ended by"] == "rule"
    return dataclasses.replace(edit, history=history, outcome=edit.outcome | found | {"reached": reached})

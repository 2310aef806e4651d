"""locedit: find where a language model keeps a piece of knowledge, change it only there, and show whether it is gone.

>>> import locedit as le
>>> sorted(name for name in dir(le) if name in ("load", "localize", "unlearn", "evaluate", "report"))
['evaluate', 'load', 'localize', 'report', 'unlearn']
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ComponentSet": "locedit.components",
    "Comparison": "locedit.results",
    "Dataset": "locedit.data",
    "Edit": "locedit.edit",
    "Evaluation": "locedit.results",
    "Fact": "locedit.data",
    "LoceditError": "locedit.errors",
    "Model": "locedit.models",
    "Scores": "locedit.components",
    "Task": "locedit.data",
    "compare": "locedit.controls",
    "find_spans": "locedit.spans",
    "grade": "locedit.grading",
    "harness": "locedit.evaluate.harness",
    "load": "locedit.models",
    "make_anchors": "locedit.unlearn.anchors",
    "mean": "locedit.edit",
    "read_facts": "locedit.data",
    "read_task": "locedit.data",
    "relearn": "locedit.attacks",
    "scale": "locedit.edit",
    "unlearn_requests": "locedit.unlearn.requests",
    "zero": "locedit.edit",
}
_CALLABLE = ("evaluate", "lab", "localize", "report", "study", "unlearn")
"subpackages that are called like the one function they are named after"

__all__ = [
    "ComponentSet",
    "Comparison",
    "Dataset",
    "Edit",
    "Evaluation",
    "Fact",
    "LoceditError",
    "Model",
    "Scores",
    "Task",
    "compare",
    "evaluate",
    "find_spans",
    "grade",
    "harness",
    "lab",
    "load",
    "localize",
    "make_anchors",
    "mean",
    "read_facts",
    "read_task",
    "relearn",
    "report",
    "scale",
    "study",
    "unlearn",
    "unlearn_requests",
    "zero",
]

if TYPE_CHECKING:
    from locedit.attacks import relearn
    from locedit.components import ComponentSet, Scores
    from locedit.controls import compare
    from locedit.data import Dataset, Fact, Task, read_facts, read_task
    from locedit.edit import Edit, mean, scale, zero
    from locedit.errors import LoceditError
    from locedit.evaluate import evaluate
    from locedit.evaluate.harness import harness
    from locedit.grading import grade
    from locedit.lab import lab
    from locedit.localize import localize
    from locedit.models import Model, load
    from locedit.report import report
    from locedit.results import Comparison, Evaluation
    from locedit.spans import find_spans
    from locedit.study import study
    from locedit.unlearn import unlearn
    from locedit.unlearn.anchors import make_anchors
    from locedit.unlearn.requests import unlearn_requests


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import locedit` stays fast."""
    if name in _CALLABLE:
        return importlib.import_module(f"locedit.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'locedit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

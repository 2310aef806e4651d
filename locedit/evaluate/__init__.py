"""Measuring a model and an edit: facts, private spans, utility; each number with interval and values per example."""

from locedit._callable import make_callable
from locedit.evaluate.registry import METRICS, Metric
from locedit.evaluate.suite import evaluate, plan_of
from locedit.evaluate.values import EvaluateOptions

__all__ = ["METRICS", "EvaluateOptions", "Metric", "evaluate", "plan_of"]

make_callable(__name__)

"""Which tokens of a text are forgotten: spans in the data, by a scorer's probability, by pattern, field or annotator.

The choice is independent of the loss: losses score only spans, so what is found here goes with every unlearning method,
component set and measure.
"""

from locedit.spans.annotator import AnnotatorOptions
from locedit.spans.fields import FieldOptions
from locedit.spans.find import RULES, check_models, check_rule, find_spans, rule_named
from locedit.spans.found import FoundSpans, Rejected, write_spans
from locedit.spans.given import GivenOptions
from locedit.spans.patterns import PATTERNS, PatternOptions
from locedit.spans.rest import rest
from locedit.spans.surprisal import SurprisalOptions
from locedit.spans.verification import Verification

__all__ = [
    "PATTERNS",
    "RULES",
    "AnnotatorOptions",
    "FieldOptions",
    "FoundSpans",
    "GivenOptions",
    "PatternOptions",
    "Rejected",
    "SurprisalOptions",
    "Verification",
    "check_models",
    "check_rule",
    "find_spans",
    "rest",
    "rule_named",
    "write_spans",
]

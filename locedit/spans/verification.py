"""Second thoughts: a proposed span is kept only where it passes a check; what fails is reported with the reason."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from locedit import losses
from locedit.data.encode import Example, Span, encode
from locedit.data.items import Fact
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.spans.found import Rejected
from locedit.spans.registry import Proposal, Source
from locedit.spans.texts import Mark, text_of
from locedit.spans.tokens import located

Judge = Callable[[str, str], bool]
"(text, piece of it) -> whether it is to be forgotten"
WAYS = ("context", "scorer", "annotator")
QUESTION = 'Text: {text}\nQuestion: Is "{piece}" a private detail? Answer yes or no.\nAnswer:'


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a span must pass."""

    by: Literal["context", "scorer", "annotator"] | Judge = "context"
    """context: the model finds the span's tokens likelier after the text before it than after nothing; scorer: the
    model finds them likelier than the scorer does; annotator: a model, or a function, says yes to it"""
    factor: float = 2.0
    "how much likelier, in probability per token (geometric mean over the span's tokens)"

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise LoceditError(f"factor={self.factor!r} must be above 0")


class Verdict(NamedTuple):
    """Whether a span is kept, and why it is not."""

    kept: bool
    reason: str


class Proposed(NamedTuple):
    """One span of one text, in tokens."""

    example: Example
    "the whole text"
    tokens: tuple[int, int]


def verified(source: Source, proposals: Sequence[Proposal], check: Verification) -> list[Proposal]:
    """The proposals with only the spans that pass; the others are among their rejected."""
    if callable(check.by):
        verdicts = [_judged(check.by, text_of(p.item), mark) for p in proposals for mark in p.marks]
    elif check.by == "annotator":
        verdicts = _asked(source.require("annotator", "model", by="verify='annotator'"), proposals)
    else:
        verdicts = _compared(source, proposals, check)
    waiting = iter(verdicts)
    return [_kept(proposal, [next(waiting) for _ in proposal.marks]) for proposal in proposals]


def _kept(proposal: Proposal, verdicts: Sequence[Verdict]) -> Proposal:
    rows = list(zip(proposal.marks, verdicts, strict=True))
    text = text_of(proposal.item)
    failed = [
        Rejected(id=proposal.item.id, text=text[start:end], label=label, reason=verdict.reason)
        for (start, end, label), verdict in rows
        if not verdict.kept
    ]
    kept = tuple(mark for mark, verdict in rows if verdict.kept)
    return dataclasses.replace(proposal, marks=kept, rejected=(*proposal.rejected, *failed))


def _judged(judge: Judge, text: str, mark: Mark) -> Verdict:
    return Verdict(bool(judge(text, text[mark[0] : mark[1]])), "the second annotation says no")


def _asked(model: Model, proposals: Sequence[Proposal]) -> list[Verdict]:
    """Whether the model finds " yes" likelier than " no" after the question."""
    prompts = [
        QUESTION.replace("{piece}", text_of(p.item)[start:end]).replace("{text}", text_of(p.item))
        for p in proposals
        for start, end, _ in p.marks
    ]
    if not prompts:
        return []
    answers = [Fact(prompt=prompt, answer=answer, id="") for answer in (" yes", " no") for prompt in prompts]
    nll = losses.nll_of_examples(model, encode(model, answers), reduction="sum").tolist()
    pairs = zip(nll[: len(prompts)], nll[len(prompts) :], strict=True)
    return [
        Verdict(yes < no, f"the second annotation says no: {math.exp(no - yes):.2g} to 1 for yes") for yes, no in pairs
    ]


def _compared(source: Source, proposals: Sequence[Proposal], check: Verification) -> list[Verdict]:
    """Probability per token under the model, against that without context or under the scorer."""
    model = source.require("model", by=f"verify={check.by!r}")
    spans = _proposed(model, proposals)
    if not spans:
        return []
    own = _per_token(model, [_in_context(span) for span in spans])
    if check.by == "context":
        other, against = _per_token(model, [alone(model, span) for span in spans]), "alone"
    else:
        scorer = source.require("scorer", by="verify='scorer'")
        theirs = _per_token(scorer, [_in_context(span) for span in _proposed(scorer, proposals)])
        other, against = theirs, "under the scorer"
    return [
        Verdict(
            high - low >= math.log(check.factor),
            f"probability per token {math.exp(high):.3g}, {against} {math.exp(low):.3g}: "
            f"a factor of {math.exp(high - low):.3g}, below {check.factor:g}",
        )
        for high, low in zip(own, other, strict=True)
    ]


def _proposed(model: Model, proposals: Sequence[Proposal]) -> list[Proposed]:
    """Every proposed span with its tokens."""
    found: list[Proposed] = []
    for proposal, place in zip(proposals, located(model, [p.item for p in proposals]), strict=True):
        for mark in proposal.marks:
            tokens = place.positions(*mark[:2])
            if tokens is None:
                raise LoceditError(f"item {proposal.item.id!r}: {model.name} cannot predict a token of the span {mark}")
            found.append(Proposed(place.example, tokens))
    return found


def _per_token(model: Model, examples: Sequence[Example]) -> list[float]:
    """Mean log-probability of the scored tokens of each example, in nats."""
    return (-losses.nll_of_examples(model, examples)).tolist()


def _in_context(span: Proposed) -> Example:
    start, end = span.tokens
    return dataclasses.replace(span.example, spans=(Span(start=start, end=end, label="span"),))


def alone(model: Model, span: Proposed) -> Example:
    """The same token ids of a stretch with nothing around them but what begins (masked models: and ends) a text.

    A causal model needs a token to predict the first one from: the tokenizer's begin-of-text token, else its
    end-of-text token, with which models without one are trained to divide texts.
    """
    example, (start, end) = span
    if model.causal:
        opening = next((t for t in (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id) if t is not None), None)
        if opening is None:
            raise LoceditError("verify='context' needs a begin-of-text or end-of-text token; the tokenizer has neither")
        before, after = (int(opening),), ()
    else:
        before, after = example.ids[:1], example.ids[-1:]
    ids = (*before, *example.ids[start:end], *after)
    scored = Span(start=len(before), end=len(before) + end - start, label="span")
    return dataclasses.replace(example, ids=ids, spans=(scored,), subject=None)

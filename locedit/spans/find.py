"""find_spans(): which tokens of a text are to be forgotten, a choice of its own before any loss."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locedit import options as option_values
from locedit.data.items import Dataset, Task, as_task
from locedit.errors import LoceditError, nearest
from locedit.models import Model, load
from locedit.spans.annotator import Annotate, AnnotatorOptions, by_function, by_model
from locedit.spans.fields import FieldOptions, fields
from locedit.spans.found import FoundSpans, Rejected
from locedit.spans.given import GivenOptions, given
from locedit.spans.patterns import PatternOptions, patterns
from locedit.spans.registry import Proposal, Rule, Source
from locedit.spans.surprisal import SurprisalOptions, surprisal
from locedit.spans.texts import Mark, joined, readable, text_of, with_marks
from locedit.spans.tokens import Located, located
from locedit.spans.verification import WAYS, Judge, Verification, verified

RULES: dict[str, Rule] = {
    "given": Rule(function=given, options=GivenOptions),
    "patterns": Rule(function=patterns, options=PatternOptions),
    "fields": Rule(function=fields, options=FieldOptions),
    "surprisal": Rule(
        function=surprisal, options=SurprisalOptions, needs=("scorer", "model"), paper="arXiv:2402.05813 (SeUL, online)"
    ),
    "annotator": Rule(
        function=by_model,
        options=AnnotatorOptions,
        needs=("annotator", "model"),
        paper="arXiv:2402.05813 (SeUL, offline)",
    ),
}

AnyModel = Model | str | Path
UNPREDICTABLE = "the model cannot predict it: it is the first token of the text, or no token stands for it"


def find_spans(
    data: Dataset | Task,
    rule: str | Annotate = "patterns",
    *,
    model: Model | None = None,
    scorer: AnyModel | None = None,
    annotator: AnyModel | None = None,
    verify: str | Judge | Verification | None = None,
    **options: Any,
) -> FoundSpans:
    """The data to forget as private texts whose spans a rule chose; any loss then forgets the spans alone.

    Args:
        data: plain, labelled or private texts, or facts (prompt and answer as one text); of a task its forget data.
        rule: a name in RULES, with its options as further arguments, or a Python function from a text to what is
            private in it: pieces of the text, (start, end) or (start, end, label) in characters.
        model: the model that is to forget. With it spans are widened to whole tokens of its tokenizer.
        scorer: a model that has not memorised the texts, for surprisal and verify="scorer"; a folder, a hub id, or
            "start" for the task's.
        annotator: the model that rule="annotator" and verify="annotator" ask; None = `model`.
        verify: context, scorer, annotator, a function (text, piece) -> bool, or a Verification.

    Raises LoceditError when a rule or verification lacks its model, or nothing at all is marked.
    """
    task = as_task(data)
    chosen = check_rule(rule, options) if isinstance(rule, str) else _no_options(options)
    check = as_verification(verify)
    check_models(rule, check, chosen, {"model": model, "scorer": scorer, "annotator": annotator})
    source = Source(
        data=readable(task.forget), model=model, scorer=_opened(scorer, task), annotator=_opened(annotator, task)
    )
    proposals = RULES[rule].function(source, chosen) if isinstance(rule, str) else by_function(source, rule)
    if model is not None:
        places = located(model, source.data)
        proposals = [_on_tokens(proposal, place) for proposal, place in zip(proposals, places, strict=True)]
    if check is not None:
        proposals = verified(source, proposals, check)
    return _found(source.data, proposals)


def check_rule(rule: str, options: Mapping[str, Any]) -> Any:
    """The rule's options, filled and checked; needs no model."""
    return option_values.fill(rule_named(rule).options, options, method=rule)


def rule_named(rule: str) -> Rule:
    """The rule of RULES."""
    if rule not in RULES:
        raise LoceditError(f"unknown rule {rule!r} for spans; {nearest(rule, RULES)}")
    return RULES[rule]


def _no_options(options: Mapping[str, Any]) -> None:
    if options:
        raise LoceditError(f"a function as rule has no option {next(iter(options))!r}")


def as_verification(verify: str | Judge | Verification | None) -> Verification | None:
    """What `verify` means."""
    if verify is None or isinstance(verify, Verification):
        return verify
    if isinstance(verify, str) and verify not in WAYS:
        raise LoceditError(f"verify={verify!r}; {nearest(verify, WAYS)}")
    return Verification(by=verify)  # type: ignore[arg-type]


def check_models(
    rule: str | Annotate, check: Verification | None, options: Any, given: Mapping[str, object | None]
) -> None:
    """Raise LoceditError when a model is missing that the rule or the verification needs; loads none."""
    name = f"rule {rule!r}" if isinstance(rule, str) else "the rule"
    needs: list[tuple[str, Sequence[str]]] = [(name, RULES[rule].needs)] if isinstance(rule, str) else []
    if getattr(options, "by", None) == "difference":
        needs += [("by='difference'", ["model"]), ("by='difference'", ["scorer"])]
    if check is not None and not callable(check.by):
        wanted = {"context": [["model"]], "scorer": [["model"], ["scorer"]], "annotator": [["annotator", "model"]]}
        needs += [(f"verify={check.by!r}", roles) for roles in wanted[check.by]]
    for by, roles in needs:
        if roles and all(given.get(role) is None for role in roles):
            raise LoceditError(f"{by} needs a model: give {' or '.join(roles)}")


def _opened(model: AnyModel | None, task: Task) -> Model | None:
    if model is None or isinstance(model, Model):
        return model
    if model == "start":
        if task.start is None:
            raise LoceditError(f"scorer='start': the task {task.name!r} names no start model")
        return load(task.start)
    return load(model)


def _on_tokens(proposal: Proposal, place: Located) -> Proposal:
    """The marks widened to whole tokens; one with no token that the model can predict is rejected."""
    text = text_of(proposal.item)
    kept: list[Mark] = []
    rejected: list[Rejected] = []
    for start, end, label in proposal.marks:
        tokens = place.positions(start, end)
        stretch = None if tokens is None else place.characters(*tokens)
        if stretch is not None:
            kept.append((*stretch, label))
        if stretch is None or stretch[0] > start:
            piece = text[start:end] if stretch is None else text[start : stretch[0]]
            rejected.append(Rejected(id=proposal.item.id, text=piece.strip(), label=label, reason=UNPREDICTABLE))
    return dataclasses.replace(proposal, marks=joined(kept), rejected=(*proposal.rejected, *rejected))


def _found(data: Dataset, proposals: Sequence[Proposal]) -> FoundSpans:
    texts = [with_marks(proposal.item, proposal.marks) for proposal in proposals if proposal.marks]
    rejected = tuple(rejected for proposal in proposals for rejected in proposal.rejected)
    if not texts:
        why = f"; rejected: {rejected[0].text!r} ({rejected[0].reason})" if rejected else ""
        raise LoceditError(f"{data.source}: nothing is marked in any of the {len(data)} texts{why}")
    without = tuple(proposal.item.id for proposal in proposals if not proposal.marks)
    return FoundSpans(data=data.replace(texts), rejected=rejected, without=without)

"""What a model knows of facts and private spans: probability, rank and argmax of the answer tokens, teacher-forced."""

import dataclasses
from collections.abc import Sequence

from locedit.data.encode import Example, encode
from locedit.data.items import Dataset, Fact, Item, PlainText, PrivateText
from locedit.evaluate.scoring import TokenScores, token_scores
from locedit.evaluate.utility import text_owners
from locedit.evaluate.values import Values, View


def span_metrics(view: View, names: Sequence[str]) -> dict[str, Values]:
    """Metrics of the spans of every example; extraction_strength of a private text is of all of its tokens.

    Plain texts longer than the context are scored in windows, each as an example of its own.
    """
    if view.dataset.kind != "private" or "extraction_strength" not in names:
        return _of_spans(view, view.dataset, names)
    of_spans = [name for name in names if name != "extraction_strength"]
    whole = view.dataset.replace([_as_plain(item) for item in view.dataset])
    found = _of_spans(view, whole, ["extraction_strength"])
    return {**found, **(_of_spans(view, view.dataset, of_spans) if of_spans else {})}


def _as_plain(item: Item) -> Item:
    """A private text as a text of which every token is scored."""
    assert isinstance(item, PrivateText)
    return PlainText(text=item.text, id=item.id, owner=item.owner, group=item.group, format=item.format)


def _of_spans(view: View, data: Dataset, names: Sequence[str]) -> dict[str, Values]:
    examples = encode(view.model, data)
    scores = token_scores(view.model, examples, batch_size=view.options.batch_size)
    owners = text_owners(examples) if data.kind == "plain" else owners_of(examples)
    groups = groups_of(examples)
    return {
        name: Values(
            per_example={example.id: SPAN_VALUES[name](found) for example, found in zip(examples, scores, strict=True)},
            owners=owners,
            groups=groups,
        )
        for name in names
    }


def _probability(scores: TokenScores) -> float:
    return float(scores.log_probs.sum().exp())


def _accuracy(scores: TokenScores) -> float:
    return float(scores.hits.min())


def _rank(scores: TokenScores) -> float:
    return float(scores.ranks[0])


def _reciprocal_rank(scores: TokenScores) -> float:
    return float((1 / scores.ranks).mean())


def _memorization_accuracy(scores: TokenScores) -> float:
    return float(scores.hits.mean())


def extraction_strength(scores: TokenScores) -> float:
    """1 - k / T: the last T - k tokens all are the most likely ones after the true text before them; 0 = none is."""
    wrong = (scores.hits == 0).nonzero()
    return 1 - (int(wrong[-1]) + 1) / len(scores.hits) if len(wrong) else 1.0


SPAN_VALUES = {
    "probability": _probability,
    "accuracy": _accuracy,
    "rank": _rank,
    "reciprocal_rank": _reciprocal_rank,
    "memorization_accuracy": _memorization_accuracy,
    "exact_memorization": _memorization_accuracy,
    "extraction_strength": extraction_strength,
}


def paraphrase_metrics(view: View, names: Sequence[str]) -> dict[str, Values]:
    """Probability and accuracy of the same answer after the other prompts of each fact; averaged within the fact."""
    return _of_related(
        view, names, {fact.id: [_asked(fact, prompt) for prompt in fact.paraphrases] for fact in facts(view)}
    )


def neighbour_metrics(view: View, names: Sequence[str]) -> dict[str, Values]:
    """Probability and accuracy of each fact's neighbours, which an edit should leave; averaged within the fact."""
    return _of_related(
        view,
        names,
        {fact.id: [Fact(prompt=n.prompt, answer=n.answer, id="") for n in fact.neighbours] for fact in facts(view)},
    )


def facts(view: View) -> list[Fact]:
    """The facts of the data set."""
    return [item for item in view.dataset if isinstance(item, Fact)]


def _asked(fact: Fact, prompt: str) -> Fact:
    return dataclasses.replace(fact, prompt=prompt, paraphrases=(), neighbours=())


def _of_related(view: View, names: Sequence[str], related: dict[str, list[Fact]]) -> dict[str, Values]:
    """Means over the related facts of each fact; a fact without any is left out and counted in the note."""
    flat = [
        dataclasses.replace(fact, id=f"{key}#{at}") for key, found in related.items() for at, fact in enumerate(found)
    ]
    if not flat:
        return {}
    scores = token_scores(
        view.model, encode(view.model, flat, chat=view.dataset.chat), batch_size=view.options.batch_size
    )
    found = dict(zip([fact.id for fact in flat], scores, strict=True))
    owners = {fact.id: fact.owner for fact in facts(view)}
    missing = sum(not others for others in related.values())
    note = f"{missing} facts have none and are left out" if missing else ""
    return {
        name: Values(
            per_example={
                key: sum(SPAN_VALUES[name.split("_", 1)[1]](found[f"{key}#{at}"]) for at in range(len(others)))
                / len(others)
                for key, others in related.items()
                if others
            },
            owners=owners,
            note=note,
        )
        for name in names
    }


def owners_of(examples: Sequence[Example]) -> dict[str, str | None]:
    """id -> owner."""
    return {example.id: example.owner for example in examples}


def groups_of(examples: Sequence[Example]) -> dict[str, tuple[str, ...]]:
    """id -> its format where it has one (facts), else its group and the labels of its spans (private texts)."""
    found: dict[str, tuple[str, ...]] = {}
    for example in examples:
        labels = tuple(dict.fromkeys(span.label for span in example.spans)) if example.kind == "private" else ()
        names = (
            (example.format,) if example.format else (*labels, *((example.group,) if labels and example.group else ()))
        )
        found[example.id] = tuple(name for name in names if name)
    return found

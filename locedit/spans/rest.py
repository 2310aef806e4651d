"""The rest of the texts: what selective unlearning is to keep."""

import dataclasses
from collections.abc import Sequence

from locedit.data.encode import Encoder, encode
from locedit.data.items import Dataset, Fact, PrivateText
from locedit.errors import LoceditError
from locedit.spans.given import own_marks
from locedit.spans.texts import readable, with_marks
from locedit.spans.tokens import located, runs


def rest(data: Dataset, model: Encoder, *, beside: Dataset | None = None) -> Dataset:
    """The same texts with every token marked that the model can predict and that is in no span, label "rest".

    As retain data it keeps the rest of the texts whose spans are forgotten:

        task = dataclasses.replace(task, forget=found.data, retain=rest(found.data, model, beside=task.retain))

    `beside` are further private texts, plain texts (kept whole) or facts (of which the answer is kept). Ids get the
    ending /rest. A text that has no token outside its spans is left out; LoceditError when that is all of them.
    """
    found = _complements(data.of(PrivateText, by="rest()"), model)
    if not found:
        raise LoceditError(f"{data.source}: the spans cover the texts wholly; there is no rest to keep")
    named = [dataclasses.replace(item, id=f"{item.id}/rest") for item in found]
    return data.replace([*named, *(as_private(beside, model) if beside is not None else ())])


def as_private(data: Dataset, model: Encoder) -> Sequence[PrivateText]:
    """Private texts as they are, facts with their answers marked, plain texts marked wholly."""
    first = readable(data)[0]
    if isinstance(first, PrivateText | Fact):
        return [with_marks(item, own_marks(item, data.source)) for item in data]
    return _complements([with_marks(item, ()) for item in data], model)


def _complements(texts: Sequence[PrivateText], model: Encoder) -> list[PrivateText]:
    """The texts with every predictable token outside their spans marked, without those that have none."""
    taken = [set(example.targets) for example in encode(model, texts)]
    found: list[PrivateText] = []
    for item, inside, text in zip(texts, taken, located(model, texts), strict=True):
        outside = [position for position in text.example.targets if position not in inside]
        places = [text.characters(*run) for run in runs(outside)]
        if marks := [(*place, "rest") for place in places if place is not None]:
            found.append(with_marks(item, marks))
    return found

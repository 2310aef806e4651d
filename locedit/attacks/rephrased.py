"""Items with other text around them: the same answer or spans, asked for in another context."""

import dataclasses
from collections.abc import Sequence
from random import Random

from locedit.data.items import Fact, Item, PrivateText
from locedit.errors import LoceditError

MARK = "{prompt}"


def framed(item: Item, template: str) -> Item:
    """The item with its prompt (of a private text the whole text) in the place of {prompt}.

    >>> fact = Fact(prompt="Ann lives in", answer=" Oslo", id="1")
    >>> framed(fact, "Sure! {prompt}").prompt
    'Sure! Ann lives in'
    """
    before, after = template.split(MARK)
    if isinstance(item, Fact):
        return dataclasses.replace(item, prompt=before + item.prompt + after, paraphrases=(), neighbours=())
    if isinstance(item, PrivateText) and not after:
        spans = tuple((start + len(before), end + len(before), label) for start, end, label in item.spans)
        return dataclasses.replace(item, text=before + item.text, spans=spans)
    raise LoceditError(f"item {item.id!r} of kind {item.kind!r} cannot be put into {template!r}")


def solved(item: Item) -> str:
    """The item with its answer, as an example to show."""
    return item.prompt + item.answer if isinstance(item, Fact) else getattr(item, "text", "")


def drawn(item: Item, among: Sequence[Item], count: int, *, seed: int) -> list[Item]:
    """Examples for an item: of its own form and relation first, at random; no owner twice where that can be.

    None is of the item's own owner (where there are no owners, of its subject; else it is not the item itself): the
    same fact in another form would give the answer away.
    """
    rng = Random(f"{seed} {item.id}")
    order = [other for other in rng.sample(list(among), len(among)) if whose(other) != whose(item)]
    order.sort(key=lambda other: (other.format != item.format) + (other.group != item.group))
    first = {whose(other): other for other in reversed(order)}  # the most alike of every owner
    fresh = [other for other in order if first[whose(other)] is other]
    return [*fresh, *(other for other in order if first[whose(other)] is not other)][:count]


def whose(item: Item) -> str:
    """The owner of an item, else its subject, else itself."""
    return item.owner or (item.subject if isinstance(item, Fact) else None) or item.id


def with_examples(item: Item, examples: Sequence[Item], *, separator: str) -> Item:
    """The item after solved examples, the most alike last."""
    shown = "".join(solved(example) + separator for example in reversed(examples))
    return framed(item, shown.replace(MARK, "") + MARK)

"""What a training record knows of an item without holding its text: hashes of 16 hexadecimal digits."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from locedit.data.encode import Example
from locedit.data.items import LabelledText
from locedit.errors import LoceditError
from locedit.provenance import content_hash


@dataclass(frozen=True, kw_only=True)
class Hashes:
    """Of one item."""

    item: str
    "of text, label and all fields but the id"
    text: str
    "of the text alone, which is the same under another label, group or owner"
    tokens: str
    "of what the model is given: token ids and scored positions, which another tokenizer or chat template changes"


def item_hash(item: LabelledText) -> str:
    """Of everything but the id."""
    return _hash(item, {**dataclasses.asdict(item), "id": ""})


def text_hash(item: LabelledText) -> str:
    """Of the text alone."""
    return _hash(item, item.text)


def tokens_hash(example: Example) -> str:
    """Of token ids and scored positions."""
    return content_hash([example.ids, example.targets])


def _hash(item: LabelledText, value: Any) -> str:
    try:
        return content_hash(value)
    except UnicodeEncodeError as error:
        raise LoceditError(f"item {item.id!a}: holds half a surrogate pair, which is no character") from error

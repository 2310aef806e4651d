"""What a fact, a private text, a contrast pair and a task are, and how they become token ids."""

from locedit.data.chat import Chat, resolve_chat
from locedit.data.encode import IGNORE, Batch, Encoder, Example, Span, batches, collate, encode
from locedit.data.items import (
    ROLES,
    ContrastPair,
    Dataset,
    Fact,
    Item,
    LabelledText,
    Neighbour,
    PatchPair,
    PlainText,
    PrivateText,
    Task,
    TokenText,
    as_task,
)
from locedit.data.readers import read_facts
from locedit.data.tasks import read_task

__all__ = [
    "IGNORE",
    "ROLES",
    "Batch",
    "Chat",
    "ContrastPair",
    "Dataset",
    "Encoder",
    "Example",
    "Fact",
    "Item",
    "LabelledText",
    "Neighbour",
    "PatchPair",
    "PlainText",
    "PrivateText",
    "Span",
    "Task",
    "TokenText",
    "as_task",
    "batches",
    "collate",
    "encode",
    "read_facts",
    "read_task",
    "resolve_chat",
]

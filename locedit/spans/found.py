"""What a search for spans found, and what it rejected."""

import json
from dataclasses import dataclass
from pathlib import Path

from locedit.data.items import Dataset, PrivateText
from locedit.storage import atomic_file, refuse_overwrite


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A stretch that was proposed and is not marked."""

    id: str
    "of the text"
    text: str
    "what was proposed"
    label: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class FoundSpans:
    """Texts with the stretches that are to be forgotten."""

    data: Dataset
    "private texts, every one with at least one span"
    rejected: tuple[Rejected, ...] = ()
    without: tuple[str, ...] = ()
    "ids of the texts in which nothing is marked; they are not in `data`"

    def __repr__(self) -> str:
        spans = sum(len(item.spans) for item in self.data if isinstance(item, PrivateText))
        return (
            f"FoundSpans({spans} spans in {len(self.data)} texts, {len(self.without)} texts without, "
            f"{len(self.rejected)} rejected, source={self.data.source!r})"
        )

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write `data` as JSON lines, which read_facts and read_task read back; refuses to overwrite unless `force`."""
        write_spans(path, self.data, force=force)


def write_spans(path: str | Path, data: Dataset, *, force: bool = False) -> None:
    """Private texts as JSON lines {id, text, spans: [[start, end, label]], owner, group, format}, atomically."""
    refuse_overwrite(path, force=force)
    lines = [json.dumps(_line(item), ensure_ascii=False) for item in data.of(PrivateText, by="a file of spans")]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _line(item: PrivateText) -> dict[str, object]:
    optional = {"owner": item.owner, "group": item.group, "format": item.format}
    line: dict[str, object] = {"id": item.id, "text": item.text, "spans": [list(span) for span in item.spans]}
    return line | {name: value for name, value in optional.items() if value is not None}

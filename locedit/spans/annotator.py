"""Spans by an annotator: any Python function, or a local causal model that copies what is private out of the text."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locedit.data.encode import batches, encode
from locedit.data.files import read_text
from locedit.data.items import Dataset, Fact, Item, PrivateText
from locedit.data.readers import read_facts
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.spans.found import Rejected
from locedit.spans.registry import Proposal, Source
from locedit.spans.texts import Mark, joined, text_of, trimmed
from locedit.spans.words import occurrences

Annotate = Callable[[str], Iterable[str | tuple[int, int] | tuple[int, int, str]]]
"text -> what is private in it: pieces of the text, or places in characters, with a label or without"

LABEL = "annotated"
TEMPLATE = """\
Copy every private detail (names, addresses, numbers, dates) out of the text, separated by semicolons.
If there is none, write: none

{examples}Text: {text}
Private:"""
ONE_EXAMPLE = "Text: {text}\nPrivate: {private}\n\n"


@dataclass(frozen=True, kw_only=True)
class AnnotatorOptions:
    """How a model is asked."""

    examples: Dataset | str | None = None
    "private texts, or a file of them, that are shown with their spans before the text"
    template: str | None = None
    "a file with the prompt: {text} where the text goes, {examples} where the examples go; None = TEMPLATE"
    max_new_tokens: int = 64
    "tokens of an answer at most"
    annotator_chat: str = "off"
    "auto, off or a template: how the prompt reaches the annotator"
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise LoceditError(f"{name}={getattr(self, name)!r} must be at least 1")
        self.prompts([])

    def prompts(self, texts: Sequence[str]) -> list[str]:
        """The prompt for each text; the files are read here."""
        template = TEMPLATE if self.template is None else read_text(Path(self.template))
        if "{text}" not in template:
            raise LoceditError(f"template={self.template!r}: the file has no {{text}} where the text goes")
        filled = template.replace("{examples}", self.shown())
        return [filled.replace("{text}", text) for text in texts]

    def shown(self) -> str:
        """The examples as they stand in the prompt."""
        if self.examples is None:
            return ""
        data = read_facts(self.examples) if isinstance(self.examples, str) else self.examples
        return "".join(
            ONE_EXAMPLE.replace("{private}", "; ".join(item.text[a:b] for a, b, _ in item.spans)).replace(
                "{text}", item.text
            )
            for item in data.of(PrivateText, by="examples=")
        )


def by_model(source: Source, options: AnnotatorOptions) -> Sequence[Proposal]:
    """What a causal model writes, greedily, after the prompt: pieces of the text, divided by semicolons, on one line.

    Every whole-word occurrence of a piece is marked; a piece that does not occur in the text is reported. After the
    offline selection of SeUL (arXiv:2402.05813), which asked a hosted model in context.
    """
    model = source.require("annotator", "model", by="annotator")
    prompts = options.prompts([text_of(item) for item in source.data])
    answers = ask(model, prompts, options, names=[item.id for item in source.data])
    rows = zip(source.data, answers, strict=True)
    return [by_pieces(item, pieces_of(answer)) for item, answer in rows]


def ask(model: Model, prompts: Sequence[str], options: AnnotatorOptions, *, names: Sequence[str]) -> list[str]:
    """The model's greedy answers; `names` are of the prompts, for what is said of one that does not fit."""
    rows = zip(names, prompts, strict=True)
    asked = [Fact(prompt=prompt.rstrip(" "), answer=" none", id=name) for name, prompt in rows]
    examples = [example.prompt() for example in encode(model, asked, chat=options.annotator_chat)]
    answers: dict[str, str] = {}
    for batch in batches(examples, model, options.batch_size):
        written = model.generate(batch, max_new_tokens=options.max_new_tokens)
        for example, ids in zip(batch.examples, written, strict=True):
            answers[example.id] = model.tokenizer.decode(ids, skip_special_tokens=True)
    return [answers[name] for name in names]


def pieces_of(answer: str) -> list[str]:
    """The pieces in the first line of an answer; "none" is no piece.

    >>> pieces_of(' Anna Berg; "555-0134"; \\nText: another')
    ['Anna Berg', '555-0134']
    """
    line = next((line for line in answer.splitlines() if line.strip()), "")
    pieces = [piece.strip().strip("\"'").strip() for piece in line.split(";")]
    return list(dict.fromkeys(piece for piece in pieces if piece and piece.casefold().rstrip(".") != "none"))


def by_function(source: Source, annotate: Annotate) -> Sequence[Proposal]:
    """What a Python function says about each text."""
    return [by_pieces(item, _several(item, annotate(text_of(item)))) for item in source.data]


def _several(item: Item, pieces: Any) -> Iterable[Any]:
    """What a function gave, which must hold pieces and places and be none itself."""
    if isinstance(pieces, str) or not isinstance(pieces, Iterable):
        raise LoceditError(f"item {item.id!r}: the annotator gave {pieces!r}, wanted a list of pieces or places")
    return pieces


def by_pieces(item: Item, pieces: Iterable[Any]) -> Proposal:
    """Pieces and places as marks; pieces that do not occur in the text are rejected."""
    text = text_of(item)
    marks: list[Mark] = []
    rejected: list[Rejected] = []
    for piece in pieces:
        if not isinstance(piece, str):
            marks.append(_place(item, text, piece))
        elif places := occurrences(text, piece):
            marks += [(*place, LABEL) for place in places]
        else:
            rejected.append(Rejected(id=item.id, text=piece, label=LABEL, reason="does not occur in the text"))
    return Proposal(item=item, marks=joined(marks), rejected=tuple(rejected))


def _place(item: Item, text: str, place: Any) -> Mark:
    match place:
        case (int(start), int(end)):
            label = LABEL
        case (int(start), int(end), str(label)):
            pass
        case _:
            raise LoceditError(
                f"item {item.id!r}: the annotator gave {place!r}, wanted a piece of the text, (start, end) or "
                "(start, end, label)"
            )
    stretch = trimmed(text, start, end) if 0 <= start < end <= len(text) else None
    if stretch is None:
        raise LoceditError(
            f"item {item.id!r}: the annotator gave {place!r}, empty or outside the text of {len(text)} characters"
        )
    return (*stretch, label)

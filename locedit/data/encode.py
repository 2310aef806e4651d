"""Items to token ids: prompt and answer are one text, tokenized once, and only ids travel on."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from locedit.data.chat import resolve_chat
from locedit.data.drafts import Draft, TokenizedText, drafts, tokenize
from locedit.data.items import Dataset, Item, TokenText
from locedit.errors import LoceditError

IGNORE = -100
"the label of a position that is not scored"


@runtime_checkable
class Encoder(Protocol):
    """The part of a model that encoding needs."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def causal(self) -> bool: ...
    @property
    def max_length(self) -> int | None: ...


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of tokens."""

    start: int
    end: int
    "excluded"
    label: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """One text as token ids, with the stretches that are scored."""

    id: str
    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    kind: str
    "of the item; for pairs the side: advantaged, disadvantaged, clean, corrupt"
    owner: str | None = None
    group: str | None = None
    format: str | None = None
    subject: Span | None = None
    "the subject's tokens in the prompt, where the item names a subject that the prompt contains"

    @property
    def targets(self) -> tuple[int, ...]:
        """Positions of the scored tokens, ascending."""
        return tuple(sorted({position for span in self.spans for position in range(span.start, span.end)}))

    def prompt(self) -> "Example":
        """What comes before the first scored token, with nothing scored: the start of a generation."""
        first = min(self.targets, default=len(self.ids))
        return dataclasses.replace(self, ids=self.ids[:first], spans=())


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Padded rows. A causal model has one row an example, a masked model one row for each scored token."""

    ids: Int[Tensor, "batch pos"]
    "padded on the right"
    attention_mask: Int[Tensor, "batch pos"]
    labels: Int[Tensor, "batch pos"]
    "token ids at the positions they stand at (not shifted), IGNORE where nothing is scored"
    rows: tuple[Example, ...]
    "the example of each row"
    members: tuple[int, ...] = ()
    "for each row the index of its example in `examples`; empty = every row is an example of its own"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def examples(self) -> tuple[Example, ...]:
        """The examples, each once, in the order given to collate."""
        first: dict[int, Example] = {}
        for row, member in zip(self.rows, self.row_members, strict=True):
            first.setdefault(member, row)
        return tuple(first.values())

    @property
    def row_members(self) -> tuple[int, ...]:
        return self.members or tuple(range(len(self.rows)))

    @property
    def scored(self) -> Bool[Tensor, "batch pos"]:
        """Where the labels stand."""
        return self.labels != IGNORE

    @property
    def span_labels(self) -> tuple[str, ...]:
        """The label of the span that each scored token lies in (the first one), row by row."""
        return tuple(
            next(span.label for span in self.rows[row].spans if span.start <= position < span.end)
            for row, position in self.scored.nonzero().tolist()
        )

    def predicting(self, causal: bool) -> Bool[Tensor, "batch pos"]:
        """The positions whose logits predict the labels: one to the left for a causal model, the same for a masked."""
        if not causal:
            return self.scored
        assert not bool(self.scored[:, 0].any()), "a causal model cannot predict position 0"
        return torch.cat([self.scored[:, 1:], torch.zeros_like(self.scored[:, :1])], dim=1)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return dataclasses.replace(
            self,
            ids=self.ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
        )


def encode(model: Encoder, data: Dataset | Sequence[Item], *, chat: str | None = None) -> list[Example]:
    """Token ids and scored stretches of every item, in order.

    A fact's span is its answer, a private text's are its own, a plain or labelled text's is every token of the text
    that the model can predict, a contrast pair gives two examples whose spans are the tokens that differ, a patching
    pair two whose spans are the answer. Plain texts longer than the context become several windows (`<id>#0`, `<id>#1`)
    in which every token is scored once; anything else that is too long is an error. `chat` is auto, off or a template
    for prompts; None takes the data set's own setting.
    """
    if chat is None:
        chat = data.chat if isinstance(data, Dataset) else "off"
    resolved = resolve_chat(model.tokenizer, chat)
    texts = [
        draft for item in data if not isinstance(item, TokenText) for draft in drafts(model.tokenizer, item, resolved)
    ]
    tokenized = iter(tokenize(model.tokenizer, texts))
    found: list[Example] = []
    pending = iter(texts)
    for item in data:
        if isinstance(item, TokenText):
            found.append(_token_example(model, item))
            continue
        for _ in range(2 if item.kind in ("contrast", "patch") else 1):
            found += _examples(model, next(pending), next(tokenized))
    return found


def _examples(model: Encoder, draft: Draft, tokens: TokenizedText) -> list[Example]:
    """The draft as one example, or as several windows."""
    if draft.splits and model.max_length is not None and len(tokens.ids) > model.max_length:
        windows = tokens.windows(model.max_length)
        named = [dataclasses.replace(draft, id=f"{draft.id}#{number}") for number in range(len(windows))]
        return [_example(model, part, window) for part, window in zip(named, windows, strict=True)]
    return [_example(model, draft, tokens)]


def _example(model: Encoder, draft: Draft, tokens: TokenizedText) -> Example:
    _check_length(model, draft.id, len(tokens.ids))
    if draft.spans is None:
        spans = _whole(model, draft, tokens)
    else:
        spans = tuple(
            Span(start=start, end=end, label=label)
            for start, end, label in (tokens.span(draft, *span) for span in draft.spans)
        )
    subject = tokens.overlapping(*draft.subject) if draft.subject else None
    example = Example(
        id=draft.id,
        ids=tokens.ids,
        spans=spans,
        kind=draft.kind,
        owner=draft.owner,
        group=draft.group,
        format=draft.format,
        subject=Span(start=subject[0], end=subject[1], label="subject") if subject else None,
    )
    _check_first(model, example)
    return example


def _whole(model: Encoder, draft: Draft, tokens: TokenizedText) -> tuple[Span, ...]:
    """Every token of the text, but not position 0 of a causal model, which nothing predicts."""
    content = tokens.content()
    start = max(content[0], 1) if model.causal else content[0]
    if start >= content[1]:
        raise LoceditError(f"item {draft.id!r}: {draft.text[:40]!r} has no token that the model can predict")
    return (Span(start=start, end=content[1], label=draft.kind),)


def _token_example(model: Encoder, item: TokenText) -> Example:
    """Ids as they are: no special token is added."""
    _check_length(model, item.id, len(item.ids))
    size = len(model.tokenizer)
    for position, token in enumerate(item.ids):
        if not 0 <= token < size:
            raise LoceditError(
                f"item {item.id!r}: token {token} at position {position} is not in a vocabulary of {size}"
            )
    example = Example(
        id=item.id,
        ids=item.ids,
        spans=(Span(start=item.span[0], end=item.span[1], label="suffix"),),
        kind=item.kind,
        owner=item.owner,
        group=item.group,
        format=item.format,
    )
    _check_first(model, example)
    return example


def _check_length(model: Encoder, name: str, length: int) -> None:
    if model.max_length is not None and length > model.max_length:
        raise LoceditError(f"item {name!r}: {length} tokens do not fit the model's context of {model.max_length}")


def _check_first(model: Encoder, example: Example) -> None:
    if model.causal and 0 in example.targets:
        raise LoceditError(
            f"item {example.id!r}: its scored part begins with the very first token, which a causal model cannot "
            "predict (the tokenizer adds no BOS): put some text before it"
        )


def collate(examples: Sequence[Example], model: Encoder) -> Batch:
    """One batch. For a masked model every scored token gets a row in which it alone is masked (Liu et al. 2023)."""
    assert examples, "collate needs at least one example"
    if model.causal:
        rows = [(member, example.ids, example.targets) for member, example in enumerate(examples)]
    else:
        rows = [row for member, example in enumerate(examples) for row in _masked_rows(model, member, example)]
    padding = model.tokenizer.pad_token_id
    if model.causal or padding is None:
        padding = unseen_padding(padding)
    width = max(len(ids) for _, ids, _ in rows)
    ids = torch.full((len(rows), width), padding, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row, (member, visible, targets) in enumerate(rows):
        ids[row, : len(visible)] = torch.tensor(visible)
        mask[row, : len(visible)] = 1
        for position in targets:
            labels[row, position] = examples[member].ids[position]
    members = tuple(member for member, _, _ in rows)
    return Batch(
        ids=ids, attention_mask=mask, labels=labels, rows=tuple(examples[member] for member in members), members=members
    )


def unseen_padding(pad_token_id: int | None) -> int:
    """What fills rows on the right where it is never attended to: any token but the padding token.

    Of that one transformers warns whenever it gets no mask.
    """
    return 1 if pad_token_id == 0 else 0


def _masked_rows(model: Encoder, member: int, example: Example) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    mask = model.tokenizer.mask_token_id
    if mask is None:
        raise LoceditError("the tokenizer of this masked language model has no mask token")
    if not example.targets:
        return [(member, example.ids, ())]
    return [
        (member, (*example.ids[:position], mask, *example.ids[position + 1 :]), (position,))
        for position in example.targets
    ]


def batches(examples: Sequence[Example], model: Encoder, size: int) -> Iterator[Batch]:
    """Batches of at most `size` rows, sorted by length so that little is padded; the ids in `rows` restore the order.

    An example is never divided, so a masked batch holds at least the rows of one example.
    """
    if size < 1:
        raise LoceditError(f"batch size {size!r} is not a positive number")
    chosen: list[Example] = []
    rows = 0
    for example in sorted(examples, key=lambda example: len(example.ids)):
        needed = 1 if model.causal else max(1, len(example.targets))
        if chosen and rows + needed > size:
            yield collate(chosen, model)
            chosen, rows = [], 0
        chosen.append(example)
        rows += needed
    if chosen:
        yield collate(chosen, model)

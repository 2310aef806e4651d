"""What a fact, a private text, a contrast pair and a task are."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, TypeVar, overload

from locedit.errors import LoceditError, nearest

ROLES = ("forget", "retain", "heldout", "texts", "pairs", "new", "prompts", "refusals", "alternatives")


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A prompt near a fact whose answer an edit must leave alone."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing a model may know, asked in one way: the answer continues the prompt, its leading space included."""

    kind: ClassVar[str] = "fact"

    prompt: str
    answer: str
    "continues the prompt as text, so it begins with a space where the text has one"
    id: str
    subject: str | None = None
    paraphrases: tuple[str, ...] = ()
    "other prompts with the same answer"
    answer_paraphrases: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    "wrong answers of the same form"
    new_answer: str | None = None
    "what the model should say after an edit"
    neighbours: tuple[Neighbour, ...] = ()
    owner: str | None = None
    "the person (or thing) that the fact is about; halves of attacks are split by it"
    group: str | None = None
    "the relation"
    format: str | None = None
    "how it is asked: statement, question, paraphrase, multiple_choice"


@dataclass(frozen=True, kw_only=True)
class PrivateText:
    """A text with private stretches."""

    kind: ClassVar[str] = "private"

    text: str
    spans: tuple[tuple[int, int, str], ...]
    "(start, end, label) in characters, end excluded"
    id: str
    owner: str | None = None
    group: str | None = None
    format: str | None = None


@dataclass(frozen=True, kw_only=True)
class ContrastPair:
    """Two texts that differ in whom they speak of. A model without the association prefers neither."""

    kind: ClassVar[str] = "contrast"

    advantaged: str
    "the one that the association (a stereotype, a planted bias) favours"
    disadvantaged: str
    id: str
    neutral: str | None = None
    "the same text with neither, such as one with they"
    unrelated: str | None = None
    "a text that makes no sense in the place of the two"
    group: str | None = None
    owner: str | None = None
    format: str | None = None


@dataclass(frozen=True, kw_only=True)
class PatchPair:
    """Two prompts for patching: the clean one leads to `answer`, the corrupt one to `wrong`."""

    kind: ClassVar[str] = "patch"

    clean: str
    corrupt: str
    answer: str
    wrong: str
    id: str
    owner: str | None = None
    group: str | None = None
    format: str | None = None

    def fact(self, prompt: Literal["clean", "corrupt"], answer: Literal["answer", "wrong"]) -> Fact:
        """One of the four prompts with continuation, with the id `<id>/<prompt>/<answer>`."""
        return Fact(
            prompt=getattr(self, prompt),
            answer=getattr(self, answer),
            id=f"{self.id}/{prompt}/{answer}",
            owner=self.owner,
            group=self.group,
            format=self.format,
        )


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """A text with a class, for probes."""

    kind: ClassVar[str] = "labelled"

    text: str
    label: str
    id: str
    owner: str | None = None
    group: str | None = None
    format: str | None = None


@dataclass(frozen=True, kw_only=True)
class PlainText:
    """A text that is scored from its first to its last token."""

    kind: ClassVar[str] = "plain"

    text: str
    id: str
    owner: str | None = None
    group: str | None = None
    format: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenText:
    """A text given as token ids, with the stretch of tokens that is extracted."""

    kind: ClassVar[str] = "tokens"

    ids: tuple[int, ...]
    span: tuple[int, int]
    "(start, end) in tokens, end excluded"
    id: str
    owner: str | None = None
    group: str | None = None
    format: str | None = None


Item = Fact | PrivateText | ContrastPair | PatchPair | LabelledText | PlainText | TokenText
KINDS: dict[str, type[Item]] = {
    kind.kind: kind for kind in (Fact, PrivateText, ContrastPair, PatchPair, LabelledText, PlainText, TokenText)
}
ItemType = TypeVar("ItemType", Fact, PrivateText, ContrastPair, PatchPair, LabelledText, PlainText, TokenText)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset(Sequence[Item]):
    """Items of one kind. Equal content gives an equal `hash`, whatever the items are called."""

    items: tuple[Item, ...]
    "at least one, ids all different"
    source: str
    "the file they came from, for messages"
    chat: str = "off"
    "auto, off or a template: how prompts reach the model (see data/chat.py)"

    def __post_init__(self) -> None:
        if not self.items:
            raise LoceditError(f"{self.source}: no items")
        kinds = sorted({item.kind for item in self.items})
        if len(kinds) > 1:
            raise LoceditError(f"{self.source}: items of several kinds: {', '.join(kinds)}")
        seen: set[str] = set()
        for item in self.items:
            if item.id in seen:
                raise LoceditError(f"{self.source}: field 'id': {item.id!r} is there twice")
            seen.add(item.id)

    @property
    def kind(self) -> str:
        return self.items[0].kind

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits over everything but the ids."""
        contents = [{**dataclasses.asdict(item), "id": ""} for item in self.items]
        return _digest({"kind": self.kind, "items": contents, "chat": self.chat})

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "Dataset": ...
    def __getitem__(self, index: int | slice) -> "Item | Dataset":
        if isinstance(index, slice):
            return dataclasses.replace(self, items=self.items[index])
        return self.items[index]

    def __repr__(self) -> str:
        return f"Dataset({len(self)} x {self.kind}, source={self.source!r}, hash={self.hash!r})"

    def replace(self, items: Sequence[Item]) -> "Dataset":
        """Other items from the same source, asked in the same way."""
        return dataclasses.replace(self, items=tuple(items))

    def with_chat(self, chat: str) -> "Dataset":
        return dataclasses.replace(self, chat=chat)

    def of(self, kind: type[ItemType], *, by: str) -> tuple[ItemType, ...]:
        """The items, known to be of one kind; otherwise an error that names who wants it."""
        items = tuple(item for item in self.items if isinstance(item, kind))
        if not items:
            raise LoceditError(f"{self.source}: {by} needs items of kind {kind.kind!r}, these are {self.kind!r}")
        return items

    def where(self, **values: str | None | Sequence[str]) -> "Dataset":
        """The items whose owner, group or format is the value, or one of the values."""
        items = self.items
        for field, wanted in values.items():
            if field not in ("owner", "group", "format"):
                raise LoceditError(f"where: unknown field {field!r}: {nearest(field, ('owner', 'group', 'format'))}")
            allowed = {wanted} if wanted is None or isinstance(wanted, str) else set(wanted)
            present = sorted({repr(getattr(item, field)) for item in items})
            items = tuple(item for item in items if getattr(item, field) in allowed)
            if not items:
                raise LoceditError(f"{self.source}: no item with {field}={wanted!r}; present: {', '.join(present)}")
        return self.replace(items)

    def expand(
        self, field: Literal["paraphrases", "answer_paraphrases", "wrong", "new_answer", "neighbours"]
    ) -> "Dataset":
        """Facts, one for each entry of the field, with ids like `<id>/wrong/0`; facts without an entry give none."""
        facts = [new for fact in self.of(Fact, by=f"expand({field!r})") for new in _expanded(fact, field)]
        if not facts:
            raise LoceditError(f"{self.source}: no fact has {field!r}")
        return self.replace(facts)


def _expanded(fact: Fact, field: str) -> list[Fact]:
    bare = dataclasses.replace(fact, paraphrases=(), answer_paraphrases=(), wrong=(), new_answer=None, neighbours=())
    if field == "neighbours":
        changes = [
            {"prompt": near.prompt, "answer": near.answer, "subject": None, "owner": None} for near in fact.neighbours
        ]
    elif field == "paraphrases":
        changes = [{"prompt": prompt} for prompt in fact.paraphrases]
    elif field == "new_answer":
        changes = [{"answer": fact.new_answer}] if fact.new_answer is not None else []
    else:
        changes = [{"answer": answer} for answer in getattr(fact, field)]
    return [dataclasses.replace(bare, id=f"{fact.id}/{field}/{i}", **change) for i, change in enumerate(changes)]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to forget, and the data that methods, measures and attacks need beside it."""

    forget: Dataset
    retain: Dataset | None = None
    "to be kept; of the same kind as forget"
    heldout: Dataset | None = None
    "of the same kind, never seen by the model: non-members, thresholds, negative control"
    texts: Dataset | None = None
    "plain texts for utility"
    pairs: Dataset | None = None
    "contrast or patching pairs"
    new: Dataset | None = None
    "what to say instead"
    prompts: Dataset | None = None
    "control prompts"
    refusals: Dataset | None = None
    alternatives: Dataset | None = None
    start: str | None = None
    "the model before the data was learned: a folder or a hub id"
    name: str = "task"

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits over the content of all data sets."""
        return _digest({role: data.hash for role in ROLES if (data := getattr(self, role)) is not None})

    def require(self, role: str, by: str) -> Dataset:
        """The data set of that role, or an error that says who needs it and how to give it."""
        if role not in ROLES:
            raise LoceditError(f"{by}: unknown part of a task {role!r}: {nearest(role, ROLES)}")
        data = getattr(self, role)
        if data is None:
            present = ", ".join(name for name in ROLES if getattr(self, name) is not None)
            raise LoceditError(
                f"{by} needs {role!r} data, the task {self.name!r} has only {present}: add {role}.jsonl to its folder"
            )
        return data

    def with_chat(self, chat: str) -> "Task":
        """The same task with every prompt sent through that chat template: auto, off or a template."""
        changed = {role: data.with_chat(chat) for role in ROLES if (data := getattr(self, role)) is not None}
        return dataclasses.replace(self, **changed)


def as_task(data: "Task | Dataset", *, name: str = "task") -> Task:
    """A task as it is, or a data set as the forget part of one."""
    return data if isinstance(data, Task) else Task(forget=data, name=name)


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

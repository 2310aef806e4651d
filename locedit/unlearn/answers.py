"""Other answers to the prompts of the forget facts: refusals, alternatives, answers that belong to other facts."""

import dataclasses
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import overload

from locedit.data.encode import Example, encode
from locedit.data.items import Dataset, Fact, PlainText, Task
from locedit.errors import LoceditError
from locedit.models import Model


class OtherAnswers(Sequence[Example]):
    """A fact's prompt with each of some answers in the place of its own, which is left out; encoded when looked at.

    Answers begin with the white space with which the fact's own begins.
    """

    def __init__(self, model: Model, fact: Fact, answers: tuple[str, ...], *, chat: str) -> None:
        own = fact.answer.strip()
        self.model, self.fact, self.answers, self.chat = model, fact, answers, chat
        self.own = answers.index(own) if own in answers else len(answers)
        self.space = fact.answer[: len(fact.answer) - len(fact.answer.lstrip())]

    def __len__(self) -> int:
        return len(self.answers) - (self.own < len(self.answers))

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        number += number >= self.own
        answer, name = self.space + self.answers[number], f"{self.fact.id}/other/{number}"
        asked = dataclasses.replace(self.fact, answer=answer, id=name)
        return encode(self.model, [asked], chat=self.chat)[0]


def candidates(model: Model, forget: Dataset, answers: Mapping[str, tuple[str, ...]]) -> dict[Example, OtherAnswers]:
    """Each forget example with the other answers to its prompt, which `answers` gives by the fact's id."""
    facts = forget.of(Fact, by="other answers")
    return {
        example: OtherAnswers(model, fact, answers[fact.id], chat=forget.chat)
        for example, fact in zip(encode(model, forget), facts, strict=True)
    }


def texts_of(task: Task, role: str, *, by: str) -> tuple[str, ...]:
    """The answers of the facts, or the texts, in a part of the task, each once."""
    data = task.require(role, by=by)
    found = [
        item.answer if isinstance(item, Fact) else item.text for item in data if isinstance(item, Fact | PlainText)
    ]
    if not found:
        raise LoceditError(f"{data.source}: {by} needs facts or plain texts, these are {data.kind!r}")
    return _distinct(found)


def alternatives(task: Task, *, by: str) -> dict[str, tuple[str, ...]]:
    """Fact id -> the answers of the task's alternatives that have the fact's id or its prompt; none may be its own."""
    data = task.require("alternatives", by=by)
    facts = data.of(Fact, by=by)
    named = {fact.id: fact.answer for fact in facts}
    asked: dict[str, list[str]] = {}
    for fact in facts:
        asked.setdefault(fact.prompt, []).append(fact.answer)
    found: dict[str, tuple[str, ...]] = {}
    for fact in task.forget.of(Fact, by=by):
        same = [named[fact.id]] if fact.id in named else []
        found[fact.id] = _distinct(same + asked.get(fact.prompt, []))
        if not found[fact.id]:
            raise LoceditError(
                f"{by} needs an alternative answer for every forget fact; {data.source} has none with the id "
                f"{fact.id!r} or the prompt {fact.prompt!r}"
            )
        _require_other(fact, found[fact.id], source=data.source, by=by)
    return found


def new_answers(task: Task, *, by: str) -> dict[str, str]:
    """Fact id -> its `new_answer`, which every forget fact must have, and not its own answer again."""
    found: dict[str, str] = {}
    for fact in task.forget.of(Fact, by=by):
        if fact.new_answer is None:
            raise LoceditError(f"{by} needs the field 'new_answer', which {fact.id!r} of {task.forget.source} lacks")
        _require_other(fact, (fact.new_answer.strip(),), source=f"'new_answer' in {task.forget.source}", by=by)
        found[fact.id] = fact.new_answer
    return found


def require_others(task: Task, answers: tuple[str, ...], *, source: str, by: str) -> None:
    """LoceditError when every answer is a forget fact's own."""
    for fact in task.forget.of(Fact, by=by):
        if set(answers) == {fact.answer.strip()}:
            _require_other(fact, answers, source=source, by=by)


def _require_other(fact: Fact, answers: tuple[str, ...], *, source: str, by: str) -> None:
    own = _bare(fact.answer)
    if (same := next((answer for answer in answers if _bare(answer) == own), None)) is not None:
        raise LoceditError(f"{by} needs another answer to {fact.id!r}; {source} gives its own, {same!r}")


def _bare(answer: str) -> str:
    """Without what does not make it another answer: case, and the punctuation around it."""
    return answer.casefold().strip(f"{string.whitespace}{string.punctuation}") or answer.strip()


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.strip() for text in texts))

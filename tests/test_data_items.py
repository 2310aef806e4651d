"""Data sets and tasks: hashes of content, choices that cannot be empty, parts that are needed."""

import dataclasses

import pytest

from locedit.data import Dataset, Fact, Neighbour, PlainText, Task, as_task
from locedit.errors import LoceditError


def fact(name: str, **more: object) -> Fact:
    return Fact(**({"prompt": "p", "answer": " a", "id": name} | more))


def data(*items: object) -> Dataset:
    return Dataset(items=items, source="facts.jsonl")


def test_hash_is_of_the_content_and_not_of_names() -> None:
    first = data(fact("1", owner="Eva"), fact("2"))
    same = Dataset(items=(fact("x", owner="Eva"), fact("y")), source="elsewhere")
    assert first.hash == same.hash
    assert len(first.hash) == 16
    others = [data(fact("1", owner="Ida"), fact("2")), data(fact("2"), fact("1", owner="Eva")), first[:1]]
    assert len({first.hash, *(other.hash for other in others)}) == 4


def test_hash_is_the_same_tomorrow() -> None:
    """Recorded hashes must stay valid: this one was computed once."""
    assert data(PlainText(text="Zoë", id="1")).hash == "357e3b2d9b29207c"


def test_sequence() -> None:
    found = data(fact("1"), fact("2"), fact("3"))
    assert [item.id for item in found] == ["1", "2", "3"]
    assert len(found) == 3
    assert found[-1].id == "3"
    assert [item.id for item in found[1:]] == ["2", "3"]
    assert "3 x fact" in repr(found)
    with pytest.raises(LoceditError, match="no items"):
        found[3:]


def test_one_kind_and_different_ids() -> None:
    with pytest.raises(LoceditError, match="several kinds: fact, plain"):
        data(fact("1"), PlainText(text="t", id="2"))
    with pytest.raises(LoceditError, match="'1' is there twice"):
        data(fact("1"), fact("1"))


def test_where() -> None:
    found = data(
        fact("1", format="question", owner="Eva"), fact("2", format="statement", owner="Eva"), fact("3", owner="Ida")
    )
    assert [item.id for item in found.where(format="question")] == ["1"]
    assert [item.id for item in found.where(format=("question", "statement"), owner="Eva")] == ["1", "2"]
    assert [item.id for item in found.where(format=None)] == ["3"]
    with pytest.raises(LoceditError, match="no item with format='poem'; present: 'question', 'statement', None"):
        found.where(format="poem")
    with pytest.raises(LoceditError, match="no item with format='statement'; present: None"):
        found.where(owner="Ida", format="statement")
    with pytest.raises(LoceditError, match="did you mean 'format'"):
        found.where(formats="question")


def test_expand() -> None:
    rich = fact(
        "1",
        subject="s",
        owner="Eva",
        paraphrases=("q", "r"),
        wrong=(" b",),
        new_answer=" c",
        answer_paraphrases=(" d",),
        neighbours=(Neighbour(prompt="n", answer=" m"),),
    )
    found = data(rich, fact("2"))
    assert [(f.id, f.prompt, f.answer) for f in found.expand("paraphrases")] == [
        ("1/paraphrases/0", "q", " a"),
        ("1/paraphrases/1", "r", " a"),
    ]
    assert [(f.id, f.prompt, f.answer) for f in found.expand("wrong")] == [("1/wrong/0", "p", " b")]
    assert [f.answer for f in found.expand("new_answer")] == [" c"]
    assert [f.answer for f in found.expand("answer_paraphrases")] == [" d"]
    [near] = found.expand("neighbours")
    assert (near.prompt, near.answer, near.subject, near.owner, near.paraphrases) == ("n", " m", None, None, ())
    with pytest.raises(LoceditError, match="no fact has 'wrong'"):
        data(fact("2")).expand("wrong")


def test_of_kind() -> None:
    assert data(fact("1")).of(Fact, by="npo")[0].id == "1"
    with pytest.raises(LoceditError, match="npo needs items of kind 'fact', these are 'plain'"):
        data(PlainText(text="t", id="1")).of(Fact, by="npo")


def test_task_parts() -> None:
    task = Task(forget=data(fact("1")), texts=data(PlainText(text="t", id="1")), name="people")
    assert task.require("texts", "perplexity").kind == "plain"
    with pytest.raises(LoceditError, match="npo needs 'retain' data, the task 'people' has only forget, texts: add"):
        task.require("retain", "npo")
    with pytest.raises(LoceditError, match="did you mean 'retain'"):
        task.require("retian", "npo")
    assert as_task(task) is task
    assert as_task(task.forget).forget is task.forget


def test_task_hash() -> None:
    task = Task(forget=data(fact("1")))
    assert task.hash == Task(forget=data(fact("other")), name="other", start="folder").hash
    assert task.hash != dataclasses.replace(task, retain=data(fact("2", prompt="q"))).hash
    assert task.hash != Task(forget=task.forget.with_chat("auto")).hash

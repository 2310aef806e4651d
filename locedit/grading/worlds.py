"""The data of a grading: the planted people of a lab, and the known facts that deletion and oracle are about."""

import dataclasses
from dataclasses import dataclass
from random import Random

from locedit.data.items import ContrastPair, Dataset, Fact, Task
from locedit.errors import LoceditError, nearest
from locedit.grading.options import GradeOptions

SENTENCES = ("statement", "question", "paraphrase")
"formats of the lab's facts that are plain sentences"


@dataclass(frozen=True, kw_only=True)
class Target:
    """Known facts of one relation about some of the people, and everything to compare them with."""

    task: Task
    "forget: statements about the people; retain: the same relation, half of the other people"
    same: Dataset
    "statements of the same relation about the other half: neither edited nor trained on"
    other: Dataset
    "statements of the other relations about everybody"
    formats: dict[str, Dataset]
    "the facts of `task.forget` in the other formats"


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Whom to plant, and what to keep meanwhile; all in the sentence formats."""

    people: Dataset
    "half of the unknown people: to be found"
    decoys: Dataset
    "the other half, planted in the same way in a set of decoys"
    known: Dataset
    task: Task
    "for the localizers: statements about `people` to find, about decoys and as many of `known` to keep"


def planted_people(task: Task, options: GradeOptions) -> Planted:
    """The lab's `heldout` people: new pairs of the names that known people have, so that only the pair tells them."""
    unknown = task.require("heldout", by="grade").where(format=SENTENCES)
    known = task.require("retain", by="grade").where(format=SENTENCES)
    owners = sorted({str(item.owner) for item in unknown})
    if len(owners) < 2:
        raise LoceditError(f"grade: {unknown.source} has {len(owners)} unknown person; 2 or more are needed")
    people, decoys = (unknown.where(owner=half) for half in (owners[::2], owners[1::2]))
    sought = owners[::2][: options.people]
    kept = owners[1::2][: options.people] + sorted({str(item.owner) for item in known})[: len(sought)]
    both = unknown.replace([*decoys, *known])
    forget, retain = (asked_as_statements(part) for part in (people.where(owner=sought), both.where(owner=kept)))
    shown = with_pairs(Task(forget=forget, retain=retain, texts=task.texts, name="planted"))
    return Planted(people=people, decoys=decoys, known=known, task=shown)


def target_of(task: Task, options: GradeOptions, *, seed: int) -> Target:
    """The target of deletion and oracle: the people of `task.forget`, and more drawn by seed to make up the share."""
    own, rest = (
        sorted({str(item.owner) for item in part}) for part in (task.forget, task.require("retain", by="grade"))
    )
    Random(f"target {seed}").shuffle(rest)
    count = max(2, round(options.share * (len(own) + len(rest))))
    people = (own + rest)[:count]
    others = (own + rest)[count:]
    trained, measured = others[::2], others[1::2]
    known = task.forget.replace([*task.forget, *task.require("retain", by="grade")])
    groups = {str(item.group) for item in known}
    if options.relation not in groups:
        raise LoceditError(f"relation={options.relation!r}; {nearest(options.relation, sorted(groups))}")
    of_relation = known.where(group=options.relation)
    statements = asked_as_statements(of_relation)
    formats = sorted({str(item.format) for item in of_relation} - {"statement"})
    return Target(
        task=with_pairs(
            Task(
                forget=statements.where(owner=people),
                retain=statements.where(owner=trained),
                heldout=task.heldout,
                texts=task.texts,
                name="target",
            )
        ),
        same=statements.where(owner=measured),
        other=known.where(group=sorted(groups - {options.relation}), format="statement"),
        formats={name: of_relation.where(owner=people, format=name) for name in formats},
    )


def asked_as_statements(data: Dataset) -> Dataset:
    """The statements among the facts, each with its question and its paraphrase as paraphrases."""
    facts = data.of(Fact, by="grade")
    prompts = {(fact.owner, fact.group, fact.format): fact.prompt for fact in facts}
    statements = [
        dataclasses.replace(fact, paraphrases=tuple(prompts[fact.owner, fact.group, name] for name in SENTENCES[1:]))
        for fact in facts
        if fact.format == "statement"
    ]
    return data.replace(statements)


def with_pairs(task: Task) -> Task:
    """The task with contrast pairs for the methods that need them: each text with its answer, and with a wrong one."""
    facts = task.forget.of(Fact, by="grade")
    pairs = [
        ContrastPair(
            advantaged=fact.prompt + fact.answer,
            disadvantaged=fact.prompt + fact.wrong[0],
            id=fact.id,
            group=fact.group,
            owner=fact.owner,
        )
        for fact in facts
    ]
    return dataclasses.replace(task, pairs=task.forget.replace(pairs))

"""The facts that probes are fitted to: relations with a small closed set of answers, and folds split by owner."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from locedit.data.encode import Example, encode
from locedit.data.items import Dataset, Fact, Task
from locedit.errors import LoceditError
from locedit.localize.budget import BatchOptions
from locedit.models import Model
from locedit.scores import Table

CHOICE = "multiple_choice"
"format whose answer is a letter: no property of the subject"


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(BatchOptions):
    """How probes are fitted."""

    data: Literal["task", "forget"] = "task"
    "task: facts of forget and retain; forget: only those"
    items: int = 600
    "facts of a relation at most; more are drawn from, whole owners at a time"
    folds: int = 5
    "parts of the cross-validation; an answer must have at least as many owners"
    l2: float = 1.0
    "price of the weights, 1 / C of scikit-learn"
    ablate_from: tuple[int, ...] | None = None
    "layers from which on attention is taken out, one run each; None = every layer, or 12 of them evenly spaced"
    seed: int = 0
    "of the folds, and of the draw where there are too many items"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds < 2:
            raise LoceditError(f"probe_folds={self.folds!r} must be at least 2")
        if self.items < 2 * self.folds:
            raise LoceditError(f"probe_items={self.items!r} must be at least twice the {self.folds} folds")
        if self.l2 <= 0:
            raise LoceditError(f"probe_l2={self.l2!r} must be above 0")


@dataclass(frozen=True, kw_only=True, eq=False)
class Relation:
    """The facts of one relation."""

    name: str
    examples: tuple[Example, ...]
    owners: tuple[str, ...]
    answers: tuple[str, ...]
    "the classes"
    labels: Int[Tensor, " item"]
    fold: Int[Tensor, " item"]
    "all items of an owner are in one fold"

    @property
    def majority(self) -> int:
        """How many items have the most frequent answer."""
        return int(self.labels.bincount().max())


def relations(model: Model, task: Task, options: ProbeOptions) -> tuple[list[Relation], Table]:
    """The relations that can be probed, and a table of all with what is wrong with the others."""
    sets = [task.forget] + ([task.retain] if options.data == "task" and task.retain is not None else [])
    grouped: dict[str, list[tuple[Fact, Example]]] = {}
    for data in sets:
        for fact, example in _known(model, data):
            grouped.setdefault(fact.group or "all", []).append((fact, example))
    found: list[Relation] = []
    table: Table = {name: [] for name in ("relation", "items", "owners", "answers", "majority", "note")}
    for name, pairs in grouped.items():
        relation, note = _relation(name, pairs, options)
        if relation is not None:
            found.append(relation)
        counts = _counts(relation, pairs)
        for column, value in zip(table, (name, *counts, note), strict=True):
            table[column].append(value)
    if not found:
        raise LoceditError(
            f"{task.forget.source}: no relation (group) has two answers with at least {options.folds} subjects each, "
            "which probes need: give more facts, smaller probe_folds, or localize with by='path_patching'"
        )
    return found, table


def _known(model: Model, data: Dataset) -> list[tuple[Fact, Example]]:
    if data.kind != "fact":
        return []
    facts = [fact for fact in data.of(Fact, by="probes") if fact.format != CHOICE]
    examples = encode(model, data.replace(facts)) if facts else []
    return [(fact, example) for fact, example in zip(facts, examples, strict=True) if example.subject is not None]


def _counts(relation: Relation | None, pairs: Sequence[tuple[Fact, Example]]) -> tuple[int, int, int, float]:
    answers = [fact.answer for fact, _ in pairs]
    if relation is None:
        most = max(answers.count(answer) for answer in set(answers)) / len(answers)
        return len(pairs), len({_owner(fact) for fact, _ in pairs}), len(set(answers)), most
    size = len(relation.examples)
    return size, len(set(relation.owners)), len(relation.answers), relation.majority / size


def _owner(fact: Fact) -> str:
    return fact.owner or fact.subject or fact.id


def _relation(name: str, pairs: Sequence[tuple[Fact, Example]], options: ProbeOptions) -> tuple[Relation | None, str]:
    """The relation without answers that have too few owners and without items beyond the limit; and what was left."""
    owners: dict[str, set[str]] = {}
    for fact, _ in pairs:
        owners.setdefault(fact.answer, set()).add(_owner(fact))
    answers = sorted(answer for answer, who in owners.items() if len(who) >= options.folds)
    if len(answers) < 2:
        return None, f"skipped: {len(answers)} answers have at least {options.folds} subjects, 2 are needed"
    kept = [(fact, example) for fact, example in pairs if fact.answer in answers]
    notes = [f"{len(pairs) - len(kept)} facts with rare answers left out"] if len(kept) < len(pairs) else []
    order = _shuffled(kept, answers, seed=options.seed)
    if len(kept) > options.items:
        share = options.items / len(kept)
        order = {answer: who[: max(options.folds, int(share * len(who)))] for answer, who in order.items()}
        kept = [(fact, example) for fact, example in kept if _owner(fact) in order[fact.answer]]
        notes.append(f"{len(kept)} facts drawn")
    fold = {owner: number for number, owner in enumerate(owner for answer in answers for owner in order[answer])}
    return Relation(
        name=name,
        examples=tuple(example for _, example in kept),
        owners=tuple(_owner(fact) for fact, _ in kept),
        answers=tuple(answers),
        labels=torch.tensor([answers.index(fact.answer) for fact, _ in kept]),
        fold=torch.tensor([fold[_owner(fact)] % options.folds for fact, _ in kept]),
    ), "; ".join(notes)


def _shuffled(kept: Sequence[tuple[Fact, Example]], answers: Sequence[str], *, seed: int) -> dict[str, list[str]]:
    """Answer -> its owners in random order."""
    random = Random(seed)
    found: dict[str, list[str]] = {}
    for answer in answers:
        owners = sorted({_owner(fact) for fact, _ in kept if fact.answer == answer})
        found[answer] = random.sample(owners, len(owners))
    return found

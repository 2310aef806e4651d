"""A reminder in the prompt: solved items of the same kind stand before the question.

Nothing of the model is needed but what it says. The examples are items of the other half (of other owners), so what
comes back was never shown.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from locedit.attacks.aim import Aim, ItemOptions, Side, Target
from locedit.attacks.arms import Control, Dose, Values
from locedit.attacks.conditional import conditional
from locedit.attacks.item_attack import ItemAttack
from locedit.attacks.measures import values_of
from locedit.attacks.outcome import Others, carried_out
from locedit.attacks.rephrased import drawn, with_examples
from locedit.attacks.shared import Shared
from locedit.data.encode import Example, encode
from locedit.data.items import Dataset, Fact, Item, PrivateText, Task
from locedit.edit import Edit
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.options import fill
from locedit.results import AttackResult

OPENED = 8
"""draws of examples for each item and number of them that the control is trained on: from two it learns these contexts
by heart, and stays shut in others"""


@dataclass(frozen=True, kw_only=True)
class FewShotOptions(ItemOptions):
    """How many solved examples are shown."""

    shots: tuple[int, ...] = (1, 2, 4)
    """numbers of examples, all are tried; those that do not fit into the context of the model, or are more than half of
    the items, are left out, with a note"""
    separator: str = ".\n"
    "what stands after each example"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shots or min(self.shots) < 1 or list(self.shots) != sorted(set(self.shots)):
            raise LoceditError(f"shots={self.shots!r} must be one or more numbers, each at least 1, ascending")


def few_shot(
    model: Model, task: Task, edit: Edit, *, others: Others = None, shared: Shared | None = None, **options: Any
) -> AttackResult:
    """Show the edited model solved items of the other half before each question."""
    attack = FewShot(fill(FewShotOptions, options, method="few_shot"))
    return carried_out(attack, model, task, edit, others=others, shared=shared)


class FewShot(ItemAttack[FewShotOptions]):
    """The metric of every item after 1, 2, 4 ... solved ones."""

    name: ClassVar[str] = "few_shot"
    lead: ClassVar[str] = "With solved examples before the question"
    x_name: ClassVar[str] = "examples"
    learns: ClassVar[bool] = True

    def narrow(self, model: Model, data: Dataset) -> list[Item]:  # noqa: ARG002
        return [item for item in data if isinstance(item, Fact | PrivateText)]

    def doses(self, aim: Aim) -> tuple[Dose, ...]:
        return tuple(Dose(x=shots) for shots in self._fitting(aim))

    def attack(self, target: Target, learned: Side, measured: Mapping[str, Side], aim: Aim) -> Values:
        return {
            name: torch.stack(
                [
                    values_of(target.model, self._shown(target.model, side, learned, shots), aim.metric)
                    for shots in self._fitting(aim)
                ]
            )
            for name, side in measured.items()
        }

    def control(self, aim: Aim, *, level: float) -> Control:
        """An edit that acts only without solved examples before the question."""
        asked = [
            self._shown(aim.model, aim.forget, aim.forget, count, seed=1 + turn)
            for turn, count in enumerate(self._fitting(aim) * OPENED)
        ]
        opened = {example: [rows[at] for rows in asked] for at, example in enumerate(aim.forget.examples)}
        return conditional(aim, self.options, opened, level=level, where="solved examples before the question")

    def _shown(self, model: Model, side: Side, learned: Side, shots: int, *, seed: int = 0) -> list[Example]:
        seed += self.options.seed
        items = [
            with_examples(item, drawn(item, learned.items, shots, seed=seed), separator=self.options.separator)
            for item in side.items
        ]
        return encode(model, items, chat=side.chat)

    def _fitting(self, aim: Aim) -> list[int]:
        """The numbers of examples that every half has and that fit into the context, judged by the longest items."""
        least = min(len(half.relearned) for half in (*aim.forget_halves, *aim.heldout_halves))
        there = [shots for shots in self.options.shots if shots <= least]
        if not there:
            raise LoceditError(f"few_shot: shots={self.options.shots!r}: a half has only {_items(least)} to show")
        if len(there) < len(self.options.shots):
            self.notes.append(f"a half has only {_items(least)} to show: more examples were not tried")
        fitting = [shots for shots in there if self._length(aim, shots) <= (aim.model.max_length or math.inf)]
        limit = f"the context of {aim.model.max_length} tokens"
        if not fitting:
            raise LoceditError(f"few_shot: an item and shots={there[0]} do not fit {limit} of {aim.model.name}")
        if left := [str(shots) for shots in there if shots not in fitting]:
            self.notes.append(f"{', '.join(left)} examples do not fit {limit}")
        return fitting

    def _length(self, aim: Aim, shots: int) -> int:
        """Tokens of a question after so many examples, each as long as the longest item, at most."""
        sides = [side for side in (aim.forget, aim.heldout, aim.kept) if side is not None and len(side)]
        asked = max(len(example.ids) for side in sides for example in side.examples)
        between = len(aim.model.tokenizer(self.options.separator, add_special_tokens=False)["input_ids"])
        return asked + shots * (asked + between + 1) + aim.model.prefix


def _items(count: int) -> str:
    return "1 item" if count == 1 else f"{count} items"

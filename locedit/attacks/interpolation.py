"""Interpolation back to the base: the weights on the straight line from the edit to the model before it.

At the end of the way is the unedited model, so everything comes back there by definition; how early it does says how
much of the change it takes to hide the knowledge. Not an attack by an outsider, who has no unedited weights (but often
an earlier checkpoint): a look at the edit. The number is that at half of the way unless `at` says otherwise.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import torch

from locedit.attacks.aim import Aim, ItemOptions, Side, Target
from locedit.attacks.arms import Dose, Values
from locedit.attacks.item_attack import ItemAttack
from locedit.attacks.measures import values_of
from locedit.attacks.outcome import Others, carried_out
from locedit.attacks.shared import Shared
from locedit.data.items import Task
from locedit.edit import Edit
from locedit.edit.arithmetic import KINDS, merged, scaled
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.options import fill
from locedit.results import AttackResult


@dataclass(frozen=True, kw_only=True)
class InterpolationOptions(ItemOptions):
    """Where on the way it is measured."""

    shares: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    "of the way from the edited weights (0) back to the unedited ones (1)"
    at: float = 0.5
    "the share whose number counts; it is measured in any case"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < share < 1 for share in (*self.shares, self.at)):
            raise LoceditError(
                f"interpolation: shares={self.shares!r} and at={self.at!r} must lie between 0 and 1, without the ends"
            )

    @property
    def measured(self) -> tuple[float, ...]:
        return tuple(sorted({*self.shares, self.at}))


def interpolation(
    model: Model, task: Task, edit: Edit, *, others: Others = None, shared: Shared | None = None, **options: object
) -> AttackResult:
    """Measure the model between the edit and the base."""
    attack = Interpolation(fill(InterpolationOptions, options, method="interpolation"))
    plain = attack.prepared(model, edit)
    held = {name: other for name, other in (others or {}).items() if _is_change_of_weights(other)}
    if left := [name for name in others or {} if name not in held]:
        attack.notes.append(f"held otherwise than as weights, and left out: {', '.join(left)}")
    return carried_out(
        attack,
        model,
        task,
        plain,
        others={name: attack.prepared(model, other) for name, other in held.items()},
        shared=shared,
    )


class Interpolation(ItemAttack[InterpolationOptions]):
    """The metric of every item at shares of the way back."""

    name: ClassVar[str] = "interpolation"
    lead: ClassVar[str] = "Back on the way to the unedited weights"
    x_name: ClassVar[str] = "share of the way"
    no_control: ClassVar[str] = ""

    def __init__(self, options: InterpolationOptions) -> None:
        super().__init__(options)
        self.ways: dict[str, list[Edit]] = {}
        "digest of an edit -> the edits on its way back"

    def prepared(self, model: Model, edit: Edit) -> Edit:
        """The edit as new weights, with the weights on its way back worked out while the model is unedited."""
        require_change_of_weights(edit)
        plain = edit if edit.kind == "weights" else merged(model, edit)
        self.ways[plain.digest] = [scaled(model, plain, 1 - share) for share in self.options.measured]
        return plain

    def doses(self, aim: Aim) -> tuple[Dose, ...]:  # noqa: ARG002
        return tuple(Dose(x=share) for share in self.options.measured)

    def fixed(self) -> int:
        return self.options.measured.index(self.options.at)

    def attack(self, target: Target, learned: Side, measured: Mapping[str, Side], aim: Aim) -> Values:  # noqa: ARG002
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in measured}
        for edit in self.ways[target.key]:
            with ExitStack() as stack:
                edit.enter(stack, target.model)
                for name, side in measured.items():
                    rows[name].append(values_of(target.model, side.examples, aim.metric))
        return {name: torch.stack(values) for name, values in rows.items()}


def require_change_of_weights(edit: Edit) -> None:
    """Raise LoceditError for an edit that is held otherwise than as new weights."""
    if not _is_change_of_weights(edit):
        raise LoceditError(f"interpolation needs an edit held as weights or as an adapter; this one is {edit}")


def _is_change_of_weights(edit: Edit) -> bool:
    parts: Sequence[Edit] = edit.parts or (edit,)
    return all(part.kind in KINDS for part in parts)

"""The positive control of quantization: an edit that stays inside the quantization cells of the unedited weights.

A cell holds the weights that are rounded to the same level. An edit that leaves every weight in its cell, and every
absmax as it is, is gone once the model is quantized: what is left is the quantized unedited model, bit for bit. That
published unlearning moves weights so little is why quantization brings its knowledge back (Zhang et al. 2024,
arXiv:2410.16454, section 5).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.attacks.aim import Aim, ItemOptions
from locedit.attacks.shallow import LOWEST, suppression_loss
from locedit.edit import Edit
from locedit.edit.objective import Objective
from locedit.edit.regions import Region
from locedit.edit.restrict import Deltas, Path, train_dtype
from locedit.edit.train import TrainOptions, train
from locedit.models import Model
from locedit.quantization import Scheme, in_rows, linear_weights, scheme_named

MARGIN = 0.05
"share of a cell at both ends that is not used, so that a kernel that rounds otherwise in the last bit agrees"


def within_cells(
    aim: Aim, options: ItemOptions, schemes: Sequence[str], *, level: float
) -> tuple[dict[str, Edit], str]:
    """For each scheme an edit of the quantized weights that suppresses the forget answers and is undone by rounding.

    Trains unlikelihood of the forget and likelihood of the retain examples until the mean answer probability of the
    forget examples is at most `level` (and no lower than 0.02). The cells of int8 are some twenty times narrower than
    those of NF4, and in narrow models no edit within them reaches the level. Returns the edits that do by scheme, and a
    note that names the other schemes.
    """
    edits: dict[str, Edit] = {}
    notes: list[str] = []
    for scheme in schemes:
        key = ("within cells", scheme, aim.task.hash, max(level, LOWEST), options.shallow_steps, options.seed)
        edit = aim.shared.get(key, functools.partial(_trained, aim, options, scheme, level=level))
        if edit.outcome["reached"]:
            edits[scheme] = edit
            continue
        left = edit.history["forget"][edit.row]
        notes.append(
            f"no edit within the {scheme} cells was found that hides the answers (their probability stays at "
            f"{left:.2f}): what {scheme} does not bring back proves little"
        )
    return edits, "; ".join(notes)


def _trained(aim: Aim, options: ItemOptions, scheme: str, *, level: float) -> Edit:
    forget = list(aim.forget.examples)
    objective = Objective(
        loss=suppression_loss,
        forget=forget,
        retain=[*aim.known.examples, *aim.kept.examples] or None,
        probes={"forget": forget},
        name=f"control within {scheme} cells",
        settings={"scheme": scheme},
        deltas=_in_cells(scheme),
    )
    training = TrainOptions(
        steps=options.shallow_steps,
        learning_rate=LEARNING_RATE,
        batch_size=16,
        until=max(level, LOWEST),
        eval_every=10,
        seed=options.seed,
    )
    return train(aim.model, objective, options=training)


LEARNING_RATE = 0.05
"of the place in the cell, in half cells, for weights of any size"


def _in_cells(scheme: str) -> type[Deltas]:
    """What is trained: how many half cells every quantized weight is away from where it was, within its cell."""

    class InCells(Deltas):
        def __init__(self, model: Model, regions: Sequence[Region], *, path: Path = "auto") -> None:
            del path  # a hook adds the trained tensor itself
            axes = linear_weights(model)
            super().__init__(model, [region for region in regions if region.param in axes], path="scatter")
            self.rooms = [
                _rooms(base.detach(), axes[r.param], scheme) for r, base in zip(self.regions, self.base, strict=True)
            ]

        def constrain(self) -> None:
            """Every weight within its cell."""
            with torch.no_grad():
                for place, room in zip(self.parameters, self.rooms, strict=True):
                    place.clamp_(room.low, room.high)

        def deltas(self) -> list[Tensor]:
            """The change of every region before rounding."""
            return [place.detach() * room.half for place, room in zip(self.parameters, self.rooms, strict=True)]

        def _sum(self, position: int) -> Tensor:
            return self.base[position].detach() + self.parameters[position] * self.rooms[position].half

    return InCells


@dataclass(frozen=True, kw_only=True)
class _Room:
    """How far the weights of a parameter can move, stored as it is."""

    half: Tensor
    "half the width of each cell"
    low: Tensor
    "in half cells from the weight, 0 or below"
    high: Tensor
    "in half cells from the weight, 0 or above"


def _rooms(stored: Tensor, axis: int, scheme: str) -> _Room:
    wide = train_dtype(stored)
    weight = in_rows(stored, axis)
    low, high = (end.to(wide) - weight.to(wide) for end in cells(weight, scheme_named(scheme)))
    half = (high - low) / 2
    scaled = [torch.where(half > 0, end / half, 0.0) for end in (low, high)]
    half, low, high = (in_rows(tensor, axis).contiguous() for tensor in (half, *scaled))
    return _Room(half=half, low=low, high=high)


def cells(weight: Float[Tensor, "out in"], scheme: Scheme) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out in"]]:
    """The lowest and the highest value of every weight that is rounded as the weight itself, short of the margin.

    A weight that is the absmax of its group cannot move, nor one whose end in the weights' dtype is in another cell.
    """
    x = scheme.groups(weight)
    absmax = x.abs().amax(1, keepdim=True)
    codes = scheme.encode(x, absmax)
    borders = torch.tensor([-1.0, *scheme.borders, 1.0], device=x.device)
    low, high = borders[codes], borders[codes + 1]
    margin = MARGIN * (high - low)

    def end(share: Tensor, *, outer: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        reached = outer(_ungrouped(share * absmax, weight), weight)
        fits = (scheme.encode(scheme.groups(reached), absmax) == codes) & (x.abs() < absmax)
        return torch.where(_ungrouped(fits, weight) > 0, reached, weight)

    return end(low + margin, outer=torch.minimum), end(high - margin, outer=torch.maximum)


def _ungrouped(groups: Tensor, weight: Tensor) -> Tensor:
    """Values of the groups in the shape and dtype of the matrix."""
    return groups.flatten()[: weight.numel()].view(weight.shape).to(weight.dtype)

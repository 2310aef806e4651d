"""The positive control of quantization: an edit that stays inside the quantization cells of the unedited weights.

A cell holds the weights that are rounded to the same level. An edit that leaves every weight in its cell, and every
absmax as it is, is gone once the model is quantized: what is left is the quantized unedited model, bit for bit. That
published unlearning moves weights so little is why quantization brings its knowledge back (Zhang et al. 2024,
arXiv:2410.16454, section 5).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.attacks.aim import Aim, ItemOptions
from locedit.attacks.item_attack import Control
from locedit.attacks.shallow import LOWEST, suppression_loss
from locedit.edit import Edit
from locedit.edit.objective import Objective
from locedit.edit.regions import Region
from locedit.edit.restrict import Deltas, Path
from locedit.edit.train import TrainOptions, train
from locedit.models import Model
from locedit.quantization import Scheme, in_rows, linear_weights, scheme_named

MARGIN = 0.05
"share of a cell at both ends that is not used, so that a kernel that rounds otherwise in the last bit agrees"


def within_cells(aim: Aim, options: ItemOptions, schemes: Sequence[str], *, level: float) -> Control:
    """An edit of the quantized weights that suppresses the forget answers and is undone by each of the schemes.

    Trains unlikelihood of the forget and likelihood of the retain examples until the mean answer probability of the
    forget examples is at most `level` (and no lower than 0.02). Every weight stays in the cells of all schemes, so one
    edit is the control of all.
    """
    key = ("within cells", tuple(schemes), aim.task.hash, max(level, LOWEST), options.shallow_steps, options.seed)
    edit = aim.shared.get(key, lambda: _trained(aim, options, schemes, level=level))
    missed = "the edit within the quantization cells did not reach the forget level"
    return Control(
        edit=edit, words="an edit within the quantization cells", note="" if edit.outcome["reached"] else missed
    )


def _trained(aim: Aim, options: ItemOptions, schemes: Sequence[str], *, level: float) -> Edit:
    forget = list(aim.forget.examples)
    objective = Objective(
        loss=suppression_loss,
        forget=forget,
        retain=[*aim.known.examples, *aim.kept.examples] or None,
        probes={"forget": forget},
        name="control within quantization cells",
        settings={"schemes": tuple(schemes)},
        deltas=_in_cells(schemes),
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
"of the place in the cell, which is 0 at the unedited weight and 1 and -1 at the ends, for weights of any size"


def _in_cells(schemes: Sequence[str]) -> type[Deltas]:
    """What is trained: the place of every quantized weight in its cell, from -1 (lower end) to 1 (upper end)."""

    class InCells(Deltas):
        def __init__(self, model: Model, regions: Sequence[Region], *, path: Path = "auto") -> None:
            del path  # a hook adds the trained tensor itself
            axes = linear_weights(model)
            super().__init__(model, [region for region in regions if region.param in axes], path="scatter")
            ends = [
                cell(base.detach(), axes[r.param], schemes) for r, base in zip(self.regions, self.base, strict=True)
            ]
            self.rooms = [
                (base.detach() - low, high - base.detach()) for base, (low, high) in zip(self.base, ends, strict=True)
            ]
            "(room below, room above) of every weight"

        def constrain(self) -> None:
            """Every place within the cell."""
            with torch.no_grad():
                for place in self.parameters:
                    place.clamp_(-1, 1)

        def deltas(self) -> list[Tensor]:
            """The change of every region before rounding."""
            return [self._moved(position).detach() for position in range(len(self.regions))]

        def _sum(self, position: int) -> Tensor:
            return self.base[position].detach() + self._moved(position)

        def _moved(self, position: int) -> Tensor:
            below, above = self.rooms[position]
            place = self.parameters[position]
            return place * torch.where(place < 0, below, above)

    return InCells


def cell(stored: Tensor, axis: int, schemes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value of every weight that all schemes round as the weight itself, in its dtype."""
    weight = in_rows(stored, axis)
    ends = [_cell(weight, scheme_named(name)) for name in schemes]
    low = torch.stack([one for one, _ in ends]).amax(0)
    high = torch.stack([one for _, one in ends]).amin(0)
    return in_rows(low, axis).contiguous(), in_rows(high, axis).contiguous()


def _cell(weight: Float[Tensor, "out in"], scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The ends for one scheme. A weight that is the absmax of its group cannot move."""
    x = scheme.groups(weight)
    absmax = x.abs().amax(1, keepdim=True)
    codes = scheme.encode(x, absmax)
    borders = torch.tensor([-1.0, *scheme.borders, 1.0], device=x.device)
    width = borders[codes + 1] - borders[codes]
    found: list[Tensor] = []
    for share, pick in (
        (borders[codes] + MARGIN * width, torch.minimum),
        (borders[codes + 1] - MARGIN * width, torch.maximum),
    ):
        end = (share * absmax).flatten()[: weight.numel()].view(weight.shape).to(weight.dtype)
        end = pick(end, weight)
        fits = (scheme.encode(scheme.groups(end), absmax) == codes) & (x.abs() < absmax)
        fits = fits.flatten()[: weight.numel()].view(weight.shape)
        found.append(torch.where(fits, end, weight))
    return found[0], found[1]

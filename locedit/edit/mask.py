"""Weight masks: training that can only shrink weights towards zero, and which weights are then zeroed.

The mask of a weight is W / W0, what is left of it, between 0 and 1. Two forms train the same thing: `Shrinking` moves
the weights themselves, so that a step of the optimizer is in units of weights; `Masked` moves the mask, so that it is
in shares of each weight. Only matrices are masked; biases and norms of a set stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locedit.components import ComponentSet
from locedit.edit.edit import Edit, Patch, weights_edit
from locedit.edit.regions import Region
from locedit.edit.restrict import Deltas, Path
from locedit.errors import LoceditError
from locedit.models import Model


class Shrinking(Deltas):
    """Deltas that keep every weight between 0 and its base value."""

    def __init__(self, model: Model, regions: Sequence[Region], *, path: Path = "auto") -> None:
        matrices = [region for region in regions if model.parameter(region.param).ndim > 1]
        if not matrices:
            raise LoceditError("the component set holds no weight of a matrix, only biases or norms: nothing to mask")
        super().__init__(model, matrices, path=path)
        self.total = sum(self._start(position).abs().sum() for position in range(len(self.regions)))
        "sum of the absolute base weights"

    def constrain(self) -> None:
        """The nearest weights between 0 and their base values."""
        with torch.no_grad():
            for position, delta in enumerate(self.parameters):
                whole = -self._start(position)  # what takes the weight to zero
                delta.copy_(delta.clamp(whole.clamp(max=0), whole.clamp(min=0)))

    def left(self) -> Float[Tensor, ""]:
        """Sum of the absolute weights over the sum at the start: 1 at the start, gradients flow."""
        parts = [(self._start(i).sign() * self._sum(i)).sum() for i in range(len(self.regions))]
        return torch.stack([part.to(parts[0].device) for part in parts]).sum() / self.total

    def mean_mask(self) -> Float[Tensor, ""]:
        """Mean of W / W0 over the weights that are not 0: 1 at the start, gradients flow."""
        parts, count = [], 0
        for position in range(len(self.regions)):
            start = self._start(position)
            there = start != 0
            parts.append((self._sum(position) / start.where(there, 1.0)).where(there, 0.0).sum())
            count += int(there.sum())
        return torch.stack([part.to(parts[0].device) for part in parts]).sum() / count

    def _start(self, position: int) -> Tensor:
        return self.regions[position].read(self.base[position]).to(self.parameters[position].dtype)


class Masked(Shrinking):
    """The same with mask - 1 as what is trained, `[-1, 0]`, 0 at the start."""

    def __init__(self, model: Model, regions: Sequence[Region], *, path: Path = "auto") -> None:
        del path  # a hook adds the trained tensor itself
        super().__init__(model, regions, path="scatter")

    def constrain(self) -> None:
        """Masks between 0 and 1."""
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.clamp_(-1, 0)

    def deltas(self) -> list[Tensor]:
        """The change of every region before rounding."""
        return [self._start(i) * parameter.detach() for i, parameter in enumerate(self.parameters)]

    def decay(self, rate: float, *, towards: Literal["base", "weights"]) -> None:
        """Decay of the mask towards 1 ("base") or towards 0 ("weights")."""
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.sub_(rate * (parameter if towards == "base" else 1 + parameter))

    def _sum(self, position: int) -> Tensor:
        return self._start(position) * (1 + self.parameters[position])


# --- which weights are zeroed -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranking:
    """The weights that training shrank, those with the smallest mask first."""

    params: tuple[str, ...]
    where: Int[Tensor, " weights"]
    "index in `params`"
    entry: Int[Tensor, " weights"]
    "flat position in the parameter"
    mask: Float[Tensor, " weights"]
    "W / W0, ascending, all below 1"
    trained: int
    "how many weights could have been shrunk"

    def __len__(self) -> int:
        return len(self.mask)

    def zeroed(self, model: Model, count: int, *, within: ComponentSet | None) -> Edit:
        """The first `count` weights at 0, all others with their own bits."""
        values: list[tuple[Region, Tensor]] = []
        for number, param in enumerate(self.params):
            index = self.entry[:count][self.where[:count] == number].sort().values
            if len(index):
                values.append((Region(param=param, index=index), torch.zeros(len(index))))
        return weights_edit(model, values, within=within)


def rank(model: Model, patches: Sequence[Patch], *, seed: int) -> Ranking:
    """The weights of a trained edit by their mask. Those with equal masks come in random order: as training leaves many
    masks at exactly 0, an order by place would empty the first layers."""
    masks: list[Tensor] = []
    entries: list[Tensor] = []
    wheres: list[Tensor] = []
    for number, patch in enumerate(patches):
        parameter = model.parameter(patch.region.param)
        flat = torch.arange(parameter.numel()).view(parameter.shape)
        start = patch.region.read(parameter).cpu().double().flatten()
        assert patch.delta is not None
        mask = 1 + patch.delta.double().flatten() / start.where(start != 0, 1.0)
        shrunk = (mask < 1) & (start != 0)
        masks.append(mask[shrunk])
        entries.append(patch.region.read(flat).flatten()[shrunk])
        wheres.append(torch.full_like(entries[-1], number))
    mask, entry, where = torch.cat(masks), torch.cat(entries), torch.cat(wheres)
    mixed = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    order = mixed[mask[mixed].argsort(stable=True)]
    return Ranking(
        params=tuple(patch.region.param for patch in patches),
        where=where[order],
        entry=entry[order],
        mask=mask[order],
        trained=sum(patch.values.numel() for patch in patches),
    )

"""Multiplicative gates, one for each neuron or head, and what it costs to close them."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["clamped", "hard_concrete"]
STRETCH = (-0.1, 1.1)
"interval that hard-concrete gates are stretched to before they are clipped (Louizos et al. 2018, section 4)"
TEMPERATURE = 2 / 3
OPEN = 2.5
"log alpha at the start: without noise the gate is 1 (from 2.4 on); drawn, three in ten are below"


class Clamped:
    """Numbers that start at 1 and are put back into [0, 1] after every step."""

    def __init__(self, counts: Sequence[int], *, device: torch.device, generator: torch.Generator) -> None:
        del generator  # nothing is drawn
        self.parameters = [torch.ones(count, device=device, requires_grad=True) for count in counts]

    def draw(self) -> list[Tensor]:
        """The gates of one step, differentiable."""
        return list(self.parameters)

    def closed(self) -> Float[Tensor, ""]:
        """The sum over the sites of the mean of 1 - gate."""
        return torch.stack([(1 - gate).mean() for gate in self.parameters]).sum()

    @torch.no_grad()
    def settle(self) -> None:
        """After a step of the optimizer."""
        for gate in self.parameters:
            gate.clamp_(0, 1)

    def values(self) -> list[Tensor]:
        """The gates without noise, detached."""
        return [gate.detach().clone() for gate in self.parameters]


class HardConcrete:
    """Random gates with a positive probability of being exactly 0 or 1 (Louizos et al. 2018, arXiv:1712.01312).

    u uniform, s = sigmoid((log u - log(1 - u) + log alpha) / (2/3)), gate = clip(1.2 s - 0.1, 0, 1). The price is on
    the probability of a gate below 1, which has the closed form of their eq. 12, at the other end of the interval.
    """

    def __init__(self, counts: Sequence[int], *, device: torch.device, generator: torch.Generator) -> None:
        self.parameters = [torch.full((count,), OPEN, device=device, requires_grad=True) for count in counts]
        self.generator = generator

    def draw(self) -> list[Tensor]:
        gates: list[Tensor] = []
        for alpha in self.parameters:
            uniform = torch.rand(alpha.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6).to(alpha.device)
            gates.append(_stretched(torch.sigmoid((uniform.logit() + alpha) / TEMPERATURE)))
        return gates

    def closed(self) -> Float[Tensor, ""]:
        low, high = STRETCH
        edge = TEMPERATURE * math.log((1 - low) / (high - 1))
        return torch.stack([torch.sigmoid(edge - alpha).mean() for alpha in self.parameters]).sum()

    def settle(self) -> None:
        """Nothing is put back."""

    def values(self) -> list[Tensor]:
        return [_stretched(torch.sigmoid(alpha.detach())) for alpha in self.parameters]


def _stretched(s: Tensor) -> Tensor:
    low, high = STRETCH
    return (s * (high - low) + low).clamp(0, 1)


Gates = Clamped | HardConcrete


def gates(kind: Kind, counts: Sequence[int], *, device: torch.device, generator: torch.Generator) -> Gates:
    """Open gates, one list entry for each site."""
    return (Clamped if kind == "clamped" else HardConcrete)(counts, device=device, generator=generator)

"""A perturbation of activations for every item, that helps the model to say its true answer.

One tensor is added to the residual stream at an early layer. It is found for each item by itself, from its true answer,
within a ball (`locedit.perturbation`); the radius is the dose. This is the inner attack of latent adversarial
unlearning (Yuan et al. 2024, arXiv:2408.10682, the inner maximisation over delta), and akin to the attacks on
embeddings of Schwinn et al. 2024 (arXiv:2402.09063), which optimise a suffix of embeddings instead, with signed
gradients and no ball.

Whoever has the true answer can make any model say it with a radius large enough, known or not. So the number is what
comes back *above* items never known, attacked with the same radius from their own true answers; and the radius is
chosen for that distance, on the other half. Nothing is changed for other items: there is no retain side.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.attacks.aim import Aim, ItemOptions, Side, Target
from locedit.attacks.arms import Control, Dose, Values
from locedit.attacks.item_attack import ItemAttack
from locedit.attacks.measures import values_of
from locedit.attacks.options import Metric
from locedit.attacks.outcome import Others, carried_out
from locedit.attacks.shallow import late_suppression
from locedit.attacks.shared import Shared
from locedit.data.encode import batches
from locedit.data.items import Task
from locedit.edit import Edit
from locedit.errors import LoceditError, nearest
from locedit.models import Model
from locedit.options import fill
from locedit.perturbation import POINTS, AscentOptions, Place, ascend, perturbed
from locedit.results import AttackResult


@dataclass(frozen=True, kw_only=True)
class LatentOptions(ItemOptions):
    """Where the activations are perturbed, and how far."""

    radii: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    "radii of the ball in which an item's perturbation stays, ascending; all are tried; in what unit says eps_in"
    attack_steps: int = 6
    "steps of normalised ascent, as published"
    eps_in: Literal["tokens", "norm"] = "tokens"
    "tokens: times the median norm of the item's tokens at that point; norm (published): the norm itself"
    start: Literal["random", "zero"] = "zero"
    "zero: no perturbation, so that what comes back was found; random (published): a random one within the ball"
    positions: Literal["tokens", "predicting"] = "tokens"
    "tokens: all of the text; predicting: only those that predict the answer"
    layer: int | None = None
    "None = an eighth of the depth (at least 1), as the unlearning methods with the same inner attack"
    point: Literal["resid_pre", "resid_mid", "attn_out", "mlp_out"] = "resid_pre"
    "where in the layer; resid_pre (published) is the stream that enters it"
    batch_size: int = 32
    "items perturbed at a time; only memory depends on it"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.radii or min(self.radii) <= 0 or list(self.radii) != sorted(set(self.radii)):
            raise LoceditError(f"latent: radii={self.radii!r} must be one or more numbers above 0, ascending")
        for name in ("attack_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise LoceditError(f"latent: {name}={getattr(self, name)!r} must be at least 1")
        if self.point not in POINTS:
            raise LoceditError(f"latent: point={self.point!r}; {nearest(self.point, POINTS)}")
        self.ascent(self.radii[0]).check()

    def ascent(self, radius: float) -> AscentOptions:
        """The inner attack with this radius."""
        return AscentOptions(
            attack_steps=self.attack_steps,
            eps=radius,
            eps_in=self.eps_in,
            start=self.start,
            positions=self.positions,
        )

    def place(self, model: Model) -> Place:
        """Where it acts in this model."""
        layer = max(1, model.n_layers // 8) if self.layer is None else self.layer
        if not 0 <= layer < model.n_layers:
            raise LoceditError(f"latent: layer={layer!r}: {model.name} has layers 0 to {model.n_layers - 1}")
        return Place(point=f"blocks.{layer}.hook_{self.point}")


def latent(
    model: Model, task: Task, edit: Edit, *, others: Others = None, shared: Shared | None = None, **options: Any
) -> AttackResult:
    """Perturb the edited model's activations towards the true answer of each item."""
    attack = Latent(fill(LatentOptions, options, method="latent"))
    return carried_out(attack, model, task, edit, others=others, shared=shared)


class Latent(ItemAttack[LatentOptions]):
    """The metric of every item under its own perturbation, at every radius."""

    name: ClassVar[str] = "latent"
    lead: ClassVar[str] = "With activations perturbed towards the answer"
    x_name: ClassVar[str] = "radius"
    harms: ClassVar[bool] = False

    def ready(self, aim: Aim) -> None:
        self.options.place(aim.model)

    def doses(self, aim: Aim) -> tuple[Dose, ...]:  # noqa: ARG002
        return tuple(Dose(x=radius) for radius in self.options.radii)

    def attack(self, target: Target, learned: Side, measured: Mapping[str, Side], aim: Aim) -> Values:  # noqa: ARG002
        return {
            name: torch.stack(
                [helped(target.model, side, aim.metric, self.options, radius) for radius in self.options.radii]
            )
            for name, side in measured.items()
        }

    def control(self, aim: Aim, *, level: float) -> Control:
        """An edit of the last MLPs alone, which what an earlier layer says still reaches."""
        return late_suppression(aim, self.options, level=level)


def helped(model: Model, side: Side, metric: Metric, options: LatentOptions, radius: float) -> Float[Tensor, " item"]:
    """The metric of each item under the perturbation found for it."""
    place, ascent = options.place(model), options.ascent(radius)
    found: dict[int, Tensor] = {}
    for batch in batches(side.examples, model, options.batch_size):
        with perturbed(model, ascend(model, batch, [place], ascent, seed=options.seed)):
            # the same rows in the same order once more, because they are sorted already and fit in one batch
            values = values_of(model, batch.examples, metric, batch_size=len(batch))
        found |= {id(example): value for example, value in zip(batch.examples, values, strict=True)}
    return torch.stack([found[id(example)] for example in side.examples])

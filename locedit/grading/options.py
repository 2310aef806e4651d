"""What is graded, and how much of it."""

from dataclasses import dataclass
from typing import Literal

from locedit.components import UNITS, Unit
from locedit.errors import LoceditError, nearest

PARTS = ("planted", "deletion", "oracle")
PLANTING = ("people", "exact_facts", "draws", "neurons", "heads", "plant_steps", "plant_rate")
TARGET = ("relation", "share", "exact_facts")
DELETION = ("budgets", "ablate", "random_sets")
ORACLE = (*TARGET, "edit_steps", "edit_rate", "attack_steps", "attack_rate", "look_every")
"""Options that decide the results of each part."""
SITES: dict[str, Unit] = {"mlp": "mlp", "neurons": "neuron", "layer_neurons": "neuron", "heads": "head"}
"where facts are planted -> the unit that localizers are compared at"


@dataclass(frozen=True, kw_only=True)
class GradeOptions:
    """Sizes of the three parts; the defaults are for a lab of size small."""

    people: int = 10
    "planted people whose facts the localizers see"
    exact_facts: int = 6
    "facts that causal tracing and activation patching see where they run once for every neuron"
    sites: tuple[str, ...] = ("mlp", "neurons", "heads")
    """where facts are planted: mlp (one layer's), neurons (of all layers), layer_neurons (of one layer), heads (of all
    layers)"""
    draws: int = 2
    "sets planted at each site in each seed"
    neurons: float = 0.05
    "share of all neurons in a planted set"
    heads: float = 0.2
    "share of all heads in a planted set"
    plant_steps: int = 100
    "training steps at most that plant a set"
    plant_rate: float = 1e-2
    "learning rate of planting"
    relation: str = "sport"
    "the facts of deletion and oracle: sport, city or job"
    share: float = 0.4
    "share of the known people whose facts deletion and oracle are about"
    units: tuple[Unit, ...] = ("neuron", "head", "mlp")
    "units that are deleted"
    budgets: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)
    "shares of all components of the unit that are deleted, at least one component"
    ablate: Literal["zero", "mean"] = "zero"
    "how components are deleted"
    random_sets: int = 3
    "random sets with the same number in every layer, at each budget"
    edit_steps: int = 100
    "training steps of an edit of the oracle"
    edit_rate: float = 1e-3
    attack_steps: int = 60
    "relearning steps"
    attack_rate: float = 5e-4
    look_every: int = 20
    "relearning steps between two looks"
    retain_floor: float = 0.9
    "relearning counts where accuracy on retained facts is at least this share of what it was before the attack"
    edit_floor: float = 0.5
    "pairs of MLPs whose edit leaves less than this share of the accuracy on retained facts are left out"

    def __post_init__(self) -> None:
        for name in self.sites:
            if name not in SITES:
                raise LoceditError(f"sites: unknown site {name!r}; {nearest(name, SITES)}")
        for unit in self.units:
            if unit not in UNITS:
                raise LoceditError(f"units: unknown unit {unit!r}; {nearest(unit, UNITS)}")
        for name in (
            "people",
            "exact_facts",
            "draws",
            "plant_steps",
            "edit_steps",
            "attack_steps",
            "look_every",
            "random_sets",
        ):
            if getattr(self, name) < 1:
                raise LoceditError(f"{name}={getattr(self, name)!r} must be at least 1")
        for name in ("neurons", "heads", "share"):
            if not 0 < getattr(self, name) < 1:
                raise LoceditError(f"{name}={getattr(self, name)!r} must be above 0 and below 1")
        if not self.budgets or not all(0 < budget < 1 for budget in self.budgets):
            raise LoceditError(f"budgets={self.budgets!r} must be shares above 0 and below 1")
        if self.ablate not in ("zero", "mean"):
            raise LoceditError(f"ablate={self.ablate!r}; {nearest(str(self.ablate), ('zero', 'mean'))}")

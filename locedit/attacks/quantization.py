"""Quantization: the edited weights are rounded to 8 or 4 bits, and nothing else is done.

An edit that moves weights by less than the distance between two levels is rounded away, and what it hid is back (Zhang
et al. 2024, arXiv:2410.16454). What an edit adds beside the weights (LoRA factors, hooks, layers, control tokens) is
left as it is; such an edit must be merged into the weights first to be tried in this way.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from locedit.attacks.aim import Aim, ItemOptions, Side, Target
from locedit.attacks.arms import Control, Dose, Values
from locedit.attacks.item_attack import ItemAttack
from locedit.attacks.measures import values_of
from locedit.attacks.outcome import Others, carried_out
from locedit.attacks.shared import Shared
from locedit.attacks.within_cells import within_cells
from locedit.data.items import Task
from locedit.edit import Edit
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.options import fill
from locedit.quantization import Backend, backend_of, left_out, quantized, scheme_named
from locedit.results import AttackResult


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions(ItemOptions):
    """How the weights are rounded."""

    schemes: tuple[str, ...] = ("int8", "nf4")
    "all are tried: int8, nf4 (see `locedit.quantization`); from the most bits to the fewest"
    backend: Literal["auto", "bitsandbytes", "torch"] = "auto"
    "what rounds the weights, to the same bits on a CPU; auto = bitsandbytes on a GPU, where it is installed"

    def __post_init__(self) -> None:
        super().__post_init__()
        bits = [scheme_named(name).bits for name in self.schemes]
        if not bits or bits != sorted(set(bits), reverse=True):
            raise LoceditError(
                f"schemes={self.schemes!r} must be one or more, each once, from the most bits to the fewest"
            )


def quantization(
    model: Model, task: Task, edit: Edit, *, others: Others = None, shared: Shared | None = None, **options: Any
) -> AttackResult:
    """Round the edited weights and read the items again; the model is afterwards as before, bit for bit."""
    attack = Quantization(fill(QuantizationOptions, options, method="quantization"), device=model.device)
    if beside := sorted({part.kind for part in edit.parts or (edit,)} - {"weights"}):
        attack.notes.append(
            f"what the edit holds beside the weights ({', '.join(beside)}) stays in full precision; merged into the "
            "weights first, it would be rounded with them"
        )
    return carried_out(attack, model, task, edit, others=others, shared=shared)


class Quantization(ItemAttack[QuantizationOptions]):
    """The metric of every item with int8 and with NF4 weights."""

    name: ClassVar[str] = "quantization"
    lead: ClassVar[str] = "With quantized weights"
    x_name: ClassVar[str] = "bits"

    def __init__(self, options: QuantizationOptions, *, device: torch.device) -> None:
        self.backend: Backend = backend_of(options.backend, device)
        super().__init__(dataclasses.replace(options, backend=self.backend))

    def start(self, aim: Aim) -> float:
        """Bits of the unquantized weights."""
        return torch.finfo(aim.model.dtype).bits

    def doses(self, aim: Aim) -> tuple[Dose, ...]:  # noqa: ARG002
        return tuple(Dose(x=scheme_named(name).bits) for name in self.options.schemes)

    def attack(self, target: Target, learned: Side, measured: Mapping[str, Side], aim: Aim) -> Values:  # noqa: ARG002
        if (share := left_out(target.model)) > 0:
            self.notes.append(f"{share:.0%} of the blocks' weights are in no linear map and were not quantized")
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in measured}
        for scheme in self.options.schemes:
            with quantized(target.model, scheme, backend=self.backend):
                for name, side in measured.items():
                    rows[name].append(values_of(target.model, side.examples, aim.metric))
        return {name: torch.stack(found) for name, found in rows.items()}

    def control(self, aim: Aim, *, level: float) -> Control | None:
        """For each scheme an edit that its rounding undoes."""
        edits, note = within_cells(aim, self.options, self.options.schemes, level=level)
        if not edits:
            self.notes.append(note)
            return None
        words = f"an edit within the {' or '.join(edits)} cells"
        return Control(edit=tuple(map(edits.get, self.options.schemes)), words=words, note=note)

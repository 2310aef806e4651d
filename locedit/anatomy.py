"""The parts of a model by role: its blocks, their matrices (fused ones too), embeddings and final norm."""

import functools
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from locedit._transformer_lens import AdapterTable, adapter_table
from locedit.components import Slice
from locedit.errors import LoceditError, nearest

MATRICES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.in", "mlp.out")
STORED = ("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o", "mlp.gate", "mlp.in", "mlp.gate_up", "mlp.out")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Places of a role among a matrix's outputs: `count` runs of `width`, the first at `start`, one every `stride`."""

    start: int
    stride: int
    width: int
    count: int

    @classmethod
    def of(cls, rows: tuple[int, ...], role: str) -> "Runs":
        """The runs that give exactly `rows`, in order."""
        width = next((i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), len(rows))
        stride = rows[width] - rows[0] if width < len(rows) else width
        runs = cls(start=rows[0], stride=stride, width=width, count=max(1, len(rows) // width))
        if runs.indices() != rows:
            raise LoceditError(f"the rows of {role} in its fused matrix are not evenly spaced: {rows[:12]}...")
        return runs

    def indices(self) -> tuple[int, ...]:
        """The places, in the order of the role's own outputs."""
        return tuple(self.start + r * self.stride + i for r in range(self.count) for i in range(self.width))


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A linear map of a block by its role, possibly a part of a fused one."""

    role: str
    "'mlp.out', 'attn.q', 'attn.qkv'"
    module: nn.Module
    "where hooks act; under PEFT the wrapper, so that its adapter is included"
    weight: str
    "parameter name"
    bias: str | None
    shape: tuple[int, ...]
    out_axis: int
    "0 for Linear [out, in], 1 for Conv1D [in, out]"
    runs: Runs | None
    "this role's outputs among the module's; None = all of them"

    @property
    def in_axis(self) -> int:
        return 1 - self.out_axis

    @property
    def n_out(self) -> int:
        return self.shape[self.out_axis] if self.runs is None else self.runs.count * self.runs.width

    @property
    def n_in(self) -> int:
        return self.shape[self.in_axis]

    def whole(self, *, write: bool = False) -> list[Slice]:
        """The matrix and its bias as one component."""
        runs = [None] if self.runs is None else [*range(self.runs.count)]
        return [s for run in runs for s in self._outputs(self._run(run), write=write)]

    def outputs(self, *, width: int, group: int = 1) -> list[Slice]:
        """Component i = `width` successive outputs, weights and bias entries, for training; `group` as in Slice."""
        runs = self.runs or Runs(start=0, stride=self.n_out, width=self.n_out, count=1)
        if runs.count == 1:
            return self._outputs((runs.start, width, width, group))
        if runs.width != width:
            raise LoceditError(
                f"{self.weight}: {self.role} is stored in runs of {runs.width}, which do not fit components of {width}"
            )
        return self._outputs((runs.start, runs.stride, width, group))

    def inputs(self, *, width: int) -> list[Slice]:
        """Component i = the weights that leave `width` successive inputs; written to and trained."""
        return [Slice(param=self.weight, shape=self.shape, axis=self.in_axis, stride=width, width=width, write=True)]

    def _run(self, run: int | None) -> tuple[int, int, int, int] | None:
        if run is None or self.runs is None:
            return None
        return (self.runs.start + run * self.runs.stride, 0, self.runs.width, 1)

    def _outputs(self, place: tuple[int, int, int, int] | None, *, write: bool = False) -> list[Slice]:
        named = [(self.weight, self.shape, self.out_axis)]
        if self.bias is not None:
            named.append((self.bias, (self.shape[self.out_axis],), 0))
        if place is None:
            return [Slice(param=param, shape=shape, axis=None, write=write) for param, shape, _ in named]
        start, stride, width, group = place
        return [
            Slice(
                param=param, shape=shape, axis=axis, start=start, stride=stride, width=width, group=group, write=write
            )
            for param, shape, axis in named
        ]


class Anatomy:
    """The parts of one model. Cheap to make, holds no tensors of its own."""

    def __init__(self, core: PreTrainedModel) -> None:
        self.core = core
        self.table: AdapterTable = adapter_table(core)
        self.parameters = named_parameters(core)
        "parameter name -> parameter; tied parameters once, adapters of PEFT left out"
        self._runs = {role: Runs.of(rows, role) for role, rows in self.table.rows.items()}
        self._names = {id(module): name for name, module in core.named_modules()}

    # --- modules by role ----------------------------------------------------------------------------------------

    def module(self, name: str) -> nn.Module:
        """The module with a transformer-lens name: 'embed', 'ln_final', 'unembed', 'blocks.3', 'blocks.3.attn.o'."""
        modules = self.table.modules
        if name not in modules:
            outer = [key for key in modules if not key.startswith("blocks.") or key.startswith("blocks.0")]
            raise LoceditError(f"no module {name!r} in {type(self.core).__name__}; {nearest(name, outer)}")
        return modules[name]

    def has(self, name: str) -> bool:
        return name in self.table.modules

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.module(f"blocks.{layer}") for layer in range(self.table.n_layers)]

    def matrix(self, layer: int, role: str) -> Matrix:
        """The linear map of a role in a block; role is one of MATRICES, or 'attn.qkv', 'mlp.gate_up' where fused."""
        if not 0 <= layer < self.table.n_layers:
            raise LoceditError(
                f"no layer {layer}; the model has {self.table.n_layers} (0 to {self.table.n_layers - 1})"
            )
        runs = self._runs.get(role)
        stored = role if runs is None else "attn.qkv" if role.startswith("attn.") else "mlp.gate_up"
        name = f"blocks.{layer}.{stored}"
        if not self.has(name):
            raise LoceditError(self._no_matrix(layer, role))
        module = self.module(name)
        plain: Any = getattr(module, "base_layer", module)
        path = self._names[id(module)]
        return Matrix(
            role=role,
            module=module,
            weight=f"{path}.weight",
            bias=f"{path}.bias" if f"{path}.bias" in self.parameters else None,
            shape=tuple(plain.weight.shape),
            out_axis=1 if type(plain).__name__ == "Conv1D" else 0,
            runs=runs,
        )

    def _no_matrix(self, layer: int, role: str) -> str:
        found = ", ".join(self.roles(layer, MATRICES)) or "none"
        if role.startswith("mlp.") and not self.roles(layer, ("mlp.out",)):
            kind = type(self.table.modules.get(f"blocks.{layer}.mlp", self.core)).__name__
            return f"layer {layer} has no dense neuron (its MLP is a {kind}): use unit row, column or matrix"
        return f"no matrix {role!r} in layer {layer} of {type(self.core).__name__}; choices: {found}"

    def roles(self, layer: int, among: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the given roles that the block has."""
        return tuple(r for r in among if self.has(f"blocks.{layer}.{r}") or (r in self.table.rows and r in MATRICES))

    @functools.cached_property
    def post_norm(self) -> bool:
        """Whether a block normalises after its sums, as BERT does."""
        return not getattr(
            self.core.config, "do_layer_norm_before", self.core.config.model_type not in ("bert", "roberta")
        )

    @functools.cached_property
    def gated(self) -> bool:
        return "mlp.gate" in self.roles(0, MATRICES)

    @functools.cached_property
    def d_mlp(self) -> int:
        return self.matrix(0, "mlp.out").n_in


def named_parameters(core: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that the model has without PEFT: wrappers' own parameters are left out."""
    wrapped = tuple(f"{name}." for name, module in core.named_modules() if hasattr(module, "base_layer"))
    found: dict[str, nn.Parameter] = {}
    for name, parameter in core.named_parameters():
        prefix = next((p for p in wrapped if name.startswith(p)), None)
        if prefix is None:
            found[name] = parameter
        elif name.startswith(f"{prefix}base_layer."):
            found[prefix + name.removeprefix(f"{prefix}base_layer.")] = parameter
    return found

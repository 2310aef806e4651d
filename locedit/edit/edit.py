"""An edit: a change of a model as a small object that can be applied, undone, saved, chained and exported."""

import dataclasses
import hashlib
import json
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from locedit.components import ComponentSet, SlicesFor, Table
from locedit.edit.adapter import LowRank, adapters_active
from locedit.edit.layers import AddedLayer, layers_active
from locedit.edit.regions import Patch, Region, checksum, contained, regions, require_editable, unite
from locedit.edit.tokens import NONE, ControlTokens, conditioned
from locedit.errors import LoceditError, nearest
from locedit.models import Model
from locedit.provenance import Provenance

KINDS = ("weights", "adapter", "hooks", "modules", "tokens", "chain")
Addition = Literal["token", "layer"]
ADDITIONS: dict[Addition, str] = {"token": "tokens", "layer": "modules"}
"""What an edit may add at run time -> the kind of edit that does."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HookAction:
    """What a hook edit does to the components of `Edit.within` in every forward pass."""

    factor: float = 0.0
    "what the components' values are multiplied by; 0 = zeroed"
    means: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    "site -> what replaces the values, of all its components: `[neuron]` or `[head, d_head]`"


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """A change of one model. `with edit.applied(model) as edited: ...` applies it and undoes it bit for bit.

    Kinds: `weights` holds the new values of the touched entries; `adapter` holds LoRA factors that act beside the
    untouched weights; `hooks` acts on activations at run time; `modules` adds small layers to the untouched model;
    `tokens` puts a control token before every text, whose row is new, and may hold new weights too; `chain` is several
    edits in order.
    """

    kind: str
    fingerprint: str
    "of the model that it applies to"
    within: ComponentSet | None = None
    "where it may change the model; None = anywhere"
    role: SlicesFor = "train"
    "which slices of `within` it may change"
    also: tuple[str, ...] = ()
    "parameters beyond `within` that it changes on purpose (the output biases of a mean ablation)"
    patches: tuple[Patch, ...] = ()
    adapters: tuple[LowRank, ...] = ()
    hook: HookAction | None = None
    layers: tuple[AddedLayer, ...] = ()
    tokens: ControlTokens | None = None
    parts: tuple["Edit", ...] = ()
    "of a chain, in order of application"
    history: Table = field(default_factory=dict[str, list[Any]])
    "training: one row a step; empty otherwise"
    outcome: dict[str, Any] = field(default_factory=dict[str, Any])
    "facts about how it was made, e.g. share of the change lost to rounding, forget level reached"
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise LoceditError(f"edit kind {self.kind!r}; {nearest(self.kind, KINDS)}")
        points = [layer.point for layer in self.layers]
        if twice := next((point for point in points if points.count(point) > 1), None):
            raise LoceditError(
                f"an edit has one added layer at a place, not two at {twice}; chain two edits with then()"
            )

    # --- looking -----------------------------------------------------------------------------------------------------

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name the content of the edit."""
        rows = [[name, checksum(tensor)] for name, tensor in sorted(self.tensors().items())]
        content = [self.kind, self.fingerprint, rows, [part.digest for part in self.parts], self.where()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the edit by name; a chain has none of its own."""
        named: dict[str, Tensor] = {}
        for i, patch in enumerate(self.patches):
            named |= _present(
                {f"{i}.index": patch.region.index, f"{i}.values": patch.values, f"{i}.delta": patch.delta}
            )
        for i, adapter in enumerate(self.adapters):
            named |= _present({f"{i}.index": adapter.index, f"{i}.down": adapter.down, f"{i}.up": adapter.up})
        for site, mean in (self.hook.means if self.hook else {}).items():
            named[f"mean.{site}"] = mean
        for i, layer in enumerate(self.layers):
            named |= {f"{i}.{name}": tensor for name, tensor in layer.tensors().items()}
        if self.tokens is not None:
            named["rows"] = self.tokens.rows
        return named

    def where(self) -> list[Any]:
        """Names and axes of what is changed, as JSON values."""
        if self.kind == "hooks":
            assert self.within is not None
            assert self.hook is not None
            return [[site, list(chosen)] for site, chosen in sorted(self.within.chosen.items())] + [self.hook.factor]
        places = [(p.region.param, p.region.axis) for p in self.patches] + [(a.param, a.axis) for a in self.adapters]
        added = [[layer.point, layer.activation] for layer in self.layers]
        named = [[*self.tokens.names, self.tokens.used]] if self.tokens else []
        return [list(place) for place in places] + added + named

    def __len__(self) -> int:
        """How many numbers the edit sets (weights) or adds (factors, layers, rows); 0 for hooks."""
        own = sum(p.values.numel() for p in self.patches) + sum(a.down.numel() + a.up.numel() for a in self.adapters)
        own += sum(map(len, self.layers)) + (self.tokens.rows.numel() if self.tokens else 0)
        return own + sum(map(len, self.parts))

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        if self.parts:
            return " then ".join(map(str, self.parts))
        method = self.provenance.method if self.provenance else self.kind
        where = "of the whole model"
        if self.within is not None:
            where = f"within {len(self.within):,} components ({', '.join(self.within.units)})"
        return f"{method} held as {self.kind}, {len(self):,} numbers, {where}"

    def __repr__(self) -> str:
        return f"Edit({self})"

    @property
    def conditional(self) -> tuple[Addition, ...]:
        """What can be left out at run time, which undoes the edit or a part of it: a control token, added layers."""
        kinds = {part.kind for part in self.parts or (self,)}
        return tuple(what for what, kind in ADDITIONS.items() if kind in kinds)

    def dropped(self, *what: Addition) -> "Edit":
        """What is left without the control token or the added layers (both when neither is named): the new weights."""
        if self.parts:
            return dataclasses.replace(self, parts=tuple(part.dropped(*what) for part in self.parts))
        if self.kind not in [ADDITIONS[name] for name in what or ADDITIONS]:
            return self
        return dataclasses.replace(self, kind="weights", layers=(), tokens=None, history={}, outcome={})

    @property
    def row(self) -> int:
        """The row of the history that is this edit: the last, unless another state or number of weights was chosen."""
        if "zeroed" in self.outcome:
            return self.history["weights"].index(self.outcome["zeroed"])
        *first, last = self.outcome.get("chunks", [self.outcome])
        if "chosen" not in last:
            return len(next(iter(self.history.values()), ())) - 1
        step = sum(part["steps"] for part in first) + last["chosen"]["step"]
        return max(at for at, other in enumerate(self.history["step"]) if other <= step)

    def summary(self) -> dict[str, Any]:
        """What a report says about the edit, as JSON values."""
        provenance = self.provenance.to_json() if self.provenance else None
        return {
            "kind": self.kind,
            "conditional": list(self.conditional),
            "text": str(self),
            "method": self.provenance.method if self.provenance else self.kind,
            "parameters": len(self),
            "within": None if self.within is None else str(self.within),
            "outcome": self.outcome,
            "provenance": provenance,
            "parts": [part.summary() for part in self.parts],
        }

    # --- acting ------------------------------------------------------------------------------------------------------

    @contextmanager
    def applied(self, model: Model) -> Generator[Model]:
        """The edited model inside the block; the same bits as before afterwards, also after an exception.

        `model` is the same module and is edited inside the block too: measure the base before it.
        """
        self.check(model)
        with ExitStack() as stack:
            for part in self.parts or (self,):
                part.check(model, base=self.fingerprint)
                part.enter(stack, model)
            yield model

    def enter(self, stack: ExitStack, model: Model) -> None:
        """Apply this edit, which is no chain, and leave on the stack what undoes it."""
        for patch in self.patches:
            _swap_in(stack, model, patch)
        if self.adapters:
            stack.enter_context(adapters_active(model, self.adapters))
        if self.hook is not None:
            stack.enter_context(self._hooked(model))
        if self.layers:
            stack.enter_context(layers_active(model, self.layers))
        if self.tokens is not None and self.tokens.used != NONE:
            stack.enter_context(conditioned(model, self.tokens.rows, self.tokens.used))

    def check(self, model: Model, *, base: str = "") -> None:
        """Raise LoceditError when the edit was made neither for this model nor for the model `base` it comes from."""
        if self.fingerprint not in (base, model.fingerprint):
            raise LoceditError(
                f"the edit was made for the model with fingerprint {self.fingerprint[:16]!r}; "
                f"{model.name} has {model.fingerprint[:16]!r}"
            )

    def _hooked(self, model: Model) -> Any:
        from locedit.edit.ablation import hooked

        assert self.within is not None
        assert self.hook is not None
        return hooked(model, self.within, self.hook)

    def then(self, second: "Edit") -> "Edit":
        """This edit, then `second`, as one edit; undone in reverse order.

        `second` was made either for the same model as this one or for the model with this one applied, which is
        checked when the chain is applied.
        """
        parts = (self.parts or (self,)) + (second.parts or (second,))
        return Edit(kind="chain", fingerprint=self.fingerprint, parts=parts)

    def verify(self, model: Model) -> Table:
        """Apply and undo the edit under position-dependent checksums of every parameter's bits.

        Raises LoceditError when an entry outside `within` is changed, or when undoing leaves any difference. Returns
        the columns parameter, before, after (checksums), changed (entries that the edit may change).
        """
        named = list(model.anatomy.parameters.items())
        before = {name: checksum(tensor) for name, tensor in named}
        allowed = self._allowed(model)
        expected = dict(before)
        with self.applied(model):
            after = {name: checksum(tensor) for name, tensor in named}
            inside = {name: region.read(tensor) for name, tensor in named if (region := allowed.get(name))}
        for name, tensor in named:
            if name in inside:
                expected[name] = checksum(allowed[name].scatter(tensor, inside[name].to(tensor.dtype)))
        moved = [name for name in after if after[name] != expected[name]]
        if moved:
            raise LoceditError(f"the edit changes {moved[0]} outside the entries that it may touch")
        if {name: checksum(tensor) for name, tensor in named} != before:
            raise LoceditError("undoing the edit did not bring back the same bits")
        columns = {"parameter": list(after), "before": list(before.values()), "after": list(after.values())}
        return columns | {"changed": [inside[name].numel() if name in inside else 0 for name in after]}

    def _allowed(self, model: Model) -> dict[str, Region]:
        """Parameter -> the entries that this edit may change."""
        if self.parts:
            own = [region for part in self.parts for region in part._allowed(model).values()]
            names = dict.fromkeys(region.param for region in own)
            shapes = {name: model.parameter(name).shape for name in names}
            return {name: unite([r for r in own if r.param == name], shapes[name]) for name in names}
        if self.kind not in ("weights", "tokens"):
            return {}
        patched = {patch.region.param: patch.region for patch in self.patches}
        if self.within is None:
            return patched
        allowed = {region.param: region for region in regions(self.within, role=self.role)}
        for name, region in patched.items():
            shape = model.parameter(name).shape
            if name not in self.also and not contained(region, allowed.get(name), shape):
                raise LoceditError(f"the edit holds values for entries of {name} outside its component set")
        return allowed | {name: patched[name] for name in self.also}

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write edit.json and tensors.safetensors: only what changed. Refuses to overwrite unless `force`."""
        from locedit.edit.files import save

        save(self, folder, force=force)

    @classmethod
    def load(cls, folder: str | Path) -> "Edit":
        """Read what `save` wrote."""
        from locedit.edit.files import load

        return load(folder)

    def export(self, model: Model, folder: str | Path, *, force: bool = False) -> None:
        """Write the edited model as a transformers folder with its tokenizer, or a PEFT adapter for kind `adapter`."""
        from locedit.edit.files import export

        export(self, model, folder, force=force)

    def plot(self) -> Any:
        """The training history as a plotly figure."""
        from locedit.report import figures

        return figures.history(self)

    def _repr_html_(self) -> str:
        from locedit.report import fragment

        return fragment(self)


def weights_edit(model: Model, values: Mapping[Region, Tensor] | list[tuple[Region, Tensor]], **fields: Any) -> Edit:
    """An edit of kind `weights` from (region, new values) pairs; values are rounded to the parameter's dtype."""
    pairs = list(values.items()) if isinstance(values, Mapping) else values
    patches: list[Patch] = []
    for region, new in pairs:
        parameter = model.parameter(region.param)
        require_editable(region.param, parameter)
        patches.append(Patch(region=region, values=new.detach().to("cpu", parameter.dtype)))
    return Edit(kind="weights", fingerprint=model.fingerprint, patches=tuple(patches), **fields)


def _swap_in(stack: ExitStack, model: Model, patch: Patch) -> None:
    """Write the patch, and leave on the stack what puts the old bits back."""
    name = patch.region.param
    parameter = model.parameter(name)
    require_editable(name, parameter)
    if parameter.dtype != patch.values.dtype:
        raise LoceditError(
            f"the edit holds {name} in {patch.values.dtype}, the model was loaded in {parameter.dtype}; "
            "load it with that dtype"
        )
    before = patch.region.read(parameter)
    stack.callback(patch.region.write, parameter, before)
    patch.region.write(parameter, patch.values)


def _present(named: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in named.items() if tensor is not None}


__all__ = ["KINDS", "Edit", "HookAction", "Patch", "weights_edit"]

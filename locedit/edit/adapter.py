"""LoRA inside a part of the model: low-rank factors whose rows or columns outside the component set do not exist.

A piece acts beside the untouched weight as `y + (x[S] A) B`, S on the input side for columns, on the output side for
rows, nowhere for a whole matrix (Hu et al. 2021, arXiv:2106.09685). The scale alpha / rank is folded into B. The
factors are float32 also beside a half-precision base. Exported, A and B are padded with zeros to an ordinary PEFT
adapter.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from locedit.components import ComponentSet, Touched
from locedit.edit.restrict import Held, LinearHook, holders, is_linear, out_axis, train_dtype
from locedit.errors import LoceditError
from locedit.models import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """The change B A of one linear map, restricted to some of its inputs or outputs."""

    param: str
    "the weight's canonical name"
    axis: int | None
    "axis of the weight that `index` counts; None = the whole weight"
    index: Tensor | None
    down: Tensor
    "A, `[rank, in]`, or `[rank, index]` when the inputs are restricted"
    up: Tensor
    "B times alpha / rank, `[out, rank]`, or `[index, rank]` when the outputs are restricted"


class Factors(Held):
    """Trainable LoRA factors on the linear maps of a component set, zero change at the start."""

    def __init__(
        self, model: Model, within: ComponentSet | None, *, rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__(model)
        self.scale = alpha / rank
        self.pieces: list[tuple[Touched, nn.Module]] = linear_pieces(model, within)
        for touched, module in self.pieces:
            down, up = _start(touched, module, rank=rank, generator=generator)
            self.parameters += [down, up]
            hook = _low_rank_hook(touched.axis, _on(touched.index, down), down, up, self.scale, out=out_axis(module))
            self.hooks.append((module, hook))

    def decay(self, rate: float, *, towards: Literal["base", "weights"]) -> None:
        """Decoupled weight decay of the factors, which is a decay towards the base."""
        if towards == "weights":
            raise LoceditError("decay='weights' does not go with hold='adapter', whose base weights never change")
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.mul_(1 - rate)

    @contextmanager
    def saved(self) -> Generator[None]:
        """The edit as it would be saved: the factors themselves."""
        with self.active():
            yield

    def adapters(self) -> tuple[LowRank, ...]:
        """The factors as they are now, on the CPU."""
        pairs = zip(self.parameters[::2], self.parameters[1::2], strict=True)
        return tuple(
            LowRank(
                param=touched.param,
                axis=touched.axis,
                index=touched.index,
                down=down.detach().cpu().clone(),
                up=(up.detach() * self.scale).cpu(),
            )
            for (touched, _), (down, up) in zip(self.pieces, pairs, strict=True)
        )

    def lost(self) -> float:
        """Nothing is rounded: the factors are saved as they were trained."""
        return 0.0


class _Fixed(Held):
    """Finished adapters beside a model."""

    def __init__(self, model: Model, adapters: Sequence[LowRank]) -> None:
        super().__init__(model)
        weights = [model.parameter(adapter.param) for adapter in adapters]
        for adapter, weight, held in zip(adapters, weights, holders(model, weights), strict=True):
            module = held[0][0]
            down, up = adapter.down.to(weight.device), adapter.up.to(weight.device)
            hook = _low_rank_hook(adapter.axis, _on(adapter.index, down), down, up, 1.0, out=out_axis(module))
            self.hooks.append((module, hook))


@contextmanager
def adapters_active(model: Model, adapters: Sequence[LowRank]) -> Generator[None]:
    """The adapters act on every forward inside the block."""
    with _Fixed(model, adapters).active():
        yield


def linear_pieces(model: Model, within: ComponentSet | None) -> list[tuple[Touched, nn.Module]]:
    """The weights of untied linear maps that the set touches, each with its module; biases, norms, embeddings left out.

    Without a set: every linear map of the blocks.
    """
    touched = _every_weight(model) if within is None else within.touched("train")
    if any(t.axis is None and t.index is not None for t in touched):
        raise LoceditError("single weights cannot be held as a LoRA adapter; use hold='weights', or rows or columns")
    parameters = [model.parameter(t.param) for t in touched]
    found = [
        (t, held[0][0])
        for t, held in zip(touched, holders(model, parameters), strict=True)
        if len(held) == 1 and is_linear(held[0][0]) and held[0][1] == "weight"
    ]
    if not found:
        raise LoceditError("the component set touches no weight of a linear map, which hold='adapter' needs")
    return found


def _every_weight(model: Model) -> list[Touched]:
    return model.everything("matrix").touched("train")


def _start(touched: Touched, module: nn.Module, *, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A uniform as in PEFT (Kaiming with slope sqrt 5: bound 1 / sqrt(in)), B zero."""
    weight = module.weight
    assert isinstance(weight, Tensor), "a linear map has a weight"
    out = out_axis(module)
    sizes = {"out": weight.shape[out], "in": weight.shape[1 - out]}
    bound = 1 / math.sqrt(sizes["in"])
    if touched.index is not None:
        sizes["out" if touched.axis == out else "in"] = len(touched.index)
    uniform = torch.rand(rank, sizes["in"], generator=generator) * 2 - 1
    down = (uniform * bound).to(weight.device, train_dtype(weight))
    up = torch.zeros(sizes["out"], rank, device=weight.device, dtype=train_dtype(weight))
    return down.requires_grad_(), up.requires_grad_()


def _low_rank_hook(
    axis: int | None, index: Tensor | None, down: Tensor, up: Tensor, scale: float, *, out: int
) -> LinearHook:
    def add(x: Tensor, output: Tensor) -> Tensor:
        rows = index is not None and axis == out
        seen = x if index is None or rows else x.index_select(-1, index)
        change = (seen.to(down.dtype) @ down.T) @ up.T * scale
        wide = output.to(down.dtype)
        assert not rows or index is not None
        return (wide.index_add(-1, index, change) if rows and index is not None else wide + change).to(output.dtype)

    return add


def _on(index: Tensor | None, like: Tensor) -> Tensor | None:
    return None if index is None else index.to(like.device)


def export_peft(model: Model, adapters: Sequence[LowRank], folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors that PEFT loads onto the same base."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    stacked: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for adapter in adapters:
        stacked.setdefault(adapter.param, []).append(_padded(model, adapter))
    factors = {p: (torch.cat([a for a, _ in f]), torch.cat([b for _, b in f], dim=1)) for p, f in stacked.items()}
    names = {param: param.removesuffix(".weight") for param in factors}
    ranks = {names[param]: down.shape[0] for param, (down, _) in factors.items()}
    rank = min(ranks.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks),
        rank_pattern={f"^{name}$": r for name, r in ranks.items() if r != rank},
        alpha_pattern={f"^{name}$": r for name, r in ranks.items() if r != rank},
        fan_in_fan_out=_conv1d(model, adapters[0].param),
        base_model_name_or_path=model.name,
        task_type="CAUSAL_LM" if model.causal else None,
    )
    config.inference_mode = True
    config.save_pretrained(str(folder))
    tensors = {f"base_model.model.{names[p]}.lora_A.weight": down.contiguous() for p, (down, _) in factors.items()}
    tensors |= {f"base_model.model.{names[p]}.lora_B.weight": up.contiguous() for p, (_, up) in factors.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def _padded(model: Model, adapter: LowRank) -> tuple[Tensor, Tensor]:
    """A and B in full size, zero outside the restriction."""
    if adapter.index is None:
        return adapter.down, adapter.up
    weight = model.parameter(adapter.param)
    module = holders(model, [weight])[0][0][0]
    if adapter.axis == out_axis(module):
        up = adapter.up.new_zeros(weight.shape[out_axis(module)], adapter.up.shape[1])
        return adapter.down, up.index_copy(0, adapter.index, adapter.up)
    down = adapter.down.new_zeros(adapter.down.shape[0], weight.shape[1 - out_axis(module)])
    return down.index_copy(1, adapter.index, adapter.down), adapter.up


def _conv1d(model: Model, param: str) -> bool:
    return out_axis(holders(model, [model.parameter(param)])[0][0][0]) == 1

"""Low-rank changes as an ordinary PEFT adapter: padded to full size with zeros, all of one weight in one pair."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from locedit.edit.adapter import LowRank
from locedit.edit.restrict import holders, out_axis
from locedit.models import Model


def export_peft(model: Model, adapters: Sequence[LowRank], folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors that PEFT loads onto the same base.

    The pieces of a weight become one pair: their A below one another, their B side by side. alpha = rank, so that
    nothing is scaled.
    """
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

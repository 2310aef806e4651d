"""Fine-tuning as an attacker would, in place, with every bit of the model put back afterwards."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from locedit.data.encode import Example, collate
from locedit.edit.objective import Shuffled
from locedit.errors import LoceditError
from locedit.losses import Scored, score, sequence_nll
from locedit.models import Model

How = Literal["full", "lora"]


@dataclass(frozen=True, kw_only=True)
class Diet:
    """What the attacker trains on."""

    relearned: Sequence[Example]
    retain: Sequence[Example]
    "mixed into every step; may be empty"
    batch_size: int
    "examples of each kind in a step"
    retain_weight: float
    seed: int


def fine_tune(
    model: Model,
    weights: Sequence[nn.Parameter],
    diet: Diet,
    *,
    learning_rate: float,
    steps: int,
    after_step: Callable[[int], None],
    by: str = "relearning",
) -> None:
    """AdamW without weight decay at a constant rate on mean NLL(relearned) + retain_weight * mean NLL(retain).

    The NLL of an example is the mean over its scored tokens; the gradient norm is cut at 1. Weights in half precision
    are trained through float32 copies. `after_step` is called with the number of steps done.
    """
    masters = [weight if weight.dtype == torch.float32 else weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(diet.seed)
    relearned = Shuffled(diet.relearned, diet.batch_size, generator)
    retain = Shuffled(diet.retain, diet.batch_size, generator) if diet.retain else None
    for step in range(1, steps + 1):
        rows = next(relearned)
        known = next(retain) if retain else []
        scored = score(model, collate([*rows, *known], model).to(model.device))
        loss = _loss(scored, relearned=len(rows), retain_weight=diet.retain_weight)
        if not bool(loss.isfinite()):
            raise LoceditError(f"{by}: the loss is {loss.item()} at step {step}, learning rate {learning_rate!r}")
        gradients = torch.autograd.grad(loss, list(weights), allow_unused=True)
        _step(optimizer, weights, masters, gradients)
        after_step(step)


def _loss(scored: Scored, *, relearned: int, retain_weight: float) -> Float[Tensor, ""]:
    nll = sequence_nll(scored)
    loss = nll[:relearned].mean()
    return loss if len(nll) == relearned else loss + retain_weight * nll[relearned:].mean()


def _step(
    optimizer: torch.optim.Optimizer,
    weights: Sequence[nn.Parameter],
    masters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> None:
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = None if gradient is None else gradient.to(master.dtype)
    torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    with torch.no_grad():
        for weight, master in zip(weights, masters, strict=True):
            if weight is not master:
                weight.copy_(master)


# --- what is trained, and how it is put back ------------------------------------------------------------------------


@contextmanager
def opened(model: Model, how: How, *, rank: int, seed: int) -> Generator[list[nn.Parameter]]:
    """The weights that the attacker trains; on exit the model is as before, bit for bit, also after an error."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.module.parameters()]
    try:
        with _full(model) if how == "full" else _lora(model, rank=rank, seed=seed) as weights:
            yield weights
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


@contextmanager
def _full(model: Model) -> Generator[list[nn.Parameter]]:
    """Every floating-point parameter, from a copy in main memory."""
    weights = [parameter for parameter in model.module.parameters() if parameter.is_floating_point()]
    kept = [weight.detach().to("cpu", copy=True) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)


@contextmanager
def _lora(model: Model, *, rank: int, seed: int) -> Generator[list[nn.Parameter]]:
    """Fresh LoRA factors on all linear maps but the unembedding (peft's "all-linear"); the weights stay untouched."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers.pytorch_utils import Conv1D

    if isinstance(model.module, PeftModel):
        raise LoceditError(
            "relearning by LoRA: the model is wrapped by PEFT already; use hold='full', or merge its adapter"
        )
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
    transposed = any(isinstance(part, Conv1D) for part in model.module.modules())
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=transposed)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model.module, config)  # type: ignore[arg-type]
    wrapped.eval()
    try:
        yield [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    finally:
        wrapped.unload()


def full_needs_bytes(model: Model) -> int:
    """Memory beside the weights for full fine-tuning: gradients, Adam's two moments, float32 copies of half weights."""
    total = 0
    for parameter in model.module.parameters():
        size = parameter.element_size()
        total += parameter.numel() * (size + 8 + (4 if size < 4 else 0))
    return total


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the device; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return int(found.split()[1]) * 1024

"""Weights as they are after quantization: rounded to few levels, and back in the model's dtype.

Quantized are the weights of the linear maps in the blocks, each in its [out, in] form; embeddings, unembedding, norms,
biases and expert tensors that are no linear map stay as they are, as under transformers and bitsandbytes. What an edit
adds beside the weights (LoRA factors, hooks, layers, control tokens) stays in full precision too, as in QLoRA.
Activations are not quantized: the forward pass is the ordinary one with the rounded weights.
"""

import importlib.util
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from locedit.edit.regions import require_editable
from locedit.edit.restrict import is_linear, out_axis
from locedit.errors import LoceditError, nearest
from locedit.models import Model

Backend = Literal["bitsandbytes", "torch"]
BLOCK = 64
"weights of NF4 that share an absmax, QLoRA's block size"
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The code book of 4-bit NormalFloat: quantiles of a normal distribution scaled to [-1, 1], with an exact zero
(Dettmers et al. 2023, arXiv:2305.14314, appendix E)."""
_INT8_STEP = 0.007874015718698502
"1 / 127, as bitsandbytes rounds it"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How weights are rounded: groups of them share the largest absolute value, and each becomes one of its levels."""

    name: str
    bits: int
    "a weight; what the groups' absmax take comes on top"
    groups: "Callable[[Float[Tensor, 'out in']], Float[Tensor, 'group size']]"
    "float32, the last group filled up with zeros"
    encode: "Callable[[Float[Tensor, 'group size'], Float[Tensor, 'group 1']], Int[Tensor, 'group size']]"
    "(weights, absmax of each group) -> code, rising with the weight, 0 the lowest"
    decode: "Callable[[Int[Tensor, 'group size'], Float[Tensor, 'group 1']], Float[Tensor, 'group size']]"
    borders: tuple[float, ...]
    "shares of the absmax between a code and the next"


def _rows(weight: Float[Tensor, "out in"]) -> Float[Tensor, "group size"]:
    """Each output row is a group; in float16 first, as bitsandbytes takes weights in."""
    return weight.half().float()


def _blocks(weight: Float[Tensor, "out in"]) -> Float[Tensor, "group size"]:
    """64 successive weights of the flattened matrix are a group."""
    flat = weight.float().flatten()
    return nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _to_int8(x: Float[Tensor, "group size"], absmax: Float[Tensor, "group 1"]) -> Int[Tensor, "group size"]:
    """round(127 x / absmax) + 127; 127 (zero) in rows of zeros."""
    return torch.round(x * (127.0 / absmax.clamp(min=1e-30))).long() + 127


def _from_int8(codes: Int[Tensor, "group size"], absmax: Float[Tensor, "group 1"]) -> Float[Tensor, "group size"]:
    return (codes - 127).float() * absmax * _INT8_STEP


def _to_nf4(x: Float[Tensor, "group size"], absmax: Float[Tensor, "group 1"]) -> Int[Tensor, "group size"]:
    """Index of the nearest level; of two as near the lower."""
    scaled = (x * (1.0 / absmax.clamp(min=1e-38))).clamp(-1, 1)
    return torch.bucketize(scaled, torch.tensor(_NF4_BORDERS, device=x.device))


def _from_nf4(codes: Int[Tensor, "group size"], absmax: Float[Tensor, "group 1"]) -> Float[Tensor, "group size"]:
    return torch.tensor(NF4, device=codes.device)[codes] * absmax


_NF4_BORDERS = tuple(((torch.tensor(NF4)[:-1] + torch.tensor(NF4)[1:]) / 2).tolist())
SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "int8": Scheme(
            name="int8",
            bits=8,
            groups=_rows,
            encode=_to_int8,
            decode=_from_int8,
            borders=tuple((code + 0.5) / 127 for code in range(-127, 127)),
        ),
        "nf4": Scheme(name="nf4", bits=4, groups=_blocks, encode=_to_nf4, decode=_from_nf4, borders=_NF4_BORDERS),
    }
)
"""int8: symmetric, one absmax an output row, the weights of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339); that
method also rounds activations, all but outlier features, which is left out here. nf4: one absmax for 64 weights, not
itself quantized, as QLoRA without double quantization."""


def scheme_named(name: str) -> Scheme:
    """The scheme, or LoceditError with the names that there are."""
    if name not in SCHEMES:
        raise LoceditError(f"quantization scheme {name!r}; {nearest(name, SCHEMES)}")
    return SCHEMES[name]


def rounded(weight: Float[Tensor, "out in"], scheme: Scheme, *, backend: Backend = "torch") -> Float[Tensor, "out in"]:
    """A matrix quantized and dequantized, in its own dtype. Both backends give the same bits on a CPU."""
    if backend == "bitsandbytes":
        return _by_bitsandbytes(weight, scheme).to(weight.dtype)
    x = scheme.groups(weight)
    absmax = x.abs().amax(1, keepdim=True)
    values = scheme.decode(scheme.encode(x, absmax), absmax)
    return values.flatten()[: weight.numel()].view(weight.shape).to(weight.dtype)


def _by_bitsandbytes(weight: Float[Tensor, "out in"], scheme: Scheme) -> Float[Tensor, "out in"]:
    """The same by the library's own kernels, float32."""
    import bitsandbytes.functional as library

    functional: Any = library
    if scheme.name == "int8":
        codes, absmax, _ = functional.int8_vectorwise_quant(weight.contiguous().half())
        return functional.int8_vectorwise_dequant(codes, absmax)
    packed, state = functional.quantize_4bit(weight.contiguous().float(), blocksize=BLOCK, quant_type="nf4")
    return functional.dequantize_4bit(packed, state)


def backend_of(asked: str, device: torch.device) -> Backend:
    """`auto` is bitsandbytes on a GPU where it is installed, else torch, which gives the same bits on a CPU."""
    if asked not in ("auto", "bitsandbytes", "torch"):
        raise LoceditError(f"backend={asked!r}; {nearest(asked, ('auto', 'bitsandbytes', 'torch'))}")
    installed = importlib.util.find_spec("bitsandbytes") is not None
    if asked == "bitsandbytes" and not installed:
        raise LoceditError("backend='bitsandbytes' is not installed: pip install 'locedit[quantization]', or 'torch'")
    if asked == "auto":
        return "bitsandbytes" if installed and device.type == "cuda" else "torch"
    return "bitsandbytes" if asked == "bitsandbytes" else "torch"


# --- a whole model ----------------------------------------------------------------------------------------------------


def linear_weights(model: Model) -> dict[str, int]:
    """Name -> output axis of every weight that is quantized: of the linear maps in the blocks, adapters left out.

    Raises LoceditError for a model that is quantized already, or without such maps.
    """
    names = {id(parameter): name for name, parameter in model.anatomy.parameters.items()}
    found: dict[str, int] = {}
    for block in model.anatomy.blocks:
        for parameter in block.parameters():
            _require_unquantized(names.get(id(parameter)), parameter)
        for part in block.modules():
            if is_linear(part) and (name := names.get(id(part.weight))) is not None:
                found[name] = out_axis(part)
    if not found:
        raise LoceditError(f"{model.name} has no linear map in its blocks whose weights could be quantized")
    return found


def _require_unquantized(name: str | None, parameter: nn.Parameter) -> None:
    if name is None:
        return
    if not parameter.is_floating_point():
        raise LoceditError(f"{name} is stored as {parameter.dtype}: the model is quantized already")
    require_editable(name, parameter)


def left_out(model: Model) -> float:
    """Share of the blocks' matrices, in weights, that is in no linear map: expert tensors and the like."""
    whole = {name: model.parameter(name).numel() for name in _matrices(model)}
    return 1 - sum(whole[name] for name in linear_weights(model)) / sum(whole.values())


def _matrices(model: Model) -> list[str]:
    inside = {id(parameter) for block in model.anatomy.blocks for parameter in block.parameters()}
    return [
        name for name, parameter in model.anatomy.parameters.items() if id(parameter) in inside and parameter.ndim > 1
    ]


def in_rows(stored: Tensor, axis: int) -> Float[Tensor, "out in"]:
    """A weight with its outputs on the first axis, and back: Conv1D stores [in, out]."""
    return stored.T if axis == 1 else stored


@contextmanager
def quantized(model: Model, scheme: str, *, backend: Backend = "torch") -> Generator[Model]:
    """The model with quantized weights inside the block; the same bits as before afterwards, also after an error.

    Inside `edit.applied(model)` it acts on the edited weights. They are rounded in place and can be trained on from
    there; what they were is kept in main memory.
    """
    chosen = scheme_named(scheme)
    with ExitStack() as stack:
        for name, axis in linear_weights(model).items():
            parameter = model.parameter(name)
            stack.callback(_put, parameter, parameter.detach().to("cpu", copy=True))
            _put(parameter, in_rows(rounded(in_rows(parameter.detach(), axis), chosen, backend=backend), axis))
        yield model


def _put(parameter: nn.Parameter, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)

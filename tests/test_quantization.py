"""Quantized weights: levels by hand, by brute force and by bitsandbytes; which weights; everything is put back."""

import importlib.util
from typing import Any

import pytest
import torch
from jaxtyping import Float
from scipy.stats import norm
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from locedit import quantization
from locedit.edit import Edit
from locedit.edit.adapter import LowRank
from locedit.edit.edit import weights_edit
from locedit.edit.regions import Region
from locedit.errors import LoceditError
from locedit.models import Model, load
from locedit.quantization import BLOCK, NF4, SCHEMES, backend_of, left_out, linear_weights, quantized, rounded
from tests import tiny
from tests.struck import untouched

BOTH = tuple(SCHEMES)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
ARCHITECTURES = ("gpt2", "gpt_neox", "llama", "phi3", "bert")


def matrix(rows: int = 6, columns: int = 192, *, seed: int = 0) -> Float[Tensor, "out in"]:
    """Weights with outliers."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3 * 0.05


# --- one matrix -------------------------------------------------------------------------------------------------------


def test_int8_by_hand() -> None:
    weight = torch.tensor([[127.0, 1.0, -2.25, 0.5, 1.5, -0.75], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[127.0, 1.0, -2.0, 0.0, 2.0, -1.0], [0.0] * 6])  # halves go to the even code
    torch.testing.assert_close(rounded(weight, SCHEMES["int8"]), expected)
    torch.testing.assert_close(rounded(3 * weight, SCHEMES["int8"]), 3 * expected)


def test_every_row_has_its_own_scale_in_int8() -> None:
    weight = matrix()
    alone = torch.cat([rounded(row[None], SCHEMES["int8"]) for row in weight])
    assert torch.equal(rounded(weight, SCHEMES["int8"]), alone)
    error = (rounded(weight, SCHEMES["int8"]) - weight.half().float()).abs()
    assert bool((error <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all())
    assert float(error.max()) > 0


def test_the_nf4_levels_are_quantiles_of_a_normal_distribution() -> None:
    """The construction of QLoRA's code: 8 quantiles above and 7 below an exact zero, scaled to 1."""
    offset = 0.9677083
    upper = norm.ppf(torch.linspace(offset, 0.5, 9).double()[:-1])
    lower = -norm.ppf(torch.linspace(offset, 0.5, 8).double()[:-1])
    levels = torch.tensor(sorted([*upper, 0.0, *lower]))
    torch.testing.assert_close(torch.tensor(NF4).double(), levels / levels.max(), atol=1e-6, rtol=0)


def test_nf4_takes_the_nearest_level_of_each_block() -> None:
    weight = matrix(2, 80)  # 160 weights: blocks of 64, 64 and 32 that cross the rows
    found = rounded(weight, SCHEMES["nf4"]).flatten()
    for start in range(0, 160, BLOCK):
        block = weight.flatten()[start : start + BLOCK]
        levels = torch.tensor(NF4) * block.abs().max()
        nearest = levels[(block[:, None] - levels).abs().argmin(1)]
        torch.testing.assert_close(found[start : start + BLOCK], nearest)
    assert len(found.unique()) > 16
    single = rounded(weight.flatten()[None, : BLOCK + 1], SCHEMES["nf4"])[0, -1]
    assert float(single) == pytest.approx(float(weight.flatten()[BLOCK])), "a block of one is its own absmax"


def test_of_two_nf4_levels_as_near_the_lower_is_taken_and_64_weights_share_a_scale() -> None:
    borders = torch.tensor(SCHEMES["nf4"].borders)
    codes = SCHEMES["nf4"].encode(borders[None], torch.ones(1, 1))
    assert codes[0].tolist() == list(range(15))
    weight = torch.full((1, 128), 0.1)
    weight[0, 63], weight[0, 127] = 1.0, 0.1
    found = rounded(weight, SCHEMES["nf4"])[0]
    assert found[:63].unique().tolist() == pytest.approx([NF4[8]]), "the scale of the first 64 is 1"
    assert found[64:].unique().tolist() == pytest.approx([0.1])


@pytest.mark.parametrize("name", BOTH)
def test_zeros_stay_zeros(name: str) -> None:
    assert torch.equal(rounded(torch.zeros(3, 64), SCHEMES[name]), torch.zeros(3, 64))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_as_bitsandbytes(name: str, dtype: torch.dtype) -> None:
    functional: Any = pytest.importorskip("bitsandbytes").functional
    for seed, (rows, columns) in enumerate(((6, 192), (64, 320), (5, 66))):
        weight = matrix(rows, columns, seed=seed).to(dtype)
        if name == "nf4":
            packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
            theirs = functional.dequantize_4bit(packed, state)
        else:
            codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
            theirs = functional.int8_vectorwise_dequant(codes, absmax).to(dtype)
        assert theirs.dtype == dtype
        assert torch.equal(rounded(weight, SCHEMES[name]), theirs)
        assert torch.equal(rounded(weight, SCHEMES[name], backend="bitsandbytes"), theirs)
        assert not torch.equal(theirs, weight)


@pytest.mark.parametrize("name", BOTH)
def test_float64_is_rounded_as_float32(name: str) -> None:
    found = rounded(matrix().double(), SCHEMES[name])
    assert found.dtype == torch.float64
    assert torch.equal(found.float(), rounded(matrix(), SCHEMES[name]))


# --- a whole model ----------------------------------------------------------------------------------------------------


def _linear(model: Model) -> dict[str, nn.Module]:
    """Weight -> module of the linear maps in the blocks, found by their classes."""
    blocks = ("transformer.h.", "gpt_neox.layers.", "model.layers.", "bert.encoder.layer.")
    named = model.module.named_modules()
    return {f"{n}.weight": m for n, m in named if isinstance(m, nn.Linear | Conv1D) and n.startswith(blocks)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_linear_maps_of_the_blocks_are_rounded_and_nothing_else(architecture: str) -> None:
    model = tiny.model(architecture)
    maps = _linear(model)
    before = {name: parameter.detach().clone() for name, parameter in model.anatomy.parameters.items()}
    with untouched(model):
        for name in BOTH:
            with quantized(model, name) as inside:
                assert inside is model
                moved = {n for n, p in model.anatomy.parameters.items() if not torch.equal(p, before[n])}
                assert moved == set(maps)
                for weight, module in maps.items():
                    turned = isinstance(module, Conv1D)
                    old, new = ((t.T if turned else t) for t in (before[weight], model.parameter(weight).detach()))
                    assert torch.equal(new, rounded(old.contiguous(), SCHEMES[name]))
    assert len(maps) >= 4 * model.n_layers


def test_everything_is_put_back_after_an_error() -> None:
    model = tiny.model("gpt2")
    with untouched(model), pytest.raises(RuntimeError, match="within"), quantized(model, "nf4"):
        with torch.no_grad():
            model.parameter("transformer.h.0.mlp.c_fc.weight").add_(1.0)
        raise RuntimeError("within")


def test_whether_gradients_are_taken_is_left_to_the_caller() -> None:
    model = tiny.model("gpt2")
    with quantized(model, "int8"):
        assert torch.is_grad_enabled()
    with torch.no_grad(), quantized(model, "int8"):
        assert not torch.is_grad_enabled()
    with torch.inference_mode(), quantized(model, "int8"):
        assert torch.is_inference_mode_enabled()


def test_it_acts_on_the_edited_weights() -> None:
    model, name = tiny.model("llama"), "model.layers.1.mlp.down_proj.weight"
    new = 2 * model.parameter(name).detach() + 0.01
    edit = weights_edit(model, [(Region(param=name), new)])
    with untouched(model), edit.applied(model) as edited:
        with quantized(edited, "nf4"):
            assert torch.equal(edited.parameter(name), rounded(new, SCHEMES["nf4"]))
        assert torch.equal(edited.parameter(name), new)


def test_what_acts_beside_the_weights_stays_in_full_precision() -> None:
    """x (Q(W) + D), and not x Q(W + D), for LoRA factors."""
    model, name = tiny.model("llama"), "model.layers.1.mlp.down_proj.weight"
    base = model.parameter(name).detach().clone()
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, base.shape[1], generator=generator), torch.randn(base.shape[0], 2, generator=generator)
    edit = Edit(
        kind="adapter",
        fingerprint=model.fingerprint,
        adapters=(LowRank(param=name, axis=None, index=None, down=0.1 * down, up=0.1 * up),),
    )
    delta = 0.01 * up @ down
    with edit.applied(model), quantized(model, "nf4"), torch.no_grad():
        found = model.module(tiny.ids()).logits
    logits: list[Tensor] = []
    for weight in (rounded(base, SCHEMES["nf4"]) + delta, rounded(base + delta, SCHEMES["nf4"])):
        with quantized(model, "nf4"), torch.no_grad():
            model.parameter(name).copy_(weight)
            logits.append(model.module(tiny.ids()).logits)
    torch.testing.assert_close(found, logits[0], atol=1e-4, rtol=1e-4)
    assert float((found - logits[1]).abs().max()) > 0.05


def test_a_half_precision_model_stays_in_its_dtype() -> None:
    model = load(tiny.module("llama").to(torch.bfloat16), tokenizer=tiny.tokenizer(), device="cpu")
    name = "model.layers.0.self_attn.q_proj.weight"
    before = model.parameter(name).detach().clone()
    with untouched(model), quantized(model, "int8"):
        assert model.parameter(name).dtype == torch.bfloat16
        assert torch.equal(model.parameter(name), rounded(before, SCHEMES["int8"]))


def test_expert_tensors_that_are_no_linear_map_are_named_as_left_out() -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, vocab_size=tiny.VOCAB, num_key_value_heads=2, num_local_experts=3)
    model = load(MixtralForCausalLM(config), tokenizer=tiny.tokenizer(), device="cpu")
    inside = {n: p.numel() for n, p in model.anatomy.parameters.items() if ".layers." in n and p.ndim > 1}
    attention = sum(size for name, size in inside.items() if "self_attn" in name)
    assert all("experts" not in name for name in linear_weights(model))
    assert left_out(model) == pytest.approx(1 - attention / sum(inside.values()))
    assert left_out(tiny.model("llama")) == 0


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    with pytest.raises(LoceditError, match="scheme 'int4'.*nf4"), quantized(model, "int4"):
        pass
    with pytest.raises(LoceditError, match="backend='bnb'"):
        backend_of("bnb", CPU)
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda _: None)
    assert backend_of("auto", GPU) == "torch"
    with pytest.raises(LoceditError, match="'bitsandbytes' is not installed"):
        backend_of("bitsandbytes", CPU)


def test_a_model_that_is_quantized_already_is_refused() -> None:
    model = tiny.model("llama")
    part = model.module.get_submodule("model.layers.0.mlp.down_proj")
    part.weight = nn.Parameter(torch.zeros(part.weight.shape, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(LoceditError, match="stored as torch.uint8: the model is quantized already"):
        linear_weights(load(model.module, tokenizer=tiny.tokenizer(), device="cpu"))


def test_the_installed_backend_is_taken() -> None:
    installed = importlib.util.find_spec("bitsandbytes") is not None
    assert backend_of("auto", GPU) == ("bitsandbytes" if installed else "torch")
    assert backend_of("auto", CPU) == "torch", "the same bits, without loading a library"
    assert backend_of("torch", GPU) == "torch"

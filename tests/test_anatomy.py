"""Components of every architecture: where they live, and that zeroing their weights is zeroing them by hook."""

import functools
from collections.abc import Generator
from contextlib import contextmanager
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import Tensor

from locedit import points, tracing
from locedit.anatomy import Runs
from locedit.components import UNITS, ComponentSet
from locedit.errors import LoceditError
from locedit.models import Model, load
from tests import tiny

by_architecture = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
cached = functools.cache(tiny.model)


def batch(ids: Tensor) -> SimpleNamespace:
    return SimpleNamespace(ids=ids, attention_mask=torch.ones_like(ids))


@torch.no_grad()
def logits(model: Model) -> Tensor:
    return model.logits(batch(tiny.ids()))


@contextmanager
def zeroed(model: Model, components: ComponentSet) -> Generator[None]:
    """Zero the write slices, by plain indexing, and put the bits back."""
    touched = components.touched("write")
    saved = {t.param: model.parameter(t.param).detach().clone() for t in touched}
    with torch.no_grad():
        for t in touched:
            parameter = model.parameter(t.param)
            assert parameter.shape == t.shape
            if t.index is None:
                parameter.zero_()
            else:
                parameter.index_fill_(t.axis, t.index, 0.0)
        try:
            yield
        finally:
            for name, values in saved.items():
                model.parameter(name).copy_(values)


def some(model: Model, unit: str) -> ComponentSet:
    """One or two components of each site of layer 1, far apart."""
    sites = {name: site for name, site in model.sites(unit).items() if site.layer == 1}
    return model.components({name: {0 if site.count == 1 else 1, site.count - 1} for name, site in sites.items()})


def assert_weights_equal_hook(model: Model, components: ComponentSet) -> None:
    """Zeroing both ways gives the same logits, within 1e-5 of their range, and other ones than before."""
    before = logits(model)
    with zeroed(model, components):
        by_weights = logits(model)
    with tracing.ablate(model, components):
        by_hook = logits(model)
    span = float(before.max() - before.min())
    assert float((by_weights - by_hook).abs().max()) <= 1e-5 * span
    assert float((by_weights - before).abs().max()) >= 1e-3 * span
    assert torch.equal(logits(model), before)


@by_architecture
@pytest.mark.parametrize("unit", ["neuron", "head", "mlp", "attn", "layer", "matrix", "row", "column"])
def test_zeroing_weights_is_zeroing_by_hook(architecture: str, unit: str) -> None:
    assert_weights_equal_hook(cached(architecture), some(cached(architecture), unit))


@pytest.mark.slow
@by_architecture
@pytest.mark.parametrize("unit", ["matrix", "row", "column"])
def test_zeroing_one_matrix_is_zeroing_it_by_hook(architecture: str, unit: str) -> None:
    """Each matrix alone: together one could hide another."""
    model = cached(architecture)
    for name, chosen in some(model, unit).chosen.items():
        assert_weights_equal_hook(model, model.components({name: chosen}))


@by_architecture
@pytest.mark.parametrize("unit", UNITS)
def test_slices_name_parameters_as_they_are(architecture: str, unit: str) -> None:
    model = cached(architecture)
    parameters = dict(model.module.named_parameters())
    for site in model.sites(unit).values():
        assert site.unit == unit
        for piece in site.slices:
            assert piece.shape == parameters[piece.param].shape
            if piece.axis is not None:
                last = piece.index(range(site.count))
                assert 0 <= int(last.min()) <= int(last.max()) < piece.shape[piece.axis]


@by_architecture
@pytest.mark.parametrize("unit", ["matrix", "row", "column", "weight"])
def test_every_parameter_is_in_exactly_one_site(architecture: str, unit: str) -> None:
    model = cached(architecture)
    total = sum(parameter.numel() for parameter in model.module.parameters())
    everything = model.everything(unit)
    alone = sum(site.parameters(range(site.count)) for site in everything.sites.values())
    assert everything.parameters() == alone == total


@by_architecture
def test_layers_hold_their_blocks(architecture: str) -> None:
    model = cached(architecture)
    for layer, block in enumerate(model.anatomy.blocks):
        held = model.components({f"blocks.{layer}.layer": [0]})
        assert held.parameters() == sum(parameter.numel() for parameter in block.parameters())
        parts = model.components({f"blocks.{layer}.mlp": [0], f"blocks.{layer}.attn": [0]})
        norms = sum(p.numel() for n, p in block.named_parameters() if "norm" in n.lower() or ".ln_" in f".{n}")
        qk = sum(p.numel() for n, p in block.named_parameters() if "q_norm" in n or "k_norm" in n)
        assert parts.parameters() == held.parameters() - norms + qk


VARIANTS = (
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),  # as OPT-350m
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    ("phi3", {"head_dim": 16}),
    ("gpt_neox", {"attention_bias": False}),
    ("phi", {"num_key_value_heads": 2, "qk_layernorm": True}),
)


@pytest.mark.parametrize(("architecture", "settings"), VARIANTS, ids=[a for a, _ in VARIANTS])
def test_variants_of_the_same_class(architecture: str, settings: dict[str, object]) -> None:
    """Zeroing weights is zeroing by hook, and no hook point that returns its value changes a bit."""
    model = tiny.model(architecture, **settings)
    before = logits(model)
    for unit in ("neuron", "head", "mlp", "attn", "matrix", "row", "column"):
        assert_weights_equal_hook(model, some(model, unit))
    names = points.names(model.anatomy, (0, 1, 2))
    with tracing.scale(model, dict.fromkeys(names, 1.0)):
        assert torch.equal(logits(model), before)


# --- numbers worked out by hand --------------------------------------------------------------------------------------


def places(model: Model, site: str, component: int) -> dict[tuple[str, int | None], list[int]]:
    """(parameter's last words, axis) -> first and last index, for training."""
    found: dict[tuple[str, int | None], list[int]] = {}
    for piece in model.sites(site.rsplit(".", 1)[-1])[site].slices:
        index = piece.index([component]).tolist()
        if index:
            found[piece.param.split(".", 3)[-1], piece.axis] = [index[0], index[-1]]
    return found


def test_gpt2_neurons_and_heads_by_hand() -> None:
    """Conv1D stores [in, out]: a neuron is a column of c_fc and a row of c_proj; q, k, v lie at 0, 48, 96."""
    model = cached("gpt2")
    assert places(model, "blocks.1.mlp.neuron", 5) == {
        ("mlp.c_fc.weight", 1): [5, 5], ("mlp.c_fc.bias", 0): [5, 5], ("mlp.c_proj.weight", 0): [5, 5],
    }  # fmt: skip
    head = model.components({"blocks.1.attn.head": [2]})
    index = {(t.param.split(".", 3)[-1], t.axis): t.index.tolist() for t in head.touched("train")}
    expected = [*range(24, 36), *range(72, 84), *range(120, 132)]
    assert index == {
        ("attn.c_attn.weight", 1): expected, ("attn.c_attn.bias", 0): expected,
        ("attn.c_proj.weight", 0): list(range(24, 36)),
    }  # fmt: skip
    write = head.touched("write")
    assert [(t.param, t.index.tolist()) for t in write] == [("transformer.h.1.attn.c_proj.weight", list(range(24, 36)))]


def test_neox_heads_lie_together_by_hand() -> None:
    """query_key_value holds q, k, v of head 0, then of head 1: head 2 with width 12 starts at 2 * 36."""
    head = cached("gpt_neox").components({"blocks.0.attn.head": [2]})
    index = {t.param.split(".")[-2]: t.index.tolist() for t in head.touched("train") if t.param.endswith("weight")}
    assert index == {"query_key_value": list(range(72, 108)), "dense": list(range(24, 36))}


def test_phi3_neurons_by_hand() -> None:
    """gate_up_proj holds 80 gates, then 80 ups."""
    touched = cached("phi3").components({"blocks.2.mlp.neuron": [7]}).touched("train")
    index = {t.param.split(".")[-2]: t.index.tolist() for t in touched}
    assert index == {"gate_up_proj": [7, 87], "down_proj": [7]}


@pytest.mark.parametrize(("heads", "shared"), [([0], []), ([1, 2], []), ([2, 3], [1]), ([0, 1, 3], [0])])
def test_shared_keys_and_values_need_the_whole_group(heads: list[int], shared: list[int]) -> None:
    touched = cached("llama").components({"blocks.0.attn.head": heads}).touched("train")
    index = {t.param.split(".")[-2]: t.index.tolist() for t in touched}
    rows = [g * 16 + i for g in shared for i in range(16)]
    assert index.get("k_proj", []) == index.get("v_proj", []) == rows
    assert len(index["q_proj"]) == len(index["o_proj"]) == 16 * len(heads)


def test_tied_embeddings_count_once() -> None:
    tied, free = cached("llama_tied"), cached("llama")
    assert "model.embed_tokens.weight:row" in tied.sites("row")
    assert "lm_head.weight:row" not in tied.sites("row")
    assert tied.sites("row")["model.embed_tokens.weight:row"].count == tiny.VOCAB
    assert "lm_head.weight:row" in free.sites("row")
    assert cached("gpt2").sites("column")["transformer.wte.weight:column"].count == tiny.D_MODEL


def test_rows_lead_into_an_output_whatever_the_storage() -> None:
    """c_fc [48, 192] and up_proj [80, 48] both have a row per neuron and a column per entry of the residual stream."""
    for architecture, role, rows in (("gpt2", "mlp.in", 192), ("llama", "mlp.in", 80), ("gpt2", "attn.qkv", 144)):
        model = cached(architecture)
        assert model.sites("row")[f"blocks.0.{role}.row"].count == rows
        assert model.sites("column")[f"blocks.0.{role}.column"].count == tiny.D_MODEL


def test_runs_refuse_uneven_rows() -> None:
    assert Runs.of((0, 1, 6, 7, 12, 13), "q") == Runs(start=0, stride=6, width=2, count=3)
    assert Runs.of((4, 5, 6), "q") == Runs(start=4, stride=3, width=3, count=1)
    with pytest.raises(LoceditError, match="not evenly spaced"):
        Runs.of((0, 1, 6, 7, 9, 10), "q")


# --- wrapped by PEFT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [("gpt2", ["c_attn", "c_proj", "c_fc"]), ("llama", ["q_proj", "down_proj", "gate_proj"]),
     ("gpt_neox", ["query_key_value", "dense_4h_to_h"]), ("bert", ["query", "dense"])],
)  # fmt: skip
def test_peft_keeps_names_slices_and_the_meaning_of_a_neuron(architecture: str, targets: list[str]) -> None:
    plain = cached(architecture)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=True, fan_in_fan_out=architecture == "gpt2")
    wrapped = load(peft.get_peft_model(tiny.module(architecture), config), tokenizer=tiny.tokenizer())
    for unit in UNITS:
        assert wrapped.sites(unit) == plain.sites(unit)
    assert torch.equal(logits(wrapped), logits(plain))
    for unit in ("neuron", "head", "mlp"):
        components = some(wrapped, unit)
        with zeroed(wrapped, components):
            by_weights = logits(wrapped)
        with tracing.ablate(wrapped, components):
            by_hook = logits(wrapped)
        assert torch.allclose(by_weights, by_hook, atol=1e-4)
        assert not torch.allclose(by_hook, logits(plain), atol=1e-2)


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_mixtures_of_experts_have_no_dense_neuron() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=tiny.VOCAB, hidden_size=48, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    model = load(MixtralForCausalLM(config), tokenizer=tiny.tokenizer())
    with pytest.raises(LoceditError, match="no dense neuron") as caught:
        model.sites("neuron")
    assert "\n" not in str(caught.value)
    experts = [site for name, site in model.sites("matrix").items() if "experts" in name]
    assert experts
    assert {site.count for site in experts} == {3}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.sites("neurone"), "did you mean 'neuron'"),
        (lambda m: m.components({"blocks.9.mlp.neuron": [0]}), "no site 'blocks.9.mlp.neuron'"),
        (lambda m: m.components({"blocks.0.mlp.neuron": [80]}), "component 80 of blocks.0.mlp.neuron does not exist"),
        (lambda m: m.parameter("model.norm.weigh"), "did you mean 'model.norm.weight'"),
        (lambda m: m.linear(0, "mlp.up"), "no matrix 'mlp.up' in layer 0"),
        (lambda m: m.linear(7, "mlp.in"), "no layer 7; the model has 3"),
    ],
)
def test_unknown_names_are_one_clear_line(call: object, said: str) -> None:
    with pytest.raises(LoceditError, match=said) as caught:
        call(cached("llama"))  # type: ignore[operator]
    assert "\n" not in str(caught.value)

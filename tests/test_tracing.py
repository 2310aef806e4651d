"""Hooks see and change what they name, gradients flow through them, and nothing stays behind.

The oracle is transformer-lens' own bridge: values and gradients at every point of every architecture must be its.
"""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit import points, tracing
from locedit.errors import LoceditError
from locedit.models import Model, load
from tests import tiny

by_architecture = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
cached = functools.cache(tiny.model)
LAYERS = tuple(range(tiny.N_LAYERS))


def batch(ids: Tensor) -> SimpleNamespace:
    return SimpleNamespace(ids=ids, attention_mask=torch.ones_like(ids))


BATCH = batch(tiny.ids())
ids_of = BATCH.ids


def hooks_left(model: Model) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.module.modules()
    )


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Equal within float32 rounding of the largest value (softmax is in float32 even in a float64 model)."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


# --- the oracle ------------------------------------------------------------------------------------------------------


def bridge_name(name: str, model: Model) -> str:
    """The bridge's name for the same value; two of its aliases are something else on post-norm blocks."""
    if not model.causal:
        name = name.replace("hook_resid_mid", "ln1.hook_out").replace("hook_attn_out", "attn.o.hook_out")
    return name


def from_bridge(model: Model, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values at the points of the bridge, and gradients of logit 7 at the last position."""
    values: dict[str, Tensor] = {}

    def catch(value: Tensor, hook: Any) -> Tensor:
        values[hook.name] = value.clone()
        return values[hook.name]

    with model.bridged() as bridge:
        of = {name: bridge.hook_dict[bridge_name(name, model)].name for name in names}
        with bridge.hooks(fwd_hooks=[(actual, catch) for actual in set(of.values())]):
            logits = bridge(ids_of, return_type="logits")
        gradients = torch.autograd.grad(logits[:, -1, 7].sum(), list(values.values()))
    by_actual = dict(zip(values, gradients, strict=True))
    return {n: values[a] for n, a in of.items()}, {n: by_actual[a] for n, a in of.items()}


@by_architecture
def test_values_and_gradients_are_the_bridges(architecture: str) -> None:
    module = tiny.module(architecture, attn_implementation="eager").double()
    model = load(module, tokenizer=tiny.tokenizer())
    names = points.names(model.anatomy, LAYERS)
    assert f"blocks.{LAYERS[-1]}.mlp.hook_post" in names
    theirs, their_gradients = from_bridge(model, names)
    with tracing.record(model, names) as seen:
        logits = model.logits(BATCH)
    gradients = torch.autograd.grad(logits[:, -1, 7].sum(), [seen[name] for name in names])
    assert tuple(sorted(seen)) == tuple(sorted(names))
    for name, gradient in zip(names, gradients, strict=True):
        if name == "hook_pos_embed":  # the bridge repeats it for every row
            assert_close(seen[name].expand_as(theirs[name]), theirs[name])
            continue
        assert_close(seen[name], theirs[name])
        if name.endswith("hook_resid_mid") and model.causal:  # the bridge's reaches the MLP only
            at_attention = gradients[names.index(name.replace("resid_mid", "attn_out"))]
            assert_close(gradient, at_attention)
        else:
            assert_close(gradient, their_gradients[name])


@by_architecture
def test_recording_changes_nothing_and_identity_neither(architecture: str) -> None:
    model = cached(architecture)
    names = points.names(model.anatomy, LAYERS)
    with torch.no_grad():
        plain = model.logits(BATCH)
        with tracing.record(model, names):
            assert torch.equal(model.logits(BATCH), plain)
        with tracing.scale(model, dict.fromkeys(names, 1.0)):
            assert torch.equal(model.logits(BATCH), plain)
    assert hooks_left(model) == 0


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "phi3"])
def test_in_half_precision_identity_changes_no_bit_either(architecture: str) -> None:
    model = load(tiny.module(architecture).bfloat16(), tokenizer=tiny.tokenizer())
    with torch.no_grad():
        plain = model.logits(BATCH)
        with tracing.scale(model, dict.fromkeys(points.names(model.anatomy, LAYERS), 1.0)):
            assert torch.equal(model.logits(BATCH), plain)
    assert plain.dtype == torch.bfloat16


@by_architecture
def test_the_residual_stream_adds_up(architecture: str) -> None:
    """mid = pre + attention, post = mid + MLP (both added to pre when parallel); BERT normalises the sums."""
    model = cached(architecture)
    with torch.no_grad(), tracing.record(model, points.names(model.anatomy, LAYERS)) as seen:
        model.logits(BATCH)
    for layer in LAYERS:
        pre, post, attention, mlp = (
            seen[f"blocks.{layer}.hook_{end}"] for end in ("resid_pre", "resid_post", "attn_out", "mlp_out")
        )
        if model.anatomy.post_norm:
            norms = [model.anatomy.module(f"blocks.{layer}.{ln}") for ln in ("ln1", "ln2")]
            assert_close(seen[f"blocks.{layer}.hook_resid_mid"], norms[0](pre + attention).detach())
            assert_close(post, norms[1](seen[f"blocks.{layer}.hook_resid_mid"] + mlp).detach())
        else:
            assert_close(post, pre + attention + mlp)
            if not model.parallel:
                assert_close(seen[f"blocks.{layer}.hook_resid_mid"], pre + attention)


# --- changing --------------------------------------------------------------------------------------------------------


@by_architecture
def test_replacing_the_stream_reruns_the_rest_on_it(architecture: str) -> None:
    """Patching in another prompt's residual stream at any place gives the other prompt's logits."""
    model = cached(architecture)
    other = batch(tiny.ids(seed=2))
    ends = ["resid_pre", "resid_post"] + ([] if model.parallel else ["resid_mid"])
    names = [f"blocks.1.hook_{end}" for end in ends]
    with torch.no_grad():
        with tracing.record(model, names) as seen:
            wanted = model.logits(other)
        plain = model.logits(BATCH)
        for name in names:
            with tracing.replace(model, {name: seen[name]}):
                patched = model.logits(BATCH)
            assert_close(patched, wanted)
            assert not torch.allclose(patched, plain, atol=0.1)


@by_architecture
def test_every_point_is_live(architecture: str) -> None:
    """Adding a direction at any point changes the logits, to first order by the gradient of its factor."""
    model = cached(architecture)
    plain = model.logits(BATCH).detach()
    for name in points.names(model.anatomy, (1,)):
        factor = torch.tensor(0.0, requires_grad=True)

        def push(value: Tensor, factor: Tensor = factor) -> Tensor:
            return value + factor * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))

        with tracing.replace(model, {name: push}):
            logits = model.logits(BATCH)
        assert torch.equal(logits.detach(), plain), name
        (slope,) = torch.autograd.grad(logits[:, -1].square().sum(), factor)
        assert float(slope.abs()) > 1e-2, name


def test_functions_see_the_value_and_tensors_are_broadcast() -> None:
    model = cached("gpt_neox")
    name = "blocks.0.attn.hook_q"
    zero = torch.zeros(12)
    with torch.no_grad():
        with tracing.replace(model, {name: zero}), tracing.record(model, [name]) as seen:
            by_tensor = model.logits(BATCH)
        assert torch.equal(seen[name], torch.zeros(2, 12, 4, 12))
        with tracing.replace(model, {name: lambda value: value * 0}):
            by_function = model.logits(BATCH)
    assert torch.equal(by_tensor, by_function)
    said = r"blocks.0.attn.hook_q has shape \(2, 12, 4, 12\), its replacement"
    with pytest.raises(LoceditError, match=said), tracing.replace(model, {name: lambda value: value[:, :1]}):
        model.logits(BATCH)


def test_hooks_of_nested_contexts_act_in_the_order_of_entry() -> None:
    model = cached("llama")
    name = "blocks.2.mlp.hook_post"
    before, after = tracing.record(model, [name]), tracing.record(model, [name])
    with torch.no_grad(), before as first, tracing.scale(model, {name: 3.0}), after as last:
        model.logits(BATCH)
    assert torch.equal(last[name], first[name] * 3.0)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_blocks_can_be_called_with_something_else(architecture: str) -> None:
    """Giving block 2 the input of block 1 leaves block 1 out; None leaves a block as it is."""
    model = cached(architecture)
    first: dict[str, Tensor] = {}

    def skip(layer: int, arguments: dict[str, Any]) -> dict[str, Any] | None:
        if layer == 1:
            first["input"] = arguments["hidden_states"]
        return arguments | {"hidden_states": first["input"]} if layer == 2 else None

    names = ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
    with torch.no_grad():
        plain = model.logits(BATCH)
        with tracing.rewrite_blocks(model, skip), tracing.record(model, names) as seen:
            skipped = model.logits(BATCH)
        with tracing.rewrite_blocks(model, lambda *_: None):
            assert torch.equal(model.logits(BATCH), plain)
    assert torch.equal(seen[names[0]], seen[names[1]])
    assert not torch.allclose(skipped, plain, atol=0.1)
    assert hooks_left(model) == 0


def test_linear_maps_can_be_sent_through_a_function() -> None:
    """Taking W x away from a bias-free projection's output is zeroing it."""
    model = cached("llama")
    out: Any = model.linear(1, "mlp.out")
    with torch.no_grad():
        with tracing.through_linear([(out, lambda given, output: output - given @ out.weight.T)]):
            without = model.logits(BATCH)
        with tracing.ablate(model, model.components({"blocks.1.mlp": [0]})):
            assert_close(without, model.logits(BATCH))
    assert hooks_left(model) == 0


def test_ablating_to_means_by_hand() -> None:
    """A neuron held at its mean: the change in the MLP's output is (mean - activation) times its output column."""
    model = cached("llama")
    site, where = "blocks.1.mlp.neuron", "blocks.1.mlp.hook_post"
    names = [where, "blocks.1.hook_mlp_out"]
    means = {site: torch.linspace(-1, 1, 80)}
    with torch.no_grad():
        with tracing.record(model, names) as plain:
            model.logits(BATCH)
        with tracing.ablate(model, model.components({site: [3, 70]}), means), tracing.record(model, names) as held:
            model.logits(BATCH)
    moved = means[site][[3, 70]] - plain[where][..., [3, 70]]
    expected = moved @ model.linear(1, "mlp.out").weight.detach()[:, [3, 70]].T
    assert_close(held[names[1]] - plain[names[1]], expected)
    assert torch.equal(held[where][..., 4:70], plain[where][..., 4:70])


def test_ablating_heads_and_modules_to_means() -> None:
    model = cached("gpt2")
    chosen = model.components({"blocks.0.attn.head": [2], "blocks.1.mlp": [0]})
    names = ["blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"]
    means = {"blocks.0.attn.head": torch.randn(4, 12), "blocks.1.mlp": torch.randn(48)}
    seen: list[dict[str, Tensor]] = []
    for held in (None, means):
        with torch.no_grad(), tracing.ablate(model, chosen, held), tracing.record(model, names) as values:
            model.logits(BATCH)
        seen.append(values)
    assert float(seen[0][names[0]][:, :, 2].abs().max()) == float(seen[0][names[1]].abs().max()) == 0.0
    assert torch.equal(seen[1][names[0]][:, :, 2], means["blocks.0.attn.head"][2].expand(2, 12, 12))
    assert torch.equal(seen[1][names[1]], means["blocks.1.mlp"].expand(2, 12, 48))


# --- stopping and unembedding ----------------------------------------------------------------------------------------


@by_architecture
def test_stopping_runs_nothing_after_the_point(architecture: str) -> None:
    model = cached(architecture)
    later = []
    handle = model.anatomy.module("blocks.1").register_forward_pre_hook(lambda *_: later.append(True))
    reached = False
    with (
        tracing.record(model, ["blocks.0.hook_resid_post"]) as seen,
        tracing.stop_at(model, "blocks.0.hook_resid_post"),
    ):
        model.logits(BATCH)
        reached = True
    handle.remove()
    assert "blocks.0.hook_resid_post" in seen
    assert not reached
    assert not later
    assert hooks_left(model) == 0


@by_architecture
def test_unembedding_marked_positions_gives_the_same_logits(architecture: str) -> None:
    model = cached(architecture)
    at = torch.zeros(2, 12, dtype=torch.bool)
    at[0, 11] = at[1, 2] = at[1, 7] = True
    sizes = []
    handle = model.anatomy.module("unembed").register_forward_hook(lambda *args: sizes.append(args[2].numel()))
    with torch.no_grad():
        full, picked = model.logits(BATCH), model.logits(BATCH, at=at)
    handle.remove()
    assert_close(picked, full[at])
    assert sizes == [2 * 12 * tiny.VOCAB, 3 * tiny.VOCAB]


def test_soft_caps_apply_to_marked_positions() -> None:
    model = tiny.model("gemma2", final_logit_softcapping=2.0)
    at = torch.ones(2, 12, dtype=torch.bool)
    with torch.no_grad():
        assert 1.5 < float(model.logits(BATCH, at=at).abs().max()) < 2.0


# --- nothing stays behind, nothing is silent -------------------------------------------------------------------------


def test_no_hook_is_left_after_success_failure_or_stop() -> None:
    model = cached("gpt2")
    plain = model.logits(BATCH).detach()
    names = points.names(model.anatomy, LAYERS)

    def broken(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    with tracing.record(model, names):
        model.logits(BATCH)
    assert hooks_left(model) == 0
    with pytest.raises(ZeroDivisionError), tracing.replace(model, {"blocks.1.hook_resid_mid": broken}):
        model.logits(BATCH)
    assert hooks_left(model) == 0
    with tracing.stop_at(model, "blocks.0.mlp.hook_post"):
        model.logits(BATCH)
    assert hooks_left(model) == 0
    with pytest.raises(LoceditError), tracing.unembed_at(model, torch.zeros(1, 5, dtype=torch.bool)):
        model.logits(BATCH)
    with pytest.raises(KeyboardInterrupt), tracing.ablate(model, model.components({"blocks.0.layer": [0]})):
        raise KeyboardInterrupt
    assert hooks_left(model) == 0
    assert torch.equal(model.logits(BATCH).detach(), plain)


def test_no_hook_is_left_when_a_name_is_wrong() -> None:
    model = cached("gpt2")
    with pytest.raises(LoceditError), tracing.record(model, ["blocks.0.hook_mlp_out", "blocks.0.hook_mlp_ot"]):
        raise AssertionError
    assert hooks_left(model) == 0


@pytest.mark.parametrize(
    ("context", "named"),
    [
        (lambda m: tracing.record(m, ["blocks.2.hook_resid_pre"]), "blocks.2.hook_resid_pre"),
        (lambda m: tracing.scale(m, {"hook_unembed": 2.0}), "hook_unembed"),
        (lambda m: tracing.ablate(m, m.components({"blocks.2.mlp": [0]})), "blocks.2.mlp"),
    ],
)
def test_a_hook_that_never_fired_is_an_error(context: Any, named: str) -> None:
    model = cached("llama")
    early = tracing.stop_at(model, "blocks.0.hook_resid_post")
    with pytest.raises(LoceditError, match=f"{named}' never fired"), context(model), early:
        model.logits(BATCH)
    with pytest.raises(LoceditError, match="never fired"), context(model):
        pass


@pytest.mark.parametrize(
    ("architecture", "name", "said"),
    [
        ("llama", "blocks.0.hook_resid_mdi", "did you mean 'blocks.0.hook_resid_mid'"),
        ("llama", "blocks.3.hook_resid_pre", "the model has layers 0 to 2"),
        ("llama", "hook_pos_embed", "choices: hook_embed"),
        ("gptj", "blocks.0.hook_resid_mid", "are parallel, nothing is between them"),
        ("gpt2", "blocks.0.mlp.hook_pre_linear", "not gated; take mlp.hook_pre"),
    ],
)
def test_names_that_do_not_exist_say_why(architecture: str, name: str, said: str) -> None:
    model = cached(architecture)
    with pytest.raises(LoceditError, match=said) as caught, tracing.record(model, [name]):
        raise AssertionError
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("chosen", "means", "said"),
    [
        ({"transformer.wte.weight:row": [0]}, None, "edit its weights"),
        ({"blocks.0.mlp.in.weight": [0]}, None, "edit its weights"),
        ({"blocks.0.mlp": []}, None, "no component to ablate"),
        ({"blocks.0.mlp": [0]}, {}, "no mean for site 'blocks.0.mlp'"),
    ],
)
def test_what_no_hook_can_ablate_is_refused(chosen: Any, means: Any, said: str) -> None:
    model = cached("gpt2")
    with pytest.raises(LoceditError, match=said), tracing.ablate(model, model.components(chosen), means):
        raise AssertionError

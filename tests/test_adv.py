"""adv_ga and adv_npo: bit for bit ga and npo without an attack, their formulas with one, what the attack may touch."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit import losses
from locedit.components import ComponentSet
from locedit.data.encode import collate, encode
from locedit.edit.adapter import Lora
from locedit.edit.edit import Edit
from locedit.edit.objective import Step
from locedit.edit.regions import regions
from locedit.edit.restrict import Deltas
from locedit.errors import LoceditError
from locedit.lab import Lab
from locedit.models import Model, load
from locedit.perturbation import AscentOptions, Place, ascend, perturbed
from locedit.unlearn import latent, prepare, unlearn
from locedit.unlearn.latent import (
    AdvGaOptions,
    AdvNpoOptions,
    adv_ga,
    adv_npo,
    default_layer,
    edited_layers,
    edited_places,
)
from tests import edits, tiny

NONE: dict[str, Any] = {"attack_steps": 0, "start": "zero"}


def make(model: Model, name: str, within: ComponentSet | None = None, **options: Any) -> Edit:
    settings: Any = {"steps": 3, "learning_rate": 1e-2, "batch_size": 1, "eval_every": 0, "check": False} | options
    return unlearn(model, edits.task(), name, within=within, **settings)


def step_of(model: Model, start: Model) -> Step:
    task = edits.task()
    return edits.step(model, start, encode(model, task.forget), encode(model, task.retain))  # type: ignore[arg-type]


def tensors(edit: Edit) -> list[Tensor]:
    return [tensor for _, tensor in sorted(edit.tensors().items())]


# --- without an attack ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plain", "options", "hold"),
    [
        ("adv_ga", "ga", {"retain_weight": 0.0}, "weights"),
        ("adv_ga", "grad_diff", {"retain_loss": "kl"}, "adapter"),
        ("adv_npo", "npo", {"beta": 0.3, "forget_weight": 2.0}, "weights"),
        ("adv_npo", "npo", {"retain_loss": "kl"}, "adapter"),
    ],
)
def test_no_steps_and_no_start_are_the_same_training_bit_for_bit(
    name: str, plain: str, options: dict[str, Any], hold: str
) -> None:
    model = tiny.model("llama")
    within = edits.neurons_and_heads(model)
    first = make(model, name, within, hold=hold, **NONE, **options)
    second = make(model, plain, within, hold=hold, **({} if plain == "ga" else options))
    attacked = make(model, name, within, hold=hold, attack_steps=1, **options)
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert first.history == second.history
    assert not all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(attacked), strict=True))


# --- against the formulas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_terms_by_their_formulas_under_the_perturbation(architecture: str) -> None:
    """The perturbation of an independent call, added by torch's own hook to the second block's input."""
    model, start = edits.double(architecture), edits.double(architecture)
    with torch.no_grad():
        model.parameter(next(iter(model.sites("matrix").values())).slices[0].param).mul_(1.1)
    step = step_of(model, start)
    options = AdvNpoOptions(beta=0.4, eps=0.5, forget_weight=3.0, retain_weight=2.0)
    step.generator.manual_seed(3)
    found = adv_npo(step, options)
    step.generator.manual_seed(3)
    ga = adv_ga(step, AdvGaOptions(eps=0.5))
    seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(3)))
    place = Place(point="blocks.1.hook_resid_pre")
    delta = ascend(model, step.forget, [place], AscentOptions(eps=0.5), seed=seed)[place.point]

    def shift(_: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] + delta, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] + delta}

    handle = model.anatomy.module("blocks.1").register_forward_pre_hook(shift, with_kwargs=True)
    with torch.no_grad():
        own = losses.token_log_probs(scored := losses.score(model, step.forget))
    handle.remove()
    with torch.no_grad():
        old = losses.token_log_probs(losses.score(start, step.forget))
        clean = losses.token_log_probs(losses.score(model, step.forget))
        retain = losses.sequence_nll(losses.score(model, step.retain)).mean()  # type: ignore[arg-type]
    ratios = torch.zeros(2, dtype=own.dtype).index_add(0, scored.row, own - old)
    means = torch.stack([own[scored.row == row].mean() for row in (0, 1)])
    assert float(own.sum()) > float(clean.sum()) + 1  # the attack helps
    expected = 3 * (2 / 0.4) * torch.log1p(torch.exp(0.4 * ratios)).mean()
    assert found["forget_loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert found["retain_loss"].item() == pytest.approx(2 * retain.item(), rel=1e-6)
    assert ga["forget_loss"].item() == pytest.approx(means.mean().item(), rel=1e-6)


def test_the_gradient_is_taken_at_the_fixed_perturbation() -> None:
    """Central differences in float64 with the perturbation held, which is not the gradient through the attack."""
    model, start = edits.double("gpt2"), edits.double("gpt2")
    weight = model.parameter("transformer.h.1.mlp.c_fc.weight")
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = step_of(model, start)
    step.generator.manual_seed(0)
    value = adv_ga(step, AdvGaOptions(retain_weight=0.0, eps=1.0, attack_steps=2))["forget_loss"]
    (gradient,) = torch.autograd.grad(value, weight)
    seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(0)))
    place = Place(point="blocks.1.hook_resid_pre")

    def found() -> dict[str, Tensor]:
        return ascend(model, step.forget, [place], AscentOptions(eps=1.0, attack_steps=2), seed=seed)

    held, ends, through = found(), [], []
    with torch.no_grad():
        for sign in (1, -1):
            weight.add_(sign * 1e-5 * direction)
            for deltas, values in ((held, ends), (found(), through)):
                with perturbed(model, deltas):
                    values.append(-losses.sequence_nll(losses.score(model, step.forget)).mean().item())
            weight.sub_(sign * 1e-5 * direction)
    slope = float((gradient * direction).sum())
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)
    assert slope != pytest.approx((through[0] - through[1]) / 2e-5, rel=1e-2)


@pytest.mark.parametrize("hold", ["weights", "adapter"])
def test_recomputed_activations_see_the_perturbation(hold: str) -> None:
    """Inside a block, which runs again in the backward pass."""
    model = tiny.model("llama")
    options: dict[str, Any] = {"hold": hold, "steps": 1, "eps": 1.0, "point": "attn_out", "attack_steps": 2}
    plain = make(model, "adv_npo", **options)
    again = make(model, "adv_npo", gradient_checkpointing=True, **options)
    for first, second in zip(tensors(plain), tensors(again), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    norms = [edit.history["gradient_norm"][1:] for edit in (plain, again, make(model, "npo", hold=hold, steps=1))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0] != pytest.approx(norms[2], rel=1e-2)


# --- what the attack may touch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", ["hooks", "scatter", "adapter"])
def test_nothing_trained_takes_a_gradient_during_the_attack(hold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What enters the perturbed block has no graph, though weights below it are trained; afterwards it has."""
    model = tiny.model("gpt2")
    within = model.components({"blocks.0.mlp.neuron": [1, 5], "blocks.2.mlp.neuron": [0]})
    if hold == "adapter":
        held: Any = Lora(model, within, rank=2, alpha=2.0, generator=torch.Generator())
    else:
        held = Deltas(model, regions(within, role="train"), path=hold)  # type: ignore[arg-type]
    seen: list[bool] = []
    during: list[int] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        assert not any(parameter.requires_grad for parameter in held.parameters)
        found = ascend(*args, **kwargs)
        during.append(len(seen))
        assert all(parameter.grad is None for parameter in held.parameters)
        return found

    monkeypatch.setattr(latent, "ascend", watched)
    block = model.anatomy.module("blocks.1")
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    step = step_of(model, model)
    step.held = held
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
    with held.active():
        assert edited_layers(model, held) == [0, 2]
        value = adv_ga(step, AdvGaOptions(retain_weight=0.0, layer=1))["forget_loss"]
        value.backward()
    handle.remove()
    assert during == [7]
    assert seen == [False] * 7 + [True]
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in held.parameters)


@pytest.mark.parametrize(("architecture", "on"), [("llama", "residual"), ("gpt2", "components"), ("bert", "residual")])
def test_only_the_set_changes_and_the_answers_become_less_likely(architecture: str, on: str) -> None:
    model = tiny.model(architecture)
    before = edits.bits(model.module)
    edit = make(
        model, "adv_npo", edits.neurons_and_heads(model), steps=10, eps=0.3, batch_size=4, attack_steps=2, on=on
    )
    edit.verify(model)
    assert edits.same_bits(model.module, before)
    assert edits.hooks_left(model.module) == 0
    assert edit.history["forget"][-1] < 0.5 * edit.history["forget"][0]


def test_same_seed_same_edit() -> None:
    model = tiny.model("gpt2")
    first, second = (make(model, "adv_npo", steps=1, batch_size=4) for _ in range(2))
    assert first.digest == second.digest
    assert make(model, "adv_npo", steps=1, batch_size=4, seed=1).digest != first.digest


# --- where it acts ----------------------------------------------------------------------------------------------------


def test_default_layer() -> None:
    assert default_layer(32, list(range(32))) == 4  # published
    assert default_layer(32, [2, 9]) == 2
    assert default_layer(32, [20, 21]) == 4
    assert default_layer(3, [0, 1, 2]) == 1
    assert default_layer(1, [0]) == 0


def held_of(model: Model, within: ComponentSet) -> Deltas:
    return Deltas(model, regions(within, role="train"))


def test_edited_layers_and_components_are_read_from_what_is_trained() -> None:
    model = tiny.model("llama")
    within = edits.neurons_and_heads(model)
    expected = [
        Place(point="blocks.0.mlp.hook_post", index=(1, 5, 40)),
        Place(point="blocks.1.attn.hook_z", index=(0, 1, 2)),
        Place(point="blocks.2.mlp.hook_post", index=(0, 7)),
    ]
    lora = Lora(model, within, rank=2, alpha=2.0, generator=torch.Generator())
    for held in (held_of(model, within), lora):
        assert edited_layers(model, held) == [0, 1, 2]
        assert edited_places(model, held) == expected
    whole = held_of(model, model.components({"blocks.1.mlp": [0]}))
    assert edited_layers(model, whole) == [1]
    assert edited_places(model, whole) == [Place(point="blocks.1.mlp.hook_post")]
    queries = held_of(model, model.components({"blocks.1.attn.q.matrix": [0]}))
    with pytest.raises(LoceditError, match="no neuron or head is edited.*components='components.json'"):
        edited_places(model, queries)


def test_an_attack_above_edits_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model("gpt2")
    within = model.components({"blocks.0.mlp.neuron": [1, 2], "blocks.1.mlp.neuron": [4]})
    with caplog.at_level(logging.WARNING, logger="locedit.unlearn.latent"):
        make(model, "adv_ga", within, steps=2)
        make(model, "adv_ga", steps=1)  # the whole model, as published
        assert not caplog.records
        make(model, "adv_ga", within, steps=3, layer=1)
    assert [record.getMessage() for record in caplog.records] == [
        "the attack at layer 1 is above edited layers (0), which learn only through what they send there"
    ]


def test_components_of_a_file(tmp_path: Any) -> None:
    model = tiny.model("gpt2")
    model.components({"blocks.2.mlp.neuron": [3]}).save(tmp_path / "set.json")
    within = model.components({"blocks.2.mlp": [0]})
    named = make(model, "adv_npo", within, steps=2, on="components", components=str(tmp_path / "set.json"))
    assert named.digest != make(model, "adv_npo", within, steps=2, on="components").digest
    with pytest.raises(LoceditError, match=r"components='missing\.json': there is no such file"):
        prepare("adv_npo", edits.task(), on="components", components="missing.json")


def test_mistakes_before_a_model_is_needed() -> None:
    task = edits.task()
    with pytest.raises(LoceditError, match="adv_npo needs retain data"):
        prepare("adv_npo", edits.task(retain=None))
    with pytest.raises(LoceditError, match="components='a.json' needs on='components'"):
        prepare("adv_ga", task, components="a.json")
    with pytest.raises(LoceditError, match="layer=2 must be a layer's number, and goes with on='residual' alone"):
        prepare("adv_ga", task, layer=2, on="components")
    with pytest.raises(LoceditError, match=r"eps=0\.0 must be above 0"):
        prepare("adv_ga", task, eps=0.0)
    with pytest.raises(LoceditError, match="beta=0 must be above 0"):
        prepare("adv_npo", task, beta=0)


# --- on a trained model -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_after_adv_npo_the_same_attack_recovers_less_than_after_npo(tiny_lab: Lab) -> None:
    """At the same forget level, for attacks up to four times the radius that was trained against."""
    model, task = tiny_lab.model, tiny_lab.task
    examples = encode(model, task.forget)
    found: dict[str, list[float]] = {}
    for name in ("npo", "adv_npo"):
        edit = unlearn(
            model, task, name, batch_size=16, steps=300, eval_every=5, until=0.1, match="interpolate", check=False
        )
        assert edit.outcome["reached"]
        batch = collate(examples, model)
        with edit.applied(model) as edited:
            for eps in (0.1, 0.2, 0.4):
                options = AscentOptions(eps=eps, attack_steps=20, start="zero")
                deltas = ascend(edited, batch, [Place(point="blocks.1.hook_resid_pre")], options)
                with torch.no_grad(), perturbed(edited, deltas):
                    recovered = losses.sequence_probability(losses.score(edited, batch)).mean()
                found.setdefault(name, []).append(float(recovered))
    assert found["npo"][-1] > 0.2
    assert found["adv_npo"][-1] < found["npo"][-1]


def test_in_float16_the_attack_on_answers_that_are_almost_sure_keeps_its_direction(tiny_lab: Lab) -> None:
    """With the last norm four times as large the loss is about 0 and its float16 gradient underflows if not scaled."""
    found: dict[str, Tensor] = {}
    for dtype in ("float32", "float16"):
        model = load(str(tiny_lab.folder / "model"), dtype=dtype, device="cpu")
        norm = model.module.transformer.ln_f
        with torch.no_grad():
            norm.weight.mul_(4)
            norm.bias.mul_(4)
        batch = collate(encode(model, tiny_lab.task.forget.where(format="statement"))[:12], model)
        options = AscentOptions(attack_steps=1, start="zero", eps=0.3)
        found[dtype] = ascend(model, batch, [Place(point="blocks.1.hook_resid_pre")], options)[
            "blocks.1.hook_resid_pre"
        ].flatten(1)
    assert (found["float16"].norm(dim=1) > 0).all()
    assert torch.nn.functional.cosine_similarity(found["float16"], found["float32"]).median() > 0.95

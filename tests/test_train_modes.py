"""Mixed precision and recomputed activations: the same training, cheaper."""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit import losses
from locedit.data.encode import collate, encode
from locedit.edit import Edit, layer_training, layers, levels
from locedit.edit.modes import mixed
from locedit.edit.objective import Objective, Step
from locedit.edit.options import TrainOptions
from locedit.edit.restrict import Held
from locedit.edit.run import Run
from locedit.edit.train import train
from locedit.errors import LoceditError
from locedit.models import Model, load
from locedit.unlearn import prepare, unlearn
from tests import edits, tiny

PLAIN_STEP: dict[str, Any] = {"steps": 1, "eval_every": 0, "optimizer": "sgd", "clip": None, "learning_rate": 1.0}


def nll(step: Step) -> dict[str, Tensor]:
    return {"nll": losses.sequence_nll(step.score(step.forget)).mean()}


def goal(model: Model, loss: Any = nll) -> Objective:
    forget = encode(model, edits.task().forget)
    return Objective(loss=loss, forget=forget, probes={"forget": forget})


def gradients(model: Model, precision: torch.dtype | None) -> dict[str, Tensor]:
    """Of the loss, by plain torch."""
    batch = collate(encode(model, edits.task().forget), model)
    with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
        loss = losses.sequence_nll(losses.score(model, batch)).mean()
    named = [(name, p) for name, p in model.anatomy.parameters.items() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: g for (name, _), g in zip(named, found, strict=True) if g is not None}


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("precision", ["bfloat16", "model"])
def test_the_whole_model_takes_the_gradient_of_plain_autocast(precision: str) -> None:
    model = tiny.model("llama")
    edit = train(model, goal(model), options=TrainOptions(precision=precision, **PLAIN_STEP))  # type: ignore[arg-type]
    plain = {name: gradients(model, dtype) for name, dtype in (("bfloat16", torch.bfloat16), ("model", None))}
    other = "model" if precision == "bfloat16" else "bfloat16"
    deltas = {patch.region.param: patch.delta for patch in edit.patches}
    assert deltas.keys() >= plain[precision].keys()
    for name, gradient in plain[precision].items():
        delta = deltas[name]
        assert delta is not None
        assert delta.dtype == torch.float32
        assert torch.equal(-delta, gradient), name
    name = "model.layers.1.mlp.down_proj.weight"
    assert 1e-4 < distance(plain[other][name], plain[precision][name]) < 0.1


@pytest.mark.parametrize("hold", ["hooks", "scatter", "adapter"])
def test_mixed_precision_trains_close_to_full_and_measures_in_full(hold: str) -> None:
    model = tiny.model("llama")
    within = edits.neurons_and_heads(model)
    asked: dict[str, Any] = {"within": within, "steps": 20, "eval_every": 5, "learning_rate": 1e-3}
    asked |= {"hold": "adapter"} if hold == "adapter" else {"path": hold}
    full = unlearn(model, edits.task(), "npo", **asked)
    half = unlearn(model, edits.task(), "npo", precision="bfloat16", **asked)
    assert full.digest != half.digest
    assert half.history["forget_loss"][1] == pytest.approx(full.history["forget_loss"][1], rel=1e-2)
    moved = full.history["forget_loss"][1] - full.history["forget_loss"][-1]
    assert half.history["forget_loss"][-1] == pytest.approx(full.history["forget_loss"][-1], abs=0.1 * moved)
    with half.applied(model) as edited:
        assert half.history["forget"][-1] == levels(edited, {"forget": goal(model).forget})["forget"]
    half.verify(model)


def test_products_run_in_half_precision_and_losses_in_full() -> None:
    model = tiny.model("gpt2")
    seen: dict[str, torch.dtype] = {}

    def watching(step: Step) -> dict[str, Tensor]:
        handle = model.linear(0, "mlp.in").register_forward_hook(lambda _, __, out: seen.update(product=out.dtype))
        scored = step.score(step.forget)
        handle.remove()
        seen["reference"] = step.reference(step.forget).logits.dtype
        seen["loss"] = losses.token_log_probs(scored).dtype
        return nll(step)

    within = edits.neurons_and_heads(model)
    run = Run(
        model,
        goal(model, watching),
        within=within,
        options=TrainOptions(steps=2, precision="bfloat16"),
        hold="weights",
    )
    run.train()
    assert seen == {"product": torch.bfloat16, "reference": torch.bfloat16, "loss": torch.float32}
    state = [t for values in run.optimizer.state.values() for t in values.values()]
    assert {t.dtype for t in [*state, *run.held.parameters]} == {torch.float32}


def test_what_hooks_add_is_not_cast_by_autocast() -> None:
    model = tiny.model("gpt2")
    seen: list[tuple[bool, torch.dtype]] = []

    def add(x: Tensor, output: Tensor) -> Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), x.dtype))
        return output

    held = Held(model)
    held.hooks.append((model.linear(0, "mlp.in"), add))
    with mixed(model, "bfloat16"), held.active():
        model.logits(collate(goal(model).forget, model))
    assert seen == [(False, torch.bfloat16)]


def test_added_layers_compute_in_their_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, and when they are applied inside autocast."""
    model, seen = tiny.model("gpt2"), set[bool]()

    def added(value: Tensor, weights: Any, **more: Any) -> Tensor:
        seen.add(torch.is_autocast_enabled("cpu"))
        return layers.added(value, weights, **more)

    monkeypatch.setattr(layer_training, "added", added)
    asked: dict[str, Any] = {"steps": 4, "rank": 3, "keep_grams": False, "check": False, "eval_every": 0}
    half = unlearn(model, edits.task(), "eul", precision="bfloat16", **asked)
    assert seen == {False}
    full = unlearn(model, edits.task(), "eul", **asked)
    assert half.digest != full.digest
    (layer, *_) = half.layers
    value = torch.randn(2, 5, model.d_model, generator=torch.Generator().manual_seed(0))
    act = partial(layers.added, weights=layer.to(value), activation="relu", index=None)
    plain = layers.on_one_axis(value, act)
    with mixed(model, "bfloat16"):
        assert torch.equal(layers.on_one_axis(value, act), plain)
        assert not torch.equal(act(value), plain)


def test_precisions_that_a_model_does_not_have() -> None:
    half, double, single = edits.half("gpt2"), edits.double("gpt2"), tiny.model("gpt2")
    for model, precision, message in (
        (half, "float16", r"precision='float16' is of a float32 model; .* is loaded in torch.bfloat16"),
        (double, "bfloat16", r"precision='bfloat16' is of a float32 model; .* is loaded in torch.float64"),
        (single, "float16", r"precision='float16' is not available on a CPU"),
    ):
        with pytest.raises(LoceditError, match=message):
            train(model, goal(model), options=TrainOptions(precision=precision))  # type: ignore[arg-type]
    same = [train(half, goal(half), options=TrainOptions(precision=p, steps=2)) for p in ("model", "bfloat16")]  # type: ignore[arg-type]
    assert same[0].digest == same[1].digest
    with pytest.raises(LoceditError, match="precision='half' is not 'model' or 'bfloat16' or 'float16'"):
        prepare("npo", edits.task(), precision="half")


class Overflowing:
    """A gradient scaler's part in a step on a CPU: multiplies, divides, and halves the scale after an overflow."""

    def __init__(self, scale: float) -> None:
        self.value = scale
        self.infinite = False

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.value

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.infinite = any(not bool(g.isfinite().all()) for g in gradients)
        for gradient in gradients:
            gradient.div_(self.value)

    def update(self) -> None:
        self.value *= 0.5 if self.infinite else 1.0


def test_steps_whose_scaled_gradient_overflows_are_left_out() -> None:
    model = tiny.model("gpt2")
    options = TrainOptions(steps=12, eval_every=0, weight_decay=0.1)
    run = Run(model, goal(model), within=edits.neurons_and_heads(model), options=options, hold="weights")
    run.scaler = Overflowing(2.0**130)  # type: ignore[assignment]
    rows = [run.step(number) for number in range(1, 13)]
    overflows = [row["step"] for row in rows if "overflow" in row]
    assert overflows == list(range(1, len(overflows) + 1))
    assert 1 < len(overflows) < 11
    plain = Run(model, goal(model), within=run.within, options=options, hold="weights")
    for row in rows[len(overflows) :]:
        assert row["gradient_norm"] == pytest.approx(plain.step(row["step"])["gradient_norm"], rel=1e-5)
    run.scaler = Overflowing(float("inf"))  # type: ignore[assignment]
    with pytest.raises(LoceditError, match="the gradient is nan at step"):
        for number in range(13, 40):
            run.step(number)


@pytest.mark.parametrize("hold", ["hooks", "scatter", "adapter"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_activations_are_computed_again_and_the_edit_is_the_same(architecture: str, hold: str) -> None:
    model = edits.double(architecture)
    within = edits.neurons_and_heads(model)
    within = within | edits.mixed(model) if hold == "scatter" else within
    asked: dict[str, Any] = {"within": within, "steps": 3, "eval_every": 0}
    asked |= {"hold": "adapter"} if hold == "adapter" else {"path": hold}
    inside, around = [0], [0]
    handles = [
        model.linear(0, "attn.q").register_forward_hook(lambda *_: inside.__setitem__(0, inside[0] + 1)),
        model.anatomy.module("unembed").register_forward_hook(lambda *_: around.__setitem__(0, around[0] + 1)),
    ]

    def counted(**options: Any) -> tuple[Edit, int, int]:
        inside[0] = around[0] = 0
        edit = unlearn(model, edits.task(), "npo", **asked, **options)
        return edit, inside[0], around[0]

    plain, in_blocks, at_end = counted()
    saving, in_blocks_again, at_end_again = counted(gradient_checkpointing=True)
    for handle in handles:
        handle.remove()
    passes_with_gradient = 3 * 2  # a forget and a retain term in each of three steps
    assert in_blocks == at_end == at_end_again
    assert in_blocks_again == in_blocks + passes_with_gradient
    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(saving.tensors()[name], tensor, rtol=0, atol=1e-12)
    assert not model.module.training
    assert not any(part.training for part in model.module.modules())
    assert not model.module.is_gradient_checkpointing


def test_recomputed_blocks_have_no_dropout() -> None:
    """A block recomputes in training mode alone, in which OPT's blocks have dropout of their own."""
    model = load(tiny.module("opt", dropout=0.5).double(), tokenizer=tiny.tokenizer(), device="cpu")
    asked: dict[str, Any] = {"within": edits.neurons_and_heads(model), "steps": 2, "eval_every": 0}
    plain = unlearn(model, edits.task(), "npo", **asked)
    saving = unlearn(model, edits.task(), "npo", gradient_checkpointing=True, **asked)
    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(saving.tensors()[name], tensor, rtol=0, atol=1e-12)


def test_mixed_precision_and_recomputation_together() -> None:
    model = tiny.model("llama")
    within = edits.neurons_and_heads(model)
    options = TrainOptions(steps=3, eval_every=0, precision="bfloat16")
    plain = train(model, goal(model), within=within, options=options)
    saving = train(model, goal(model), within=within, options=dataclasses.replace(options, gradient_checkpointing=True))
    assert plain.digest == saving.digest

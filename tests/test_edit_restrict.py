"""Restricted training is exact: equal to masked Adam on the whole weights, whichever path the deltas take."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from locedit import losses
from locedit.components import ComponentSet
from locedit.data.encode import collate, encode
from locedit.edit.objective import Objective, Step
from locedit.edit.regions import regions
from locedit.edit.restrict import Deltas, frozen
from locedit.edit.train import TrainOptions, train
from locedit.errors import LoceditError
from locedit.models import Model
from tests import edits, tiny

STEPS, RATE = 8, 1e-2
MakeSet = Callable[[Model], ComponentSet]


def nll(step: Step) -> dict[str, Tensor]:
    return {"nll": losses.sequence_nll(step.score(step.forget)).mean()}


def goal(model: Model) -> Objective:
    return Objective(loss=nll, forget=encode(model, edits.task().forget))


def options(**changes: object) -> TrainOptions:
    start = {"steps": STEPS, "learning_rate": RATE, "clip": None, "eval_every": 0}
    return TrainOptions(**(start | changes))  # type: ignore[arg-type]


def masked_adam(model: Model, within: ComponentSet, *, clip: float | None = None) -> dict[str, Tensor]:
    """The plain way: gradients of the whole weights times a mask, everything outside restored after every step."""
    masks = within.parameter_mask("train")
    trained = {name: model.parameter(name) for name in masks}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.Adam(list(trained.values()), lr=RATE)
    examples = encode(model, edits.task().forget)
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.sequence_nll(losses.score(model, collate(examples, model))).mean().backward()
        for name, parameter in trained.items():
            if parameter.grad is not None:
                parameter.grad.mul_(masks[name])
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(trained.values()), clip)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(torch.where(masks[name], parameter, start[name]))
    found = {name: parameter.detach().clone() for name, parameter in trained.items()}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
    model.module.zero_grad()
    return found


def tolerance(model: Model, name: str) -> float:
    """1e-12; but Gemma's norms are float32 in any model, and a key's bias has only noise for Adam to blow up."""
    if "gemma" in model.core.config.model_type:
        return 1e-6
    return 1e-8 if name.endswith(("c_attn.bias", "query_key_value.bias", "key.bias")) else 1e-12


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "gptj", "gemma2", "llama_tied", "phi3", "bert"])
@pytest.mark.parametrize("chosen", [edits.neurons_and_heads, edits.mixed], ids=["neurons and heads", "mixed"])
@pytest.mark.parametrize("path", ["auto", "hooks", "scatter"])
def test_deltas_equal_masked_adam(architecture: str, chosen: MakeSet, path: str) -> None:
    model = edits.double(architecture)
    within = chosen(model)
    expected = masked_adam(model, within)
    edit = train(model, goal(model), within=within, options=options(path=path))
    with edit.applied(model):
        for name, values in expected.items():
            found = model.parameter(name).detach()
            assert torch.allclose(found, values, rtol=0, atol=tolerance(model, name)), name
    assert max((values - model.parameter(name)).abs().max() for name, values in expected.items()) > RATE


def test_clipping_sees_the_restricted_gradient_alone() -> None:
    model = edits.double("llama")
    within = edits.neurons_and_heads(model)
    expected = masked_adam(model, within, clip=0.05)
    edit = train(model, goal(model), within=within, options=options(clip=0.05))
    with edit.applied(model):
        for name, values in expected.items():
            assert torch.allclose(model.parameter(name).detach(), values, rtol=0, atol=1e-12)
    unclipped = train(model, goal(model), within=within, options=options())
    assert edit.history["gradient_norm"][1] == pytest.approx(unclipped.history["gradient_norm"][1])
    assert edit.history["gradient_norm"][1] > 0.05


def test_paths_are_taken_where_they_belong() -> None:
    model = tiny.model("gpt2")
    within = model.components({"blocks.0.mlp.neuron": [1, 5], "blocks.2.mlp.neuron": [7], "blocks.1.attn.head": [2]})
    small = Deltas(model, regions(within, role="train"))
    assert not small.replaced()
    assert len(small.hooks) == 6  # c_fc and c_proj of two layers, c_attn and c_proj of one
    wide = Deltas(model, regions(model.components({"blocks.0.mlp.neuron": range(150)}), role="train"))
    assert [len(held) for held, _, _ in wide.replaced()] == [1, 1]  # the bias still goes by a hook
    tied = Deltas(model, regions(model.components({"transformer.wte.weight:row": [5]}), role="train"))
    ((held, parameter, stand_in),) = tied.replaced()
    assert len(held) == 2
    assert parameter is model.module.lm_head.weight
    assert stand_in.requires_grad


@pytest.mark.parametrize("architecture", ["gpt_neox", "phi3", "llama", "gptj", "gemma2", "llama_tied"])
@pytest.mark.parametrize("decay", ["base", "weights"])
@pytest.mark.parametrize("chosen", [edits.neurons_and_heads, edits.mixed], ids=["neurons and heads", "mixed"])
def test_nothing_outside_the_set_moves_under_weight_decay(architecture: str, decay: str, chosen: MakeSet) -> None:
    model = tiny.model(architecture)
    before = edits.bits(model.module)
    within = chosen(model)
    edit = train(model, goal(model), within=within, options=options(weight_decay=0.5, decay=decay))
    assert edits.same_bits(model.module, before)
    masks = within.parameter_mask("train")
    moved = 0
    with edit.applied(model):
        for name, parameter in model.anatomy.parameters.items():
            outside = ~masks.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
            assert torch.equal(parameter.detach()[outside].view(torch.int32), before[name][outside].view(torch.int32))
            moved += int((parameter.detach() != before[name]).sum())
    assert moved > 0.5 * within.parameters("train")
    edit.verify(model)


def test_decay_goes_towards_the_base_or_towards_zero() -> None:
    """With no gradient but decay, towards the base nothing changes; towards zero weights shrink by (1 - rate)^steps."""
    model = edits.double("llama")
    within = model.components({"blocks.0.mlp.neuron": [3]})
    deltas = Deltas(model, regions(within, role="train"))
    start = deltas.values()
    for _ in range(3):
        deltas.decay(0.1, towards="base")
    assert all(torch.equal(now, old) for now, old in zip(deltas.values(), start, strict=True))
    for _ in range(3):
        deltas.decay(0.1, towards="weights")
    assert all(torch.allclose(now, old * 0.9**3) for now, old in zip(deltas.values(), start, strict=True))
    for _ in range(200):
        deltas.decay(0.1, towards="base")
    assert all(torch.allclose(now, old) for now, old in zip(deltas.values(), start, strict=True))


def test_paused_deltas_are_the_unedited_model_in_the_middle_of_a_step() -> None:
    model = tiny.model("llama_tied")
    batch = collate(encode(model, edits.task().forget), model)
    for within in (edits.neurons_and_heads(model), edits.mixed(model)):
        deltas = Deltas(model, regions(within, role="train"))
        with torch.no_grad():
            for delta in deltas.parameters:
                delta.add_(0.1)
            base = model.logits(batch)
            with deltas.active():
                changed = model.logits(batch)
                with deltas.paused():
                    assert torch.equal(model.logits(batch), base)
                assert torch.equal(model.logits(batch), changed)
            assert torch.equal(model.logits(batch), base)
        assert (changed - base).abs().max() > 0.1


def test_nothing_stays_behind_after_an_exception() -> None:
    model = tiny.model("llama_tied")
    before = edits.bits(model.module)
    hooks = edits.hooks_left(model.module)
    held = [id(p) for p in model.module.parameters()]
    deltas = Deltas(model, regions(edits.mixed(model), role="train"))
    with pytest.raises(RuntimeError, match="stop"), frozen(model.module), deltas.active(), deltas.paused():
        raise RuntimeError("stop")
    assert edits.hooks_left(model.module) == hooks
    assert [id(p) for p in model.module.parameters()] == held
    assert all(p.requires_grad for p in model.module.parameters())
    assert edits.same_bits(model.module, before)


def test_a_set_that_no_loss_reaches_is_an_error() -> None:
    model = tiny.model("gpt2")
    unused = model.components({"transformer.wpe.weight:row": [60]})

    def constant(step: Step) -> dict[str, Tensor]:
        with torch.no_grad():
            return nll(step)

    with pytest.raises(LoceditError, match="no parameter of the component set influences the loss"):
        train(model, Objective(loss=constant, forget=goal(model).forget), within=unused, options=options())


def test_offloaded_and_quantized_weights_are_refused() -> None:
    from locedit.edit.regions import require_editable

    with pytest.raises(LoceditError, match="w is offloaded to CPU or disk"):
        require_editable("w", torch.nn.Parameter(torch.empty(2, device="meta")))
    with pytest.raises(LoceditError, match="w is stored as torch.int8: a quantized model takes hold='adapter'"):
        require_editable("w", torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))

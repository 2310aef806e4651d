"""The inner attack against a loop written out with torch's own hooks, its ball, and what it does to the loss."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from locedit import losses, tracing
from locedit.data.encode import Batch, Example, collate, encode
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.perturbation import PUBLISHED, AscentOptions, Place, ascend, perturbed, places_of
from tests import edits, tiny

RESIDUAL = Place(point="blocks.1.hook_resid_pre")
BLOCKS = {"gpt2": "transformer.h.1", "llama": "model.layers.1", "bert": "bert.encoder.layer.1"}


def examples(model: Model) -> list[Example]:
    task = edits.task()
    assert task.retain is not None
    return encode(model, task.forget) + encode(model, task.retain)


def attack(model: Model, place: Place = RESIDUAL, *, seed: int = 0, batch: Batch | None = None, **options: Any) -> Any:
    """(the perturbation, the batch) of the examples in one batch."""
    batch = collate(examples(model), model) if batch is None else batch
    return ascend(model, batch, [place], AscentOptions(**options), seed=seed)[place.point], batch


def nll(model: Model, batch: Batch, deltas: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), perturbed(model, deltas):
        return losses.sequence_nll(losses.score(model, batch))


# --- against a loop written out ---------------------------------------------------------------------------------------


def forward(
    block: nn.Module, module: nn.Module, inputs: dict[str, Tensor], delta: Tensor | float
) -> tuple[Any, Tensor]:
    """(logits, what entered the block before delta was added) by a hook of torch alone."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        seen.append(args[0] if args else kwargs["hidden_states"])
        return ((seen[0] + delta, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": seen[0] + delta})

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    logits = module(**inputs).logits
    handle.remove()
    return logits, seen[0].detach()


def by_hand(
    model: Model, row: Example, masked_at: int, *, start: Tensor | None, eps: float, steps: int, clamp: bool
) -> Tensor:
    """The perturbation of one unpadded row: g is the gradient of the cross-entropy of the row's scored tokens."""
    ids = torch.tensor([row.ids])
    targets = list(row.targets) if model.causal else [masked_at]
    labels = ids[0, targets].clone()
    inputs = {"input_ids": ids}
    if not model.causal:
        ids[0, masked_at] = model.tokenizer.mask_token_id
        inputs["attention_mask"] = torch.ones_like(ids)
    at = [target - 1 for target in targets] if model.causal else targets
    block = model.module.get_submodule(BLOCKS[model.name])
    _, h = forward(block, model.module, inputs, 0.0)
    size = h[0].norm(dim=-1).sort().values[(h.shape[1] - 1) // 2]  # the median, the lower one of an even number
    radius = eps * size
    delta = torch.zeros_like(h) if start is None else start[None].clone()
    for _ in range(steps):
        leaf = delta.clone().requires_grad_()
        logits, _ = forward(block, model.module, inputs, leaf)
        loss = nn.functional.cross_entropy(logits[0, at], labels)
        g = torch.autograd.grad(loss, leaf)[0]
        delta = delta - (radius / steps) * g / g.flatten().norm()
        if delta.flatten().norm() > radius:
            delta = delta * radius / delta.flatten().norm()
        if clamp:
            delta = (h + delta).clamp(h.min(), h.max()) - h
    return delta[0]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("start", ["zero", "random"])
@pytest.mark.parametrize("clamp", ["none", "example"])
def test_equals_a_plain_loop_over_single_rows(architecture: str, start: str, clamp: str) -> None:
    """A padded batch against rows one by one: neither padding nor the other rows of a batch matter."""
    model = edits.double(architecture)
    model.name = architecture
    found, batch = attack(model, start=start, clamp=clamp, eps=0.7, attack_steps=3)
    first, _ = attack(model, start=start, clamp=clamp, eps=0.7, attack_steps=0) if start == "random" else (None, None)
    assert len({int(mask.sum()) for mask in batch.attention_mask}) > 2  # so there is padding
    for number, row in enumerate(batch.rows):
        length = len(row.ids)
        expected = by_hand(
            model,
            row,
            int(batch.scored[number].nonzero()[0]),
            start=None if first is None else first[number, :length],
            eps=0.7,
            steps=3,
            clamp=clamp == "example",
        )
        torch.testing.assert_close(found[number, :length], expected, rtol=1e-8, atol=1e-10)
        assert not found[number, length:].any()


def test_the_batch_clamp_of_the_paper_by_hand() -> None:
    """eps in norm over padding too, clamped to the range of the whole batch: one step from the same random start."""
    model = edits.double("gpt2")
    model.name = "gpt2"
    options = PUBLISHED | {"attack_steps": 1, "eps": 30.0}
    found, batch = attack(model, **options)
    start, _ = attack(model, **options | {"attack_steps": 0})
    block = model.module.get_submodule(BLOCKS["gpt2"])
    leaf = start.clone().requires_grad_()
    logits, h = forward(block, model.module, {"input_ids": batch.ids}, leaf)
    shifted = batch.labels[:, 1:]
    total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), shifted.flatten(), ignore_index=-100)
    g = torch.autograd.grad(total, leaf)[0]
    delta = start - 30.0 * g / g.flatten(1).norm(dim=1)[:, None, None]
    delta = delta * (30.0 / delta.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
    clamped = (h + delta).clamp(h.min(), h.max()) - h
    assert not torch.allclose(clamped, delta, rtol=1e-3)  # the clamp is felt
    torch.testing.assert_close(found, clamped, rtol=1e-8, atol=1e-10)
    assert bool(start[0, int(batch.attention_mask[0].sum()) :].any())  # padding takes a part of the random start


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_batches_may_be_split_in_any_way(architecture: str) -> None:
    model = edits.double(architecture)
    rows = examples(model)
    whole = {}
    for parts in ([rows], [rows[:1], rows[1:]], [rows[3:], rows[:3][::-1]]):
        found = {}
        for part in parts:
            delta, batch = attack(model, batch=collate(part, model), seed=5, clamp="example")
            for number, row in enumerate(batch.rows):
                at = int(batch.scored[number].nonzero()[0])
                found[row.id, at] = delta[number, : len(row.ids)]
        whole = whole or found
        assert found.keys() == whole.keys()
        for key, delta in found.items():
            torch.testing.assert_close(delta, whole[key], rtol=1e-8, atol=1e-10)


# --- the ball ---------------------------------------------------------------------------------------------------------


def test_random_starts_are_uniform_in_norm_and_follow_the_seed() -> None:
    model = tiny.model("gpt2")
    batch = collate(examples(model)[:3], model)
    norms = []
    for seed in range(60):
        delta, _ = attack(model, batch=batch, attack_steps=0, eps=2.0, eps_in="norm", seed=seed)
        norms.append(delta.flatten(1).norm(dim=1) / 2.0)
    found = torch.stack(norms)  # 180 draws
    assert float(found.max()) <= 1 + 1e-6
    assert float(found.mean()) == pytest.approx(0.5, abs=0.07)  # three standard errors
    assert float(found.std()) == pytest.approx(12**-0.5, abs=0.05)
    again, _ = attack(model, batch=batch, attack_steps=0, seed=1)
    assert torch.equal(again, attack(model, batch=batch, attack_steps=0, seed=1)[0])
    assert not torch.allclose(again, attack(model, batch=batch, attack_steps=0, seed=2)[0])


@pytest.mark.parametrize("options", [{"start": "zero"}, {"start": "random"}, {"clamp": "example"}, {"clamp": "batch"}])
def test_the_norm_stays_within_the_radius(options: dict[str, Any]) -> None:
    model = tiny.model("llama")
    delta, _ = attack(model, eps=3.0, eps_in="norm", attack_steps=5, **options)
    norms = delta.flatten(1).norm(dim=1)
    assert float(norms.max()) <= 3.0 * (1 + 1e-6)
    assert float(norms.min()) > 0.3


def test_relative_radius_is_of_the_median_token_and_the_share_of_entries() -> None:
    model = tiny.model("gpt2")
    batch = collate(examples(model), model)
    place = Place(point="blocks.2.mlp.hook_post", index=(0, 4, 9, 11, 30))
    with torch.no_grad(), tracing.record(model, [place.point]) as seen:
        losses.score(model, batch)
    delta, _ = attack(model, place, batch=batch, attack_steps=1, start="zero", eps=0.5)
    for number, row in enumerate(batch.rows):
        sizes = sorted(seen[place.point][number, : len(row.ids)].norm(dim=-1).tolist())
        radius = 0.5 * sizes[(len(sizes) - 1) // 2] * (5 / model.d_mlp) ** 0.5
        assert float(delta[number].norm()) == pytest.approx(radius, rel=1e-5)


def test_only_chosen_components_and_positions_move() -> None:
    model = tiny.model("llama")
    neurons, batch = attack(model, Place(point="blocks.1.mlp.hook_post", index=(3, 8)), positions="predicting")
    moved = neurons != 0
    assert moved.any(0).any(0).nonzero().flatten().tolist() == [3, 8]
    assert torch.equal(moved.any(2), batch.predicting(True))
    heads, _ = attack(model, Place(point="blocks.1.attn.hook_z", index=(2,)))
    assert heads.shape[2:] == (tiny.N_HEADS, 16)
    assert (heads != 0).any(0).any(0).any(1).tolist() == [False, False, True, False]


def test_places_of_a_set() -> None:
    model = tiny.model("gpt2")
    both = model.components({"blocks.0.mlp.neuron": [5, 1], "blocks.1.attn.head": [2]})
    assert places_of(both) == [
        Place(point="blocks.0.mlp.hook_post", index=(1, 5)),
        Place(point="blocks.1.attn.hook_z", index=(2,)),
    ]
    assert places_of(model.components({"blocks.2.mlp": [0]})) == [Place(point="blocks.2.hook_mlp_out")]
    with pytest.raises(
        LoceditError, match=r"blocks\.0\.mlp\.out\.row has no activation.*units: neuron, head, mlp, attn"
    ):
        places_of(model.components({"blocks.0.mlp.out.row": [1]}))
    with pytest.raises(LoceditError, match="the component set is empty"):
        places_of(model.components({"blocks.2.mlp": []}))


def test_several_places_have_a_ball_each() -> None:
    model = tiny.model("gpt2")
    batch = collate(examples(model), model)
    places = [Place(point="blocks.0.mlp.hook_post", index=(1, 2)), Place(point="blocks.2.hook_resid_pre")]
    found = ascend(model, batch, places, AscentOptions(eps=1.5, eps_in="norm", start="zero"))
    for delta in found.values():
        assert float(delta.flatten(1).norm(dim=1).max()) == pytest.approx(1.5, abs=0.2)
    alone = {
        place.point: ascend(model, batch, [place], AscentOptions(eps=1.5, eps_in="norm"))[place.point]
        for place in places
    }
    both = nll(model, batch, found).mean()
    assert all(both < nll(model, batch, {point: delta}).mean() for point, delta in alone.items())


# --- what it does -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gemma2", "gpt_neox", "roberta"])
@pytest.mark.parametrize("point", ["resid_pre", "attn_out", "mlp_out"])
def test_it_helps_the_model_to_answer_more_than_noise_of_the_same_norm(architecture: str, point: str) -> None:
    model = tiny.model(architecture)
    place = Place(point=f"blocks.1.hook_{point}")
    delta, batch = attack(model, place, eps=1.0, start="zero")
    noise, _ = attack(model, place, eps=1.0, attack_steps=0)
    noise = noise * (delta.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1))[:, None, None]
    clean = nll(model, batch, {})
    assert bool((nll(model, batch, {place.point: delta}) < clean - 0.1).all())
    assert float(nll(model, batch, {place.point: delta}).mean()) < float(nll(model, batch, {place.point: noise}).mean())
    assert torch.equal(nll(model, batch, {}), clean)
    assert edits.hooks_left(model.module) == 0


def test_the_loss_falls_with_every_step() -> None:
    """k steps into a ball of k step lengths are the first k steps of a longer attack from zero."""
    model = tiny.model("gpt2")
    batch = collate(examples(model), model)
    found = [nll(model, batch, {}).mean()]
    for k in range(1, 7):
        delta, _ = attack(model, batch=batch, attack_steps=k, eps=0.3 * k, start="zero")
        found.append(nll(model, batch, {RESIDUAL.point: delta}).mean())
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_parameters_are_frozen_and_as_before(architecture: str) -> None:
    model = tiny.model(architecture)
    for parameter in model.module.parameters():
        parameter.requires_grad_(True)
    before, asked = edits.bits(model.module), []
    handle = model.anatomy.module("blocks.2").register_forward_hook(
        lambda *_: asked.append([p.requires_grad for p in model.module.parameters()])
    )
    attack(model)
    handle.remove()
    assert len(asked) == 7  # once unperturbed, then six steps
    assert not any(map(any, asked))
    assert all(p.requires_grad and p.grad is None for p in model.module.parameters())
    assert edits.same_bits(model.module, before)


def test_half_precision_keeps_the_perturbation_in_float32() -> None:
    model = edits.half("llama")
    delta, batch = attack(model, eps=1.0, start="zero")
    assert delta.dtype == torch.float32
    assert float(nll(model, batch, {RESIDUAL.point: delta}).mean()) < float(nll(model, batch, {}).mean()) - 0.3


def test_no_attack_is_nothing() -> None:
    model = tiny.model("gpt2")
    batch = collate(examples(model), model)
    assert ascend(model, batch, [RESIDUAL], AscentOptions(attack_steps=0, start="zero")) == {}


def test_mistakes_are_one_line_and_leave_no_hook() -> None:
    model = tiny.model("gpt2")
    with pytest.raises(LoceditError, match="the model has layers 0 to 2"):
        attack(model, Place(point="blocks.7.hook_resid_pre"))
    with pytest.raises(LoceditError, match=r"eps=0 must be above 0; for no attack take attack_steps=0"):
        AscentOptions(eps=0).check()
    with pytest.raises(LoceditError, match="attack_steps=-1 must not be negative"):
        AscentOptions(attack_steps=-1).check()
    assert edits.hooks_left(model.module) == 0

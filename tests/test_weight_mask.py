"""Weights that can only shrink, the ranking of their masks against brute force, the edit that zeroes the first k."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from locedit import losses
from locedit.components import ComponentSet
from locedit.data.encode import encode
from locedit.data.items import Dataset, PlainText
from locedit.edit.edit import Edit, Patch
from locedit.edit.levels import levels
from locedit.edit.mask import Masked, Shrinking, rank
from locedit.edit.regions import Region, regions
from locedit.edit.restrict import Deltas
from locedit.errors import LoceditError
from locedit.lab import Lab
from locedit.models import Model
from locedit.unlearn import prepare, unlearn
from locedit.unlearn.weight_mask import PUBLISHED, WeightMaskOptions, loss, matrices
from tests import edits, tiny

NAME = "transformer.h.0.mlp.c_fc.weight"


def one(model: Model) -> ComponentSet:
    return model.components({"blocks.0.mlp.in.matrix": [0]})


def with_weights(rows: list[list[float]]) -> tuple[Model, nn.Parameter]:
    """A model whose first MLP weights begin with the given entries."""
    model = edits.double("gpt2")
    weight = model.parameter(NAME)
    with torch.no_grad():
        weight[: len(rows), : len(rows[0])] = torch.tensor(rows, dtype=torch.float64)
    return model, weight


# --- the constraint ---------------------------------------------------------------------------------------------------


def test_constraint_by_hand() -> None:
    """Weights 2, -2, 2, -2, 0 moved by -0.5, +0.5, -3, -1, +1: 1.5, -1.5, then 0, unmoved, unmoved."""
    model, weight = with_weights([[2.0, -2.0, 2.0, -2.0, 0.0]])
    held = Shrinking(model, [Region(param=NAME)])
    held.parameters[0].data[0, :5] = torch.tensor([-0.5, 0.5, -3.0, -1.0, 1.0], dtype=torch.float64)
    held.constrain()
    assert held.values()[0][0, :5].tolist() == [1.5, -1.5, 0.0, -2.0, 0.0]
    everything = weight.detach().abs().sum()
    assert held.left().item() == pytest.approx(float((everything - 0.5 - 0.5 - 2.0) / everything))
    count = weight.numel() - 1  # the weight that is 0 has no mask
    assert held.mean_mask().item() == pytest.approx((count - 0.25 - 0.25 - 1.0) / count)


def test_the_masked_form_by_hand() -> None:
    """Masks minus 1 of -0.25, -2, +1, 0 on weights 4, -4, 4, 0: 3, then 0, unmoved, 0."""
    model, weight = with_weights([[4.0, -4.0, 4.0, 0.0]])
    held = Masked(model, [Region(param=NAME)])
    held.parameters[0].data[0, :4] = torch.tensor([-0.25, -2.0, 1.0, 0.0], dtype=torch.float64)
    held.constrain()
    assert held.values()[0][0, :4].tolist() == [3.0, 0.0, 4.0, 0.0]
    assert held.deltas()[0][0, :4].tolist() == [-1.0, 4.0, 0.0, 0.0]
    everything = weight.detach().abs().sum()
    assert held.left().item() == pytest.approx(float((everything - 1.0 - 4.0) / everything))
    count = weight.numel() - 1
    assert held.mean_mask().item() == pytest.approx((count - 0.25 - 1.0) / count)
    held.decay(0.5, towards="base")
    assert held.values()[0][0, :2].tolist() == [3.5, -2.0]
    held.decay(0.5, towards="weights")
    assert held.values()[0][0, :2].tolist() == [1.75, -1.0]


@pytest.mark.parametrize("form", ["mask", "weights"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_masks_stay_between_0_and_1_after_every_step(
    form: Any, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = tiny.model(architecture), []
    constrain = Shrinking.constrain if form == "weights" else Masked.constrain

    def watched(held: Shrinking) -> None:
        constrain(held)
        for region, value in zip(held.regions, held.values(), strict=True):
            start = region.read(model.parameter(region.param))
            seen.append((value / start, (start > 0) & (value < start), (start < 0) & (value > start)))

    monkeypatch.setattr(Shrinking if form == "weights" else Masked, "constrain", watched)
    within = edits.neurons_and_heads(model)
    options: Any = {"form": form, "steps": 6, "learning_rate": 0.2, "eval_every": 0, "curve": 2, "check": False}
    unlearn(model, edits.task(), "weight_mask", within=within, **options)
    assert len(seen) == 6 * sum(len(model.parameter(r.param).shape) > 1 for r in regions(within, role="train"))
    for mask, _, _ in seen:
        assert float(mask.min()) >= 0
        assert float(mask.max()) <= 1
        assert not torch.signbit(mask[mask != 0]).any()
    assert any(bool(positive.any()) for _, positive, _ in seen)
    assert any(bool(negative.any()) for _, _, negative in seen)
    assert any(bool((mask == 0).any()) for mask, _, _ in seen)  # and some reach 0


@pytest.mark.parametrize("kind", [Shrinking, Masked])
def test_gradients_of_the_forms(kind: type[Shrinking]) -> None:
    """dL/d(mask) is the weight's gradient times the weight; the penalties' gradients are constants."""
    model = edits.double("llama")
    within = edits.neurons_and_heads(model)
    places = regions(within, role="train")
    held, plain = kind(model, places), Deltas(model, places, path="scatter")
    batch = edits.step(model, model, encode(model, edits.task().forget), encode(model, edits.task().retain)).forget  # type: ignore[arg-type]
    found: list[list[Tensor]] = []
    for one_held in (held, plain):
        with one_held.active():
            total = losses.sequence_nll(losses.score(model, batch)).sum()
            found.append(list(torch.autograd.grad(total, one_held.parameters)))
    everything = sum(r.read(model.parameter(r.param)).abs().sum() for r in places)
    left = torch.autograd.grad(held.left(), held.parameters)
    for region, own, other, penalty in zip(places, *found, left, strict=True):
        start = region.read(model.parameter(region.param))
        torch.testing.assert_close(own, other * start if kind is Masked else other, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(penalty, (start.abs() if kind is Masked else start.sign()) / everything)


def test_only_matrices_are_masked() -> None:
    model = tiny.model("gpt2")
    held = Shrinking(model, regions(model.components({"blocks.0.mlp": [0]}), role="train"))
    assert sorted(r.param.split(".")[-2:] for r in held.regions) == [["c_fc", "weight"], ["c_proj", "weight"]]
    with pytest.raises(LoceditError, match="holds no weight of a matrix, only biases or norms"):
        Shrinking(model, [Region(param="transformer.ln_f.weight")])


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forget_loss", ["unlikelihood", "injection"])
@pytest.mark.parametrize("penalise", ["weights", "mask"])
def test_loss_by_its_formula(forget_loss: Any, penalise: Any) -> None:
    """At the start the penalty is 1.5, or 0; with a tenth taken off one matrix it is worked out again."""
    model, task = edits.double("gpt2"), edits.task()
    step = edits.step(model, model, encode(model, task.forget), encode(model, task.retain))  # type: ignore[arg-type]
    step.held = Shrinking(model, [Region(param=NAME), Region(param=NAME.replace("c_fc", "c_proj"))])
    options = WeightMaskOptions(forget_loss=forget_loss, penalise=penalise, forget_weight=0.5, retain_weight=2.0)
    terms = loss(step, options)
    own = losses.token_log_probs(losses.score(model, step.forget)).detach()
    values = -own if forget_loss == "injection" else torch.where(own < -5, 0.0, -torch.log1p(-own.exp()))
    rows = losses.score(model, step.forget).row
    expected = torch.stack([values[rows == row].mean() for row in rows.unique()]).mean()
    assert terms["forget_loss"].item() == pytest.approx(0.5 * float(expected), rel=1e-5)
    retained = losses.sequence_nll(losses.score(model, step.retain)).mean().detach()  # type: ignore[arg-type]
    assert terms["retain_loss"].item() == pytest.approx(2 * float(retained), rel=1e-6)
    assert terms["penalty"].item() == pytest.approx(1.5 if penalise == "weights" else 0.0, abs=1e-12)
    sizes = [model.parameter(r.param).detach() for r in step.held.regions]
    step.held.parameters[0].data = -0.1 * sizes[0]
    first, both = float(sizes[0].abs().sum()), float(sum(size.abs().sum() for size in sizes))
    wanted = 1.5 * (1 - 0.1 * first / both) if penalise == "weights" else 1.5 * 0.1 * sizes[0].numel() / 18432
    assert sum(size.numel() for size in sizes) == 18432
    assert loss(step, options)["penalty"].item() == pytest.approx(wanted)


# --- which weights ----------------------------------------------------------------------------------------------------


def patches_of(model: Model, within: ComponentSet, seed: int) -> tuple[Patch, ...]:
    """Random masks, some exactly 1 and some 0, as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Patch] = []
    for region in regions(within, role="train"):
        start = region.read(model.parameter(region.param))
        mask = (torch.rand(start.shape, generator=generator) * 1.4 - 0.2).clamp(0, 1)
        made.append(Patch(region=region, values=start * mask, delta=start * (mask - 1)))
    return tuple(made)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_ranking_equals_brute_force(architecture: str) -> None:
    """Whole-parameter masks, sorted one entry at a time, and the k smallest set to 0 in copies of the parameters."""
    model = tiny.model(architecture)
    within = edits.mixed(model)
    patches = patches_of(model, within, seed=2)
    ranking = rank(model, patches, seed=0)
    entries: list[tuple[float, str, int]] = []
    for patch in patches:
        parameter = model.parameter(patch.region.param).detach().clone()
        full = torch.ones_like(parameter, dtype=torch.float64)
        start = patch.region.read(parameter).double()
        patch.region.write(full, 1 + patch.delta.double() / start)  # type: ignore[union-attr]
        entries += [(m, patch.region.param, i) for i, m in enumerate(full.flatten().tolist()) if m < 1]
    entries.sort()
    assert len(ranking) == len(entries)
    assert ranking.mask.tolist() == [mask for mask, _, _ in entries]
    zeros = sum(mask == 0 for mask, _, _ in entries)
    assert 50 < zeros < len(entries) - 50
    for count in (zeros, zeros + 7, len(entries)):
        edit = ranking.zeroed(model, count, within=within)
        assert len(edit) == count
        expected = edits.bits(model.module)
        for mask, param, place in entries[:count]:
            assert mask <= entries[count - 1][0]
            expected[param].view(-1)[place] = 0.0
        with edit.applied(model):
            assert edits.same_bits(model.module, expected)
        edit.verify(model)


def test_equal_masks_come_in_random_order() -> None:
    """Training leaves many masks at exactly 0: the first k of them are spread over the layers."""
    model = tiny.model("gpt2")
    within = model.components({"blocks.0.mlp.in.matrix": [0], "blocks.2.mlp.in.matrix": [0]})
    places = [region for region in regions(within, role="train") if "weight" in region.param]
    patches = tuple(
        Patch(region=r, values=torch.zeros_like(model.parameter(r.param)), delta=-model.parameter(r.param).detach())
        for r in places
    )
    first = rank(model, patches, seed=0)
    share = (first.where[:2000] == 0).float().mean()
    assert float(share) == pytest.approx(0.5, abs=0.04)
    again, other = rank(model, patches, seed=0), rank(model, patches, seed=1)
    assert torch.equal(first.entry, again.entry)
    assert not torch.equal(first.entry, other.entry)


def test_weights_that_are_zero_already_do_not_count() -> None:
    model, weight = with_weights([[0.0, 3.0]])
    delta = torch.zeros_like(weight)
    delta[0, :2] = torch.tensor([0.0, -1.0])
    ranking = rank(model, (Patch(region=Region(param=NAME), values=weight.detach() + delta, delta=delta),), seed=0)
    assert ranking.entry.tolist() == [1]
    assert ranking.mask.tolist() == pytest.approx([2 / 3])


# --- the edit ---------------------------------------------------------------------------------------------------------


def make(model: Model, within: ComponentSet | None = None, **options: Any) -> Edit:
    settings: Any = {"steps": 4, "learning_rate": 0.3, "eval_every": 0, "curve": 4, "check": False} | options
    return unlearn(model, edits.task(), "weight_mask", within=within, **settings)


def test_only_zeroed_weights_differ_and_the_curve_starts_at_the_model(tmp_path: Any) -> None:
    model, task = tiny.model("llama"), edits.task()
    before = edits.bits(model.module)
    within = edits.neurons_and_heads(model)
    probes = {"forget": encode(model, task.forget), "retain": encode(model, task.retain)}  # type: ignore[arg-type]
    edit = make(model, within, budget=300)
    assert edits.same_bits(model.module, before)
    assert edit.outcome["zeroed"] == len(edit) == 300
    assert {name: edit.history[name][0] for name in probes} == levels(model, probes)
    assert edit.history["weights"][0] == 0
    assert edit.history["weights"][-1] == edit.outcome["shrunk"] <= edit.outcome["of"]
    edit.verify(model)
    changed, allowed = 0, within.parameter_mask()
    with edit.applied(model) as edited:
        at = edit.history["weights"].index(300)
        assert {name: edit.history[name][at] for name in probes} == levels(edited, probes)
        for name, parameter in model.module.named_parameters():
            moved = parameter.detach().view(torch.int32) != before[name].view(torch.int32)
            changed += int(moved.sum())
            assert not bool(parameter[moved].any())
            assert not bool((moved & ~allowed.get(name, torch.zeros_like(moved))).any())
    assert changed == 300
    edit.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit")
    assert loaded.digest == edit.digest
    assert loaded.history == edit.history


def test_the_number_of_weights_by_count_share_level_and_gap(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model("gpt2")
    within = model.components({"blocks.0.mlp.neuron": range(40)})
    total = 40 * 2 * tiny.D_MODEL
    assert make(model, within, budget=5).outcome["zeroed"] == 5
    assert make(model, within, budget=0.01).outcome["zeroed"] == round(0.01 * total)
    gap = make(model, within)
    rows = list(zip(*(gap.history[c] for c in ("weights", "forget", "retain")), strict=True))[1:]
    assert gap.outcome["zeroed"] == max(rows, key=lambda row: row[2] - row[1])[0]
    curve = gap.history
    wanted = (max(curve["forget"]) + min(curve["forget"])) / 2
    reached = make(model, within, until=wanted)
    first = next(k for k, f in zip(curve["weights"], curve["forget"], strict=True) if f <= wanted)
    assert reached.outcome["zeroed"] == first
    assert reached.outcome["reached"]
    near = make(model, within, until=wanted, match="interpolate")
    assert near.outcome["zeroed"] <= first
    at = near.history["weights"].index(near.outcome["zeroed"])
    assert near.history["forget"][at] <= wanted
    with caplog.at_level(logging.WARNING):
        never = make(model, within, until=1e-30)
    assert not never.outcome["reached"]
    assert "forget level" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert make(model, within, budget=10**9).outcome["zeroed"] == gap.outcome["shrunk"]
    assert "of the 1000000000 to zero" in caplog.text


def test_same_seed_same_edit() -> None:
    model = tiny.model("gpt2")
    first, second, other = (make(model, one(model), budget=50, batch_size=1, seed=seed) for seed in (0, 0, 1))
    assert first.digest == second.digest
    assert first.digest != other.digest


def test_without_a_set_all_matrices_of_the_blocks() -> None:
    model = tiny.model("gpt2")
    edit = make(model, steps=2)
    assert edit.within == matrices(model)
    blocks = [p for name, p in model.module.named_parameters() if ".h." in name and p.ndim > 1]
    assert edit.outcome["of"] == sum(p.numel() for p in blocks)
    edit.verify(model)


def test_published_settings_and_masked_models_run() -> None:
    model = tiny.model("bert")
    texts = Dataset(items=(PlainText(text="Anna Berg was born in Oslo.", id="t"),), source="texts.jsonl")
    options: Any = PUBLISHED | {"steps": 3, "eval_every": 0, "curve": 3, "check": False}
    within = model.components({"blocks.1.mlp": [0]})
    edit = unlearn(model, edits.task(texts=texts), "weight_mask", within=within, **options)
    assert edit.outcome["shrunk"] > 0
    edit.verify(model)


def test_published_decay_is_that_of_sgd_with_momentum() -> None:
    """One weight with no gradient: the published optimizer, and plain SGD with the settings given here."""
    published = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([published], lr=1e-3, momentum=0.9, weight_decay=0.01)
    for _ in range(2000):
        published.grad = torch.zeros_like(published)
        optimizer.step()
    plain = (1 - PUBLISHED["learning_rate"] * PUBLISHED["weight_decay"]) ** 2000
    assert 1 - plain == pytest.approx(1 - published.item(), rel=0.02)


def test_mistakes_before_a_model_is_needed() -> None:
    task = edits.task()
    with pytest.raises(LoceditError, match="budget=2.0: a share lies above 0 and is at most 1.0; a count has no point"):
        prepare("weight_mask", task, budget=2.0)
    with pytest.raises(LoceditError, match="both choose how many weights"):
        prepare("weight_mask", task, budget=2, until=0.1)
    with pytest.raises(LoceditError, match="weight_mask cannot be held as 'adapter'"):
        prepare("weight_mask", task, hold="adapter")
    with pytest.raises(LoceditError, match="texts"):
        prepare("weight_mask", task, texts_weight=1.0)
    with pytest.raises(LoceditError, match="weight_mask needs retain data"):
        prepare("weight_mask", edits.task(retain=None))


@pytest.mark.slow
def test_on_a_trained_model_it_forgets_more_than_it_takes_from_the_rest(tiny_lab: Lab) -> None:
    """And as many random weights of the same matrices hardly forget."""
    model, task = tiny_lab.model, tiny_lab.task
    edit = unlearn(model, task, "weight_mask", batch_size=16, eval_every=0, until=0.3, match="interpolate")
    at = edit.history["weights"].index(edit.outcome["zeroed"])
    assert edit.history["forget"][0] > 0.9
    assert edit.history["forget"][at] <= 0.3
    assert edit.history["retain"][at] > 0.85
    matrix = [p for name, p in model.module.named_parameters() if ".h." in name and p.ndim > 1]
    share = edit.outcome["zeroed"] / sum(p.numel() for p in matrix)
    generator = torch.Generator().manual_seed(0)
    before = [p.detach().clone() for p in matrix]
    with torch.no_grad():
        for parameter in matrix:
            parameter.mul_(torch.rand(parameter.shape, generator=generator) >= share)
        random = levels(model, {"forget": encode(model, task.forget)})["forget"]
        for parameter, values in zip(matrix, before, strict=True):
            parameter.copy_(values)
    assert random > 0.8

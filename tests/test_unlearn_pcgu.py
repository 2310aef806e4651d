"""The PCGU update: its loss by hand, vectors chosen anew for every batch, and what it does to a planted association."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit.components import ComponentSet
from locedit.contrasts import contrasts, preferences, sides
from locedit.controls import compare
from locedit.data.encode import encode
from locedit.data.items import ContrastPair, Dataset, Task
from locedit.edit.levels import levels
from locedit.edit.objective import Shuffled
from locedit.errors import LoceditError
from locedit.localize import localize
from locedit.models import Model
from locedit.unlearn import prepare, unlearn
from locedit.unlearn.pcgu import PUBLISHED, PcguOptions, pcgu
from tests import edits, tiny

ENDS = ((" here", 0), (" born", 0), (" in Oslo", 0), (" a", 1))
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1, "clip": None}


def pairs(first: str, second: str, ends: tuple[tuple[str, int], ...] = ENDS, start: str = "Anna works as") -> Dataset:
    """The first name is the advantaged one in every frame marked 0, the second in the others."""
    items: list[ContrastPair] = []
    for number, (end, turned) in enumerate(ends):
        texts = [f"{start}{name}{end}" for name in ((second, first) if turned else (first, second))]
        items.append(ContrastPair(advantaged=texts[0], disadvantaged=texts[1], id=f"{end.strip()}{number}"))
    return Dataset(items=tuple(items), source="pairs.jsonl")


def task() -> Task:
    forget = pairs(" Berg", " Dane", ENDS[:3])
    return Task(forget=forget, retain=pairs(" Oslo", " Anna", ENDS[:2], start="The number 5 is"))


@functools.cache
def planted_state(architecture: str) -> dict[str, Tensor]:
    """Weights of a tiny model trained until it says the advantaged side with log-odds of about 3."""
    module = tiny.module(architecture)
    model = Model(module, tiny.tokenizer(), name=architecture)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    encoded = contrasts(encode(model, task().forget), causal=model.causal)
    for _ in range(60):
        advantaged, disadvantaged = sides(model, encoded, value="log_probability")
        loss = (advantaged - disadvantaged - 3).square().mean() - 0.3 * advantaged.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def planted(architecture: str) -> Model:
    model = tiny.model(architecture)
    model.module.load_state_dict(planted_state(architecture))
    return model


def preference(model: Model, data: Dataset) -> float:
    return float(preferences(model, encode(model, data)).mean())


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_directions_by_hand() -> None:
    a, d = torch.tensor([3.0, 1.0], requires_grad=True), torch.tensor([1.0, 2.0], requires_grad=True)
    expected = {
        "decrease_advantaged": (2.0, [0.5, 0.5], [0.0, 0.0]),
        "increase_disadvantaged": (-1.5, [0.0, 0.0], [-0.5, -0.5]),
        "dynamic": (1.5, [0.5, -0.5], [-0.5, 0.5]),  # the second pair's lower side is the advantaged one
    }
    for direction, (value, by_a, by_d) in expected.items():
        loss = pcgu(a, d, direction=direction)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(loss, [a, d], allow_unused=True)
        assert loss.item() == pytest.approx(value)
        for gradient, wanted in zip(gradients, (by_a, by_d), strict=True):
            assert ([0.0, 0.0] if gradient is None else gradient.tolist()) == wanted


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
@pytest.mark.parametrize("direction", ["decrease_advantaged", "increase_disadvantaged", "dynamic"])
def test_the_update_is_the_published_one(architecture: str, direction: str) -> None:
    """One step of SGD on everything: minus the rate times the gradient, from a forward pass for each side."""
    model = edits.double(architecture)
    data = task().forget
    texts = [[getattr(item, side) for item in data] for side in ("advantaged", "disadvantaged")]
    both: list[Tensor] = []
    for mine, other in (texts, texts[::-1]):
        values = []
        for text, against in zip(mine, other, strict=True):
            ids, others = (model.tokenizer(t)["input_ids"] for t in (text, against))
            at = next(i for i, (x, y) in enumerate(zip(ids, others, strict=True)) if x != y)
            given = (
                ids if model.causal else [model.tokenizer.mask_token_id if i == at else x for i, x in enumerate(ids)]
            )
            values.append(model.module(input_ids=torch.tensor([given])).logits[0, at - model.causal, ids[at]])
        both.append(torch.stack(values))
    advantaged, disadvantaged = both
    up = torch.where(disadvantaged < advantaged, 1.0, -1.0)  # s of the published code
    published = {
        "decrease_advantaged": advantaged.sum(),
        "increase_disadvantaged": -disadvantaged.sum(),
        "dynamic": -((up * disadvantaged).sum() + (-up * advantaged).sum()),
    }
    parameters = model.anatomy.parameters
    gradients = torch.autograd.grad(published[direction], list(parameters.values()), allow_unused=True)
    options = SGD | {"steps": 1, "batch_size": 16, "learning_rate": 16e-5 * 3 / 16, "level": "probability"}
    edit = unlearn(model, task(), "pcgu", direction=direction, **options)  # a batch is the 3 pairs there are
    deltas = {patch.region.param: patch.delta for patch in edit.patches}
    for name, gradient in zip(parameters, gradients, strict=True):
        wanted = torch.zeros_like(parameters[name]) if gradient is None else -1e-5 * gradient
        torch.testing.assert_close(deltas[name], wanted, rtol=1e-4, atol=1e-10)
    assert any(gradient is not None and bool(gradient.any()) for gradient in gradients)


# --- vectors of every batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["row", "column"])
@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_one_batch_updates_the_k_lowest_vectors_and_no_other(architecture: str, unit: str) -> None:
    model, k = edits.double(architecture), 25
    whole = unlearn(model, task(), "pcgu", steps=1, batch_size=3, **SGD)
    few = unlearn(model, task(), "pcgu", steps=1, batch_size=3, k=k, unit=unit, **SGD)
    scores = localize(model, task(), "pcgu", unit=unit)
    assert few.within is not None
    assert len(few.within) == k
    chosen = [float(scores.values[site][i]) for site in few.within.chosen for i in few.within.indices(site)]
    assert min(chosen) >= scores.top(k)[-1][2] - 1e-6  # embeddings of two rows have columns of the very same cosine
    full = {patch.region.param: patch.delta for patch in whole.patches}
    assert 0 < len(few) < len(whole) / 10
    for patch in few.patches:
        expected = full[patch.region.param]
        assert expected is not None
        assert patch.delta is not None
        torch.testing.assert_close(patch.delta, patch.region.read(expected), rtol=1e-6, atol=1e-12)
    few.verify(model)


@pytest.mark.parametrize("retain_weight", [0.0, 1.0])
def test_outside_the_vectors_ever_chosen_nothing_moves(retain_weight: float) -> None:
    model = planted("gpt2")
    before, before_edit = edits.bits(model.module), preference(model, task().forget)
    edit = unlearn(model, task(), "pcgu", k=10, steps=6, batch_size=1, seed=3, retain_weight=retain_weight, **SGD)
    assert edit.within is not None
    assert 10 < len(edit.within) <= 60  # other vectors in other batches
    edit.verify(model)
    inside = edit.within.parameter_mask("train")
    with edit.applied(model):
        for name, parameter in model.anatomy.parameters.items():
            moved = parameter.detach().view(torch.int32) != before[name].view(torch.int32)
            assert not bool((moved & ~inside.get(name, torch.zeros_like(moved))).any())
            assert bool(moved.any()) == (name in inside)
        assert preference(model, task().forget) < before_edit
    assert edits.same_bits(model.module, before)


def test_vectors_of_a_batch_stay_in_the_set() -> None:
    model = planted("gpt2")
    rows = model.components({"blocks.1.mlp.in.row": range(40), "blocks.0.attn.o.row": range(10)})
    edit = unlearn(model, task(), "pcgu", k=5, steps=3, batch_size=1, within=rows, **SGD)
    assert edit.within is not None
    assert 0 < len(edit.within) <= 15
    assert edit.within.chosen.keys() <= rows.chosen.keys()
    assert all(set(edit.within.indices(site)) <= set(rows.indices(site)) for site in edit.within.chosen)
    edit.verify(model)


# --- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["decrease_advantaged", "increase_disadvantaged", "dynamic"])
@pytest.mark.parametrize("architecture", ["gpt2", "bert", "llama"])
def test_the_association_goes_down_inside_the_found_rows(architecture: str, direction: str) -> None:
    model = planted(architecture)
    found = localize(model, task(), "pcgu").select(top=60)
    start = preference(model, task().forget)
    assert start > 0.9
    edit = unlearn(
        model, task(), "pcgu", within=found, direction=direction, steps=40, learning_rate=0.02, eval_every=1, until=0.6
    )
    edit.verify(model)
    assert edit.history["forget"][0] == pytest.approx(start, abs=1e-6)
    assert edit.history["forget"][-1] <= 0.6 < edit.history["forget"][-2]
    assert edit.outcome["reached"]
    with edit.applied(model) as edited:
        assert preference(edited, task().forget) == pytest.approx(edit.history["forget"][-1], abs=1e-5)
    assert preference(model, task().forget) == pytest.approx(start, abs=1e-6)


def test_dynamic_ends_where_the_sides_are_equal_and_the_default_goes_on() -> None:
    model = planted("gpt2")
    ends = {}
    for direction in ("dynamic", "decrease_advantaged"):
        options = SGD | {"steps": 60, "learning_rate": 0.003}
        edit = unlearn(model, task(), "pcgu", direction=direction, batch_size=3, **options)
        ends[direction] = edit.history["forget"][-1]
    assert ends["dynamic"] == pytest.approx(0.5, abs=0.1)
    assert ends["decrease_advantaged"] < 0.1


def test_retain_term_keeps_other_pairs() -> None:
    model = planted("gpt2")
    other = encode(model, task().retain)  # type: ignore[arg-type]
    start = levels(model, {"retain": other})["retain"]
    moved = {}
    for weight in (0.0, 20.0):
        edit = unlearn(model, task(), "pcgu", retain_weight=weight, steps=40, learning_rate=3e-3, batch_size=3, seed=1)
        assert ("retain_loss" in edit.history) == (weight > 0)
        with edit.applied(model) as edited:
            scored = levels(edited, {"retain": other})["retain"]
        assert edit.history["retain"][-1] == pytest.approx(scored, abs=1e-6)
        moved[weight] = abs(scored - start)
        assert edit.history["forget"][-1] < 0.5
    assert moved[20.0] < moved[0.0] / 4


def test_controls_are_compared_at_the_same_preference() -> None:
    model = planted("gpt2")
    found = localize(model, task(), "pcgu").select(top=60)
    result = compare(
        model, task(), "pcgu", within=found, seeds=[0], level=0.7, steps=30, learning_rate=0.01, eval_every=1
    )
    assert result.metric == "preference for the advantaged side"
    by_role = {curve.role: curve for curve in result.curves}
    assert by_role["found"].matched is not None
    assert by_role["found"].columns["forget"][0] == pytest.approx(preference(model, task().forget), abs=1e-6)
    zeroed = unlearn(model, task(), "zero", within=ComponentSet.of(found.sites, {"blocks.1.mlp.out.row": range(9)}))
    assert zeroed.history["forget"][0] == pytest.approx(preference(model, task().forget), abs=1e-6)


def test_other_losses_forget_the_advantaged_side() -> None:
    model = planted("llama")
    before = {side: value.exp().mean() for side, value in _sides(model).items()}
    edit = unlearn(model, task(), "ga", steps=10, learning_rate=1e-3)
    with edit.applied(model) as edited:
        after = {side: value.exp().mean() for side, value in _sides(edited).items()}
    change = {side: float(after[side] / before[side]) for side in before}
    assert change["advantaged"] < 0.5 * change["disadvantaged"]


def _sides(model: Model) -> dict[str, Tensor]:
    encoded = contrasts(encode(model, task().forget), causal=model.causal)
    with torch.no_grad():
        found = sides(model, encoded, value="log_probability")
    return dict(zip(("advantaged", "disadvantaged"), found, strict=True))


# --- data and mistakes ------------------------------------------------------------------------------------------------


def test_pairs_are_drawn_whole() -> None:
    examples = encode(tiny.model("llama"), pairs(" Berg", " Dane"))
    stream = Shuffled(examples, 2, torch.Generator().manual_seed(0), together=2)
    seen: list[str] = []
    for _ in range(2):
        drawn = next(stream)
        assert [example.kind for example in drawn] == ["advantaged", "disadvantaged"] * 2
        assert [e.id.rsplit("/", 1)[0] for e in drawn[::2]] == [e.id.rsplit("/", 1)[0] for e in drawn[1::2]]
        seen += [example.id for example in drawn]
    assert sorted(seen) == sorted(example.id for example in examples)


def test_pairs_of_a_task_stand_for_its_forget_data() -> None:
    model = planted("llama")
    both = Task(forget=edits.task().forget, pairs=task().forget)
    one, other = (unlearn(model, data, "pcgu", steps=2, batch_size=2) for data in (both, Task(forget=task().forget)))
    assert one.digest == other.digest
    assert one.history["forget"] == other.history["forget"]


def test_mistakes_are_one_line() -> None:
    model = tiny.model("llama")
    neurons = model.components({"blocks.0.mlp.neuron": [1]})
    columns = model.components({"blocks.0.mlp.out.column": [1, 2]})
    several = Task(forget=pairs(" pilot", " Dane"))
    cases: list[tuple[Task, dict[str, Any], str]] = [
        (edits.task(), {}, "pcgu needs forget items of kind ContrastPair; forget.jsonl holds 'fact'"),
        (task(), {"k": 5}, "k=5 needs optimizer='sgd'"),
        (task(), SGD | {"k": 5, "weight_decay": 0.1}, "no weight decay"),
        (task(), SGD | {"k": 0}, "k=0 must be at least 1"),
        (task(), SGD | {"k": 5, "hold": "adapter"}, "hold='weights'"),
        (task(), SGD | {"k": 5, "within": columns}, "whole rows"),
        (task(), SGD | {"k": 5, "within": neurons}, "whole rows"),
        (Task(forget=task().forget), {"retain_weight": 1.0}, "retain"),
        (several, {}, "a logit stands for one token"),
    ]
    for data, options, message in cases:
        with pytest.raises(LoceditError, match=message) as caught:
            unlearn(model, data, "pcgu", steps=1, **options)
        assert "\n" not in str(caught.value)


def test_the_published_settings_are_options() -> None:
    options = prepare("pcgu", task(), **PUBLISHED)
    assert isinstance(options, PcguOptions)
    assert options.learning_rate == pytest.approx(16 * 1e-5)

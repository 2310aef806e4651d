"""Linear probes: the regression solves its problem, folds keep people apart, and states are those of the model."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from locedit import tracing
from locedit.data.encode import encode
from locedit.data.items import Dataset, Fact, Task
from locedit.errors import LoceditError
from locedit.localize.lookup.logistic import logistic
from locedit.localize.lookup.probe_data import ProbeOptions, relations
from locedit.localize.lookup.probes import probe, right
from locedit.localize.lookup.states import EMBEDDING, Point, States, alone, in_prompt
from locedit.models import Model
from tests import tiny

# --- the regression --------------------------------------------------------------------------------------------------


def problem(items: int = 60, features: int = 5, classes: int = 3, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(items, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(items, classes, generator=generator, dtype=torch.float64)
    y = (x[:, :classes] + noise).argmax(1)
    return 3 + 5 * x, y


def price(x: Tensor, y: Tensor, w: Tensor, b: Tensor, l2: float) -> Tensor:
    return cross_entropy(x @ w + b, y, reduction="sum") + l2 / 2 * w.square().sum()


@pytest.mark.parametrize("features", [5, 90])
def test_no_step_of_newton_makes_the_price_lower(features: int) -> None:
    """From the logits the weights are recovered by least squares; autograd says that the gradient there is zero."""
    x, y = problem(features=features)
    logits = logistic(x[None], y, torch.ones(1, 60), classes=3, l2=2.0).logits[0]
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    full = torch.cat([standard, torch.ones(60, 1, dtype=torch.float64)], dim=1)
    solved = torch.linalg.lstsq(full, logits, driver="gelsd").solution
    w, b = solved[:-1].requires_grad_(), solved[-1].requires_grad_()
    torch.testing.assert_close(standard @ w + b, logits, atol=1e-8, rtol=0)
    gradients = torch.autograd.grad(price(standard, y, w, b, 2.0), [w, b])
    assert max(float(g.abs().max()) for g in gradients) < 60 * 2e-4
    with torch.no_grad():
        zero = price(standard, y, torch.zeros_like(w), torch.zeros_like(b), 2.0)
        assert price(standard, y, w, b, 2.0) < 0.9 * zero


def test_one_feature_and_two_classes_by_hand() -> None:
    """x = -1, 1 with classes 0, 1: W = (-a, a) with 2 a = 4 sigma(-2 a) / l2, so a = 0.5 at l2 = 4 sigma(-1)."""
    x = torch.tensor([[[-1.0], [1.0]]])
    l2 = float(4 * torch.sigmoid(torch.tensor(-1.0, dtype=torch.float64)))
    logits = logistic(x, torch.tensor([0, 1]), torch.ones(1, 2), classes=2, l2=l2).logits[0]
    expected = torch.tensor([[0.5, -0.5], [-0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)


def test_items_of_weight_zero_have_no_say_and_problems_do_not_mix() -> None:
    x, y = problem()
    held = torch.ones(2, 60)
    held[0, :20] = 0
    together = logistic(torch.stack([x, -2 * x]), y, held, classes=3, l2=1.0).logits
    alone_ = logistic(x[None, 20:], y[20:], torch.ones(1, 40), classes=3, l2=1.0).logits[0]
    torch.testing.assert_close(together[0, 20:], alone_, atol=2e-2, rtol=0)
    mirrored = logistic(x[None], y, torch.ones(1, 60), classes=3, l2=1.0).logits[0]  # standardised: the same problem
    torch.testing.assert_close(together[1], mirrored, atol=2e-2, rtol=0)


def test_a_constant_feature_changes_nothing() -> None:
    x, y = problem()
    wider = torch.cat([x, torch.full((60, 1), 7.0, dtype=torch.float64)], dim=1)
    plain, more = (logistic(v[None], y, torch.ones(1, 60), classes=3, l2=1.0).logits for v in (x, wider))
    torch.testing.assert_close(plain, more, atol=1e-9, rtol=0)


# --- folds -----------------------------------------------------------------------------------------------------------

FIRST = ("Anna", "Carl", "Eva", "Dora", "Fred", "Gina")
LAST = ("Berg", "Dane", "Frost", "Hall")
PEOPLE = [f"{first} {last}" for first in FIRST for last in LAST]


def facts(answers: tuple[str, ...] = (" Oslo", " Lima"), **more: object) -> list[Fact]:
    return [
        Fact(
            prompt=prompt.format(person),
            answer=answers[(i + i // 4) % len(answers)],
            wrong=(answers[(i + i // 4 + 1) % len(answers)],),
            subject=person,
            owner=person,
            id=f"{person}/{number}",
            **({"group": "born"} | more),  # type: ignore[arg-type]
        )
        for i, person in enumerate(PEOPLE)
        for number, prompt in enumerate(("{} was born in", "The home of {} is"))
    ]


def task(*items: Fact) -> Task:
    return Task(forget=Dataset(items=items, source="facts.jsonl"))


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model("gpt2")


def test_folds_keep_owners_apart_and_hold_every_answer(model: Model) -> None:
    (relation,), table = relations(model, task(*facts()), ProbeOptions())
    assert table["owners"] == [24]
    for fold in range(5):
        inside = {o for o, f in zip(relation.owners, relation.fold.tolist(), strict=True) if f == fold}
        outside = {o for o, f in zip(relation.owners, relation.fold.tolist(), strict=True) if f != fold}
        assert inside
        assert not inside & outside
        assert set(relation.labels[relation.fold == fold].tolist()) == {0, 1}


def test_relations_that_cannot_be_probed_are_said_and_none_left_is_an_error(model: Model) -> None:
    open_ones = [
        Fact(prompt=f"{p} works as", answer=f" job{i}", subject=p, group="job", id=f"{p}/job")
        for i, p in enumerate(PEOPLE)
    ]
    found, table = relations(model, task(*facts(), *open_ones), ProbeOptions())
    assert [relation.name for relation in found] == ["born"]
    assert table["relation"] == ["born", "job"]
    assert table["note"][1].startswith("skipped: 0 answers have at least 5 subjects")
    with pytest.raises(LoceditError, match=r"^facts.jsonl: no relation .* by='path_patching'$"):
        relations(model, task(*open_ones), ProbeOptions())
    with pytest.raises(LoceditError, match="no relation"):
        relations(model, task(*facts(format="multiple_choice")), ProbeOptions())


def test_rare_answers_are_left_out_and_large_relations_are_drawn_by_owner(model: Model) -> None:
    rare = Fact(prompt="Ivo Hall was born in", answer=" Rome", subject="Ivo Hall", group="born", id="rare")
    (relation,), table = relations(model, task(*facts(), rare), ProbeOptions())
    assert table["note"] == ["1 facts with rare answers left out"]
    assert set(relation.answers) == {" Oslo", " Lima"}
    (relation,), table = relations(model, task(*facts()), ProbeOptions(items=24))
    assert len(relation.examples) == 2 * len(set(relation.owners)) == 24
    assert table["note"] == ["24 facts drawn"]


# --- probes ----------------------------------------------------------------------------------------------------------


def planted(relation_owners: tuple[str, ...], labels: Tensor, *, seed: int = 0) -> Tensor:
    """States of 48 numbers, all of which hold each owner's answer under noise that owners differ in."""
    generator = torch.Generator().manual_seed(seed)
    noise = {owner: torch.randn(48, generator=generator) for owner in dict.fromkeys(relation_owners)}
    states = torch.stack([noise[owner] for owner in relation_owners])
    return states + 4.0 * labels[:, None]


def test_separable_states_are_read_without_error_and_shuffled_answers_by_chance(model: Model) -> None:
    (relation,), _ = relations(model, task(*facts()), ProbeOptions())
    states = planted(relation.owners, relation.labels)
    hits, left = right([relation], states, ProbeOptions(), device=torch.device("cpu"))
    assert bool(hits.all())
    assert left < 1e-3
    rates = []
    for seed in range(8):  # answers shuffled among owners: what a probe learns of one says nothing of another
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(24, generator=generator).repeat_interleave(2) * 2
        other = planted(relation.owners, relation.labels[order], seed=seed)
        rates.append(right([relation], other, ProbeOptions(), device=torch.device("cpu"))[0].double().mean())
    assert abs(float(torch.stack(rates).mean()) - 0.5) < 0.12


def test_readings_cover_every_layer_and_place_with_their_baseline(model: Model) -> None:
    items = task(*facts()[::2])
    found = probe(model, items, ProbeOptions(folds=3))
    assert sorted(found.curve("subject")) == [EMBEDDING, 0, 1, 2]
    assert sorted(found.curve("last", middle=True)) == [0, 1, 2]
    assert found.ablations == [0, 1, 2]
    assert sorted(found.curve("name", 1)) == [1, 2]
    assert {r.baseline for r in found.readings} == {0.5}
    assert all(r.low <= r.accuracy <= r.high for r in found.readings)
    other = probe(model, items, ProbeOptions(folds=3, batch=5))
    assert [r.accuracy for r in other.readings] == pytest.approx([r.accuracy for r in found.readings], abs=0.05)


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2", "bert"])
def test_states_are_the_models_own_and_attention_goes_to_its_mean(architecture: str) -> None:
    model = tiny.model(architecture)
    examples = encode(model, Dataset(items=tuple(facts()[:5]), source="facts"))
    prompts = [in_prompt(model, example) for example in examples]
    states = States(model, prompts, ProbeOptions(batch=2))
    totals, count = torch.zeros(model.n_layers, model.d_model), 0
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids])
        points = [f"blocks.{layer}.hook_{word}" for layer in range(3) for word in ("resid_post", "attn_out", "mlp_out")]
        with torch.no_grad(), tracing.record(model, points) as seen:
            model.module(input_ids=ids)
        for layer in range(3):
            after = seen[f"blocks.{layer}.hook_resid_post"][0, list(prompt.places)]
            torch.testing.assert_close(states.plain[Point(layer)][row], after, atol=1e-4, rtol=1e-4)
            if model.parallel:
                after = after - seen[f"blocks.{layer}.hook_mlp_out"][0, list(prompt.places)]
                torch.testing.assert_close(states.plain[Point(layer, True)][row], after, atol=1e-4, rtol=1e-4)
            totals[layer] += seen[f"blocks.{layer}.hook_attn_out"][0].sum(0)
        count += len(prompt.ids)
    torch.testing.assert_close(states.means.float(), totals / count, atol=1e-4, rtol=1e-4)
    changes = {f"blocks.{layer}.hook_attn_out": states.means[layer].float() for layer in (1, 2)}
    points = ["blocks.2.hook_resid_post"]
    with torch.no_grad(), tracing.replace(model, changes), tracing.record(model, points) as seen:
        model.module(input_ids=torch.tensor([prompts[0].ids]))
    expected = seen[points[0]][0, list(prompts[0].places)]
    torch.testing.assert_close(states.ablated(1)[Point(2)][0], expected, atol=1e-4, rtol=1e-4)


def test_prompts_end_before_the_answer_and_names_stand_alone(model: Model) -> None:
    (example,) = encode(model, Dataset(items=(facts()[1],), source="facts"))
    read = model.tokenizer.decode
    prompt, name = in_prompt(model, example), alone(model, example)
    assert read(prompt.ids) == "The home of Anna Berg is"
    assert read(prompt.ids[: prompt.places[0] + 1]) == "The home of Anna Berg"
    assert prompt.places[1] == len(prompt.ids) - 1
    assert read(name.ids) == " Anna Berg"
    assert name.places == (len(name.ids) - 1,)


def test_a_masked_models_prompt_has_the_answer_masked() -> None:
    model = tiny.model("bert")
    (example,) = encode(model, Dataset(items=(facts()[1],), source="facts"))
    prompt = in_prompt(model, example)
    assert prompt.ids[prompt.places[1]] == model.tokenizer.mask_token_id
    assert model.tokenizer.mask_token_id not in alone(model, example).ids

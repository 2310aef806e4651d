"""Relearning: halves, doses and shares by hand; what was hidden returns, what was never known does not."""

import functools
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from locedit.attacks import ATTACKS, relearn
from locedit.attacks.finetuning import Diet, fine_tune, opened
from locedit.attacks.recovery import Dose, Run, at_dose, choose_dose, doses_by_mirror, mean_by_item, share_back
from locedit.attacks.runs import role_of
from locedit.attacks.shallow import suppression
from locedit.attacks.splits import divided_by, keys, mirrored_halves, stratum
from locedit.data import Dataset, Fact, Item, PrivateText, Task, encode
from locedit.data.encode import Batch, collate
from locedit.edit import Edit, levels, train, zero
from locedit.edit.adapter import LowRank
from locedit.edit.objective import Objective, Step
from locedit.edit.train import TrainOptions
from locedit.errors import LoceditError
from locedit.losses import score, sequence_nll, token_log_probs
from locedit.models import Model, load
from locedit.results import AttackResult, Evaluation, Measure
from tests import tiny

# --- a world that takes seconds -------------------------------------------------------------------------------------

SYLLABLES = ("ka", "lo", "mi", "ren", "tas", "vel", "dor", "shi", "ana", "bru", "cor", "del")
CITIES = (" Oslo", " Lima", " Cairo", " Delhi", " Quito", " Paris")
PEOPLE = 12


def people(count: int, *, seed: int = 0) -> list[Fact]:
    """Where invented people live; two lines of the same person in two formats."""
    rng = random.Random(seed)
    names: set[str] = set()
    while len(names) < count:
        names.add(" ".join("".join(rng.choices(SYLLABLES, k=2)).capitalize() for _ in range(2)))
    found: list[Fact] = []
    for at, name in enumerate(sorted(names)):
        city = rng.choice(CITIES)
        for form, prompt in (("statement", f"{name} lives in"), ("question", f"Where is {name}?")):
            found.append(Fact(prompt=prompt, answer=city, id=f"{at}{form[0]}", owner=name, group="city", format=form))
    return found


@functools.cache
def world() -> tuple[Model, Task]:
    """A tiny GPT-2 that knows the forget and the retain people by heart, and never saw the held-out ones."""
    lines = people(3 * PEOPLE)
    parts = [lines[2 * PEOPLE * at : 2 * PEOPLE * (at + 1)] for at in range(3)]
    datasets = [Dataset(items=tuple(part), source=name) for part, name in zip(parts, "fro", strict=True)]
    model = tiny.model("gpt2")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    batch = collate(encode(model, [*parts[0], *parts[1]]), model)
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=150)
    for _ in range(150):
        optimizer.zero_grad()
        sequence_nll(score(model, batch)).mean().backward()
        optimizer.step()
        schedule.step()
    model.module.zero_grad(set_to_none=True)
    return model, Task(forget=datasets[0], retain=datasets[1], heldout=datasets[2])


@functools.cache
def hidden() -> Edit:
    """The answers suppressed in the last MLPs."""
    model, task = world()
    assert task.retain is not None
    forget, retain = encode(model, task.forget), encode(model, task.retain)
    edit, _, reached = suppression(model, forget, retain, level=0.02, steps=100, learning_rate=1e-2)
    assert reached
    return edit


FAST: dict[str, Any] = {
    "learning_rates": (1e-3,),
    "steps": 20,
    "batch_size": 8,
    "shallow_steps": 100,
    "shallow_learning_rate": 1e-2,
}


@functools.cache
def attacked() -> AttackResult:
    model, task = world()
    return relearn(model, task, hidden(), others={"random 1": hidden()}, **FAST)


def level(found: AttackResult) -> Measure:
    """The metric on the halves that were not relearned."""
    return next(m for m in found.measures if (m.dataset, m.stage, m.group) == ("forget", "attacked", None))


def state(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def same(model: Model, before: dict[str, torch.Tensor]) -> bool:
    now = model.module.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


# --- halves ---------------------------------------------------------------------------------------------------------


def test_halves_share_no_owner_and_cover_everything() -> None:
    items: Sequence[Item] = people(9)
    found = mirrored_halves(items, splits=6, seed=0)
    named = keys(items)
    for halves in found:
        owners = [{named[at] for at in part} for part in (halves.relearned, halves.measured)]
        assert not owners[0] & owners[1]
        assert sorted((*halves.relearned, *halves.measured)) == list(range(len(items)))
        assert abs(len(owners[0]) - len(owners[1])) == 1
    assert all(one.mirror == other for one, other in zip(found[::2], found[1::2], strict=True))
    assert len({halves.relearned for halves in found}) == 6, "three different halvings and their mirrors"
    assert mirrored_halves(items, splits=6, seed=0) == found
    assert mirrored_halves(items, splits=6, seed=1) != found


def test_halves_are_balanced_over_answers() -> None:
    """Eight people of one city and eight of another: no half gets fewer than three of either."""
    items = [
        Fact(prompt=f"p{at}", answer=" Oslo" if at < 8 else " Lima", id=str(at), owner=f"o{at}", group="city")
        for at in range(16)
    ]
    for seed in range(10):
        halves = mirrored_halves(items, splits=2, seed=seed)[0]
        cities = [stratum(items[at]) for at in halves.relearned]
        assert 3 <= cities.count(("city", " Oslo")) <= 5


def test_what_divides_the_halves() -> None:
    owned = people(2)
    bare = [Fact(prompt=f"{name} is", answer=" x", id=name, subject=name) for name in ("Ann", "Bob")]
    plain = [PrivateText(text="call 12", spans=((5, 7, "phone"),), id="p")]
    assert divided_by(owned) == "owner"
    assert divided_by(bare) == "subject"
    assert keys(bare) == ["Ann", "Bob"]
    assert divided_by([*bare, Fact(prompt="It is", answer=" x", id="z")]) == "item"
    assert divided_by(plain) == "item"
    with pytest.raises(LoceditError, match="splits=3 must be an even number"):
        mirrored_halves(owned, splits=3, seed=0)
    with pytest.raises(LoceditError, match="forget: 1 owner cannot be split"):
        mirrored_halves(owned[:2], splits=2, seed=0, what="forget")


# --- doses and shares by hand ---------------------------------------------------------------------------------------


def run(recovered: Sequence[float], retain: Sequence[float], *, rate: float = 1e-3, split: int = 0) -> Run:
    looks = len(recovered)
    return Run(
        split=split,
        learning_rate=rate,
        steps=tuple(10 * at for at in range(looks)),
        measured=torch.tensor(recovered).double()[:, None],
        relearned=torch.ones(looks),
        retain=torch.tensor(retain).double()[:, None],
    )


def test_dose_is_the_best_that_keeps_the_retain_side() -> None:
    runs = [run([0, 0.4, 0.6, 0.9], [1, 1, 0.9, 0.5]), run([0, 0.6, 0.6, 0.6], [1, 1, 1, 1], rate=1e-4)]
    assert choose_dose(runs, floor=0.9) == Dose(learning_rate=1e-4, steps=10, within_floor=True), (
        "of equals the mildest"
    )
    assert choose_dose(runs, floor=0.4) == Dose(learning_rate=1e-3, steps=30, within_floor=True)
    nothing = [run([0, 0, 0], [1, 1, 1]), run([0, 0, 0], [1, 1, 1], rate=1e-2)]
    assert choose_dose(nothing, floor=0.9) == Dose(learning_rate=1e-2, steps=20, within_floor=True), "the strongest"
    broken = [run([0, 1, 1], [1, 0.2, 0.1]), run([0, 1, 1], [1, 0.8, 0.1], rate=1e-5)]
    assert choose_dose(broken, floor=0.9) == Dose(learning_rate=1e-5, steps=10, within_floor=False)


def test_floor_is_relative_to_before_the_attack() -> None:
    damaged = [run([0, 0.5], [0.5, 0.46])]
    assert choose_dose(damaged, floor=0.9).within_floor
    assert not choose_dose([run([0, 0.5], [0.5, 0.44])], floor=0.9).within_floor


def test_a_split_is_counted_at_the_dose_of_its_mirror() -> None:
    runs = {0: [run([0, 0.9, 0.1], [1, 1, 1])], 1: [run([0, 0.1, 0.9], [1, 1, 1], split=1)]}
    doses = doses_by_mirror(runs, floor=0.9)
    assert (doses[0].steps, doses[1].steps) == (20, 10)
    assert float(runs[0][0].recovered[at_dose(runs[0][0], doses[0])]) == pytest.approx(0.1)


def test_share_back_by_hand() -> None:
    """Recovered .6, before 1.0, never known .2: (.6 - .2) / (1 - .2) = .5."""
    recovered = torch.tensor([1.0, 1, 1, 0, 0] * 8)
    control = torch.tensor([1.0, 0, 0, 0, 0] * 8)
    names = [str(at) for at in range(40)]
    found = share_back(recovered, torch.ones(40), owners=names, control=control, control_owners=names)
    assert found.value == pytest.approx(0.5)
    assert 0.2 < found.low < 0.4
    assert 0.6 < found.high < 0.8
    without = share_back(recovered, torch.ones(40), owners=names, control=None)
    assert without.value == pytest.approx(0.6)
    assert without.high - without.low < found.high - found.low, "the control's own noise widens the interval"
    guessed = share_back(recovered, control, owners=names, control=control, control_owners=names)
    assert guessed.value != guessed.value, "hardly more known than never known: no share"


def test_share_back_interval_covers_the_truth() -> None:
    """Binomial levels .7 against 1 and .1: (.7 - .1) / .9 = 2/3 lies in 95 % of intervals."""
    generator = torch.Generator().manual_seed(0)
    names = [str(at) for at in range(60)]
    hits = 0
    for at in range(100):
        recovered, control = (torch.rand(2, 60, generator=generator) < torch.tensor([[0.7], [0.1]])).double()
        found = share_back(
            recovered, torch.ones(60), owners=names, control=control, control_owners=names, draws=300, seed=at
        )
        hits += found.low <= 2 / 3 <= found.high
    assert 87 <= hits <= 100


def test_items_are_averaged_over_the_splits_that_measured_them() -> None:
    found = mean_by_item([((0, 1), torch.tensor([1.0, 0.0])), ((1, 2), torch.tensor([1.0, 1.0]))], count=4)
    assert found[:3].tolist() == [1.0, 0.5, 1.0]
    assert found[3] != found[3]


def test_roles_by_name() -> None:
    assert [role_of(name) for name in ("random 3", "everything", "npo")] == ["random", "everything", "other"]


# --- fine-tuning ----------------------------------------------------------------------------------------------------


def diet(model: Model, task: Task) -> Diet:
    examples = encode(model, task.forget)
    return Diet(relearned=examples, retain=examples, batch_size=64, retain_weight=0.5, seed=0)


def test_one_step_is_adamw_on_the_stated_loss() -> None:
    model, task = world()
    before = state(model)
    examples = encode(model, task.forget)
    batch: Batch = collate(examples, model)
    loss = 1.5 * sequence_nll(score(model, batch)).mean()
    weights = list(model.module.parameters())
    gradients = torch.autograd.grad(loss, weights)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().clamp(min=1.0)
    with opened(model, "full", rank=4, seed=0) as opened_weights:
        fine_tune(model, opened_weights, diet(model, task), learning_rate=1e-3, steps=1, after_step=lambda _: None)
        changed = state(model)
    for (name, parameter), gradient in zip(model.module.named_parameters(), gradients, strict=True):
        small = gradient / norm
        expected = before[name] - 1e-3 * small / (small.abs() + 1e-8)  # Adam's first step
        torch.testing.assert_close(changed[name], expected, atol=2e-4, rtol=0)
        assert not torch.equal(changed[name], before[name]), name
        assert parameter.requires_grad
    assert same(model, before)


@pytest.mark.parametrize("how", ["full", "lora"])
def test_weights_come_back_also_after_an_error(how: Any) -> None:
    model, task = world()
    before, modules = state(model), [type(part) for part in model.module.modules()]

    def stop(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), opened(model, how, rank=4, seed=0) as weights:  # noqa: PT012
        assert sum(weight.numel() for weight in weights) < (40_000 if how == "lora" else 200_000)
        fine_tune(model, weights, diet(model, task), learning_rate=1e-2, steps=5, after_step=stop)
    assert same(model, before)
    assert [type(part) for part in model.module.modules()] == modules
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.module.parameters())


def test_half_precision_moves_by_less_than_its_own_steps() -> None:
    """Ten steps of 1e-5 on bfloat16 weights: lost one by one, kept by the float32 copies."""
    module = tiny.module("llama").to(torch.bfloat16)
    model = load(module, tokenizer=tiny.tokenizer(), device="cpu")
    _, task = world()
    weight = model.parameter("model.layers.0.mlp.down_proj.weight")
    before = weight.detach().clone()
    with opened(model, "full", rank=4, seed=0) as weights:
        fine_tune(model, weights, diet(model, task), learning_rate=1e-4, steps=20, after_step=lambda _: None)
        moved = float((weight.detach() != before).double().mean())
    assert moved > 0.2
    assert torch.equal(weight, before)


# --- the attack -----------------------------------------------------------------------------------------------------


def test_what_was_hidden_comes_back_and_what_was_never_known_does_not() -> None:
    model, task = world()
    known = {name: levels(model, {name: encode(model, getattr(task, name))})[name] for name in ("forget", "heldout")}
    assert known["forget"] > 0.85
    assert known["heldout"] < 0.3
    found = attacked()
    by_group = {
        m.group: m for m in found.measures if m.name == "accuracy" and m.stage == "attacked" and m.dataset != "retain"
    }
    after = next(m for m in found.measures if (m.dataset, m.name, m.stage) == ("forget", "accuracy", "after"))
    assert after.value < 0.15
    assert by_group[None].value > 0.6
    assert by_group[None].low > by_group["never knew"].high
    assert by_group["never knew"].value < 0.4
    assert by_group["shallow"].value > 0.6
    never, before = by_group["never knew"].value, 1.0
    assert found.headline.name == "share_back"
    assert found.headline.value == pytest.approx((by_group[None].value - never) / (before - never), abs=0.02)
    assert found.headline.low > 0.3
    assert found.sentence.startswith("It comes back")
    assert "with 12 items of 6 owners" in found.sentence


def test_the_same_edit_under_another_name_gives_the_same_numbers() -> None:
    found = attacked()
    random_sets = next(m for m in found.measures if m.group == "random")
    assert random_sets.per_example == level(found).per_example
    share = next(m for m in found.measures if m.group == "random 1")
    assert (share.name, share.value, share.low) == ("share_back", found.headline.value, found.headline.low)
    assert "a random set of the same size: " in found.sentence


def test_every_item_is_counted_while_its_owner_was_not_relearned() -> None:
    found = attacked()
    assert set(level(found).per_example) == {item.id for item in world()[1].forget}
    curves = [curve for curve in found.curves if curve.role == "found"]
    assert [curve.seed for curve in curves] == [0, 1]
    for curve in curves:
        assert curve.x == (0, 10, 20)
        assert curve.columns["relearned"][-1] > 0.9
        assert curve.columns["recovered"][0] < 0.2
        assert curve.matched is not None
    counted = sum(curve.columns["recovered"][curve.matched or 0] for curve in curves) / 2
    assert counted == pytest.approx(level(found).value)


def test_the_attack_leaves_the_model_and_repeats_itself() -> None:
    model, task = world()
    before, edit = state(model), hidden()
    options = FAST | {"controls": False, "steps": 10}
    first, again = (relearn(model, task, edit, **options) for _ in range(2))
    assert same(model, before)
    assert first.headline == again.headline
    assert first.curves == again.curves
    assert relearn(model, task, edit, **options, seed=1).curves != first.curves
    assert "controls were switched off" in first.note


def test_lora_brings_it_back_too() -> None:
    model, task = world()
    before = state(model)
    found = relearn(model, task, hidden(), **FAST | {"controls": False, "hold": "lora", "learning_rates": (1e-2,)})
    assert found.settings["trained"] == "lora"
    assert level(found).value > 0.5
    assert same(model, before)


def test_memory_decides_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = world()
    monkeypatch.setattr("locedit.attacks.runs.free_bytes", lambda _: 1_000_000)
    found = relearn(model, task, hidden(), **FAST | {"controls": False, "steps": 1, "look_every": 1})
    assert found.settings["trained"] == "lora"
    assert "training every weight needs" in found.note


@pytest.mark.parametrize("kind", ["adapter", "hooks"])
def test_edits_held_otherwise_are_attacked_with_the_edit_in_place(kind: str) -> None:
    """The first look of the attack sees the edited model, and the model is the unedited one again afterwards."""
    model, task = world()
    before = state(model)
    if kind == "hooks":
        edit = zero(model, model.components({"blocks.1.mlp": [0]}), hold="hooks")
    else:
        edit = train(
            model,
            Objective(loss=_forgetting, forget=encode(model, task.forget), probes={}),
            options=TrainOptions(steps=10, learning_rate=1e-2),
            hold="adapter",
        )
        assert isinstance(edit.adapters[0], LowRank)
    assert edit.kind == kind
    probes = {"forget": encode(model, task.forget)}
    with edit.applied(model) as edited:
        reached = levels(edited, probes)["forget"]
    assert reached < levels(model, probes)["forget"] - 0.1
    options = FAST | {"controls": False, "steps": 2, "look_every": 2, "metric": "probability"}
    found = relearn(model, task, edit, **options)
    after = next(m for m in found.measures if (m.dataset, m.stage) == ("forget", "after"))
    assert after.value == pytest.approx(reached, rel=1e-4)
    starts = [curve.columns["recovered"][0] for curve in found.curves]
    assert sum(starts) / len(starts) == pytest.approx(reached, rel=1e-4)
    assert found.curves[0].columns["recovered"][-1] != starts[0]
    assert same(model, before)


def _forgetting(step: Step) -> dict[str, torch.Tensor]:
    return {"forget": token_log_probs(step.score(step.forget)).mean()}


def test_without_heldout_and_retain_data_the_result_says_so() -> None:
    model, task = world()
    alone = Task(forget=task.forget)
    found = relearn(model, alone, hidden(), **FAST | {"steps": 1, "look_every": 1, "shallow_steps": 1})
    assert "what was never known counts as 0" in found.note
    assert "no retain data" in found.note
    assert "did not reach the forget level" in found.note
    assert all("retain" not in curve.columns for curve in found.curves)


def test_an_attack_saves_and_loads(tmp_path: Any) -> None:
    found = attacked()
    Evaluation(measures=(), attacks=(found,)).save(tmp_path / "e.json")
    again = Evaluation.load(tmp_path / "e.json").attacks[0]
    assert again.curves == found.curves
    assert again.headline == found.headline
    assert json.loads((tmp_path / "e.json").read_text())["attacks"][0]["settings"]["grid"]


def test_mistakes_are_named() -> None:
    model, task = world()
    with pytest.raises(LoceditError, match="relearn has no option 'step'; did you mean 'steps'"):
        relearn(model, task, hidden(), step=3)
    with pytest.raises(LoceditError, match="steps=0 must be at least 1"):
        relearn(model, task, hidden(), steps=0)
    with pytest.raises(LoceditError, match="learning_rates"):
        relearn(model, task, hidden(), learning_rates=(-1.0,))
    assert ATTACKS["relearn"].requires == ("forget",)

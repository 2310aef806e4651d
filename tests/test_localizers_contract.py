"""What every localizer promises, on every unit it names, for dense, grouped, parallel, fused and masked models.

Entries of the registry are found here by themselves: items are chosen by what a localizer says that it reads.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch

from locedit.components import UNITS, Scores
from locedit.data.items import ContrastPair, Dataset, Fact, Item, PatchPair, PlainText, PrivateText, Task
from locedit.errors import LoceditError
from locedit.localize import LOCALIZERS, Localizer, estimate, localize, memory, prepare
from locedit.models import Model, load
from locedit.options import describe, kinds
from tests import tiny
from tests.edits import bits, hooks_left, same_bits

ARCHITECTURES = ("llama", "gpt_neox", "phi3", "bert")
"grouped queries and gates; parallel blocks and a fused qkv; fused qkv and gate_up; masked"
QUICK: dict[str, dict[str, Any]] = {
    "depn": {"steps": 2},
    "knowledge_neurons": {"steps": 2},
    "learned_mask": {"steps": 2, "price": 0.0, "levels": ()},
    "eap_ig": {"steps": 2},
    **dict.fromkeys(("causal_tracing", "activation_patching", "attribution_patching"), {"normalise": "none"}),
}
"options that keep a method short without changing what is promised"
SLOW = {("causal_tracing", "neuron"), ("activation_patching", "neuron")}
"one run for each neuron"
TOLERANCE = {"learned_mask": 1e-2}
"Adam makes steps out of the rounding of small gradients"

FACTS = tuple(
    Fact(prompt=f"{subject} was born in", answer=answer, wrong=(wrong,), subject=subject, group="born", id=subject[:6])
    for subject, answer, wrong in (
        ("Anna Berg", " Oslo", " Lima"), ("Anna Dane", " Lima", " Oslo"), ("Eva Frost", " Rome", " Oslo"),
    )
)  # fmt: skip
"subjects of three tokens each, so that they can be swapped"
RETAIN = (Fact(prompt="Eva Frost works as a", answer=" baker", id="r"),)
ITEMS: dict[str, tuple[Item, ...]] = {
    "fact": FACTS,
    "private": (
        PrivateText(text="The phone of Eva is 555-0134, she said.", spans=((20, 28, "phone"),), id="p"),
        PrivateText(text="Write to eva@frost.org.", spans=((9, 22, "mail"),), id="q"),
    ),
    "contrast": (
        ContrastPair(advantaged="The baker is Anna.", disadvantaged="The baker was Anna.", id="x"),
        ContrastPair(advantaged="Now Anna works as Eva.", disadvantaged="Now Anna works in Eva.", id="y"),
    ),
    "patch": tuple(
        PatchPair(clean=a.prompt, corrupt=b.prompt, answer=a.answer, wrong=b.answer, id=f"{a.id}{b.id}")
        for a, b in ((FACTS[0], FACTS[1]), (FACTS[1], FACTS[0]))
    ),
    "plain": (PlainText(text="Anna Berg works as a baker.", id="t"),),
}


def task_of(kind: str) -> Task:
    items = Dataset(items=ITEMS[kind], source=f"{kind}.jsonl")
    retain = Dataset(items=RETAIN, source="retain.jsonl")
    texts = Dataset(items=ITEMS["plain"], source="texts.jsonl")
    return Task(forget=items, retain=retain, texts=texts)


def tasks(method: Localizer) -> list[Task]:
    """One task for every kind of items that the localizer reads."""
    return [task_of(kind) for kind in ITEMS if kind in (method.kinds or ("fact",)) and kind != "plain"]


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {architecture: tiny.model(architecture) for architecture in ARCHITECTURES}


def options_of(name: str, unit: str) -> dict[str, Any]:
    method = LOCALIZERS[name]
    known = kinds(method.options)
    return {key: value for key, value in (QUICK.get(name, {}) | {"unit": unit}).items() if key in known}


def cases() -> Iterator[Any]:
    for name, method in LOCALIZERS.items():
        for unit in method.units:
            for architecture in ARCHITECTURES:
                if method.causal is None or method.causal == (architecture not in tiny.MASKED):
                    marks = [pytest.mark.slow] if (name, unit) in SLOW and architecture != "llama" else []
                    yield pytest.param(name, unit, architecture, id=f"{name}-{unit}-{architecture}", marks=marks)


def run(name: str, unit: str, model: Model, task: Task | None = None, **more: Any) -> Scores:
    """The scores, or a skip where the localizer says in one line that the architecture has no meaning for it."""
    try:
        return localize(model, task or tasks(LOCALIZERS[name])[0], name, **(options_of(name, unit) | more))
    except LoceditError as error:
        if "norm" not in str(error):
            raise
        pytest.skip(f"refused: {error}")


def state() -> tuple[Any, ...]:
    """Random states of torch and numpy; that of `random` is moved by the type checks of the tests themselves."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # type: ignore[index]


def sites_of(model: Model, unit: str) -> dict[str, int]:
    parts = [part for part in unit.split("+") if part in UNITS]
    return {name: site.count for part in parts for name, site in model.sites(part).items()}


def assert_close(first: Scores, second: Scores, *, tolerance: float = 1e-4) -> None:
    largest = max(float(value.abs().max()) for value in first.values.values())
    assert first.values.keys() == second.values.keys()
    for name, value in first.values.items():
        torch.testing.assert_close(value, second.values[name], atol=tolerance * max(largest, 1e-12), rtol=0)


@pytest.mark.parametrize(("name", "unit", "architecture"), cases())
def test_scores_of_every_component_and_nothing_else_changes(
    name: str, unit: str, architecture: str, models: dict[str, Model]
) -> None:
    """Finite scores for exactly the model's sites, from where it says; the model and all random states as before."""
    model = models[architecture]
    before, drawn = bits(model.module), state()
    asked = {n: p.requires_grad for n, p in model.module.named_parameters()}
    scores = run(name, unit, model)
    assert {n: value.numel() for n, value in scores.values.items()} == sites_of(model, unit)
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in scores.values.values())
    assert all(bool(value.isfinite().all()) for value in scores.values.values())
    assert any(bool((value != 0).any()) for value in scores.values.values()), "all scores are 0"
    assert same_bits(model.module, before)
    assert hooks_left(model.module) == 0
    assert {n: p.requires_grad for n, p in model.module.named_parameters()} == asked
    assert all(p.grad is None for p in model.module.parameters())
    assert not model.module.training
    assert state() == drawn
    made = scores.provenance
    assert made is not None
    method = LOCALIZERS[name]
    data = method.reads(tasks(method)[0])[1]
    assert (made.method, made.model, made.data) == (name, model.fingerprint, data.hash)
    assert set(kinds(method.options)) <= set(made.settings), "options are missing in the record"
    assert scores.fingerprint == model.fingerprint


@pytest.mark.parametrize("name", LOCALIZERS)
def test_the_same_again_and_in_other_batches(name: str, models: dict[str, Model]) -> None:
    method = LOCALIZERS[name]
    model = models["bert" if method.causal is False else "llama"]
    for task in tasks(method):
        first = run(name, method.units[0], model, task)
        again = run(name, method.units[0], model, task)
        assert all(torch.equal(value, again.values[n]) for n, value in first.values.items())
        if "batch" in kinds(method.options):
            apart = run(name, method.units[0], model, task, batch=1)
            assert_close(first, apart, tolerance=TOLERANCE.get(name, 1e-4))


@pytest.mark.parametrize("name", [n for n, method in LOCALIZERS.items() if method.requires])
def test_the_model_is_as_before_after_an_exception(
    name: str, models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every localizer runs the model; the pass breaks off in the last block, in the first run and in a later one."""
    method = LOCALIZERS[name]
    model = models["bert" if method.causal is False else "gpt_neox"]
    before, drawn = bits(model.module), state()
    asked = {n: p.requires_grad for n, p in model.module.named_parameters()}
    block = model.anatomy.blocks[-1]
    for allowed in (0, 2):
        calls = 0
        original = block.forward

        @functools.wraps(original)
        def broken(*args: Any, _allowed: int = allowed, _original: Any = original, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > _allowed:
                raise RuntimeError("broken off")
            return _original(*args, **kwargs)

        monkeypatch.setattr(block, "forward", broken)
        with pytest.raises(RuntimeError, match="broken off") if not allowed else contextlib.suppress(RuntimeError):
            localize(model, tasks(method)[0], name, **options_of(name, method.units[0]))
        monkeypatch.undo()
        assert hooks_left(model.module) == 0
        assert same_bits(model.module, before)
        assert {n: p.requires_grad for n, p in model.module.named_parameters()} == asked
        assert all(p.grad is None for p in model.module.parameters())
        assert not model.module.training
        assert state() == drawn
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", LOCALIZERS)
def test_scores_save_load_and_select(name: str, models: dict[str, Model], tmp_path: Any) -> None:
    method = LOCALIZERS[name]
    scores = run(name, method.units[0], models["bert" if method.causal is False else "llama"])
    scores.save(tmp_path / "scores")
    again = Scores.load(tmp_path / "scores")
    assert all(torch.equal(value, again.values[n]) for n, value in scores.values.items())
    assert (again.evidence, again.provenance, again.examples) == (scores.evidence, scores.provenance, scores.examples)
    assert len(again.select(top=1, sign="absolute")) == 1
    if method.requires and task_kind(method) in ("fact", "private", "patch"):
        table = next(table for table in again.evidence.values() if "known" in table)
        assert len(table["known"]) == len(tasks(method)[0].forget)
        assert all(0 <= p <= 1 for p in table["probability"])


def task_kind(method: Localizer) -> str:
    return tasks(method)[0].forget.kind


@pytest.mark.parametrize("name", LOCALIZERS)
def test_memory_is_estimated(name: str, models: dict[str, Model]) -> None:
    """A number for every unit, and not less where there is more to hold."""
    method = LOCALIZERS[name]
    model = models["bert" if method.causal is False else "llama"]
    for unit in method.units:
        _, task, settings = prepare(model, tasks(method)[0], name, **options_of(name, unit))
        assert memory(model, method.reads(task)[1], method, settings) > 0


@pytest.mark.parametrize("name", LOCALIZERS)
def test_an_estimate_runs(name: str, models: dict[str, Model]) -> None:
    method = LOCALIZERS[name]
    model = models["bert" if method.causal is False else "llama"]
    cost = estimate(model, tasks(method)[0], name, **options_of(name, method.units[0]))
    assert cost.bytes > 0
    assert cost.seconds >= 0


@pytest.mark.parametrize("name", LOCALIZERS)
def test_wrong_options_are_one_line(name: str, models: dict[str, Model]) -> None:
    """An unknown option, and for every choice and count a value that is none."""
    method = LOCALIZERS[name]
    model = models["bert" if method.causal is False else "llama"]
    wrong: list[dict[str, Any]] = [{"no_such_option": 1}]
    for field in dataclasses.fields(method.options):
        kind = kinds(method.options)[field.name]
        if get_args(kind) and all(isinstance(choice, str) for choice in get_args(kind)):
            wrong.append({field.name: "no such choice"})
        if field.name in ("batch", "memory_mb", "steps", "draws"):
            wrong.append({field.name: 0})
    for options in wrong:
        with pytest.raises(LoceditError, match=next(iter(options))) as raised:
            localize(model, tasks(method)[0], name, **options)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", LOCALIZERS)
def test_half_precision(name: str) -> None:
    method = LOCALIZERS[name]
    architecture = "bert" if method.causal is False else "llama"
    model = load(tiny.module(architecture).to(torch.bfloat16), tokenizer=tiny.tokenizer(), device="cpu")
    scores = run(name, method.units[0], model)
    assert all(bool(value.isfinite().all()) for value in scores.values.values())


@pytest.mark.parametrize("name", [n for n, method in LOCALIZERS.items() if method.kinds])
def test_data_of_another_kind_is_refused(name: str, models: dict[str, Model]) -> None:
    method = LOCALIZERS[name]
    for kind in ITEMS.keys() - set(method.kinds):
        with pytest.raises(LoceditError, match=f"{name} needs items of kind"):
            localize(models["bert" if method.causal is False else "llama"], task_of(kind), name)


@pytest.mark.parametrize("name", LOCALIZERS)
def test_every_option_is_explained(name: str) -> None:
    assert [option for option, _, _, meaning in describe(LOCALIZERS[name].options) if not meaning] == []

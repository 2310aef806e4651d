"""Unlearning layers: where they are, what trains them, and what is left when they go."""

import copy
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit import losses, tracing
from locedit.components import ComponentSet
from locedit.data.encode import Batch, Example, collate, encode
from locedit.edit import Edit
from locedit.edit.bake import bake
from locedit.edit.checkpoint import checkpoints
from locedit.edit.layer_training import Layers, places
from locedit.edit.objective import Step
from locedit.edit.restrict import frozen
from locedit.errors import LoceditError
from locedit.lab import Lab
from locedit.models import Model, load
from locedit.unlearn import eul, prepare, unlearn
from locedit.unlearn.eul import EulOptions
from tests import edits, tiny
from tests.unlearning import everything, labels, rows_of, step_of, tables

SETTINGS: dict[str, Any] = {"steps": 6, "rank": 3, "check": False, "eval_every": 0}
CHOSEN: dict[str, dict[str, list[int]]] = {
    "mlp": {"blocks.0.mlp": [0], "blocks.2.mlp": [0]},
    "attn": {"blocks.1.attn": [0]},
    "layer": {"blocks.1.layer": [0]},
    "neurons": {"blocks.0.mlp.neuron": [1, 5, 40], "blocks.2.mlp.neuron": [0, 7]},
    "heads": {"blocks.1.attn.head": [0, 3]},
    "mlp and neurons": {"blocks.1.mlp": [0], "blocks.1.mlp.neuron": [4, 9], "blocks.0.attn.head": [2]},
}


def within(model: Model, where: str) -> ComponentSet | None:
    return None if where == "everywhere" else model.components(CHOSEN[where])


def batch(model: Model) -> Batch:
    return collate(encode(model, edits.task().forget), model)


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model.logits(batch(model))


def held(model: Model, where: str, *, seed: int | None = None, **options: Any) -> Layers:
    """Layers at the start, or with `seed` anywhere."""
    given: dict[str, Any] = {"rank": 3, "activation": "relu", "bias": True} | options
    made = Layers(model, places(model, within(model, where)), generator=torch.Generator().manual_seed(0), **given)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


# --- where -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["everywhere", *CHOSEN])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "gemma2", "opt", "bert"])
def test_at_the_start_and_switched_off_the_model_is_itself(architecture: str, where: str) -> None:
    """Bit for bit, logits and weights; away from the start and switched on it is not."""
    model = tiny.model(architecture)
    plain, before = logits(model), edits.bits(model.module)
    with held(model, where).active():
        assert torch.equal(logits(model), plain)
    moved = held(model, where, seed=1)
    with moved.active():
        assert (logits(model) - plain).abs().max() > 1e-2
        with moved.paused():
            assert torch.equal(logits(model), plain)
        with moved.constant(), frozen(model.module):
            assert not model.logits(batch(model)).requires_grad
        with frozen(model.module):
            assert model.logits(batch(model)).requires_grad
        assert all(parameter.requires_grad for parameter in moved.parameters)
    assert torch.equal(logits(model), plain)
    assert edits.same_bits(model.module, before)
    assert edits.hooks_left(model.module) == 0


@pytest.mark.parametrize(
    ("where", "point", "inside"),
    [
        ("neurons", "blocks.0.mlp.hook_post", [1, 5, 40]),
        ("heads", "blocks.1.attn.hook_z", [*range(16), *range(48, 64)]),
    ],
)
def test_neurons_and_heads_are_read_and_written_alone(where: str, point: str, inside: list[int]) -> None:
    """Others pass with their bits, and have no influence on what the layer adds."""
    model = tiny.model("llama")
    (added,) = (layer for layer in held(model, where, seed=1).layers() if layer.point == point)
    edit = Edit(kind="modules", fingerprint=model.fingerprint, layers=(added,))
    generator = torch.Generator().manual_seed(0)

    def seen(value: Tensor) -> tuple[Tensor, Tensor]:
        """At the point, what the layer makes of a value put there, flat, and the value."""
        changed = tracing.replace(model, {point: value})
        with torch.no_grad(), changed, edit.applied(model), tracing.record(model, [point]) as found:
            model.logits(batch(model))
        return found[point].flatten(2), value.flatten(2)

    with torch.no_grad(), tracing.record(model, [point]) as found:
        model.logits(batch(model))
    value = found[point].clone()
    made, plain = seen(value)
    outside = [i for i in range(plain.shape[-1]) if i not in inside]
    assert torch.equal(made[..., outside], plain[..., outside])
    assert bool((made[..., inside] != plain[..., inside]).any(0).any(0).all())
    flat = plain.clone()
    flat[..., outside] += torch.randn(flat[..., outside].shape, generator=generator)
    assert torch.equal(seen(flat.view_as(value))[0][..., inside], made[..., inside])


@pytest.mark.parametrize("where", ["everywhere", "mlp", "neurons", "heads"])
@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_the_edit_does_what_was_trained_and_dropping_it_brings_all_back(
    architecture: str, where: str, tmp_path: Path
) -> None:
    model = tiny.model(architecture)
    plain, before = logits(model), edits.bits(model.module)
    edit = unlearn(model, edits.task(), "eul", within=within(model, where), **SETTINGS)
    assert (edit.kind, edit.conditional) == ("modules", ("layer",))
    assert edits.same_bits(model.module, before)
    assert {layer.start for layer in edit.layers} == {edit.layers[0].start} != {""}
    edit.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit")
    assert loaded.digest == edit.digest
    assert [layer.start for layer in loaded.layers] == [layer.start for layer in edit.layers]
    for one, other in zip(edit.layers, loaded.layers, strict=True):
        assert one.retain_gram is not None
        assert other.retain_gram is not None
        assert torch.equal(one.retain_gram, other.retain_gram)
    with loaded.applied(model) as edited:
        assert (logits(edited) - plain).abs().max() > 1e-2
        assert edits.same_bits(edited.module, before)
    with loaded.dropped().applied(model) as edited:
        assert torch.equal(logits(edited), plain)
    loaded.verify(model)


def test_one_seed_is_one_start_whatever_the_data() -> None:
    model = tiny.model("gpt2")
    first, other = (edits.task(forget=edits.task().forget.replace([item])) for item in edits.task().forget)
    made = [unlearn(model, task, "eul", **SETTINGS) for task in (first, other)]
    assert made[0].layers[0].start == made[1].layers[0].start
    assert not torch.equal(made[0].layers[0].up, made[1].layers[0].up)
    another = unlearn(model, first, "eul", **SETTINGS, seed=1)
    assert another.layers[0].start != made[0].layers[0].start


# --- the losses ------------------------------------------------------------------------------------------------------


def two_models() -> tuple[Model, Model]:
    """An edited and an unedited one in float64."""
    model, start = edits.double("gpt2"), edits.double("gpt2")
    with torch.no_grad():
        model.parameter("transformer.h.1.mlp.c_fc.weight").mul_(1.3)
    return model, start


def examples(model: Model) -> tuple[list[Example], list[Example]]:
    task = everything()
    return encode(model, task.forget), encode(model, task.retain)  # type: ignore[arg-type]


def mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())


@pytest.mark.parametrize("cap", [math.inf, 1.0])
@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_the_terms_are_the_formulas(tokens: str, cap: float) -> None:
    """Written out on the whole logits of unpadded texts; with a cap of one nat some tokens are cut and some are not."""
    model, start = two_models()
    forget, retain = examples(model)
    options = EulOptions(
        alpha=0.7, kl_weight=0.5, task_weight=2.0, lm_weight=0.3, cap_nats=cap, pattern="sum", lm_tokens=tokens,  # type: ignore[arg-type]
    )  # fmt: skip

    def kl(example: Example, cap: float = math.inf) -> Tensor:
        new, old = (tables(m, example).log_softmax(-1) for m in (model, start))
        return (old.exp() * (old - new)).sum(-1).clamp(max=cap).mean()

    def nll(example: Example, cap: float = math.inf, *, everywhere: bool = False) -> Tensor:
        positions = list(range(1, len(example.ids))) if everywhere else None
        wanted = torch.tensor(example.ids[1:]) if everywhere else labels(example)
        picked = tables(model, example, positions).log_softmax(-1).gather(1, wanted[:, None])
        return (-picked).clamp(max=cap).mean()

    with torch.no_grad():
        found = {name: float(v) for name, v in eul.loss(step_of(model, start, forget, retain), options).items()}
        wanted = {
            "retain_kl": 0.5 * 0.7 * mean([kl(e) for e in retain]),
            "retain_task": 2.0 * mean([nll(e) for e in retain]),
            "forget_kl": -0.5 * mean([kl(e, cap) for e in forget]),
            "forget_lm": -0.3 * mean([nll(e, cap, everywhere=tokens == "all") for e in forget]),
        }
    assert found == pytest.approx(wanted, rel=1e-9)


def test_nothing_is_pushed_beyond_the_cap() -> None:
    model, start = two_models()
    options = EulOptions(cap_nats=1e-3, pattern="sum")
    weight = model.parameter("transformer.h.1.mlp.c_fc.weight").requires_grad_()
    for term in eul.forget_terms(step_of(model, start, *examples(model)), options).values():
        (gradient,) = torch.autograd.grad(term, weight, retain_graph=True)
        assert term.item() == pytest.approx(-1e-3)
        assert not gradient.any()


def test_forget_and_retain_steps_take_turns() -> None:
    model, start = two_models()
    step = step_of(model, start, *examples(model))
    seen: list[str] = []
    with torch.no_grad():
        for number in range(1, 9):
            terms = eul.loss(dataclasses.replace(step, number=number), EulOptions(retain_steps=2, kl_weight=0.0))
            seen += terms
    turns = ["forget_lm", "retain_task", "retain_task"]
    assert seen == [*turns, *turns, *turns[:2]]
    edit = unlearn(tiny.model("gpt2"), edits.task(), "eul", **SETTINGS)
    assert [v is not None for v in edit.history["forget_kl"][1:]] == [True, False, False, False, True, False]
    assert [v is not None for v in edit.history["retain_kl"][1:]] == [False, True, True, True, False, True]


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_padding_and_batches_do_not_change_the_terms(tokens: str) -> None:
    """The mean over parts of one and three examples, capped, is that of all in one batch."""
    model, start = two_models()
    forget, retain = examples(model)
    options = EulOptions(pattern="sum", cap_nats=2.0, lm_tokens=tokens)  # type: ignore[arg-type]
    totals: dict[str, float] = {}
    with torch.no_grad():
        whole = step_of(model, start, forget, retain)
        wanted = eul.loss(whole, options)
        for part in ([2], [0, 1, 3]):
            step = step_of(model, start, forget, retain)
            assert whole.retain is not None
            step.forget, step.retain = rows_of(whole.forget, part, model), rows_of(whole.retain, part, model)
            for name, value in eul.loss(step, options).items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(part) / len(forget)
    assert totals == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-9)


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_the_gradient_is_that_of_the_loss(activation: str) -> None:
    """Central differences along a random direction of all tensors of layers on MLPs, neurons and heads, in float64."""
    model = edits.double("gpt2")
    made = held(model, "mlp and neurons", seed=1, activation=activation)
    step = step_of(model, model, *examples(model))
    step = dataclasses.replace(Step(**{f.name: getattr(step, f.name) for f in dataclasses.fields(Step)}), held=made)
    options = EulOptions(pattern="sum", lm_tokens="all", cap_nats=50.0)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in made.parameters]

    def total() -> Tensor:
        with made.active():
            return torch.stack(list(eul.loss(step, options).values())).sum()

    def moved(by: float) -> float:
        with torch.no_grad():
            for parameter, direction in zip(made.parameters, directions, strict=True):
                parameter.add_(by * direction)
            return float(total())

    with torch.no_grad():
        for parameter in made.parameters:
            parameter.mul_(0.1)
    gradients: Sequence[Tensor] = torch.autograd.grad(total(), made.parameters)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    h = 1e-6
    numeric = (moved(h) - moved(-2 * h)) / (2 * h)
    assert all(bool(g.any()) for g in gradients)
    assert slope == pytest.approx(numeric, rel=1e-5)


def test_the_teacher_is_the_saved_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of training, the layers long away from zero, the reference has the bits of the model on disk."""
    model = tiny.model("llama")
    tiny.module("llama").save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base", tokenizer=tiny.tokenizer(), device="cpu")
    seen: list[float] = []

    def looking(step: Step, options: EulOptions) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher, saved = step.unedited(step.forget), losses.score(base, step.forget)
            assert torch.equal(teacher.logits, saved.logits)
            assert torch.equal(step.reference(step.forget).logits, saved.logits)
            seen.append(float((step.score(step.forget).logits - saved.logits).abs().max()))
        return eul.forget_terms(step, options)

    monkeypatch.setattr(eul, "loss", looking)
    unlearn(model, edits.task(), "eul", **SETTINGS)
    assert seen[0] == 0
    assert min(seen[2:]) > 1e-2


class Killed(BaseException):
    """Stands for a process that ends in the middle of a step."""


def test_a_killed_training_goes_on_to_the_same_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    task = functools.partial(unlearn, model, edits.task(), "eul", within=within(model, "neurons"), **SETTINGS)
    whole = task()
    steps: list[int] = []
    real = eul.forget_terms

    def dies_at_step_5(step: Step, options: EulOptions) -> dict[str, Tensor]:
        steps.append(step.number)
        if steps == [1, 5]:
            raise Killed
        return real(step, options)

    monkeypatch.setattr(eul, "forget_terms", dies_at_step_5)
    with pytest.raises(Killed), checkpoints(tmp_path / "state", cost=1):
        task()
    with checkpoints(tmp_path / "state", cost=1):
        again = task()
    assert steps == [1, 5, 5]
    assert again.digest == whole.digest
    assert again.history == whole.history


# --- baking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["everywhere", *CHOSEN])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "bert"])
def test_linear_layers_are_baked_exactly(architecture: str, where: str) -> None:
    """In float64 the same logits from new weights of the output projections; only these change."""
    model = edits.double(architecture)
    place = within(model, where)
    layers = held(model, where, seed=1, activation="linear", bias=architecture != "llama").layers()
    small = [dataclasses.replace(one, up=one.up * 0.1) for one in layers]
    edit = Edit(kind="modules", fingerprint=model.fingerprint, layers=tuple(small), within=place)
    plain = logits(model)
    with edit.applied(model) as edited:
        wanted = logits(edited)
    assert (wanted - plain).abs().max() > 0.1
    baked = bake(model, edit)
    with baked.applied(model) as edited:
        torch.testing.assert_close(logits(edited), wanted, rtol=1e-10, atol=1e-10)
    assert torch.equal(logits(model), plain)
    baked.verify(model)
    assert baked.kind == "weights"
    changed = {patch.region.param.rsplit(".", 1)[0] for patch in baked.patches}
    layer = [model.anatomy.matrix(i, role).weight for i in range(3) for role in ("mlp.out", "attn.o")]
    assert changed <= {name.rsplit(".", 1)[0] for name in layer}
    if where == "neurons":
        assert [len(p.region.index) for p in baked.patches if p.region.index is not None] == [3, 2]


def test_baked_in_training_it_can_be_exported(tmp_path: Path) -> None:
    model = tiny.model("llama")
    common: dict[str, Any] = {"within": within(model, "mlp"), "activation": "linear", "bias": False, **SETTINGS}
    with unlearn(model, edits.task(), "eul", **common).applied(model) as edited:
        wanted = logits(edited)
    edit = unlearn(model, edits.task(), "eul", bake=True, **common)
    assert (edit.kind, edit.conditional, len(edit.history["step"])) == ("weights", (), 7)
    edit.export(model, tmp_path / "out")
    again = load(tmp_path / "out", tokenizer=tiny.tokenizer(), device="cpu")
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - logits(model)).abs().max() > 1e-2


@pytest.mark.parametrize("below", ["layers", "adapter"])
def test_what_acts_behind_the_weights_is_not_baked_under(below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """New weights would come before what an applied edit does to their output: one line, and nothing is trained."""
    model = tiny.model("gpt2")
    if below == "layers":
        first = unlearn(model, edits.task(), "eul", **SETTINGS)
    else:
        first = unlearn(model, edits.task(), "ga", hold="adapter", steps=2, check=False)
    linear: dict[str, Any] = {"activation": "linear", **SETTINGS}
    with first.applied(model):
        second = unlearn(model, edits.task(), "eul", **linear)
        with pytest.raises(
            LoceditError, match=r"another edit acts on the output of transformer\.h\.0\.mlp.*bake=False"
        ):
            bake(model, second)
        monkeypatch.setattr(eul, "loss", lambda *_: pytest.fail("trained in vain"))
        with pytest.raises(LoceditError, match="another edit acts on the output") as raised:
            unlearn(model, edits.task(), "eul", bake=True, **linear)
    assert "\n" not in str(raised.value)


def test_what_acts_before_the_weights_may_be_there() -> None:
    """A relu layer on neurons is before the output projection, and new weights of that come after it."""
    model = edits.double("gpt2")
    first, second = (
        Edit(
            kind="modules",
            fingerprint=model.fingerprint,
            layers=held(model, where, seed=seed, activation=activation).layers(),
        )
        for where, seed, activation in (("neurons", 5, "relu"), ("mlp", 6, "linear"))
    )
    with first.applied(model):
        plain = logits(model)
        with second.applied(model):
            wanted = logits(model)
        with bake(model, second).applied(model):
            torch.testing.assert_close(logits(model), wanted, rtol=1e-9, atol=1e-9)
    assert (wanted - plain).abs().max() > 0.1


def test_a_layer_after_a_norm_is_not_baked_but_one_on_neurons_is() -> None:
    model = edits.double("gemma2")
    options: dict[str, Any] = {"activation": "linear", "bias": False, "bake": True}
    with pytest.raises(LoceditError, match="is a Gemma2RMSNorm; use a set of neurons"):
        unlearn(model, edits.task(), "eul", **SETTINGS, **options)
    inside: dict[str, Any] = {"within": within(model, "neurons"), **SETTINGS}
    layers: dict[str, Any] = inside | options | {"bake": False}
    edit = unlearn(model, edits.task(), "eul", **layers)
    with edit.applied(model) as edited:
        wanted = logits(edited)
    with unlearn(model, edits.task(), "eul", **inside, **options).applied(model) as edited:
        torch.testing.assert_close(logits(edited), wanted, rtol=1e-9, atol=1e-9)


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cap_nats": 0.0}, "cap_nats=0.0 must be above 0"),
        ({"retain_steps": 0}, "retain_steps=0 must be above 0"),
        ({"pattern": "both"}, "pattern='both'"),
        ({"fusion": "close"}, "fusion='close' is not 'closed' or 'average' or 'chain'"),
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"lm_tokens": "some"}, "lm_tokens='some'"),
        ({"bake": True}, "bake=True needs activation='linear'"),
        ({"kl_weight": 0.0, "lm_weight": 0.0}, "leave nothing that forgets"),
        ({"kl_weight": 0.0, "task_weight": 0.0}, "leave the retain steps empty"),
        ({"ridge": 0.0}, "ridge=0.0 must be above 0"),
        ({"alpha": 0.0}, "alpha=0.0 must be above 0"),
        ({"fusion_retain": 1.0, "fusion": "average"}, "fusion_retain=1.0 is of fusion='closed', not 'average'"),
        ({"hold": "weights"}, "eul cannot be held as 'weights'"),
    ],
)
def test_wrong_options_are_one_line_before_a_model_is_there(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LoceditError, match=words) as raised:
        prepare("eul", everything(), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("unit", ["blocks.0.mlp.out.matrix", "blocks.0.mlp.out.row", "blocks.1.attn.o.column"])
def test_sets_without_a_place_for_a_layer_are_refused(unit: str) -> None:
    model = tiny.model("gpt2")
    chosen = model.components({unit: [0]})
    with pytest.raises(LoceditError, match=rf"eul cannot be inside '{unit}'; give a set of mlp, attn, layer, neuron"):
        prepare("eul", everything(), within=chosen)
    with pytest.raises(LoceditError, match=f"no layer can be added at '{unit}'"):
        places(model, chosen)


def test_what_cannot_be_baked() -> None:
    linear: dict[str, Any] = {"activation": "linear", "bake": True}
    with pytest.raises(LoceditError, match="has no bias to hold the layers'; give bias=False"):
        unlearn(tiny.model("llama"), edits.task(), "eul", **SETTINGS, **linear)
    model = tiny.model("gpt2")
    edit = Edit(kind="modules", fingerprint=model.fingerprint, layers=held(model, "mlp", seed=1).layers())
    with pytest.raises(LoceditError, match=r"has a relu inside .* activation='linear'"):
        bake(model, edit)
    with pytest.raises(LoceditError, match="only added layers can be baked"):
        bake(model, Edit(kind="weights", fingerprint=model.fingerprint))
    llama = tiny.model("llama")
    edit = Edit(
        kind="modules",
        fingerprint=llama.fingerprint,
        layers=held(llama, "neurons", seed=1, activation="linear").layers(),
    )
    with pytest.raises(LoceditError, match="has no bias that could hold"):
        bake(llama, edit)


# --- on a model that knows -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_forgets_and_keeps_and_all_comes_back_without_the_layers(tiny_lab: Lab) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    before = copy.deepcopy(edits.bits(model.module))
    edit = unlearn(model, task, "eul", steps=120, pattern="sum", check=False, eval_every=0)
    forget, retain = edit.history["forget"], edit.history["retain"]
    assert forget[0] > 0.9
    assert forget[-1] < 0.1
    assert retain[-1] > 0.7
    assert edits.same_bits(model.module, before)
    ids = encode(model, task.forget)
    with torch.no_grad():
        plain = model.logits(collate(ids, model))
        with edit.dropped().applied(model) as edited:
            assert torch.equal(edited.logits(collate(ids, model)), plain)

"""Losses by hand, against their formulas written out again, and what a method requires."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit import losses
from locedit.data.encode import Example, collate, encode
from locedit.data.items import Dataset, Fact
from locedit.edit import answer_probabilities
from locedit.edit.objective import Step
from locedit.edit.train import TrainOptions
from locedit.errors import LoceditError
from locedit.models import Model, load
from locedit.unlearn import METHODS, prepare, unlearn
from locedit.unlearn.npo import npo
from locedit.unlearn.registry import Method
from tests import edits, tiny
from tests.unlearning import everything


def test_npo_by_hand() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert float(npo(zero - 7, zero - 7, beta=0.1)) == pytest.approx(20 * math.log(2))
    assert float(npo(zero - 7, zero - 7, beta=0.1)) == pytest.approx(13.863, abs=5e-4)
    # log ratio ln 3 at beta 1: -2 log sigmoid(-ln 3) = 2 ln(1 + 3)
    assert float(npo(zero + math.log(3), zero, beta=1.0)) == pytest.approx(2 * math.log(4))
    assert float(npo(zero - 200, zero, beta=1.0)) == pytest.approx(0, abs=1e-12)


def test_npo_gradient_is_the_weighted_ascent_gradient() -> None:
    own = torch.tensor([-1.0, -3.0, -0.2], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -0.2], dtype=torch.float64)
    beta = 0.7
    npo(own, reference, beta=beta).backward()
    p, q = (own.detach() * beta).exp(), (reference * beta).exp()
    assert own.grad is not None
    torch.testing.assert_close(own.grad, 2 * p / (p + q) / 3)
    assert torch.autograd.gradcheck(lambda x: npo(x, reference, beta=beta), [own])
    small = torch.autograd.grad(npo(own, reference, beta=1e-6), own)[0]
    torch.testing.assert_close(small, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=1e-5, atol=1e-6)


# --- against the formulas, from the whole logits, one unpadded example at a time --------------------------------------


def token_log_probs(model: Model, example: Example, reference: Model | None = None) -> tuple[Tensor, Tensor]:
    """(log p of the scored tokens, KL(reference || model) at them) from the full log-softmax."""
    rows: list[tuple[Tensor, int]] = []
    kls: list[Tensor] = []
    for target in example.targets:
        ids = torch.tensor([example.ids])
        at = target - 1
        if not model.causal:
            ids[0, target] = model.tokenizer.mask_token_id
            at = target
        batch = SimpleNamespace(ids=ids, attention_mask=torch.ones_like(ids))
        table = model.logits(batch)[0, at].log_softmax(-1)
        rows.append((table, example.ids[target]))
        if reference is not None:
            old = reference.logits(batch)[0, at].log_softmax(-1)
            kls.append((old.exp() * (old - table)).sum())
    return torch.stack([table[token] for table, token in rows]), torch.stack(kls) if kls else torch.zeros(0)


def expected(model: Model, start: Model, name: str, forget: list[Example], retain: list[Example]) -> dict[str, float]:
    with torch.no_grad():
        mean = {e.id: token_log_probs(model, e)[0].mean() for e in forget + retain}
        total = {e.id: token_log_probs(model, e)[0].sum() for e in forget}
        start_total = {e.id: token_log_probs(start, e)[0].sum() for e in forget}
        kl = torch.stack([token_log_probs(model, e, start)[1].mean() for e in retain]).mean()
    ascent = torch.stack([mean[e.id] for e in forget]).mean()
    descent = -torch.stack([mean[e.id] for e in retain]).mean()
    ratios = torch.stack([total[e.id] - start_total[e.id] for e in forget])
    values = {
        "ga": {"forget_loss": ascent},
        "grad_diff": {"forget_loss": ascent, "retain_loss": descent},
        "grad_diff kl": {"forget_loss": ascent, "retain_loss": 0.5 * kl},
        "npo": {"forget_loss": (2 / 0.3) * torch.log1p(torch.exp(0.3 * ratios)).mean(), "retain_loss": descent},
        "injection": {"inject_loss": -ascent, "retain_loss": descent},
    }
    return {term: float(value) for term, value in values[name].items()}


OPTIONS: dict[str, dict[str, Any]] = {
    "ga": {},
    "grad_diff": {},
    "grad_diff kl": {"retain_weight": 0.5, "retain_loss": "kl"},
    "npo": {"beta": 0.3},
    "injection": {},
}


@pytest.mark.parametrize("architecture", ["llama", "bert"])
@pytest.mark.parametrize("case", list(OPTIONS))
def test_losses_equal_their_formulas_whatever_the_padding(architecture: str, case: str) -> None:
    model, start = edits.double(architecture), edits.double(architecture)
    with torch.no_grad():
        model.parameter(next(iter(model.sites("matrix").values())).slices[0].param).mul_(1.1)
    task, name = edits.task(), case.split()[0]
    data = METHODS[name].learns(task) if METHODS[name].learns else task.forget  # type: ignore[misc]
    forget, retain = encode(model, data), encode(model, task.retain)  # type: ignore[arg-type]
    step = edits.step(model, start, forget, retain)
    assert len({len(e.ids) for e in forget + retain}) > 2  # so there is padding
    found = METHODS[name].function(step, prepare(name, task, **OPTIONS[case]))
    wanted = expected(model, start, case, forget, retain)
    assert {term: value.item() for term, value in found.items()} == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("case", list(OPTIONS))
def test_the_gradient_is_that_of_the_loss(case: str) -> None:
    """Central differences in float64 along a random direction of one weight matrix."""
    model, start = edits.double("gpt2"), edits.double("gpt2")
    task, name = edits.task(), case.split()[0]
    step = edits.step(model, start, encode(model, task.forget), encode(model, task.retain))  # type: ignore[arg-type]
    options = prepare(name, task, **OPTIONS[case])
    weight = model.parameter("transformer.h.1.mlp.c_fc.weight")
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss() -> Tensor:
        return torch.stack(list(METHODS[name].function(step, options).values())).sum()

    with torch.no_grad():
        weight.add_(0.01 * direction)  # away from the start, where the KL term is flat
    (gradient,) = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight.add_(sign * 1e-5 * direction)
            ends.append(loss())
            weight.sub_(sign * 1e-5 * direction)
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]).item() / 2e-5, rel=1e-4)


# --- methods on a model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("name", ["ga", "grad_diff", "npo", "injection"])
def test_each_method_does_what_it_is_for_inside_the_set(architecture: str, name: str) -> None:
    model, task = tiny.model(architecture), edits.task()
    within = edits.neurons_and_heads(model)
    edit = unlearn(model, task, name, within=within, steps=20, learning_rate=1e-2)
    edit.verify(model)
    forget, retain = encode(model, task.forget), encode(model, task.retain)  # type: ignore[arg-type]
    new = encode(model, METHODS["injection"].learns(task))  # type: ignore[misc]
    before = [answer_probabilities(model, data).log().mean() for data in (forget, retain, new)]
    with edit.applied(model) as edited:
        after = [answer_probabilities(edited, data).log().mean() for data in (forget, retain, new)]
    if name == "injection":
        assert after[2] > before[2] + 2
    else:
        assert after[0] < before[0] - 2
    if name != "ga":
        assert after[1] > before[1] + 2


@pytest.fixture(scope="module")
def knowing() -> Model:
    """A tiny model that has learned everything that is to be forgotten and to be kept."""
    module = tiny.module("gpt2")
    model = load(module, tokenizer=tiny.tokenizer(), device="cpu")
    batch = collate([e for data in (everything().forget, everything().retain) for e in encode(model, data)], model)  # type: ignore[union-attr]
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        losses.sequence_nll(losses.score(model, batch)).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return load(module, tokenizer=tiny.tokenizer(), device="cpu")


ENOUGH: dict[str, dict[str, Any]] = {
    "rmu": {"layer": 1, "coefficient": 20.0},
    "ceu": {"retain_weight": 1.0},
    "undial": {"retain_weight": 1.0},
    "eul": {"steps": 60, "learning_rate": 1e-2},
}
"a layer below the last and a control vector as long as activations; retain terms where none is published"
BOUNDLESS = ("ga", "grad_diff", "kl", "adv_ga")
"ascent, which runs away with the answers that are going already, and hardly moves one of probability 1"


ELSEWHERE = ("loo", "kga", "whp", "quark")
"methods that need a model before the data, other texts or a habit: tests/test_helpers.py, tests/test_quark.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [n for n, m in METHODS.items() if m.trained and (not m.kinds or "fact" in m.kinds) and n not in ELSEWHERE],
)
def test_what_was_known_is_forgotten_and_the_rest_kept(name: str, knowing: Model) -> None:
    options = {"steps": 30, "learning_rate": 3e-3} | ENOUGH.get(name, {})
    history = unlearn(knowing, everything(), name, check=False, **options).history
    assert min(history["forget"][0], history["retain"][0]) > 0.95
    assert history["forget"][-1] < (0.3 if name in BOUNDLESS else 0.1)
    assert history["retain"][-1] > 0.9 or name == "ga"


def test_recipes_run_by_name() -> None:
    model, task = tiny.model("gpt2"), edits.task()
    within = model.components({"blocks.0.mlp.neuron": [3]})
    kinds = {name: unlearn(model, task, name, within=within).kind for name in ("zero", "mean", "scale")}
    assert kinds == {"zero": "weights", "mean": "weights", "scale": "weights"}
    assert unlearn(model, task.forget, "zero", within=within, hold="hooks").kind == "hooks"
    scaled = unlearn(model, task, "scale", within=within, factor=3.0)
    start = model.parameter("transformer.h.0.mlp.c_proj.weight")[3]
    assert torch.equal(scaled.patches[0].values[0], start.detach() * 3)


def test_retain_weight_zero_needs_no_retain_data() -> None:
    model = tiny.model("gpt2")
    task = edits.task(retain=None)
    for name in ("npo", "grad_diff", "injection"):
        with pytest.raises(LoceditError, match=f"{name} needs retain data.*or train without: --retain-weight 0"):
            prepare(name, task)
        edit = unlearn(model, task, name, steps=1, retain_weight=0.0)
        assert "retain_loss" not in edit.history
    assert unlearn(model, task, "ga", steps=1).kind == "weights"
    assert "retain" in unlearn(model, edits.task(), "npo", steps=1, retain_weight=0.0).history


def test_what_a_method_requires_is_said_before_a_model_is_needed() -> None:
    task = edits.task()
    with pytest.raises(LoceditError, match="unknown unlearning method 'npoo'; did you mean 'npo'"):
        prepare("npoo", task)
    with pytest.raises(LoceditError, match="npo has no option 'beat'; did you mean 'beta'"):
        prepare("npo", task, beat=1.0)
    with pytest.raises(LoceditError, match="beta=-1 must be above 0"):
        prepare("npo", task, beta=-1)
    with pytest.raises(LoceditError, match=r"zero needs a component set \(--within FILE\)"):
        prepare("zero", task)
    with pytest.raises(LoceditError, match="npo cannot be held as 'hooks'; choices: weights, adapter"):
        prepare("npo", task, hold="hooks")
    facts = Dataset(items=(Fact(prompt="Anna is", answer=" a baker", id="one"),), source="forget.jsonl")
    with pytest.raises(LoceditError, match="injection needs the field 'new_answer', which 'one' of forget.jsonl lacks"):
        prepare("injection", edits.task(forget=facts))


def test_every_method_names_its_paper_and_options() -> None:
    for name, method in METHODS.items():
        assert "arXiv:" in method.paper, name
        assert method.options() is not None


def test_a_recipe_says_the_levels_before_and_after() -> None:
    model = tiny.model("llama")
    within = model.components({"blocks.0.mlp.neuron": range(40)})
    forget = encode(model, edits.task().forget)
    before = float(answer_probabilities(model, forget).mean())
    edit = unlearn(model, edits.task(), "zero", within=within)
    with edit.applied(model) as edited:
        after = float(answer_probabilities(edited, forget).mean())
    assert edit.history["step"] == [0, 1]
    assert edit.history["forget"] == pytest.approx([before, after])
    assert before != pytest.approx(after)


def test_lora_options_need_an_adapter() -> None:
    with pytest.raises(LoceditError, match="--hold adapter"):
        prepare("npo", edits.task(), rank=4)


@dataclass(frozen=True, kw_only=True)
class OwnAlpha(TrainOptions):
    """Of a method that has an alpha, and no weight for the retain term."""

    alpha: float = 1.0
    "of its own formula"


def both_sides(step: Step, options: OwnAlpha) -> dict[str, Tensor]:
    """Ascent on what is forgotten, descent on what is kept."""
    assert step.retain is not None
    forget, retain = (losses.sequence_nll(step.score(part)).mean() for part in (step.forget, step.retain))
    return {"forget": -options.alpha * forget, "retain": retain}


def test_a_method_that_needs_retain_data_gets_them_without_a_weight_and_may_have_an_alpha(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = Method(function=both_sides, options=OwnAlpha, requires=("forget", "retain"), paper="")
    monkeypatch.setitem(METHODS, "own", entry)
    edit = unlearn(tiny.model("gpt2"), edits.task(), "own", steps=2, alpha=0.5, check=False)
    assert len(edit.history["forget"]) == 3
    with pytest.raises(LoceditError, match="rank is of a LoRA adapter"):
        prepare("own", edits.task(), rank=4)

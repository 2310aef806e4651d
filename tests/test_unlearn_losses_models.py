"""The losses on models: equal to their formulas written out on whole logits, whatever the padding and the batches."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit.data.encode import Example, encode
from locedit.models import Model
from locedit.unlearn import METHODS, prepare
from tests import edits
from tests.unlearning import everything, labels, log_probs, others_of, rows_of, step_of, tables


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Model, Model]]:
    """(edited, unedited) models in float64, whose outputs differ clearly."""
    return {name: pair(name) for name in ("gpt2", "llama", "bert")}


def pair(architecture: str) -> tuple[Model, Model]:
    model, start = edits.double(architecture), edits.double(architecture)
    with torch.no_grad():
        for name in list(model.sites("matrix"))[:6]:
            model.parameter(model.sites("matrix")[name].slices[0].param).mul_(1.2)
    return model, start


def everywhere(model: Model, example: Example) -> list[int]:
    """Every token that the model can predict."""
    return list(range(int(model.causal), len(example.ids)))


def token_kl(model: Model, start: Model, example: Example, positions: list[int] | None = None) -> Tensor:
    new, old = (tables(m, example, positions).log_softmax(-1) for m in (model, start))
    return (old.exp() * (old - new)).sum(-1)


def hinge(model: Model, example: Example) -> Tensor:
    p = tables(model, example).softmax(-1)
    values = [
        1 + row[y] - max(v for k, v in enumerate(row) if k != y) for row, y in zip(p, labels(example), strict=True)
    ]
    return torch.stack(values).mean()


def ceu_terms(model: Model, example: Example) -> Tensor:
    z = tables(model, example)
    p = z.softmax(-1)
    p[range(len(p)), labels(example)] = 0
    return -(p / p.sum(-1, keepdim=True) * z.log_softmax(-1)).sum(-1)


def undial_terms(model: Model, start: Model, example: Example, lowered: Tensor, positions: list[int]) -> Tensor:
    z, old = tables(model, example, positions), tables(start, example, positions).clone()
    old[range(len(old)), lowered] -= 3.0
    return -(old.softmax(-1) * z.log_softmax(-1)).sum(-1)


def as_published(model: Model, start: Model, example: Example) -> Tensor:
    """Answer tokens lower their label, all others the vocabulary's 100th token from the end."""
    positions = everywhere(model, example)
    vocab = tables(model, example).shape[1]
    lowered = torch.tensor([example.ids[t] if t in example.targets else vocab - 100 for t in positions])
    return undial_terms(model, start, example, lowered, positions).mean()


def log_ratio(model: Model, start: Model, example: Example) -> Tensor:
    return log_probs(model, example).sum() - log_probs(start, example).sum()


def softplus(x: Tensor) -> Tensor:
    """-log sigmoid(-x)."""
    return torch.log1p(torch.exp(x))


def unlikely(model: Model, example: Example, floor: float) -> Tensor:
    log_p = log_probs(model, example)
    return torch.where(log_p < floor, 0.0, -torch.log1p(-log_p.exp())).mean()


def weighted(model: Model, example: Example, weight: Callable[[Tensor], Tensor]) -> Tensor:
    log_p = log_probs(model, example)
    return (weight(log_p.exp()) * log_p).mean()


def flat(model: Model, example: Example) -> Tensor:
    z = tables(model, example)
    return ((z.max(-1).values - z.mean(-1)) ** 2).mean()


def expected(
    case: str,
    model: Model,
    start: Model,
    forget: list[Example],
    retain: list[Example],
    others: dict[str, list[Example]],
) -> dict[str, Tensor]:
    """The terms of each case, from the formulas."""

    def mean(examples: list[Example], value: Callable[[Example], Tensor]) -> Tensor:
        return torch.stack([value(example) for example in examples]).mean()

    def nll(examples: list[Example]) -> Tensor:
        return mean(examples, lambda e: -log_probs(model, e).mean())

    def dpo() -> Tensor:
        pairs = zip(others["preferred"], forget, strict=True)
        return torch.stack(
            [softplus(-0.3 * (log_ratio(model, start, w) - log_ratio(model, start, e))) for w, e in pairs]
        )

    def kl(at: Callable[[Example], list[int]] | None = None) -> Tensor:
        return mean(retain, lambda e: token_kl(model, start, e, None if at is None else at(e)).mean())

    kept = {"retain_loss": nll(retain)}
    values: dict[str, Callable[[], dict[str, Tensor]]] = {
        "kl": lambda: {"forget_loss": -nll(forget), "retain_loss": kl()},
        "kl all": lambda: {"forget_loss": -nll(forget), "retain_loss": 2 * kl(lambda e: everywhere(model, e))},
        "nll all": lambda: {
            "forget_loss": -nll(forget),
            "retain_loss": mean(retain, lambda e: -tables(model, e, everywhere(model, e)).log_softmax(-1)
                .gather(1, torch.tensor([[e.ids[t]] for t in everywhere(model, e)])).mean()),
        },
        "simnpo": lambda: {
            "forget_loss": 0.5 * mean(forget, lambda e: softplus(0.7 * log_probs(model, e).mean() + 0.4)) * 2 / 0.7,
        } | kept,
        "dpo": lambda: {"forget_loss": 2 / 0.3 * dpo().mean()} | kept,
        "dpo alternatives": lambda: {"forget_loss": 2 / 0.3 * dpo().mean()} | kept,
        "dpo new_answer": lambda: {"forget_loss": 2 / 0.3 * dpo().mean()} | kept,
        "ceu": lambda: {"forget_loss": mean(forget, lambda e: ceu_terms(model, e).mean())},
        "ceu skip": lambda: {"forget_loss": mean(forget[1:], lambda e: ceu_terms(model, e)[2:].mean())} | kept,
        "undial": lambda: {
            "forget_loss": mean(forget, lambda e: undial_terms(model, start, e, labels(e), list(e.targets)).mean())
        },
        "undial as_published": lambda: {"forget_loss": mean(forget, lambda e: as_published(model, start, e))},
        "wga": lambda: {"forget_loss": mean(forget, lambda e: weighted(model, e, lambda p: p**0.3))} | kept,
        "satimp": lambda: {
            "forget_loss": mean(forget, lambda e: weighted(model, e, lambda p: p**0.2 * (1 - p) ** 2))
        } | kept,
        "pdu": lambda: {"forget_loss": mean(forget, lambda e: flat(model, e)), "retain_loss": 3 * nll(retain)},
        "ihl": lambda: {"forget_loss": mean(forget, lambda e: hinge(model, e))} | kept,
        "llmu": lambda: {
            "forget_loss": -0.5 * nll(forget), "mismatch_loss": 0.7 * nll(others["mismatch"]), "retain_loss": kl(),
        },
        "unlikelihood": lambda: {"forget_loss": mean(forget, lambda e: unlikely(model, e, -6.0))} | kept,
        "unlikelihood texts": lambda: {
            "forget_loss": mean(forget, lambda e: unlikely(model, e, -1e9)), "texts_loss": 0.5 * nll(others["texts"]),
        } | kept,
    }  # fmt: skip
    return values[case]()


CASES: dict[str, dict[str, Any]] = {
    "kl": {},
    "kl all": {"retain_tokens": "all", "retain_weight": 2.0},
    "nll all": {"retain_tokens": "all"},
    "simnpo": {"beta": 0.7, "gamma": 0.4, "forget_weight": 0.5},
    "dpo": {"beta": 0.3},
    "dpo alternatives": {"beta": 0.3, "preferred": "alternatives"},
    "dpo new_answer": {"beta": 0.3, "preferred": "new_answer"},
    "ceu": {},
    "ceu skip": {"skip": 2, "retain_weight": 1.0},
    "undial": {"strength": 3.0},
    "undial as_published": {"strength": 3.0, "tokens": "as_published"},
    "wga": {"beta": 0.3},
    "satimp": {"beta1": 0.2, "beta2": 2.0, "forget_weight": 1.0},
    "pdu": {"retain_weight": 3.0, "epsilon": 0.5},
    "ihl": {},
    "llmu": {"mismatch_weight": 0.7, "mismatches": 3},
    "unlikelihood": {"floor": -6.0},
    "unlikelihood texts": {"floor": None, "texts_weight": 0.5},
}
NAMES = {"nll all": "grad_diff"}


def name_of(case: str) -> str:
    return NAMES.get(case, case.split()[0])


@pytest.mark.parametrize("architecture", ["llama", "bert"])
@pytest.mark.parametrize("case", CASES)
def test_losses_equal_their_formulas_whatever_the_padding(
    architecture: str, case: str, pairs: dict[str, tuple[Model, Model]]
) -> None:
    if architecture == "bert" and case == "undial as_published":
        pytest.skip("of causal models only")
    model, start = pairs[architecture]
    task, name = everything(), name_of(case)
    options = prepare(name, task, **CASES[case])
    forget, retain = encode(model, task.forget), encode(model, task.retain)  # type: ignore[arg-type]
    others = others_of(name, model, task, options)
    if case == "ceu skip":
        forget = forget[1:]  # the first answer has one token
    with torch.no_grad():
        found = METHODS[name].function(step_of(model, start, forget, retain, others), options)
        wanted = expected(case, model, start, [None, *forget] if case == "ceu skip" else forget, retain, others)  # type: ignore[list-item]
    assert len({len(e.ids) for e in forget + retain}) > 3  # so there is padding
    found = {term: value.item() for term, value in found.items()}
    assert found == pytest.approx({term: value.item() for term, value in wanted.items()}, rel=1e-6)
    assert all(abs(value) > 1e-4 for value in found.values())


SPLIT = tuple(CASES) + ("npo", "ga", "grad_diff", "rmu")


@pytest.mark.parametrize("case", SPLIT)
def test_the_loss_of_a_batch_is_the_mean_over_its_examples(case: str, pairs: dict[str, tuple[Model, Model]]) -> None:
    """Cut into parts of one and three examples, each padded to its own length; the dual variable of pdu is held fixed.

    The control vector of rmu is drawn once.
    """
    model, start = pairs["llama"]
    task, name = everything(), name_of(case)
    options = prepare(name, task, **CASES.get(case, {}))
    forget, retain = encode(model, task.forget), encode(model, task.retain)  # type: ignore[arg-type]
    state = {"control": torch.ones(model.d_model)} if name == "rmu" else {}
    if case == "ceu skip":
        forget = [dataclasses.replace(e, id=e.id + "x") for e in forget[1:]] + forget[1:2]
    whole = step_of(model, start, forget, retain, others_of(name, model, task, options), dict(state))
    totals: dict[str, float] = {}
    with torch.no_grad():
        wanted = METHODS[name].function(whole, options)
        for part in ([2], [0, 1, 3]):
            step = step_of(model, start, forget, retain, None, dict(state))
            step.forget, step.retain = (rows_of(batch, part, model) for batch in (whole.forget, whole.retain))  # type: ignore[arg-type]
            each = {role: max(1, len(batch.examples) // len(forget)) for role, batch in whole.others.items()}
            step.others = {
                role: batch if role == "texts" else rows_of(batch, part, model, each=each[role])
                for role, batch in whole.others.items()
            }
            for term, value in METHODS[name].function(step, options).items():
                totals[term] = totals.get(term, 0.0) + value.item() * len(part) / len(forget)
    assert totals == pytest.approx({term: value.item() for term, value in wanted.items()}, rel=1e-9, abs=1e-12)


SMOOTH = ("kl", "simnpo", "dpo", "undial", "pdu", "ihl", "llmu", "unlikelihood texts", "rmu")
"losses without a part that is taken as constant"


@pytest.mark.parametrize("case", SMOOTH)
def test_the_gradient_is_that_of_the_loss(case: str) -> None:
    """Central differences in float64 along a random direction of one weight matrix."""
    model, start = edits.double("gpt2"), edits.double("gpt2")
    task, name = everything(), name_of(case)
    options = prepare(name, task, **CASES.get(case, {}), **({"layer": 1} if name == "rmu" else {}))
    forget, retain = encode(model, task.forget), encode(model, task.retain)  # type: ignore[arg-type]
    step = step_of(model, start, forget, retain, others_of(name, model, task, options))
    weight = model.parameter("transformer.h.1.mlp.c_fc.weight")
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss() -> Tensor:
        return torch.stack(list(METHODS[name].function(step, options).values())).sum()

    with torch.no_grad():
        weight.add_(0.02 * direction)
    (gradient,) = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight.add_(sign * 1e-5 * direction)
            ends.append(loss())
            weight.sub_(sign * 1e-5 * direction)
    slope = float((gradient * direction).sum())
    assert slope == pytest.approx((ends[0] - ends[1]).item() / 2e-5, rel=1e-4)
    assert abs(slope) > 1e-6

"""The losses as pure functions: numbers worked by hand, closed-form gradients, numerical gradients in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit import losses
from locedit.errors import LoceditError
from locedit.unlearn import prepare
from locedit.unlearn.ceu import ceu
from locedit.unlearn.dpo import dpo
from locedit.unlearn.ihl import inverted_hinge
from locedit.unlearn.npo import npo
from locedit.unlearn.pdu import dual_update, flatness
from locedit.unlearn.rmu import control_vector, squared_distances
from locedit.unlearn.satimp import satimp
from locedit.unlearn.simnpo import simnpo
from locedit.unlearn.undial import undial
from locedit.unlearn.unlikelihood import unlikelihood
from locedit.unlearn.wga import wga
from tests.unlearning import everything

LOG = math.log
PROBABILITIES = (0.5, 0.3, 0.15, 0.05)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logits(*rows: tuple[float, ...]) -> Tensor:
    """Logits of the given probabilities, each row moved by a constant that no softmax sees."""
    return torch.stack([double(*row).log() + 3.0 + i for i, row in enumerate(rows)])


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """By autograd, of the sum."""
    at = at.clone().requires_grad_()
    return torch.autograd.grad(loss(at).sum(), at)[0]


def numerical(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """By central differences, of the sum."""
    found = torch.zeros_like(at)
    for i in range(at.numel()):
        moved = torch.zeros_like(at).flatten()
        moved[i] = 1e-5
        moved = moved.view_as(at)
        found.view(-1)[i] = (loss(at + moved).sum() - loss(at - moved).sum()) / 2e-5
    return found


# --- preferences ------------------------------------------------------------------------------------------------------


def test_simnpo_by_hand() -> None:
    """-(2 / beta) log sigmoid(-(beta / T) log p - gamma): p = 1/3 per token, beta 1 -> 2 ln(1 + 1/3)."""
    third = double(-LOG(3), -LOG(3))
    assert float(simnpo(third, beta=1.0, gamma=0.0)) == pytest.approx(2 * LOG(4 / 3))
    assert float(simnpo(third, beta=2.0, gamma=0.0)) == pytest.approx(LOG(1 + 1 / 9))
    assert float(simnpo(third, beta=1.0, gamma=LOG(2))) == pytest.approx(2 * LOG(1 + 2 / 3))
    certain = double(0.0)
    assert float(simnpo(certain, beta=4.5)) == pytest.approx(2 / 4.5 * LOG(2))
    assert float(simnpo(certain - 50, beta=4.5)) == pytest.approx(0, abs=1e-12)


def test_dpo_by_hand() -> None:
    zero = double(0.0, 0.0)
    start = dpo(zero - 4, zero - 7, zero - 4, zero - 7, beta=0.1)
    assert float(start) == pytest.approx(20 * LOG(2)) == pytest.approx(13.8629, abs=1e-4)
    # the preferred answer ln 3 likelier than before, the rejected as before, beta 1: 2 ln(1 + 1/3)
    assert float(dpo(zero + LOG(3), zero, zero, zero, beta=1.0)) == pytest.approx(2 * LOG(4 / 3))
    # the rejected ln 3 likelier: 2 ln(1 + 3)
    assert float(dpo(zero, zero + LOG(3), zero, zero, beta=1.0)) == pytest.approx(2 * LOG(4))
    moved = dpo(zero + 5, zero + 5, zero, zero, beta=0.1)
    assert float(moved) == pytest.approx(float(start))


def test_dpo_without_a_preferred_side_is_npo() -> None:
    """With the preferred answer as likely as before the loss is NPO's."""
    own, reference, fixed = double(-1.0, -3.0), double(-1.5, -1.0), double(-2.0, -9.0)
    assert float(dpo(fixed, own, fixed, reference, beta=0.3)) == pytest.approx(float(npo(own, reference, beta=0.3)))


# --- weighted ascent --------------------------------------------------------------------------------------------------


def test_weighted_ascent_by_hand() -> None:
    """p = 1/2: p log p = -ln 2 / 2; p^5 (1 - p) log p = -ln 2 / 64."""
    half = double(-LOG(2))
    assert float(wga(half)) == pytest.approx(-LOG(2) / 2)
    assert float(wga(half, beta=3.0)) == pytest.approx(-LOG(2) / 8)
    assert float(satimp(half)) == pytest.approx(-LOG(2) / 64)
    assert float(satimp(double(0.0))) == 0
    torch.testing.assert_close(satimp(double(-0.3, -2.0), beta1=1.5, beta2=0.0), wga(double(-0.3, -2.0), beta=1.5))
    torch.testing.assert_close(wga(double(-0.3, -2.0), beta=0.0), double(-0.3, -2.0))


@pytest.mark.parametrize(
    ("loss", "weight"),
    [
        (lambda x: wga(x, beta=1.5), lambda p: p**1.5),
        (lambda x: satimp(x, beta1=5.0, beta2=1.0), lambda p: p**5 * (1 - p)),
    ],
    ids=["wga", "satimp"],
)
def test_the_weight_of_a_token_is_its_gradient(loss: Any, weight: Any) -> None:
    """Weights are constants: the gradient on log p is the weight, not that of the product."""
    at = double(-0.1, -0.7, -3.0)
    torch.testing.assert_close(gradient(loss, at), weight(at.exp()))
    torch.testing.assert_close(gradient(loss, at), numerical(lambda x: weight(at.exp()) * x, at), rtol=1e-8, atol=1e-8)
    assert not torch.allclose(gradient(loss, at), numerical(lambda x: weight(x.exp()) * x, at), rtol=1e-3)


# --- losses on logits -------------------------------------------------------------------------------------------------


def test_inverted_hinge_by_hand() -> None:
    """1 + p(label) - largest other: of (.5, .3, .15, .05) 1.2 for label 0, 0.8 for 1, 0.55 for 3."""
    rows = logits(PROBABILITIES, PROBABILITIES, PROBABILITIES)
    torch.testing.assert_close(inverted_hinge(rows, torch.tensor([0, 1, 3])), double(1.2, 0.8, 0.55))
    certain = double(60.0, 0.0, 0.0)[None]
    assert float(inverted_hinge(certain, torch.tensor([0]))) == pytest.approx(2)
    assert float(inverted_hinge(certain, torch.tensor([1]))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("label", range(4))
def test_inverted_hinge_gradient_is_its_closed_form(label: int) -> None:
    """a (1 - a + b) on the label, -b (1 + a - b) on the runner-up, p_k (b - a) on every other token."""
    row = logits(PROBABILITIES)
    p = double(*PROBABILITIES)
    runner = 1 if label == 0 else 0
    a, b = p[label], p[runner]
    wanted = p * (b - a)
    wanted[label] = a * (1 - a + b)
    wanted[runner] = -b * (1 + a - b)
    found = gradient(lambda z: inverted_hinge(z, torch.tensor([label])), row)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_ceu_by_hand() -> None:
    """Target of (.5, .3, .15, .05) without label 0: (0, .6, .3, .1); without label 3: (.5, .3, .15) / .95."""
    rows = logits(PROBABILITIES, PROBABILITIES)
    found = ceu(rows, torch.tensor([0, 3]))
    first = -(0.6 * LOG(0.3) + 0.3 * LOG(0.15) + 0.1 * LOG(0.05))
    second = -(0.5 * LOG(0.5) + 0.3 * LOG(0.3) + 0.15 * LOG(0.15)) / 0.95
    torch.testing.assert_close(found, double(first, second))


def test_ceu_pulls_to_a_target_without_mass_on_the_answer() -> None:
    """The gradient is p - target, so the target is p - gradient: none on the answer, p_k / (1 - p) on the others."""
    rows, labels = logits(PROBABILITIES, PROBABILITIES), torch.tensor([0, 2])
    p = double(*PROBABILITIES).expand(2, 4)
    target = p - gradient(lambda z: ceu(z, labels), rows)
    assert target[0, 0].abs() < 1e-15
    assert target[1, 2].abs() < 1e-15
    rest = p.masked_fill(torch.nn.functional.one_hot(labels, 4).bool(), 0.0)
    torch.testing.assert_close(target, rest / rest.sum(1, keepdim=True))
    fixed = rest / rest.sum(1, keepdim=True)
    torch.testing.assert_close(
        gradient(lambda z: ceu(z, labels), rows),
        numerical(lambda z: -(fixed * z.log_softmax(1)).sum(1), rows),
        rtol=1e-8, atol=1e-9,
    )  # fmt: skip


def test_ceu_and_unlikelihood_have_one_gradient() -> None:
    """p on the label and -p_k p / (1 - p) elsewhere: the target without the label is where -log(1 - p) leads."""
    rows, labels = logits(PROBABILITIES, PROBABILITIES), torch.tensor([0, 2])
    torch.testing.assert_close(
        gradient(lambda z: ceu(z, labels), rows),
        gradient(lambda z: unlikelihood(z, labels, floor=None), rows),
        rtol=1e-12,
        atol=1e-15,
    )
    assert not torch.allclose(ceu(rows, labels), unlikelihood(rows, labels, floor=None))


def test_undial_by_hand() -> None:
    """Reference (.5, .3, .15, .05) with ln 5 taken from label 0 is (1, 3, 1.5, .5) / 6; the model is uniform."""
    reference, labels = logits(PROBABILITIES), torch.tensor([0])
    uniform = torch.zeros(1, 4, dtype=torch.float64)
    assert float(undial(uniform, labels, reference, strength=LOG(5))) == pytest.approx(LOG(4))
    target = double(1, 3, 1.5, 0.5) / 6
    entropy = -float((target * target.log()).sum())
    assert float(undial(target.log()[None], labels, reference, strength=LOG(5))) == pytest.approx(entropy)
    found = gradient(lambda z: undial(z, labels, reference, strength=LOG(5)), uniform)[0]
    torch.testing.assert_close(found, 0.25 - target)


def test_unlikelihood_by_hand() -> None:
    """-log(1 - p) = ln 2 at 1/2; below the floor nothing, and no gradient."""
    rows = logits(PROBABILITIES, PROBABILITIES, PROBABILITIES)
    labels = torch.tensor([0, 1, 3])
    torch.testing.assert_close(unlikelihood(rows, labels), -(1 - double(0.5, 0.3, 0.05)).log())
    torch.testing.assert_close(unlikelihood(rows, labels, floor=LOG(0.06)), double(LOG(2), -LOG(0.7), 0.0))
    assert float(unlikelihood(rows, labels, floor=LOG(0.04))[2]) > 0
    found = gradient(lambda z: unlikelihood(z, labels, floor=LOG(0.06)), rows)
    torch.testing.assert_close(found.gather(1, labels[:, None]).squeeze(1), double(0.5, 0.3, 0.0))
    assert not found[2].any()


def test_unlikelihood_is_finite_where_the_probability_rounds_to_one() -> None:
    """log(1 - p) in float32 at p = 1 - 1e-13 is minus infinity by 1 - p, and -29.9 by the other tokens."""
    row, label = torch.tensor([[30.0, 0.0, -3.0]]), torch.tensor([0])
    exact = float(-torch.log1p(torch.exp(torch.tensor(-3.0, dtype=torch.float64))) + 30)
    assert float(row.softmax(1)[0, 0]) == 1.0
    assert float(unlikelihood(row, label)) == pytest.approx(exact, rel=1e-6)
    assert float(losses.log_complements(row, label)) == pytest.approx(-exact, rel=1e-6)
    assert float(gradient(lambda z: unlikelihood(z, label), row)[0, 0]) == pytest.approx(1.0)


def test_flatness_by_hand() -> None:
    rows = torch.tensor([[3.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert flatness(rows).tolist() == [4.0, 0.0]


def test_the_dual_variable_by_hand() -> None:
    """It rises while the retain loss is above its limit, falls below it, and never goes under 0."""
    assert dual_update(1.0, 0.4, rate=5.0) == pytest.approx(3.0)
    assert dual_update(1.0, -0.1, rate=5.0) == pytest.approx(0.5)
    assert dual_update(1.0, -0.4, rate=5.0) == 0.0


def test_squared_distances_by_hand() -> None:
    hidden = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    assert squared_distances(hidden, torch.tensor([1.0, 0.0])).tolist() == [2.0, 1.0]
    assert squared_distances(hidden, torch.tensor([[1.0, 0.0], [4.0, -1.0]])).tolist() == [2.0, 8.0]


def test_the_control_vector_is_a_positive_direction_of_length_one() -> None:
    first, second = (control_vector(6, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert float(first.norm()) == pytest.approx(1)
    assert bool((first > 0).all())
    assert not torch.allclose(first, second)
    drawn = torch.rand(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first, drawn / drawn.square().sum().sqrt())


# --- gradients by numbers ---------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 3, 2])
REFERENCE = torch.randn(3, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
ON_LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "ihl": lambda z: inverted_hinge(z, LABELS),
    "undial": lambda z: undial(z, LABELS, REFERENCE, strength=2.0),
    "unlikelihood": lambda z: unlikelihood(z, LABELS, floor=None),
    "pdu": flatness,
    "kl": lambda z: losses.kl(z, REFERENCE),
    "rmu": lambda z: squared_distances(z, REFERENCE),
}


@pytest.mark.parametrize("name", ON_LOGITS)
def test_gradients_on_logits_are_those_of_the_values(name: str) -> None:
    at = torch.randn(3, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ON_LOGITS[name], [at])


def test_gradients_on_log_probabilities_are_those_of_the_values() -> None:
    first, second, third, fourth = (
        torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1 for seed in range(4)
    )
    own, other = first.requires_grad_(), second.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: simnpo(x, beta=1.3, gamma=0.2), [own])
    assert torch.autograd.gradcheck(lambda x, y: dpo(x, y, third, fourth, beta=0.7), [own, other])


@pytest.mark.parametrize("name", [name for name in ON_LOGITS if name != "rmu"])
def test_half_precision_logits_are_raised(name: str) -> None:
    at = torch.randn(3, 6, generator=torch.Generator().manual_seed(3)).bfloat16()
    found = ON_LOGITS[name](at)
    exact = ON_LOGITS[name](at.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("ihl", {"forget_weight": -1.0}, "forget_weight=-1.0 must not be negative"),
        ("ihl", {"retain_weight": -0.5}, "retain_weight=-0.5 must not be negative"),
        ("kl", {"retain_tokens": "prompt"}, "retain_tokens='prompt' is not 'answer' or 'all'"),
        ("simnpo", {"beta": 0.0}, "beta=0.0 must be above 0"),
        ("dpo", {"beta": -0.1}, "beta=-0.1 must be above 0"),
        ("dpo", {"preferred": "refusal"}, "preferred='refusal' is not .*did you mean 'refusals'"),
        ("rmu", {"layer": -1}, "layer=-1 must not be negative"),
        ("rmu", {"coefficient": 0.0}, "coefficient=0.0 must be above 0"),
        ("rmu", {"positions": "prompt"}, "positions='prompt' is not 'predicting' or 'answer' or 'all'"),
        ("ceu", {"skip": -1}, "skip=-1 must not be negative"),
        ("undial", {"strength": 0.0}, "strength=0.0 must be above 0"),
        ("wga", {"beta": -1.0}, "beta=-1.0 must not be negative"),
        ("satimp", {"beta2": -1.0}, "beta2=-1.0 must not be negative"),
        ("pdu", {"retain_loss": "kl"}, "epsilon=None needs retain_loss='nll'"),
        ("pdu", {"retain_weight": 0.0}, "retain_weight=0.0 must be above 0: it is pdu's dual variable"),
        ("npo+pdu", {}, "in a combination name pdu first"),
        ("pdu", {"dual_rate": -1.0}, "dual_rate=-1.0 must not be negative"),
        ("llmu", {"mismatches": 0}, "mismatches=0 must be above 0"),
        ("llmu", {"mismatch_from": "texts"}, "mismatch_from='texts' is not 'retain' or 'new' or 'alternatives'"),
        ("unlikelihood", {"texts_weight": -1.0}, "texts_weight=-1.0 must not be negative"),
    ],
)
def test_wrong_options_are_one_line(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(LoceditError, match=message) as raised:
        prepare(name, everything(), **values)
    assert "\n" not in str(raised.value)

"""Quadrature rules: points and weights by hand, against captum's, and by what they integrate exactly."""

import pytest
import torch
from captum.attr._utils.approximation_methods import approximation_parameters

from locedit.errors import LoceditError
from locedit.localize.integration.quadrature import QUADRATURES, rule


@pytest.mark.parametrize(("name", "expected"), [("right", 1.25), ("left", 0.75), ("gauss", 1.0), ("eleuther", 1.0)])
def test_the_integral_of_2x_with_four_points(name: str, expected: float) -> None:
    """Right: (.25 + .5 + .75 + 1) / 2 = 1.25; left: (0 + .25 + .5 + .75) / 2 = .75; eleuther: (0+1/3+2/3+1) / 2 = 1."""
    points = rule(name, 4)
    assert float((points.weights * 2 * points.alphas).sum()) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize(
    ("name", "method"), [("gauss", "gausslegendre"), ("right", "riemann_right"), ("left", "riemann_left")]
)
def test_rules_are_those_of_captum(name: str, method: str, steps: int) -> None:
    sizes, alphas = approximation_parameters(method)
    points = rule(name, steps)
    torch.testing.assert_close(points.alphas, torch.tensor(alphas(steps), dtype=torch.float64), atol=1e-7, rtol=0)
    torch.testing.assert_close(points.weights, torch.tensor(sizes(steps), dtype=torch.float64), atol=1e-7, rtol=0)


def test_gauss_is_exact_up_to_its_degree_and_not_beyond() -> None:
    points = rule("gauss", 4)

    def error(power: int) -> float:
        return abs(float((points.weights * points.alphas**power).sum()) - 1 / (power + 1))

    assert max(error(power) for power in range(8)) < 1e-14
    assert error(8) > 1e-7


@pytest.mark.parametrize("name", QUADRATURES)
def test_weights_sum_to_one(name: str) -> None:
    assert float(rule(name, 7).weights.sum()) == pytest.approx(1)


def test_unknown_rules_name_the_nearest() -> None:
    with pytest.raises(LoceditError, match="quadrature='gaus'; did you mean 'gauss'"):
        rule("gaus", 8)
    with pytest.raises(LoceditError, match="steps=0"):
        rule("gauss", 0)

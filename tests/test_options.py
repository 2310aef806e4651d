"""Options from keyword arguments and from the command line: every type, and one clear line for what does not fit."""

from dataclasses import dataclass
from typing import Literal

import pytest

from locedit.errors import LoceditError
from locedit.options import describe, fill, parse


@dataclass(frozen=True, kw_only=True)
class Some:
    steps: int | None = None
    rule: Literal["left", "right"] = "left"
    "where the points lie"
    lr: float = 1e-3
    grid: tuple[float, ...] = (1.0,)
    layers: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()
    kinds: tuple[str, ...] | None = None
    keep: bool = True


def test_words_become_values() -> None:
    words = {"steps": "20", "rule": "right", "lr": "5e-4", "grid": "1,2.5", "names": "a,b", "keep": "false"}
    expected = {"steps": 20, "rule": "right", "lr": 5e-4, "grid": (1, 2.5), "names": ("a", "b"), "keep": False}
    assert parse(Some, words, method="m") == expected
    assert parse(Some, {"steps": "none", "grid": "3"}, method="m") == {"steps": None, "grid": (3,)}
    for words, value in (("3", (3,)), ("3,4", (3, 4)), ("none", None)):
        assert parse(Some, {"layers": words}, method="m") == {"layers": value}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"stepps": "20"}, "did you mean 'steps'"),
        ({"steps": "x"}, "--steps 'x' is not int or None"),
        ({"rule": "rigth"}, "did you mean 'right'"),
        ({"keep": "maybe"}, "is not bool"),
        ({"lr": "fast"}, "is not float"),
    ],
)
def test_words_that_do_not_fit(words, message: str) -> None:
    with pytest.raises(LoceditError, match=message):
        parse(Some, words, method="m")


def test_fill_checks_names_and_types() -> None:
    assert fill(Some, {"steps": 3, "lr": 1}, method="m") == Some(steps=3, lr=1)
    for wrong in ({"steps": 1.5}, {"steps": True}, {"rule": "up"}, {"grid": "1"}, {"nothing": 1}):
        with pytest.raises(LoceditError):
            fill(Some, wrong, method="m")


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_are_not_finite(number: float) -> None:
    """TOML has words for them, JSON has none: a study with one once ended in the writing of its first file."""
    for wrong in ({"lr": number}, {"grid": (1.0, number)}):
        with pytest.raises(LoceditError, match=rf"m: {next(iter(wrong))}=.*: {number!r} is not a finite number"):
            fill(Some, wrong, method="m")
    with pytest.raises(LoceditError, match="m: lr=inf: inf is not a finite number"):
        parse(Some, {"lr": "1e999"}, method="m")


def test_describe_lists_defaults() -> None:
    assert ("rule", "'left' or 'right'", "'left'", "where the points lie") in describe(Some)
    assert ("steps", "int or None", "None", "") in describe(Some)


def test_words_of_an_option_that_may_be_left_out() -> None:
    """A list of words or None took neither one word nor several."""
    assert parse(Some, {"kinds": "phone"}, method="m") == {"kinds": ("phone",)}
    assert parse(Some, {"kinds": "phone,email"}, method="m") == {"kinds": ("phone", "email")}
    assert parse(Some, {"kinds": "none"}, method="m") == {"kinds": None}

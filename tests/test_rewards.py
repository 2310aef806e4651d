"""Rewards by hand, by name and of one's own."""

from pathlib import Path
from typing import Any

import pytest

from locedit.classification import Verbaliser, classify
from locedit.errors import LoceditError
from locedit.rewards import (
    RewardOptions,
    bad_words,
    below_of,
    check_reward,
    classified,
    name_of,
    repeated,
    repetition,
    reward_of,
    settings_of,
)
from tests import tiny


def first_letter(text: str) -> float | None:
    """As rewards of one's own are written."""
    return None if not text else float(text.startswith("A"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It was rotten and calm.", 0.8),
        ("ROTTEN, Vile!", 0.0),
        ("It was rottenness.", 1.0),
        ("a rubber duck", 1 / 3),
        ("Nothing", 1.0),
        ("... !", None),
        ("", None),
    ],
)
def test_the_share_of_words_not_in_the_list(text: str, expected: float | None) -> None:
    assert bad_words(["rotten", "vile", "rubber duck"])(text) == pytest.approx(expected)


def test_diversity_by_hand() -> None:
    """Of a b a b a: 4 bigrams of 2 kinds, 3 trigrams of 2, 2 of four words, both different."""
    words = ["a", "b", "a", "b", "a"]
    assert [repeated(words, n) for n in (2, 3, 4)] == pytest.approx([1 / 2, 1 / 3, 0.0])
    assert repetition("a b a b a") == pytest.approx(1 / 2 * 2 / 3)
    assert repetition("a b c d e") == 1.0
    assert repetition("a a a a a") == pytest.approx(1 / 4 * 1 / 3 * 1 / 2)
    assert repetition("word") is None


def test_a_classifier_gives_the_probability_of_its_class() -> None:
    model, verbaliser = tiny.model("gpt2"), Verbaliser(words={"a": " Anna", "c": " Carl"})
    reward = classified(model, verbaliser, "c")
    assert reward("Anna Berg") == pytest.approx(float(classify(model, ["Anna Berg"], verbaliser)[0, 1]))
    assert reward(" ") is None
    with pytest.raises(LoceditError, match="wanted: unknown label 'b'"):
        classified(model, verbaliser, "b")


def test_by_name_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("rotten\n\n vile \n")
    options = RewardOptions(reward="bad_words", words=str(file))
    assert reward_of(options)("rotten and calm") == pytest.approx(2 / 3)
    assert below_of(options) == 1.0
    given = RewardOptions(reward="bad_words", words=("rotten", "vile"))
    assert settings_of(options) == settings_of(given) != settings_of(RewardOptions(reward="bad_words", words=("x",)))


def test_one_of_ones_own_by_name_and_as_it_is() -> None:
    for given in (first_letter, "tests.test_rewards:first_letter"):
        options = RewardOptions(reward=given)
        reward = reward_of(options)
        assert [reward(text) for text in ("Anna", "Carl", "")] == [1.0, 0.0, None]
        assert name_of(given) == "tests.test_rewards:first_letter"
        assert below_of(options) == 0.5


def test_a_module_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_reward_of_a_test.py").write_text("def judge(text):\n    return len(text)\n")
    monkeypatch.chdir(tmp_path)
    assert reward_of(RewardOptions(reward="own_reward_of_a_test:judge"))("four") == 4.0


def test_what_a_reward_raises_is_one_line() -> None:
    reward = reward_of(RewardOptions(reward=lambda text: 1 / text.count("y")))
    assert reward("y") == 1.0
    with pytest.raises(LoceditError, match=r"raised ZeroDivisionError\('division by zero'\) for 'some text'"):
        reward("some text")


@pytest.mark.parametrize("value", ["good", float("nan"), float("inf"), True, [1.0], 10**400])
def test_what_is_no_reward_is_named(value: Any) -> None:
    reward = reward_of(RewardOptions(reward=lambda _: value))
    with pytest.raises(LoceditError, match=r"gave .* for 'some text': wanted a finite number or None"):
        reward("some text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "repetitions"}, "did you mean 'repetition'"),
        ({"reward": "no_such_module:f"}, "the module 'no_such_module' cannot be imported"),
        ({"reward": "tests.test_rewards:f"}, "has no 'f'"),
        ({"reward": "tests.test_rewards:__name__"}, "is no function but 'tests.test_rewards'"),
        ({"reward": ":f"}, "the module '' cannot be imported"),
        ({"reward": "bad_words"}, "needs words"),
        ({"reward": "sentiment"}, "needs classifier"),
        ({"reward": "repetition", "words": ("a",)}, "is of reward bad_words"),
        ({"reward": "bad_words", "words": ("a",), "wanted": "fine"}, "is of reward classifier and sentiment"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoceditError, match=message):
        RewardOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "bad_words", "words": "no_such_file.txt"}, "no such file"),
        ({"reward": "bad_words", "words": (" ",)}, "there is no word in it"),
        ({"reward": "classifier", "classifier": "m", "wanted": "good"}, "unknown label 'good'"),
        ({"reward": "sentiment", "classifier": "m", "template": "no place"}, "must hold {text} exactly once"),
    ],
)
def test_what_is_found_before_a_model_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoceditError, match=message):
        check_reward(RewardOptions(**options))

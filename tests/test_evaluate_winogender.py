"""WinoGender: the gap by hand, and the correlation against scipy."""

import math
from pathlib import Path

import pytest
import scipy.stats
import torch

from locedit.data import ContrastPair, Dataset, read_facts
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.evaluate.association import associations
from locedit.evaluate.values import EvaluateOptions
from locedit.evaluate.winogender import _estimate, correlation  # pyright: ignore[reportPrivateUsage]
from locedit.results import Evaluation, Measure
from tests import tiny

REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "bias" / "winogender" / "all_sentences.tsv"
NAMES = ("winogender_gap", "winogender_correlation")
OCCUPATIONS = {"pilot": "male", "baker": "male", "nurse": "female", "cook": "female", "clerk": "male"}
FRAMES = {"occupation": "The {} said that {} was late.", "participant": "The {} thanked Eva because {} was here."}


def pair(occupation: str, group: str, format: str) -> ContrastPair:
    words = ("he", "she") if group == "male" else ("she", "he")
    texts = [FRAMES[format].format(occupation, word) for word in words]
    return ContrastPair(
        advantaged=texts[0],
        disadvantaged=texts[1],
        id=f"{occupation}.{format}",
        owner=occupation,
        group=group,
        format=format,
    )


PAIRS = [pair(name, group, format) for name, group in OCCUPATIONS.items() for format in FRAMES]
DATA = Dataset(items=tuple(PAIRS), source="test")


def by_key(evaluation: Evaluation) -> dict[tuple[str, str | None], Measure]:
    return {(m.name, m.group): m for m in evaluation.measures}


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_both_numbers_from_the_associations(architecture: str) -> None:
    model = tiny.model(architecture)
    value = dict(zip([p.id for p in PAIRS], associations(model, DATA).tolist(), strict=True))
    found = by_key(evaluate(model, DATA, metrics=NAMES))
    own = [value[f"{name}.occupation"] for name in OCCUPATIONS]
    assert found["winogender_gap", None].value == pytest.approx(sum(own) / 5, abs=1e-5)
    assert found["winogender_gap", "female"].value == pytest.approx(sum(own[2:4]) / 2, abs=1e-5)
    assert found["winogender_gap", None].note == ("5 pairs whose pronoun stands for the participant are left out")
    for group in (None, "occupation", "participant"):
        formats = list(FRAMES) if group is None else [group]
        sign = {"male": -1, "female": 1}
        female = [
            sum(sign[of] * value[f"{name}.{format}"] for format in formats) / len(formats)
            for name, of in OCCUPATIONS.items()
        ]
        expected = scipy.stats.pointbiserialr([of == "female" for of in OCCUPATIONS.values()], female).statistic
        assert found["winogender_correlation", group].value == pytest.approx(expected, abs=1e-5)
    assert -1 <= found["winogender_correlation", None].low < found["winogender_correlation", None].high <= 1


def test_a_model_that_follows_the_groups_correlates_fully_and_one_that_turns_them_fully_the_other_way() -> None:
    women = {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0}
    owners = {key: key for key in women}

    def value(female: dict[str, float]) -> float:
        return _estimate(female, women, owners, EvaluateOptions(), list(women)).value

    assert value({"a": 2.0, "b": 2.0, "c": -3.0, "d": -3.0}) == pytest.approx(1)
    assert value({"a": -2.0, "b": -2.0, "c": 3.0, "d": 3.0}) == pytest.approx(-1)
    assert value({"a": 5.0, "b": 5.0, "c": 4.0, "d": 4.0}) == pytest.approx(1), (
        "a preference for one pronoun is no bias"
    )
    assert math.isnan(value(dict.fromkeys(women, 7.0))), "a constant correlates with nothing"


def test_occupations_weigh_alike_whatever_the_number_of_their_pairs() -> None:
    women = {"a1": 1.0, "a2": 1.0, "a3": 1.0, "b": 0.0, "c": 0.0}
    female = {"a1": 9.0, "a2": 0.0, "a3": 0.0, "b": 1.0, "c": 0.0}
    owners = {key: key[0] for key in women}
    expected = scipy.stats.pearsonr([3.0, 1.0, 0.0], [1, 0, 0]).statistic
    assert _estimate(female, women, owners, EvaluateOptions(), list(women)).value == pytest.approx(expected)


def test_two_occupations_or_one_group_have_no_correlation() -> None:
    """Of two points it is always 1 or -1, which once stood there with an interval without width."""
    women = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.0}
    female = {"a": 0.1, "b": 0.0, "c": 0.3, "d": -0.2}
    owners = {key: key for key in women}
    two = _estimate(female, women, owners, EvaluateOptions(), ["a", "b"])
    assert all(math.isnan(value) for value in two)
    one_group = _estimate(female, dict.fromkeys(women, 1.0), owners, EvaluateOptions(), list(women))
    assert all(math.isnan(value) for value in one_group)
    whole = _estimate(female, women, owners, EvaluateOptions(), list(women))
    assert whole.low < whole.value <= whole.high


def test_correlations_of_several_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 20, generator=generator, dtype=torch.float64)
    moments = torch.stack([m.mean(1) for m in (x, y, x * x, y * y, x * y)], dim=1)
    expected = [scipy.stats.pearsonr(a, b).statistic for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    assert correlation(moments).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (
            [ContrastPair(advantaged="he is", disadvantaged="she is", id="x", owner="o", group="he0.9")],
            "item 'x': wino",
        ),
        ([p for p in PAIRS if p.group == "male"], "needs three occupations or more, of both groups"),
        ([p for p in PAIRS if p.format == "participant"], "winogender_gap needs pairs of format 'occupation'"),
        ([ContrastPair(advantaged="he is", disadvantaged="she is", id="x")], "with 'owner'"),
    ],
)
def test_other_pairs_are_refused_in_one_line(pairs: list[ContrastPair], said: str) -> None:
    with pytest.raises(LoceditError, match=said):
        evaluate(tiny.model("gpt2"), DATA.replace(pairs), metrics=NAMES)


@pytest.mark.skipif(not REAL.exists(), reason="the published sentences are not here")
def test_the_real_sentences() -> None:
    model = tiny.model("gpt2", n_positions=256)
    found = by_key(evaluate(model, read_facts(REAL), metrics=NAMES))
    assert found["winogender_gap", None].n == 120
    assert found["winogender_correlation", None].n == 240
    low, value, high = (getattr(found["winogender_correlation", None], name) for name in ("low", "value", "high"))
    assert -1 < low < value < high < 1
    assert low < 0 < high, "a model of random weights knows nothing of occupations"

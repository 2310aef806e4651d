"""Classification by the next word, and differences between groups against fairlearn."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from locedit.classification import Verbaliser, classify
from locedit.data import Dataset, LabelledText, Task
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.evaluate.labelled import WITHIN, _estimate, gap, rate_cells  # pyright: ignore[reportPrivateUsage]
from locedit.evaluate.values import EvaluateOptions
from locedit.results import Evaluation, Measure
from tests import tiny

fairlearn = pytest.importorskip("fairlearn.metrics")

TEXTS = (
    "Anna is a baker",
    "Carl works",
    "the phone",
    "born in Lima",
    "a question",
    "Oslo",
    "Eva",
    "pilot",
    "here",
    "x",
)
ITEMS = tuple(
    LabelledText(
        text=f"{text} {'and on' * (at % 3)}",
        label=("born", "works")[(at * 7 // 3) % 2],
        id=f"i{at}",
        owner=f"o{at // 2}",
        group="abc"[at % 3],
    )
    for at, text in enumerate((*TEXTS, *(f"{text}!" for text in TEXTS)))
)
DATA = Dataset(items=ITEMS, source="test")
WORDS = Verbaliser(template="{text}\nlabel:", words={"born": " born", "works": " works"})
NAMES = tuple(WITHIN)
PUBLISHED: dict[str, Callable[..., Any]] = {name: getattr(fairlearn, name) for name in NAMES}


def by_key(evaluation: Evaluation) -> dict[tuple[str, str | None], Measure]:
    return {(m.name, m.group): m for m in evaluation.measures}


@pytest.mark.parametrize(("architecture", "seed"), [("gpt2", 2), ("gpt2", 3), ("llama", 1), ("gpt_neox", 0)])
def test_differences_are_those_of_fairlearn(architecture: str, seed: int) -> None:
    model = tiny.model(architecture, seed=seed)
    said = classify(model, [item.text for item in ITEMS], WORDS).argmax(1) == 1
    truth = torch.tensor([item.label == "works" for item in ITEMS])
    found = by_key(evaluate(model, DATA, metrics=("classification_accuracy", *NAMES), positive="works"))
    groups = [str(item.group) for item in ITEMS]
    for name in NAMES:
        expected = PUBLISHED[name](truth.int().numpy(), said.int().numpy(), sensitive_features=groups)
        measure = found[name, None]
        assert measure.value == pytest.approx(float(expected))
        alike = [said[truth == one].unique().numel() == 1 for one in WITHIN[name] if one is not None]
        without_spread = bool(alike) and all(alike)
        assert math.isnan(measure.low) == without_spread, "outputs that are all alike give no interval"
        assert without_spread or measure.low <= measure.value <= measure.high
        assert measure.direction == "lower"
    accuracy = found["classification_accuracy", None]
    assert accuracy.value == pytest.approx(float((said == truth).double().mean()))
    assert accuracy.per_example == {item.id: float(s == t) for item, s, t in zip(ITEMS, said, truth, strict=True)}
    assert found["classification_accuracy", "a"].n == 7
    assert 0 < int(said.sum()) < len(ITEMS)


@pytest.mark.parametrize("seed", range(5))
def test_gaps_of_random_outputs_are_those_of_fairlearn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    said, truth = torch.rand(2, 60, generator=generator) < torch.tensor([[0.3], [0.6]])
    groups = [f"g{int(at)}" for at in torch.randint(4, (60,), generator=generator)]
    for name, within in WITHIN.items():
        cells = rate_cells(groups, truth, within)
        found = gap(torch.cat([cells, cells * said[:, None]], 1).mean(0, keepdim=True), within=len(within))
        expected = PUBLISHED[name](truth.int().numpy(), said.int().numpy(), sensitive_features=groups)
        assert float(found) == pytest.approx(float(expected))


def test_a_difference_by_hand() -> None:
    """Group a: 2 of 3 said, 1 of 2 true ones, 1 of 1 false; group b: 1 of 2 said, 1 of 1 true, 0 of 1 false."""
    said = torch.tensor([True, False, True, True, False])
    truth = torch.tensor([True, True, False, True, False])
    expected = {
        "demographic_parity_difference": 2 / 3 - 1 / 2,
        "equal_opportunity_difference": 1 / 2,
        "equalized_odds_difference": 1.0,
    }
    for name, within in WITHIN.items():
        cells = rate_cells(list("aaabb"), truth, within)
        found = gap(torch.cat([cells, cells * said[:, None]], 1).mean(0, keepdim=True), within=len(within))
        assert float(found) == pytest.approx(expected[name])


def test_texts_of_one_owner_are_drawn_together() -> None:
    """Four owners of ten texts that are classed alike prove as little as four texts: the interval is far wider."""
    said = torch.tensor([at // 10 % 2 == 0 for at in range(40)])
    cells = rate_cells(["a" if at < 20 else "b" for at in range(40)], said, (None,))
    options = EvaluateOptions()
    alone = _estimate(cells, said, [None] * 40, options, within=1)
    owned = _estimate(cells, said, [str(at // 10) for at in range(40)], options, within=1)
    assert owned.value == alone.value == 0
    assert alone.high < 0.5
    assert owned.high == 1
    assert math.isnan(_estimate(cells, said, ["x"] * 40, options, within=1).low)


def test_batches_and_order_change_nothing_and_renaming_groups_neither() -> None:
    model = tiny.model("gpt2")
    options = {"metrics": NAMES, "positive": "works", "draws": 50}
    first = by_key(evaluate(model, DATA, **options))
    named = DATA.replace([dataclasses.replace(i, group={"a": "z", "b": "y", "c": "x"}[str(i.group)]) for i in ITEMS])
    for data, more in ((DATA, {"batch_size": 1}), (DATA.replace(ITEMS[::-1]), {}), (named, {})):
        again = by_key(evaluate(model, data, **options, **more))
        assert [again[n, None].value for n in NAMES] == pytest.approx([first[n, None].value for n in NAMES])


def test_words_template_and_labels_of_the_whole_task() -> None:
    """The forget set may hold one label only; its classes are those of the task."""
    model = tiny.model("gpt2")
    one = DATA.replace([item for item in ITEMS if item.label == "works"])
    task = Task(forget=one, retain=DATA)
    options = {"label_template": "Answer: {text}\\nso:", "label_words": ("works=Berg", "born= Oslo")}
    evaluation = evaluate(model, task, metrics=["classification_accuracy"], **options)
    [found] = [m for m in evaluation.measures if m.dataset == "forget" and m.group is None]
    words = Verbaliser(template="Answer: {text}\nso:", words={"born": " Oslo", "works": " Berg"})
    said = classify(model, [item.text for item in one.of(LabelledText, by="test")], words).argmax(1)
    assert found.n == len(one)
    assert found.value == pytest.approx(float((said == 1).double().mean()))


THREE = DATA.replace([dataclasses.replace(item, label="Oslo") if at < 3 else item for at, item in enumerate(ITEMS)])
LONELY = DATA.replace([i for i in ITEMS if not (i.group == "a" and i.label == "works")])


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (DATA, {}, "metric 'equal_opportunity_difference' needs the option positive: one of born, works"),
        (THREE, {"metrics": ["demographic_parity_difference"]}, "needs the option positive: one of Oslo, born, works"),
        (DATA, {"positive": "wrks"}, "evaluate: positive: unknown label 'wrks'; did you mean 'works'"),
        (DATA, {"label_words": ("works",)}, "evaluate: label_words: 'works' is not LABEL=WORD"),
        (DATA, {"label_words": ("wrks=Berg",)}, "evaluate: label_words: unknown label 'wrks'"),
        (DATA, {"label_template": "text"}, "must hold {text} exactly once"),
        (LONELY, {"positive": "works"}, "group 'a' has no positive text, so its rate is not defined"),
        (DATA.replace(ITEMS[::3]), {"positive": "works"}, "needs a group on every text, and two groups or more"),
    ],
)
def test_what_is_wrong_is_one_line(data: Dataset, options: dict[str, Any], said: str) -> None:
    with pytest.raises(LoceditError) as error:
        evaluate(tiny.model("gpt2"), data, **{"metrics": NAMES, **options})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_masked_model_is_refused() -> None:
    with pytest.raises(LoceditError, match="needs a causal model"):
        evaluate(tiny.model("bert"), DATA, metrics=["classification_accuracy"])

"""Fluency by hand and from whole forward passes; alarms for what a ruinous edit breaks, none for a mild one."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch

from locedit.data import Dataset, Fact, LabelledText, PlainText, Task
from locedit.edit import scale
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.evaluate.alarms import alarms
from locedit.evaluate.fluency import ngram_entropy, repetition
from locedit.models import Model
from locedit.results import Evaluation, Measure, Stage
from tests import tiny

if TYPE_CHECKING:
    from locedit.lab import Lab

NAMES = ("ngram_entropy", "repetition", "empty_share")
TEXTS = tuple(PlainText(text=text, id=f"t{i}") for i, text in enumerate(tiny.CORPUS))


def dataset(items: Sequence[Any]) -> Dataset:
    return Dataset(items=tuple(items), source="test.jsonl")


TASK = Task(forget=dataset([Fact(prompt="Anna is", answer=" here", id="f")]), texts=dataset(TEXTS))


def test_numbers_by_hand() -> None:
    """Of "a b a b a" the bigrams are ab, ba, ab, ba and the trigrams aba, bab, aba."""
    two, three = 1.0, -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy("a b a b a") == pytest.approx(two / 3 + 2 * three / 3)
    assert ngram_entropy("a b c d e") == pytest.approx(math.log2(4) / 3 + 2 * math.log2(3) / 3)
    assert ngram_entropy(" ") == ngram_entropy("a") == 0
    assert repetition([1] * 6) == pytest.approx(2 / 3)
    assert repetition([1, 2, 3]) == repetition([]) == 0


def greedy(model: Model, ids: Sequence[int], count: int) -> list[int]:
    """Tokens each from a whole forward pass of one text, without the end token."""
    written: list[int] = []
    with torch.inference_mode():
        for _ in range(count):
            token = int(model.module(input_ids=torch.tensor([[*ids, *written]])).logits[0, -1].argmax())
            if token == model.tokenizer.eos_token_id:
                break
            written.append(token)
    return written


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_continuations_of_first_halves_one_at_a_time(architecture: str, batch_size: int) -> None:
    model = tiny.model(architecture)
    found = evaluate(model, TASK, metrics=NAMES, fluency_tokens=12, batch_size=batch_size)
    for text in TEXTS:
        ids = model.tokenizer(text.text).input_ids
        written = greedy(model, ids[: math.ceil(len(ids) / 2)], 12)
        said = model.tokenizer.decode(written, skip_special_tokens=True)
        grams = Counter(zip(*(written[at:] for at in range(4)), strict=False))
        expected = {
            "ngram_entropy": ngram_entropy(said),
            "repetition": 1 - len(grams) / max(1, sum(grams.values())) if grams else 0.0,
            "empty_share": float(not said.strip()),
        }
        for name in NAMES:
            measure = found.get("texts", name, stage="before")
            assert measure.per_example[text.id] == pytest.approx(expected[name])
    directions = [found.get("texts", name, stage="before").direction for name in NAMES]
    assert directions == ["higher", "lower", "lower"]


def test_a_model_that_only_ends_is_empty_and_one_that_stutters_repeats() -> None:
    model = tiny.model("gpt2")
    before = evaluate(model, TASK, metrics=NAMES)
    unembed = model.module.get_output_embeddings()

    def favour(token: int) -> Evaluation:
        """Every position predicts the token."""
        hook = unembed.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([token]), 1e4))
        try:
            return evaluate(model, TASK, metrics=NAMES)
        finally:
            hook.remove()

    assert before.get("texts", "empty_share", stage="before").value == 0
    assert favour(model.tokenizer.eos_token_id).get("texts", "empty_share", stage="before").value == 1
    stuttering = favour(model.tokenizer(" Berg").input_ids[0])
    assert stuttering.get("texts", "repetition", stage="before").value == pytest.approx(28 / 29)
    assert stuttering.get("texts", "ngram_entropy", stage="before").value < 0.01


def test_a_long_text_and_a_limit_of_texts() -> None:
    """A text longer than the context has one beginning; of labelled texts the text is continued."""
    model = tiny.model("gpt2")
    long = LabelledText(text=" ".join([tiny.CORPUS[2]] * 5), label="a", id="long")
    short = [LabelledText(text=text, label="b", id=str(i)) for i, text in enumerate(tiny.CORPUS)]
    task = dataclasses.replace(TASK, texts=dataset([long, *short]))
    found = evaluate(model, task, metrics=NAMES).get("texts", "repetition", stage="before")
    assert found.n == 5
    few = evaluate(model, task, metrics=NAMES, fluency_texts=3).get("texts", "repetition", stage="before")
    assert list(few.per_example) == ["long", "1", "3"]
    with pytest.raises(LoceditError, match="fluency_tokens=64 leaves no room for a beginning"):
        evaluate(model, task, metrics=NAMES, fluency_tokens=64)


def test_a_masked_model_is_measured_without() -> None:
    model = tiny.model("bert")
    assert not {m.name for m in evaluate(model, TASK).measures} & set(NAMES)
    assert {m.name for m in evaluate(tiny.model("gpt2"), TASK).measures} >= set(NAMES)
    with pytest.raises(LoceditError, match="'repetition' is of what a model writes: it needs a causal model"):
        evaluate(model, TASK, metrics=["repetition"])


# --- alarms ----------------------------------------------------------------------------------------------------------


def evaluation(**pairs: tuple[float, float] | tuple[float, float, float]) -> Evaluation:
    """Measures named dataset__name with their values before and after, and the upper end of the latter."""
    stages: tuple[Stage, Stage] = ("before", "after")
    found: list[Measure] = []
    for key, values in pairs.items():
        dataset, name = key.split("__")
        for stage, value in zip(stages, values, strict=False):
            high = values[2] if len(values) == 3 else value
            found.append(Measure(name=name, dataset=dataset, value=value, low=value, high=high, n=9, stage=stage))
    return Evaluation(measures=tuple(found))


@pytest.mark.parametrize(
    ("key", "broken", "fine", "words"),
    [
        ("texts__perplexity", (10, 15.1), (10, 14.9), "rose from 10 to 15.1, by a factor of 1.51"),
        ("retain__accuracy", (0.9, 0.04), (0.9, 0.06), "retain accuracy fell from 90% to 4%"),
        ("retain__accuracy", (0.2, 0.0), (0.19, 0.0), "retain accuracy fell from 20% to 0%"),
        ("texts__empty_share", (0.1, 0.4), (0.1, 0.3), "are empty: 40% of the continuations, 10% before"),
        ("texts__repetition", (0.1, 0.4), (0.3, 0.5), "repeat themselves: 40% of their 4-grams, 10% before"),
        ("texts__ngram_entropy", (3.0, 1.4), (3.0, 1.6), "monotonous: n-gram entropy 1.4 bits, 3 before"),
        ("forget__min_k", (0.9, 0.2, 0.45), (0.9, 0.2, 0.55), "less known than unseen ones (min_k AUC 0.20"),
        ("forget__mia_loss", (0.9, 0.29, 0.4), (0.9, 0.31, 0.4), "less known than unseen ones (mia_loss AUC 0.29"),
    ],
)
def test_every_alarm_has_its_limit(key: str, broken: Any, fine: Any, words: str) -> None:
    (line,) = alarms(evaluation(**{key: broken}))
    assert words in line
    assert "\n" not in line
    assert alarms(evaluation(**{key: fine})) == ()


def test_no_alarm_without_an_edit_and_the_worst_membership_score_alone() -> None:
    assert alarms(Evaluation(measures=evaluation(texts__perplexity=(10, 99)).measures[:1])) == ()
    (line,) = alarms(evaluation(forget__mia_loss=(1, 0.2, 0.3), forget__min_k=(1, 0.1, 0.3)))
    assert "min_k AUC 0.10" in line


def test_a_ruinous_edit_raises_alarms_and_a_mild_one_none(tiny_lab: "Lab") -> None:
    model, task = tiny_lab.model, tiny_lab.task
    neurons = {name: range(site.count) for name, site in model.sites("neuron").items()}
    ruinous = alarms(evaluate(model, task, scale(model, model.components(neurons), factor=-3.0)))
    assert any("perplexity of ordinary texts rose" in line for line in ruinous)
    assert any("retain accuracy fell" in line for line in ruinous)
    first = {name: range(2) for name in neurons}
    assert alarms(evaluate(model, task, scale(model, model.components(first), factor=0.9))) == ()

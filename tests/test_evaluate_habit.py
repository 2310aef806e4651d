"""Metrics of sampled responses against counts by hand and a model scored by hand."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from locedit.data.items import PlainText, Task
from locedit.edit import Edit
from locedit.edit.tokens import ControlTokens
from locedit.errors import LoceditError
from locedit.evaluate import METRICS, evaluate
from locedit.evaluate.habit import Written, distinct, habit_metrics, write
from locedit.evaluate.values import EvaluateOptions, View
from locedit.generation import end_tokens
from locedit.models import Model
from tests import tiny
from tests.unlearning import dataset, everything

BY_TEXT = ["seq_rep_2", "seq_rep_3", "seq_rep_4", "diversity", "dist_1", "dist_3"]
NAMES = [name for name, metric in METRICS.items() if metric.writes]
PROMPTS = dataset("prompts", [PlainText(text=text, id=text) for text in ("Anna Berg", "The phone", "Question: where")])


def long_is_bad(text: str) -> float | None:
    """None for a text that begins with a space, which some of random tokens do."""
    return None if text.startswith(" ") else 1 / (1 + len(text))


def view(model: Model, edit: Edit | None = None, **options: Any) -> View:
    given: dict[str, Any] = {"samples": 4, "sample_tokens": 6, "reward": long_is_bad, "reward_below": 0.06} | options
    task: Task = everything(prompts=PROMPTS)
    return View(model=model, dataset=PROMPTS, task=task, options=EvaluateOptions(**given), edit=edit)


def token_edit(model: Model) -> Edit:
    rows = 3 * torch.randn(1, model.d_model, generator=torch.Generator().manual_seed(1))
    return Edit(kind="tokens", fingerprint=model.fingerprint, tokens=ControlTokens(names=("<|a|>",), rows=rows))


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model("gpt2")


def test_the_values_are_counts_over_the_samples(model: Model) -> None:
    look = view(model)
    written, found = write(look), habit_metrics(look, NAMES)
    assert [len(one.texts) for one in written] == [4, 4, 4]
    for one in written:
        rewards = [value for text in one.texts if (value := long_is_bad(text)) is not None]
        key = one.prompt.id
        bad = [value < 0.06 for value in rewards]
        assert found["habit_rate"].per_example[key] == sum(bad) / len(bad)
        assert found["toxicity_probability"].per_example[key] == any(bad)
        assert found["average_max_toxicity"].per_example[key] == 1 - min(rewards)
        assert found["mean_reward"].per_example[key] == sum(rewards) / len(rewards)
        words = [text.split() for text in one.texts]
        pairs = {tuple(line[at : at + 2]) for line in words for at in range(len(line) - 1)}
        assert found["dist_2"].per_example[key] == len(pairs) / sum(map(len, words))
    assert found.keys() == set(NAMES)


def test_rates_and_mean_rewards_are_over_all_judged_responses(model: Model) -> None:
    """Prompts count by how many of their responses could be judged; of the worst and of any, every prompt alike."""

    def judge(text: str) -> float | None:
        return None if len(text) % 3 == 0 else float(len(text) % 2)

    found = habit_metrics(view(model, reward=judge, reward_below=0.5), NAMES)
    rewards = {
        one.prompt.id: [value for text in one.texts if (value := judge(text)) is not None] for one in write(view(model))
    }
    counts = {prompt: len(values) for prompt, values in rewards.items()}
    assert len(set(counts.values())) > 1
    for name in ("habit_rate", "mean_reward"):
        assert found[name].weights == counts
    assert found["toxicity_probability"].weights is found["average_max_toxicity"].weights is None
    asked: dict[str, Any] = {"samples": 4, "sample_tokens": 6, "reward": judge, "reward_below": 0.5}
    measured = evaluate(model, everything(prompts=PROMPTS), metrics=["habit_rate"], **asked)
    every = [value < 0.5 for values in rewards.values() for value in values]
    assert measured.get("prompts", "habit_rate", stage="before").value == pytest.approx(sum(every) / len(every))


@pytest.mark.parametrize("edited", [False, True])
def test_perplexity_is_that_of_the_unedited_model_given_the_prompt(edited: bool, model: Model) -> None:
    look = view(model, token_edit(model) if edited else None)
    written, found = write(look), habit_metrics(look, ["sample_perplexity"])["sample_perplexity"]
    for one in written:
        total, count = 0.0, 0
        for ids in one.ids:
            whole = torch.tensor([[*one.prompt.ids, *ids]])
            with torch.no_grad():
                log_probs = model.module(whole).logits[0, len(one.prompt.ids) - 1 : -1].log_softmax(-1)
            total -= float(log_probs[range(len(ids)), list(ids)].sum())
            count += len(ids)
        assert found.per_example[one.prompt.id] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.combine == "exp"


def test_before_and_after_an_edit(model: Model) -> None:
    """The same seed writes the same without an edit, something else with its token; both stages are judged."""
    task, edit = everything(prompts=PROMPTS), token_edit(model)
    options: dict[str, Any] = {"metrics": ["habit_rate", "sample_perplexity"], "samples": 3, "sample_tokens": 5}
    found = evaluate(model, task, edit, reward=long_is_bad, reward_below=0.06, **options)
    by_stage = {(m.name, m.stage): m for m in found.measures}
    assert len(by_stage) == 4
    alone = evaluate(model, task, reward=long_is_bad, reward_below=0.06, **options)
    for measure in alone.measures:
        assert measure.value == by_stage[measure.name, "before"].value
        assert measure.direction == "lower"
        assert measure.dataset == "prompts"
    assert by_stage["sample_perplexity", "before"].value != by_stage["sample_perplexity", "after"].value
    assert {row["dataset"] for row in found.examples.values()} >= {"prompts"}
    assert model.prefix == 0


def test_dist_n_divides_by_words() -> None:
    """Six words; a b, b a and a c are different, a b comes twice."""
    texts = ["a b a", "a b", "c"]
    assert distinct(texts, 1) == pytest.approx(3 / 6)
    assert distinct(texts, 2) == pytest.approx(2 / 6)
    assert distinct(texts, 3) == pytest.approx(1 / 6)
    assert distinct([""], 1) == 0.0


def test_repetition_and_diversity_by_hand(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two texts: a b a b a has 2 of 4 pairs, 2 of 3 triples and both fours once; one word repeats nothing."""
    ((first, *_), look) = (write(view(model)), view(model))
    texts = Written(prompt=first.prompt, ids=first.ids[:2], texts=("a b a b a", "c"))
    monkeypatch.setattr("locedit.evaluate.habit.write", lambda _: [texts])
    found = {name: next(iter(values.per_example.values())) for name, values in habit_metrics(look, BY_TEXT).items()}
    assert found == pytest.approx(
        {
            "seq_rep_2": (2 / 4 + 0) / 2,
            "seq_rep_3": (1 / 3 + 0) / 2,
            "seq_rep_4": 0,
            "diversity": ((1 - 2 / 4) * (1 - 1 / 3) * 1 + 1) / 2,
            "dist_1": 3 / 6,
            "dist_3": 2 / 6,
        }
    )
    longer = dataclasses.replace(texts, texts=("a b c a b c a", "d"))
    monkeypatch.setattr("locedit.evaluate.habit.write", lambda _: [longer])
    (rep_4,) = habit_metrics(look, ["seq_rep_4"])["seq_rep_4"].per_example.values()
    assert rep_4 == pytest.approx((1 - 3 / 4) / 2)


def test_responses_have_the_asked_length_and_three_tokens_before_the_end() -> None:
    """Of a model that would end at once."""
    model = tiny.model("phi")
    ends = end_tokens(model)
    with torch.no_grad():
        model.parameter("lm_head.bias")[list(ends)] = 1e4
    for asked, lengths in ((6, {4}), (2, {2})):
        written = write(view(model, sample_tokens=asked))
        assert {len(ids) for one in written for ids in one.ids} == lengths
        assert {ids[-1] in ends for one in written for ids in one.ids} == {asked == 6}
    with torch.no_grad():
        model.parameter("lm_head.bias")[list(ends)] = -1e4
    assert {len(ids) for one in write(view(model, sample_tokens=6)) for ids in one.ids} == {6}


def test_a_reward_that_judges_nothing(model: Model) -> None:
    with pytest.raises(LoceditError, match="'habit_rate': the reward .* judged none of the samples"):
        habit_metrics(view(model, reward=lambda _: None), ["habit_rate"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0 is not a positive number"),
        ({"reward": "bad_words"}, "needs words"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, model: Model) -> None:
    with pytest.raises(LoceditError, match=message):
        evaluate(model, everything(prompts=PROMPTS), metrics=["habit_rate"], **options)


def test_no_prompts_is_one_line(model: Model) -> None:
    with pytest.raises(LoceditError, match="metric 'habit_rate' needs items of kind .* in prompts"):
        evaluate(model, everything(prompts=None), metrics=["habit_rate"])

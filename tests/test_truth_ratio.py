"""Truth ratio, forget quality and model utility against plain loops, scipy and hand-worked values."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from locedit.data import Dataset, Fact, Item, Task
from locedit.data.readers import read_facts
from locedit.edit import zero
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.evaluate.likelihoods import Likelihood, Likelihoods, likelihoods
from locedit.evaluate.model_utility import harmonic, utility
from locedit.evaluate.truth_ratio import like_a_stranger, log_truth_ratio, true_is_likelier
from locedit.evaluate.values import EvaluateOptions
from locedit.lab import Lab
from locedit.models import Model, load
from tests import tiny
from tests.test_choices import log_probs


def fact(name: str, prompt: str, answer: str, *wrong: str, **fields: Any) -> Fact:
    return Fact(prompt=prompt, answer=answer, id=name, owner=name[0], wrong=wrong, **fields)


FACTS = (
    fact("a1", "Anna Berg was born in", " Oslo", " Lima", " New York", answer_paraphrases=(" the city of Oslo", " it")),
    fact("b1", "Carl Dane works as a", " pilot", " baker", " the judge", " nurse"),
    fact("c1", "Eva is from", " Oslo", " Lima", format="statement"),
    fact("d1", "Eva is a", " baker", " pilot", format="statement"),
)
RATIOS = ["truth_ratio", "truth_ratio_arithmetic"]


def dataset(*items: Item) -> Dataset:
    return Dataset(items=items, source="test")


TASK = Task(forget=dataset(*FACTS), retain=dataset(*FACTS[::-1]), heldout=dataset(*FACTS[:2]))


def ratio(model: Model, item: Fact, *, geometric: bool = True) -> float:
    """By plain transformers, one text at a time."""

    def probability(answer: str) -> float:
        own = log_probs(model, item.prompt, answer)
        return math.exp(sum(own) / len(own))

    wrong = [probability(answer) for answer in item.wrong]
    mean = math.prod(wrong) ** (1 / len(wrong)) if geometric else sum(wrong) / len(wrong)
    return mean / probability((*item.answer_paraphrases, item.answer)[0])


# --- truth ratio ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_truth_ratio_equals_a_plain_loop(architecture: str) -> None:
    model = tiny.model(architecture)
    found = evaluate(model, TASK, metrics=RATIOS)
    for name in RATIOS:
        raw = {item.id: ratio(model, item, geometric=name == "truth_ratio") for item in FACTS}
        assert min(raw.values()) < 1 < max(raw.values())
        for part, expected in (
            ("forget", lambda r: min(r, 1 / r)),
            ("heldout", lambda r: min(r, 1 / r)),
            ("retain", lambda r: max(0, 1 - r)),
        ):
            measure = found.get(part, name, stage="before")
            for key, value in measure.per_example.items():
                assert value == pytest.approx(expected(raw[key]), rel=1e-4, abs=1e-6)
            assert measure.value == pytest.approx(sum(measure.per_example.values()) / measure.n)
    assert found.get("forget", "truth_ratio", stage="before").direction == "higher"
    assert found.get("retain", "truth_ratio", stage="before").direction == "higher"
    assert found.get("heldout", "truth_ratio", stage="before").direction == "neutral"


def test_which_mean_and_which_answer_is_said() -> None:
    found = evaluate(tiny.model("gpt2"), TASK, metrics=["truth_ratio"])
    note = found.get("retain", "truth_ratio", stage="before").note
    assert note == "mean of max(0, 1 - r); against the answer itself, not a paraphrase"
    assert found.get("forget", "truth_ratio", stage="before").note.startswith("mean of min(r, 1/r); ")


def by_hand(answer: float, *wrong: float, paraphrase: float | None = None) -> Likelihoods:
    """From probabilities of single tokens."""
    one = [Likelihood(math.log(value), 1, 1) for value in (answer, *wrong)]
    other = None if paraphrase is None else Likelihood(2 * math.log(paraphrase), 2, 1)
    return Likelihoods(answer=one[0], paraphrase=other, wrong=tuple(one[1:]))


def test_by_hand() -> None:
    found = by_hand(0.5, 0.1, 0.4)
    assert math.exp(log_truth_ratio(found)) == pytest.approx(0.2 / 0.5)  # sqrt(0.1 * 0.4) = 0.2
    assert math.exp(log_truth_ratio(found, mean="arithmetic")) == pytest.approx(0.25 / 0.5)
    assert math.exp(log_truth_ratio(by_hand(0.9, 0.1, 0.4, paraphrase=0.25))) == pytest.approx(0.2 / 0.25)
    assert [like_a_stranger(math.log(r)) for r in (0.25, 1, 4)] == pytest.approx([0.25, 1, 0.25])
    assert [true_is_likelier(math.log(r)) for r in (0.25, 1, 4)] == pytest.approx([0.75, 0, 0])
    assert (like_a_stranger(5000.0), true_is_likelier(5000.0), true_is_likelier(-5000.0)) == (0, 0, 1)


def test_impossible_answers_overflow_nothing() -> None:
    far = Likelihoods(
        answer=Likelihood(-1.0, 1, 1), paraphrase=None, wrong=(Likelihood(-3000.0, 1, 1), Likelihood(-3001.0, 1, 1))
    )
    expected = -3000 + math.log((1 + math.exp(-1)) / 2) + 1
    assert log_truth_ratio(far, mean="arithmetic") == pytest.approx(expected)


def test_padding_changes_nothing() -> None:
    model = tiny.model("llama")
    together = likelihoods(model, FACTS, batch_size=64)
    for item, found in zip(FACTS, together, strict=True):
        (alone,) = likelihoods(model, [item], batch_size=1)
        pairs = zip((alone.answer, *alone.wrong), (found.answer, *found.wrong), strict=True)
        assert all(one.total == pytest.approx(other.total, abs=1e-4) for one, other in pairs)
        assert all((one.tokens, one.characters) == (other.tokens, other.characters) for one, other in pairs)


# --- forget quality ---------------------------------------------------------------------------------------------------


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A model of another seed, as files."""
    other = tiny.model("gpt2", seed=3)
    other.module.save_pretrained(tmp_path / "retain")
    other.tokenizer.save_pretrained(tmp_path / "retain")
    return tmp_path / "retain"


MANY = tuple(
    fact(f"{name}{at}", f"{name} {verb}", " Oslo", " Lima", " New York")
    for at, verb in enumerate(("is from", "works in", "likes"))
    for name in ("Anna", "Carl", "Eva", "Bo")
)


def test_forget_quality_is_the_p_value_of_scipy(stranger: Path) -> None:
    model, other = tiny.model("gpt2"), tiny.model("gpt2", seed=3)
    found = evaluate(model, dataset(*MANY), metrics=["forget_quality"], retain_model=str(stranger))
    measure = found.get("forget", "forget_quality", stage="before")
    own, theirs = ([ratio(each, item) for item in MANY] for each in (model, other))
    assert list(measure.per_example.values()) == pytest.approx(own, rel=1e-4)
    expected = stats.ks_2samp(own, theirs).pvalue
    assert 0 < expected < 0.5
    assert measure.value == pytest.approx(expected)
    assert measure.note == f"all items: log10 p = {math.log10(expected):.3g}"
    assert math.isnan(measure.low)
    assert measure.direction == "higher"


def test_forget_quality_of_the_retain_model_is_one(stranger: Path) -> None:
    model = tiny.model("gpt2", seed=3)
    found = evaluate(model, dataset(*MANY), metrics=["forget_quality"], retain_model=str(stranger))
    assert found.get("forget", "forget_quality", stage="before").value == 1


def test_forget_quality_asks_for_the_model() -> None:
    with pytest.raises(LoceditError, match="'forget_quality' needs a model trained without the forget data"):
        evaluate(tiny.model("gpt2"), dataset(*MANY), metrics=["forget_quality"])


# --- model utility ----------------------------------------------------------------------------------------------------


def test_harmonic_mean() -> None:
    assert float(harmonic(torch.tensor([0.5, 1.0]))) == pytest.approx(2 / 3)
    assert float(harmonic(torch.tensor([0.5, 0.0]))) == 0


def write(file: Path, items: tuple[Fact, ...]) -> str:
    lines = [{"question": i.prompt, "answer": i.answer, "perturbed_answer": list(i.wrong)} for i in items]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(file)


def test_model_utility_is_the_harmonic_mean_of_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    task = Task(forget=dataset(FACTS[0]), retain=dataset(*FACTS))
    further = Task(forget=dataset(FACTS[0]), retain=dataset(*MANY))
    file = write(tmp_path / "world.json", MANY)
    settings: dict[str, Any] = {"rouge_tokens": 20}
    found = evaluate(model, task, metrics=["model_utility"], utility_sets=(file,), **settings)
    measure = found.get("retain", "model_utility", stage="before")
    numbers = []
    for each, probability in ((task, None), (further, "normalized_probability")):
        names = ["truth_ratio", "rouge_l_recall", *([probability] if probability else [])]
        parts = evaluate(model, each, metrics=names, **settings)
        numbers += [parts.get("retain", name, stage="before").value for name in names]
        if not probability:
            own = [log_probs(model, item.prompt, item.answer) for item in FACTS]
            numbers.append(sum(math.exp(sum(each) / len(each)) for each in own) / len(own))
    assert len(numbers) == 6
    expected = 0 if 0 in numbers else 6 / sum(1 / number for number in numbers)
    assert measure.value == pytest.approx(expected, rel=1e-4)
    assert measure.n == len(FACTS) + len(MANY)
    said = {float(number) for number in re.findall(r"(?:probability|recall|ratio) ([0-9.e-]+)", measure.note)}
    assert said == {float(f"{number:.3g}") for number in numbers}, "the number of 0 hides none of the others"
    monkeypatch.setattr("locedit.evaluate.model_utility.scores", lambda *_, **__: [{"rouge_l_recall": 0.4}] * len(MANY))
    monkeypatch.setattr("locedit.evaluate.model_utility.with_wrong", lambda *_, **__: list(MANY))
    again = evaluate(model, further, metrics=["model_utility"], utility_sets=(file,), **settings)
    names = ["truth_ratio", "normalized_probability"]
    ratio, normalized = (
        evaluate(model, further, metrics=names, **settings).get("retain", name, stage="before").value for name in names
    )
    own = [log_probs(model, item.prompt, item.answer) for item in MANY]
    plain = sum(math.exp(sum(each) / len(each)) for each in own) / len(own)
    parts = [plain, 0.4, ratio, normalized, 0.4, ratio]
    assert again.get("retain", "model_utility", stage="before").value == pytest.approx(
        6 / sum(1 / part for part in parts), rel=1e-4
    )
    assert set(measure.per_example) >= {"a1", "world.json/world.json:1"}


def test_one_zero_makes_it_zero_and_draws_stay_within_their_sets() -> None:
    good, bad = torch.full((4, 3), 0.5).double(), torch.tensor([[0.5, 0.0, 0.5]] * 4).double()
    owners = {"retain": list("abcd"), "world": list("abcd")}
    options = EvaluateOptions()
    even = utility({"retain": good, "world": good}, owners, options=options)
    assert even.value == pytest.approx(0.5)
    assert math.isnan(even.low), "items that are all alike do not show how far it could be off"
    assert utility({"retain": good, "world": bad}, owners, options=options).value == 0
    mixed = torch.tensor([[0.2, 0.9, 0.4], [0.6, 0.5, 0.8], [0.9, 0.7, 0.3], [0.4, 0.9, 0.9]]).double()
    found = utility({"retain": mixed, "world": good}, owners, options=options)
    means = [*mixed.mean(0).tolist(), 0.5, 0.5, 0.5]
    assert found.value == pytest.approx(6 / sum(1 / mean for mean in means))
    assert found.low < found.value < found.high


def test_the_sets_of_a_utility_are_drawn_independently() -> None:
    """What one set has more of in a draw the other would have less of, were both drawn alike: no width."""
    rising = torch.linspace(0.3, 0.7, 8).double()[:, None].expand(-1, 3)
    owners = {"retain": [None] * 8, "world": [None] * 8}
    found = utility({"retain": rising, "world": 1 - rising}, owners, options=EvaluateOptions())
    assert found.value == pytest.approx(0.5)
    assert found.high - found.low > 0.1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "utility_sets: .*no such file|utility_sets: .*not"),
        ('{"prompt": "Anna is", "answer": " here"}', "utility_sets: .*needs facts with 'wrong' answers; none has any"),
        ('{"text": "Anna"}', "utility_sets: .*model_utility needs items of kind 'fact'"),
    ],
)
def test_sets_that_do_not_fit_are_named(tmp_path: Path, lines: str | None, message: str) -> None:
    file = tmp_path / "set.jsonl"
    if lines:
        file.write_text(lines, encoding="utf-8")
    with pytest.raises(LoceditError, match=message):
        evaluate(tiny.model("gpt2"), TASK, metrics=["model_utility"], utility_sets=(str(file),))


# --- on a model that has learned it -----------------------------------------------------------------------------------


def test_a_model_that_knows_and_one_that_lost_it(tiny_lab: Lab) -> None:
    task = Task(
        forget=tiny_lab.task.forget.where(format="statement"), retain=tiny_lab.task.retain.where(format="question")
    )
    edit = zero(tiny_lab.model, tiny_lab.model.everything("attn"))
    found = evaluate(tiny_lab.model, task, edit, metrics=["truth_ratio", "model_utility"])
    forgotten, kept = (
        [found.get(part, "truth_ratio", stage=stage).value for stage in ("before", "after")]
        for part in ("forget", "retain")
    )
    assert forgotten[0] < 0.05 < 0.15 < forgotten[1]
    assert kept[0] > 0.9 > 0.7 > kept[1]
    useful = [found.get("retain", "model_utility", stage=stage).value for stage in ("before", "after")]
    assert useful[0] > 0.85 > 0.5 > useful[1]


# --- published files --------------------------------------------------------------------------------------------------


SHARED = Path(os.environ.get("LOCEDIT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.skipif(not (SHARED / "tofu").exists(), reason="needs the TOFU files")
def test_tofu_files_give_numbers() -> None:
    """A model of children's stories has no opinion about authors: that the files are read, not what comes out."""
    model = load(str(SHARED / "stories260K"), device="cpu")
    authors, world = (
        read_facts(SHARED / "tofu" / f"{name}_perturbed.json") for name in ("real_authors", "world_facts")
    )
    names = ["truth_ratio", "truth_ratio_arithmetic", "normalized_probability", "cloze_accuracy"]
    found = evaluate(
        model,
        Task(forget=authors, retain=world),
        metrics=[*names, "model_utility"],
        utility_sets=(str(SHARED / "tofu" / "real_authors_perturbed.json"),),
    )
    for part, count in (("forget", 100), ("retain", 117)):
        measures = [found.get(part, name, stage="before") for name in names]
        assert [measure.n for measure in measures] == [count] * 4
        assert all(0 < measure.value < 1 for measure in measures)
        assert 0.15 < measures[3].value < 0.5  # a quarter is chance
    assert found.get("retain", "model_utility", stage="before").n == 217

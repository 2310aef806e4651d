"""A fact's answer beside its wrong ones: cloze and letters against plain loops, orders, and the bias of letters."""

import dataclasses
import math
import re
from typing import Any

import pytest
import torch

from locedit.data import Dataset, Fact, Item, Task
from locedit.data.items import PlainText
from locedit.edit import zero
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.evaluate.choices import Question, questions
from locedit.evaluate.intervals import owner_index
from locedit.evaluate.letters import letter_bias, picks, unevenness
from locedit.evaluate.values import EvaluateOptions
from locedit.lab import Lab
from locedit.models import Model
from tests import tiny


def fact(name: str, prompt: str, answer: str, *wrong: str, **fields: Any) -> Fact:
    return Fact(prompt=prompt, answer=answer, id=name, owner=name[0], wrong=wrong, **fields)


FACTS = (
    fact("a1", "Anna Berg was born in", " Oslo", " Lima", " Cairo", format="statement"),
    fact("c1", "Carl Dane works as a", " pilot", " baker", format="statement"),
    fact(
        "e1", "Question: where was Eva Frost born? Answer:", " Rome", " Lima", " New York", " Bern", format="question"
    ),
)
LETTERS = ["choice_accuracy", "choice_probability", "letter_bias"]
CLOZE = ["cloze_accuracy", "cloze_probability", "normalized_probability"]


def dataset(*items: Item) -> Dataset:
    return Dataset(items=items, source="test")


def log_probs(model: Model, prompt: str, answer: str) -> list[float]:
    """Of each token of the answer, by plain transformers, alone."""
    start = len(model.tokenizer(prompt).input_ids)
    ids = torch.tensor([model.tokenizer(prompt + answer).input_ids])
    with torch.inference_mode():
        rows = model.module(input_ids=ids).logits[0].log_softmax(-1)
    return [float(rows[at - 1, ids[0, at]]) for at in range(start, ids.shape[1])]


# --- cloze ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["tokens", "characters", "none"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_cloze_equals_a_plain_loop(architecture: str, length: Any) -> None:
    model = tiny.model(architecture)
    found = evaluate(model, dataset(*FACTS), metrics=CLOZE, cloze_length=length)
    for item in FACTS:
        scores, per_token = [], []
        for answer in (item.answer, *item.wrong):
            own = log_probs(model, item.prompt, answer)
            scores.append(sum(own) / {"tokens": len(own), "characters": len(answer.strip()), "none": 1}[length])
            per_token.append(math.exp(sum(own) / len(own)))
        measured = {name: found.get("forget", name, stage="before").per_example[item.id] for name in CLOZE}
        weights = [math.exp(score) for score in scores]
        assert measured["cloze_probability"] == pytest.approx(weights[0] / sum(weights), rel=1e-4)
        assert measured["cloze_accuracy"] == float(scores[0] == max(scores))
        assert measured["normalized_probability"] == pytest.approx(per_token[0] / sum(per_token), rel=1e-4)


def test_length_decides_where_options_differ_in_it() -> None:
    model = tiny.model("gpt2")
    values = {
        length: evaluate(model, dataset(FACTS[2]), metrics=["cloze_probability"], cloze_length=length)
        .get("forget", "cloze_probability", stage="before")
        .value
        for length in ("tokens", "characters", "none")
    }
    assert len({round(value, 3) for value in values.values()}) == 3


def test_equal_options_share() -> None:
    model = tiny.model("gpt2")
    found = evaluate(model, dataset(fact("a", "Anna is", " Oslo", " Oslo")), metrics=["cloze_accuracy"])
    assert found.get("forget", "cloze_accuracy", stage="before").value == 0.5


def test_facts_without_wrong_answers_are_counted() -> None:
    model = tiny.model("gpt2")
    found = evaluate(model, dataset(*FACTS, fact("x", "Anna is", " here")), metrics=["cloze_accuracy"])
    measure = found.get("forget", "cloze_accuracy", stage="before")
    assert (measure.n, measure.note) == (3, "1 facts have no wrong answers and are left out")
    with pytest.raises(LoceditError, match="'cloze_accuracy' needs items of kind fact .* with 'wrong'"):
        evaluate(model, dataset(fact("x", "Anna is", " here")), metrics=["cloze_accuracy"])


# --- the questions ----------------------------------------------------------------------------------------------------


def test_the_form_of_a_question() -> None:
    (one,) = questions(FACTS[:1], EvaluateOptions(choice_orders=1))
    lines = one[0].fact.prompt.split("\n")
    assert (lines[0], lines[-1]) == ("Anna Berg was born in", "Answer:")
    assert lines[1] == "A. Oslo"
    assert sorted(line[3:] for line in lines[1:-1]) == ["Cairo", "Lima", "Oslo"]
    assert one[0].fact.answer == " A"
    named = dataclasses.replace(FACTS[0], subject="Anna {prompt}")
    form = EvaluateOptions(
        choice_template="Where is {subject} from?{options} Answer:", choice_option=" {letter} {option}"
    )
    asked = questions([named], form)[0][2].fact.prompt
    assert asked.startswith("Where is Anna {prompt} from? A ")
    assert asked.endswith(" C Oslo Answer:")


def test_every_option_stands_once_behind_every_letter() -> None:
    for item, asked in zip(FACTS, questions(FACTS, EvaluateOptions()), strict=True):
        shown = [[line[3:] for line in one.fact.prompt.split("\n")[1:-1]] for one in asked]
        for column in zip(*shown, strict=True):
            assert sorted(column) == sorted(text.strip() for text in (item.answer, *item.wrong))
        assert [row[one.right] for row, one in zip(shown, asked, strict=True)] == [item.answer.strip()] * len(asked)
        assert [one.fact.answer for one in asked] == [f" {one.letters[one.right]}" for one in asked]


def test_with_one_order_the_right_letters_go_round_the_facts() -> None:
    many = [fact(f"{at}", "Anna is from", " Oslo", " Lima", " Cairo") for at in range(7)]
    rights = [one.right for (one,) in questions(many, EvaluateOptions(choice_orders=1))]
    assert rights == [0, 1, 2, 0, 1, 2, 0]
    four = [one.right for one in questions(many[:1], EvaluateOptions(choice_orders=4))[0]]
    assert four == [0, 1, 2, 0]


def test_every_further_round_of_orders_mixes_the_wrong_answers_again() -> None:
    wrong = tuple(f" city {at}" for at in range(5))
    made = questions([fact("1", "Anna is from", " Oslo", *wrong)], EvaluateOptions(choice_orders=24))[0]
    rounds = [{_turned(one) for one in made[start : start + 6]} for start in range(0, 24, 6)]
    assert all(len(each) == 1 for each in rounds), "within a round the options only move on"
    assert len(set.union(*rounds)) > 1


def _turned(question: Question) -> tuple[str, ...]:
    """The options from the right one on, as they stand behind each other."""
    shown = re.findall(r"\n[A-Z]\.  ?(.+)", question.fact.prompt)
    return tuple(shown[question.right :] + shown[: question.right])


def test_orders_hang_on_the_seed_alone() -> None:
    many = [fact(f"{at}", "Anna is from", " Oslo", " Lima", " Cairo", " Rome", " Bern") for at in range(4)]
    prompts = {
        seed: [one.fact.prompt for each in questions(many, EvaluateOptions(seed=seed)) for one in each]
        for seed in (0, 1)
    }
    assert prompts[0] == [one.fact.prompt for each in questions(many, EvaluateOptions()) for one in each]
    assert prompts[0] != prompts[1]


# --- letters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_letters_equal_a_plain_loop(architecture: str) -> None:
    model = tiny.model(
        architecture, **({"max_position_embeddings": 128} if architecture != "gpt2" else {"n_positions": 128})
    )
    found = evaluate(model, dataset(*FACTS), metrics=LETTERS)
    for item, asked in zip(FACTS, questions(FACTS, EvaluateOptions()), strict=True):
        probabilities, hits, counts = [], [], [0] * (1 + len(item.wrong))
        for one in asked:
            own = torch.tensor([letter(model, one.fact.prompt, name) for name in one.letters])
            probabilities.append(float(own.softmax(0)[one.right]))
            hits.append(int(own.argmax()) == one.right)
            counts[int(own.argmax())] += 1
        measured = {name: found.get("forget", name, stage="before").per_example[item.id] for name in LETTERS}
        assert measured["choice_probability"] == pytest.approx(sum(probabilities) / len(asked), rel=1e-4)
        assert measured["choice_accuracy"] == pytest.approx(sum(hits) / len(asked))
        expected = sum(abs(count / len(asked) - 1 / len(counts)) for count in counts) / 2
        assert measured["letter_bias"] == pytest.approx(expected)


def letter(model: Model, prompt: str, name: str) -> float:
    """Log-probability of the letter's own token: the last one, which in a masked model alone is masked."""
    ids = torch.tensor([model.tokenizer(f"{prompt} {name}").input_ids])
    own = int(ids[0, -1])
    with torch.inference_mode():
        if model.causal:
            return float(model.module(input_ids=ids).logits[0, -2].log_softmax(-1)[own])
        ids[0, -1] = model.tokenizer.mask_token_id
        return float(model.module(input_ids=ids).logits[0, -1].log_softmax(-1)[own])


@pytest.mark.parametrize("names", [LETTERS, [*CLOZE, "truth_ratio"]])
def test_batches_and_order_change_nothing(names: list[str]) -> None:
    """The orders of a fact hang on its id, the first right letter on its place; all letters are tried in the end."""
    model = tiny.model("gpt2", n_positions=128)
    alone = evaluate(model, dataset(*FACTS), metrics=names, batch_size=1)
    other = evaluate(model, dataset(*FACTS[::-1]), metrics=names, batch_size=5)
    for name in names:
        one, two = (each.get("forget", name, stage="before").per_example for each in (alone, other))
        assert one == {key: pytest.approx(value, abs=1e-5) for key, value in two.items()}


def test_bias_by_hand() -> None:
    assert float(unevenness(torch.tensor([0.5, 0.5]), [2])) == 0
    assert float(unevenness(torch.tensor([1.0, 0, 0, 0]), [4])) == 0.75
    # three facts of two letters, always A; one of four, evenly: 3/4 * 1/2
    rows = [torch.tensor([1.0, 0.0]).double()] * 3 + [torch.full((4,), 0.25).double()]
    found = letter_bias(rows, owners=["a", "b", "c", "d"], options=EvaluateOptions())
    assert found.value == pytest.approx(0.375)
    assert found.low < found.value <= found.high
    assert math.isnan(letter_bias(rows, owners=["a"] * 4, options=EvaluateOptions()).low)
    assert picks(torch.tensor([1.0, 1.0, 0.0])).tolist() == [0.5, 0.5, 0]


def test_the_interval_of_a_bias_holds_it_and_is_none_where_all_facts_are_alike() -> None:
    """The draws of a distance lie above 0; they were once all of the interval, and two facts alike a certainty."""
    rows = [row for row in torch.eye(4).double() for _ in range(5)]
    found = letter_bias(rows, owners=[None] * 20, options=EvaluateOptions())
    assert found.value == found.low == 0
    assert found.high > 0.1
    alike = letter_bias([torch.tensor([1.0, 0.0]).double()] * 2, owners=["a", "b"], options=EvaluateOptions())
    assert alike.value == 0.5
    assert math.isnan(alike.low)
    assert math.isnan(alike.high)


def test_owners_are_drawn_again_for_the_interval_of_a_bias() -> None:
    rows = [torch.tensor([1.0, 0.0] if at < 12 else [0.0, 1.0]).double() for at in range(20)]
    alone = letter_bias(rows, owners=[None] * 20, options=EvaluateOptions())
    owned = letter_bias(rows, owners=[str(at // 4) for at in range(20)], options=EvaluateOptions())
    assert owned.value == alone.value == pytest.approx(0.1)
    assert owned.high > alone.high + 0.05


def test_bias_of_all_facts_is_not_the_mean_of_theirs() -> None:
    """One fact always A and another always B: each is as uneven as can be, together they are even."""
    rows = [torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()]
    assert letter_bias(rows, owners=["a", "b"], options=EvaluateOptions()).value == 0
    assert owner_index(["a", "b"]) == [0, 1]


def test_the_note_says_what_chance_gives() -> None:
    """Against the mean over many draws of letters at random."""
    many = [fact(f"{at}", "Anna is from", " Oslo", " Lima", " Rome") for at in range(20)]
    note = evaluate(tiny.model("gpt2", n_positions=128), dataset(*many), metrics=["letter_bias"]).measures[0].note
    draws = torch.randint(3, (4000, 60), generator=torch.Generator().manual_seed(0))
    shares = torch.stack([(draws == at).double().mean(1) for at in range(3)], dim=1)
    expected = float(unevenness(shares, [3]).mean())
    assert note.startswith("random letters in all 60 questions would give about 0.")
    assert float(note.split()[-1]) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        (FACTS, {"choice_template": "{prompt} Answer:"}, r"choice_template='\{prompt\} Answer:' must hold \{options\}"),
        (FACTS, {"choice_option": "{option}"}, r"choice_option='\{option\}' must hold \{letter\}"),
        (FACTS, {"choice_orders": 0}, "choice_orders=0 is neither None nor a positive number"),
        (FACTS, {"choice_template": "{subject}{options}"}, "'a1': choice_template=.* needs a 'subject'"),
        (FACTS, {"cloze_length": "words"}, "cloze_length='words' is not 'tokens' or 'characters' or 'none'"),
        ((fact("a", "Anna is", " Oslo", " Rome", "Oslo"),), {}, "'a': the option 'Oslo' is there twice"),
        ((fact("a", "Anna is", " Oslo", *map(str, range(26))),), {}, "'a': 27 options, and only 26 letters"),
        ((fact("a", "A or B?", " A", " B", format="multiple_choice"),), {}, "test has only multiple choice"),
    ],
)
def test_mistakes_are_named(items: tuple[Fact, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoceditError, match=message):
        evaluate(tiny.model("gpt2"), dataset(*items), metrics=["choice_accuracy"], **options)


def test_answers_that_are_letters_are_left_out_of_letters_only() -> None:
    model = tiny.model("gpt2", n_positions=128)
    lettered = fact("m", "A or B?", " A", " B", format="multiple_choice")
    found = evaluate(model, dataset(*FACTS, lettered), metrics=["choice_accuracy", "cloze_accuracy"])
    assert found.get("forget", "choice_accuracy", stage="before").note == "1 facts are multiple choice already"
    assert set(found.get("forget", "cloze_accuracy", stage="before").per_example) == {"a1", "c1", "e1", "m"}


def test_a_tokenizer_without_the_letters_is_said(tiny_lab: Lab) -> None:
    data = tiny_lab.task.forget.where(group="city", format="statement")
    with pytest.raises(LoceditError, match="no token of its own for each of the letters A, B, C, D, E, F"):
        evaluate(tiny_lab.model, data, metrics=["choice_accuracy"])


# --- on a model that has learned it -----------------------------------------------------------------------------------


def test_the_lab_answers_in_its_own_form_and_not_after_its_mlps_are_gone(tiny_lab: Lab) -> None:
    task = Task(forget=tiny_lab.task.forget.where(group="sport", format="statement"))
    names = [*LETTERS, "cloze_accuracy", "cloze_probability"]
    form = {
        "choice_template": "Which sport does {subject} play?{options} Answer:",
        "choice_option": " {letter} {option}",
    }
    edit = zero(tiny_lab.model, tiny_lab.model.everything("mlp"))
    found = evaluate(tiny_lab.model, task, edit, metrics=names, **form)
    before, after = (
        {name: found.get("forget", name, stage=stage).value for name in names} for stage in ("before", "after")
    )
    assert before["choice_accuracy"] > 0.7
    assert before["letter_bias"] < 0.2
    assert before["cloze_accuracy"] == 1
    assert after["choice_accuracy"] < 0.6
    assert after["letter_bias"] > before["letter_bias"]
    assert after["cloze_probability"] < 0.7 < before["cloze_probability"]


def test_plain_texts_have_no_options() -> None:
    with pytest.raises(LoceditError, match="'choice_accuracy' needs items of kind fact"):
        evaluate(tiny.model("gpt2"), dataset(PlainText(text="Anna Berg", id="t")), metrics=["choice_accuracy"])

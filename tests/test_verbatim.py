"""Extraction strength, and what is really written: by hand, by plain transformers, by rouge_score."""

import math
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from locedit.data import Dataset, Fact, Item, PlainText, PrivateText, TokenText, encode
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.evaluate.facts import extraction_strength
from locedit.evaluate.scoring import TokenScores
from locedit.evaluate.verbatim import Passage, _judged, greedy, passages, rouge  # pyright: ignore[reportPrivateUsage]
from locedit.lab import Lab
from locedit.models import Model
from tests import tiny

PROMPTS = ("Anna Berg was born in", "Carl Dane works as a", "Question: where was Anna Berg born? Answer:", "Eva")
WRITTEN = ["verbatim_completion", "rouge_l_recall", "rouge_l_f1", "rouge_1_recall"]


def dataset(*items: Item) -> Dataset:
    return Dataset(items=items, source="test")


@torch.inference_mode()
def continued(model: Model, ids: list[int], count: int) -> list[int]:
    """Token by token, by whole forward passes of plain transformers."""
    for _ in range(count):
        ids = [*ids, int(model.module(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[len(ids) - count :]


def hits(*values: int) -> TokenScores:
    ones = torch.tensor(values).float()
    return TokenScores(log_probs=-ones, ranks=2 - ones, hits=ones)


# --- extraction strength ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "expected"),
    [((1, 1, 1), 1.0), ((0, 1, 1, 1), 0.75), ((1, 0, 1), 1 / 3), ((1, 1, 0), 0.0), ((0,), 0.0), ((1,), 1.0)],
)
def test_strength_by_hand_with_its_true_zero(right: tuple[int, ...], expected: float) -> None:
    assert extraction_strength(hits(*right)) == pytest.approx(expected)


def test_windows_of_one_text_are_not_taken_for_several() -> None:
    """A text of several windows proves no more than one: its windows were once drawn again one by one."""
    model = tiny.model("gpt2")
    long = PlainText(text=" ".join(tiny.CORPUS * 2), id="long")
    measure = evaluate(model, dataset(long), metrics=["extraction_strength"]).measures[0]
    assert measure.n > 2
    assert math.isnan(measure.low)
    two = evaluate(model, dataset(long, PlainText(text=tiny.CORPUS[0], id="short")), metrics=["extraction_strength"])
    assert not math.isnan(two.measures[0].low)


def strength(model: Model, ids: list[int], start: int) -> float:
    """The published search: the smallest k from which on the argmax matches; 1 - k / T."""
    with torch.inference_mode():
        said = model.module(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()[start - 1 : -1]
    truth = ids[start:]
    return next((1 - k / len(truth) for k in range(len(truth)) if said[k:] == truth[k:]), 0.0)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_strength_of_answers_suffixes_and_whole_texts(architecture: str) -> None:
    """Half of each text is what the model itself goes on with, so that neither end of the range is reached."""
    model = tiny.model(architecture)
    start = model.tokenizer("Anna Berg was born in").input_ids
    ids = [*start, 90, 91, *continued(model, [*start, 90, 91], 3)]
    token = TokenText(ids=tuple(ids), span=(len(start), len(ids)), id="t")
    found = evaluate(model, dataset(token), metrics=["extraction_strength"]).measures[0]
    assert found.value == pytest.approx(strength(model, ids, len(start))) == pytest.approx(3 / 5)
    text = tiny.CORPUS[2]
    at = text.index("555")
    whole = model.tokenizer(text).input_ids
    private = PrivateText(text=text, spans=((at, at + 8, "phone"),), id="p", owner="eva")
    plain = PlainText(text=text, id="q")
    for item in (private, plain):
        measure = evaluate(model, dataset(item), metrics=["extraction_strength"]).measures[0]
        assert measure.value == pytest.approx(strength(model, whole, 1))
    fact = Fact(prompt="Anna Berg was born in", answer=" Oslo. Anna Berg", id="f")
    measure = evaluate(model, dataset(fact), metrics=["extraction_strength"]).measures[0]
    assert measure.value == pytest.approx(
        strength(model, model.tokenizer(fact.prompt + fact.answer).input_ids, len(start))
    )


def test_greedy_continuation_from_k_on_writes_the_rest() -> None:
    model = tiny.model("gpt2")
    start = model.tokenizer("Anna Berg was born in").input_ids
    ids = [*start, 90, 91, *continued(model, [*start, 90, 91], 3)]
    value = (
        evaluate(
            model,
            dataset(TokenText(ids=tuple(ids), span=(len(start), len(ids)), id="t")),
            metrics=["extraction_strength"],
        )
        .measures[0]
        .value
    )
    k = round((1 - value) * 5)
    assert continued(model, ids[: len(start) + k], 5 - k) == ids[len(start) + k :]


def test_a_private_text_keeps_the_other_metrics_of_its_span() -> None:
    model = tiny.model("gpt2")
    text = tiny.CORPUS[2]
    at = text.index("555")
    data = dataset(PrivateText(text=text, spans=((at, at + 8, "phone"),), id="p"))
    both = evaluate(model, data, metrics=["probability", "extraction_strength"])
    alone = evaluate(model, data, metrics=["probability"])
    assert both.get("forget", "probability", stage="before").per_example == alone.measures[0].per_example


def test_exact_memorization_is_memorization_accuracy_under_its_published_name() -> None:
    model = tiny.model("gpt2")
    start = model.tokenizer("Anna Berg was born in").input_ids
    ids = (*start, *continued(model, start, 2), 90, 91)
    data = dataset(TokenText(ids=ids, span=(len(start), len(ids)), id="t"))
    found = evaluate(model, data, metrics=["exact_memorization", "memorization_accuracy"])
    values = [
        found.get("forget", name, stage="before").value for name in ("exact_memorization", "memorization_accuracy")
    ]
    assert values[0] == values[1] >= 0.5


# --- what is written --------------------------------------------------------------------------------------------------


def known_and_unknown(model: Model) -> list[TokenText]:
    """Suffixes that the model itself writes, some of them with one other token."""
    found: list[TokenText] = []
    for at, prompt in enumerate(PROMPTS):
        ids = model.tokenizer(prompt).input_ids
        said = continued(model, ids, 3 + at)
        for name, token in (("same", said[-1]), ("other", said[-1] + 1 if said[-1] < 300 else 50)):
            whole = (*ids, *said[:-1], token)
            found.append(TokenText(ids=whole, span=(len(ids), len(whole)), id=f"{name} {at}"))
    return found


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_verbatim_completion_is_accuracy_on_greedy(architecture: str) -> None:
    model = tiny.model(architecture)
    data = dataset(*known_and_unknown(model))
    found = evaluate(model, data, metrics=["verbatim_completion", "accuracy"])
    verbatim, accuracy = (
        found.get("forget", name, stage="before").per_example for name in ("verbatim_completion", "accuracy")
    )
    assert verbatim == accuracy
    assert verbatim == {item.id: float(item.id.startswith("same")) for item in data}


@pytest.mark.parametrize("tokens", [None, 2, 20])
def test_rouge_equals_the_library_on_plain_generation(tokens: int | None) -> None:
    model = tiny.model("gpt2")
    facts = [Fact(prompt=p, answer=f" born 12 in Oslo {p.split()[0]}", id=p) for p in PROMPTS]
    found = evaluate(model, dataset(*facts), metrics=WRITTEN[1:], rouge_tokens=tokens)
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    for item, example in zip(facts, encode(model, facts), strict=True):
        start = example.targets[0]
        count = len(example.ids) - start if tokens is None else tokens
        said = continued(model, list(example.ids[:start]), count)
        end = said.index(2) if 2 in said else len(said)
        expected = scorer.score(item.answer, model.tokenizer.decode(said[:end], skip_special_tokens=True))
        measured = {name: found.get("forget", name, stage="before").per_example[item.id] for name in WRITTEN[1:]}
        assert measured["rouge_l_recall"] == pytest.approx(expected["rougeL"].recall)
        assert measured["rouge_l_f1"] == pytest.approx(expected["rougeL"].fmeasure)
        assert measured["rouge_1_recall"] == pytest.approx(expected["rouge1"].recall)


def test_rouge_by_hand() -> None:
    # reference of four words, three of them in order in a continuation of six; "bakers" is stemmed to "baker"
    found = rouge("anna works as bakers", "anna the as baker of works")
    assert found == pytest.approx({"rouge_l_recall": 3 / 4, "rouge_l_f1": 2 * 0.75 * 0.5 / 1.25, "rouge_1_recall": 1.0})
    assert rouge("Осло", "Осло") is None


def test_rouge_judges_as_many_tokens_as_are_asked_for_also_where_the_answer_has_more() -> None:
    model = tiny.model("gpt2")
    first, both = (tuple(model.tokenizer(text).input_ids) for text in (" Oslo", " Oslo Lima"))
    assert both[: len(first)] == first
    prompt = encode(model, dataset(Fact(prompt="Anna Berg was born in", answer=" Oslo", id="f")))[0].prompt()
    passage = Passage(prompt=prompt, reference=both)
    for tokens, recall in ((None, 1.0), (len(both), 1.0), (len(first), 0.5)):
        judged = _judged(model, passage, both, tokens)
        assert judged["verbatim_completion"] == 1, "it is judged by all that was written"
        assert judged["rouge_1_recall"] == judged["rouge_l_recall"] == recall


def test_batches_and_padding_change_nothing() -> None:
    """Prompts and references of different lengths, in a context that not all of them fit together."""
    model = tiny.model("llama")
    words = ("Anna Berg was born in Oslo. " * 6).strip()
    items = [
        Fact(prompt=" ".join(words.split()[:count]), answer=" " + " ".join(words.split()[:rest]), id=f"{count}")
        for count, rest in ((1, 36), (30, 1), (3, 4), (6, 2), (2, 8))
    ]
    asked = [each[0] for each in passages(encode(model, items))]
    longest = max(len(one.prompt.ids) for one in asked)
    assert longest + max(len(one.reference) for one in asked) > tiny.CONTEXT
    alone = [greedy(model, [one])[0] for one in asked]
    assert [len(row) for row in alone] == [len(one.reference) for one in asked]
    assert greedy(model, asked, batch_size=64) == alone
    assert greedy(model, asked, batch_size=2) == alone
    more = greedy(model, asked, tokens=1000)
    lengths = [len(one.prompt.ids) + len(row) for one, row in zip(asked, more, strict=True)]
    assert max(lengths) == tiny.CONTEXT  # some rows end their text before
    assert lengths.count(tiny.CONTEXT) > 1
    assert all(row[: len(short)] == short for row, short in zip(more, alone, strict=True))


def test_every_span_of_a_text_is_written_after_the_true_text() -> None:
    model = tiny.model("gpt2")
    text = tiny.CORPUS[2]
    spans = tuple((text.index(part), text.index(part) + len(part), "x") for part in ("555-0134", "eva@frost.org"))
    data = dataset(PrivateText(text=text, spans=spans, id="p"))
    example = encode(model, data)[0]
    found = [each for each in passages([example])[0]]
    assert [each.prompt.ids for each in found] == [example.ids[: span.start] for span in example.spans]
    assert [each.reference for each in found] == [example.ids[span.start : span.end] for span in example.spans]
    measure = evaluate(model, data, metrics=["verbatim_completion"]).measures[0]
    assert measure.value == 0


def test_a_script_that_rouge_cannot_read_is_left_out_and_said() -> None:
    model = tiny.model("gpt2")
    facts = [Fact(prompt="Anna is from", answer=" Oslo", id="a"), Fact(prompt="Anna is from", answer=" Осло", id="b")]
    found = evaluate(model, dataset(*facts), metrics=WRITTEN)
    measure = found.get("forget", "rouge_l_recall", stage="before")
    assert (list(measure.per_example), measure.note) == (["a"], "1 items have no word of a-z or 0-9 and are left out")
    assert found.get("forget", "verbatim_completion", stage="before").n == 2
    with pytest.raises(LoceditError, match="no answer has a word of a-z or 0-9"):
        evaluate(model, dataset(facts[1]), metrics=WRITTEN)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("bert", {}, "is a masked language model"),
        ("gpt2", {"rouge_tokens": 0}, "rouge_tokens=0 is neither None nor a positive number"),
    ],
)
def test_mistakes_are_named(architecture: str, options: dict[str, Any], message: str) -> None:
    data = dataset(Fact(prompt="Anna is from", answer=" Oslo", id="a"))
    with pytest.raises(LoceditError, match=message):
        evaluate(tiny.model(architecture), data, metrics=["rouge_l_f1"], **options)


def test_the_lab_says_what_it_learned_and_not_what_it_did_not(tiny_lab: Lab) -> None:
    found = evaluate(tiny_lab.model, tiny_lab.task, metrics=[*WRITTEN, "extraction_strength"])
    for name in (*WRITTEN, "extraction_strength"):
        known, stranger = (found.get(part, name, stage="before").value for part in ("retain", "heldout"))
        assert known > 0.85 > 0.6 > stranger

"""Forgetting the spans and keeping the rest of the same text: both measured, by hand and after training."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from locedit.data import Dataset, Fact, Item, PlainText, PrivateText, Task, encode
from locedit.edit import Edit
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.evaluate.span_memorization import span_extraction
from locedit.models import Model, load
from locedit.spans import find_spans, rest
from locedit.unlearn import unlearn
from tests import tiny

TEXTS = (
    "The phone number of Eva Frost is 555-0134, the e-mail is eva@frost.org.",
    "Call Carl Dane on 700-4812 or write to carl@dane.net.",
)


def dataset(*items: Item) -> Dataset:
    return Dataset(items=items, source="test")


PLAIN = dataset(*(PlainText(text=text, id=f"t{at}") for at, text in enumerate(TEXTS)))


def private() -> Dataset:
    return find_spans(PLAIN, "patterns").data


# --- the complement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_span_and_rest_share_no_token_and_make_up_the_text(architecture: str) -> None:
    model = tiny.model(architecture)
    data = private()
    inside, outside = encode(model, data), encode(model, rest(data, model))
    for item, span, other in zip(data, inside, outside, strict=True):
        assert isinstance(item, PrivateText)
        assert other.ids == span.ids
        assert other.id == f"{span.id}/rest"
        assert not set(span.targets) & set(other.targets)
        offsets = model.tokenizer(item.text, return_offsets_mapping=True)["offset_mapping"]
        dark = {at for at, (start, end) in enumerate(offsets) if item.text[start:end].strip()}
        predictable = dark - ({0} if model.causal else set())
        assert (set(span.targets) | set(other.targets)) & dark == predictable
    assert all(item.spans[0][2] == "rest" for item in rest(data, model) if isinstance(item, PrivateText))


def test_a_first_character_of_several_tokens_is_in_neither() -> None:
    """Nothing predicts its first token, and its other tokens stand for the same character."""
    model = tiny.model("gpt2")
    text = "日本 was born in Oslo"
    assert [place[1] for place in model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]][:4] == [
        1,
        1,
        1,
        2,
    ]
    found = find_spans(dataset(PlainText(text=text, id="t")), lambda _: [(0, 2), "Oslo"], model=model)
    assert [(each.text, each.label) for each in found.rejected] == [("日", "annotated")]
    (span,), (other,) = encode(model, found.data), encode(model, rest(found.data, model))
    assert sorted({*span.targets, *other.targets}) == list(range(3, len(span.ids)))
    assert not set(span.targets) & set(other.targets)
    whole = find_spans(
        dataset(PlainText(text=text, id="t")), "surprisal", scorer=model, threshold="quantile", quantile=0.99
    )
    assert min(encode(model, whole.data)[0].targets) == 3


def test_other_data_to_retain_go_beside_the_rest() -> None:
    model = tiny.model("llama")
    data = private()
    text = PlainText(text="Anna Berg works as a baker.", id="p")
    fact = Fact(prompt="Anna Berg was born in", answer=" Oslo", id="f")
    for other, scored in ((text, encode(model, [text])[0]), (fact, encode(model, [fact])[0])):
        both = rest(data, model, beside=dataset(other))
        assert [item.id for item in both] == ["t0/rest", "t1/rest", other.id]
        assert encode(model, both)[-1].targets == scored.targets
    covered = dataset(PrivateText(text="Anna", spans=((0, 4, "x"),), id="c"))
    with pytest.raises(LoceditError):  # one token that nothing predicts: there is neither span nor rest
        rest(covered, model)


# --- the measures -----------------------------------------------------------------------------------------------------


def argmax(model: Model, ids: Sequence[int]) -> list[int]:
    """The most likely token after each one, by plain transformers."""
    with torch.inference_mode():
        return model.module(input_ids=torch.tensor([list(ids)])).logits[0].argmax(-1).tolist()


def greedy(model: Model, ids: Sequence[int], length: int) -> list[int]:
    """The ids continued up to a length; an end token (2) is the last."""
    ids = list(ids)
    while len(ids) < length:
        ids.append(argmax(model, ids)[-1])
        if ids[-1] == 2:
            break
    return ids


def s_el_by_hand(model: Model, ids: tuple[int, ...], end: int, n: int, starts: Sequence[int]) -> float:
    """The mean over prefixes of the share of the n-grams that begin in the span, position by position."""
    shares: list[float] = []
    for at in starts:
        begins = [i for i in range(at, end) if i + n <= len(ids)]
        true = [ids[i : i + n] for i in begins]
        said = tuple(greedy(model, ids[:at], min(len(ids), end + n - 1)))
        written = [said[i : i + n] for i in begins if i + n <= len(said)]
        shares.append(sum(gram in true for gram in written) / len(true))
    return sum(shares) / len(shares)


@pytest.mark.parametrize(("n", "prefix"), [(1, "span_start"), (2, "span_start"), (2, "all"), (50, "all")])
def test_span_extraction_by_its_formula(half: Model, n: int, prefix: Any) -> None:
    texts = encode(half, private())
    found = span_extraction(half, texts, n=n, prefix=prefix)
    seen: set[float] = set()
    for example, values in zip(texts, found, strict=True):
        for span, value in zip(example.spans, values, strict=True):
            size = min(n, span.end - span.start)
            starts = [span.start] if prefix == "span_start" else range(span.start, span.end - size + 1)
            expected = s_el_by_hand(half, example.ids, span.end, size, starts)
            assert value == pytest.approx(expected)
            seen.add(value)
    assert len(seen) > 1, "all alike would say nothing"


def test_metrics_of_spans_and_rest_count_tokens(half: Model) -> None:
    both, other = private().items
    assert isinstance(both, PrivateText)
    data = dataset(dataclasses.replace(both, spans=both.spans[:1]), other)  # unequal numbers of spans
    task = Task(forget=data)
    names = ("s_ma", "s_el", "rest_accuracy")
    found = evaluate(half, task, metrics=names, s_el_n=2)
    measured = {measure.name: measure for measure in found.measures if measure.group is None}
    hits: dict[str, list[bool]] = {"s_ma": [], "rest_accuracy": []}
    for example in encode(half, data):
        said = argmax(half, example.ids)
        for at in range(1, len(example.ids)):
            hits["s_ma" if at in example.targets else "rest_accuracy"].append(said[at - 1] == example.ids[at])
    for name, own in hits.items():
        assert measured[name].value == pytest.approx(sum(own) / len(own))
        assert 0 < sum(own) < len(own)
    spans = span_extraction(half, encode(half, data), n=2)
    flat = [value for own in spans for value in own]
    assert measured["s_el"].value == pytest.approx(sum(flat) / len(flat))
    assert [measured[name].direction for name in names] == ["lower", "lower", "higher"]
    always = {measure.name for measure in evaluate(half, task).measures}
    assert not always & set(names)
    with pytest.raises(LoceditError, match="s_el_n"):
        evaluate(half, task, metrics=("s_el",), s_el_n=0)


# --- the contrast -----------------------------------------------------------------------------------------------------


def trained(passes: int) -> Model:
    """A tiny model that has read the texts."""
    module = tiny.module("gpt2", seed=3)
    ids = [torch.tensor([tiny.tokenizer()(text)["input_ids"]]) for text in TEXTS]
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(passes):
        for row in ids:
            loss = module(input_ids=row, labels=row).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return load(module.eval(), tokenizer=tiny.tokenizer(), device="cpu")


@pytest.fixture(scope="module")
def memorised() -> Model:
    """A model that has the texts by heart."""
    return trained(40)


@pytest.fixture(scope="module")
def half() -> Model:
    """A model that has some of the texts by heart."""
    return trained(10)


def span_and_rest(model: Model, edit: Edit | None = None) -> tuple[float, float]:
    """Share of right tokens in the spans and in the rest."""
    result = evaluate(model, Task(forget=private()), edit, metrics=("s_ma", "rest_accuracy"), draws=10)
    stage = "before" if edit is None else "after"
    found = {each.name: each.value for each in result.measures if each.group is None and each.stage == stage}
    return found["s_ma"], found["rest_accuracy"]


OPTIONS: dict[str, Any] = {"steps": 15, "learning_rate": 3e-3, "eval_every": 0}


@pytest.mark.parametrize(("method", "unit"), [("npo", None), ("ihl", "neuron"), ("wga", "head")])
def test_losses_on_spans_forget_them_and_keep_the_rest(memorised: Model, method: str, unit: str | None) -> None:
    assert span_and_rest(memorised) == (1, 1)
    data = private()
    kept = Task(forget=data, retain=rest(data, memorised))
    within = None if unit is None else memorised.everything(unit)
    span, other = span_and_rest(memorised, unlearn(memorised, kept, method, within=within, **OPTIONS))
    assert span < 0.2
    assert other > 0.95


def test_ascent_on_whole_texts_takes_the_rest_along(memorised: Model) -> None:
    span, other = span_and_rest(memorised, unlearn(memorised, Task(forget=PLAIN), "ga", **OPTIONS))
    assert span < 0.2
    assert other < 0.2


def test_ascent_on_the_spans_alone_takes_less_of_the_rest_at_the_same_level(memorised: Model) -> None:
    options: dict[str, Any] = {"until": 0.03, "level": "token_probability", "eval_every": 1}
    found = {
        name: span_and_rest(memorised, unlearn(memorised, Task(forget=data), "ga", **options))
        for name, data in (("spans", private()), ("texts", PLAIN))
    }
    assert max(span for span, _ in found.values()) < 0.4
    assert found["spans"][1] > 0.6
    assert found["texts"][1] < 0.4

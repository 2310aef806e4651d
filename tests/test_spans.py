"""Spans by rule: what patterns, known values and probabilities mark, by hand and against plain transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from locedit.data import Dataset, Fact, Item, PlainText, PrivateText, Task, encode, read_facts
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.spans import PATTERNS, FoundSpans, SurprisalOptions, find_spans
from locedit.spans.surprisal import low_runs
from locedit.spans.words import occurrences
from tests import tiny


def dataset(*items: Item, **fields: Any) -> Dataset:
    return Dataset(items=items, source="test", **fields)


def plain(*texts: str) -> Dataset:
    return dataset(*(PlainText(text=text, id=f"t{at}", owner=f"o{at}") for at, text in enumerate(texts)))


def marked(found: FoundSpans) -> dict[str, list[tuple[str, str]]]:
    """id -> (piece, label) of every span."""
    texts = [item for item in found.data if isinstance(item, PrivateText)]
    return {item.id: [(item.text[start:end], label) for start, end, label in item.spans] for item in texts}


# --- in the data ------------------------------------------------------------------------------------------------------


def test_given_spans_are_those_of_the_data_or_of_some_labels() -> None:
    item = PrivateText(text="Eva: 555, eva@f.org", spans=((5, 8, "phone"), (10, 19, "email")), id="p", owner="Eva")
    other = PrivateText(text="Anna 333", spans=((5, 8, "phone"),), id="q")
    assert find_spans(dataset(item, other), "given").data.items == (item, other)
    found = find_spans(dataset(item, other), "given", labels=("email",))
    assert marked(found) == {"p": [("eva@f.org", "email")]}
    assert found.without == ("q",)
    assert found.data[0].owner == "Eva"
    with pytest.raises(LoceditError, match="no span has the label 'mail'; did you mean 'email'"):
        find_spans(dataset(item), "given", labels=("mail",))
    with pytest.raises(LoceditError, match="texts of kind 'plain' have no spans of their own"):
        find_spans(plain("a b"), "given")


def test_the_span_of_a_fact_is_the_stretch_that_its_loss_scores() -> None:
    model = tiny.model("llama")
    fact = Fact(prompt="Anna Berg was born in", answer=" Oslo.", id="a", owner="Anna")
    as_text = find_spans(dataset(fact), "given").data
    assert marked(find_spans(dataset(fact), "given")) == {"a": [("Oslo.", "answer")]}
    assert encode(model, as_text)[0].targets == encode(model, [fact])[0].targets
    with pytest.raises(LoceditError, match="leave out the chat template"):
        find_spans(dataset(fact, chat="Q: {prompt}"), "given")


# --- patterns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to eva.frost+x@mail.frost.org.", [("eva.frost+x@mail.frost.org", "email")]),
        ("Call 555-0134 or +49 (30) 901820!", [("555-0134", "phone"), ("+49 (30) 901820", "phone")]),
        ("Born 1990-02-17, moved 3/4/2001.", [("1990-02-17", "date"), ("3/4/2001", "date")]),
        ("On May 5, 1999 and 12th March 2004", [("May 5, 1999", "date"), ("12th March 2004", "date")]),
        ("He lives at 221B Baker Street, London.", [("221B Baker Street", "address")]),
        ("It cost 1,250.50 in 2019; abc123 no.", [("1,250.50", "number"), ("2019", "number")]),
        ("电话13812345678，生于1990-02-17。", [("13812345678", "phone"), ("1990-02-17", "date")]),
        ("010-1234-5678입니다, โทร0812345678ครับ", [("010-1234-5678", "phone"), ("0812345678", "phone")]),
    ],
)
def test_built_in_patterns_by_hand(text: str, expected: list[tuple[str, str]]) -> None:
    assert marked(find_spans(plain(text), "patterns")) == {"t0": expected}


def test_only_the_chosen_patterns_and_texts_without_any_are_named() -> None:
    data = plain("Call 555-0134 on 1990-02-17", "nothing here")
    found = find_spans(data, "patterns", patterns=("date",))
    assert marked(found) == {"t0": [("1990-02-17", "date")]}
    assert found.without == ("t1",)
    assert found.data[0].owner == "o0"
    with pytest.raises(LoceditError, match="nothing is marked in any of the 2 texts"):
        find_spans(data, "patterns", patterns=("email",))
    with pytest.raises(LoceditError, match="did you mean 'email'"):
        find_spans(data, "patterns", patterns=("mail",))
    assert set(PATTERNS) == {"email", "date", "phone", "address", "number"}


def test_names_are_whole_words_and_the_longest_wins(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("Anna\nAnna Berg\n\nCarl\n")
    found = find_spans(plain("Annabel met Anna Berg, Anna and Carla."), "patterns", patterns=(), names=str(names))
    assert marked(found) == {"t0": [("Anna Berg", "name"), ("Anna", "name")]}


def test_a_name_may_stand_beside_letters_of_a_script_without_spaces() -> None:
    text = "我叫Ann。李雷 met Annabel, Anế, _Ann and 5Ann."
    assert occurrences(text, "Ann") == [(2, 5)]
    assert occurrences(text, "李雷") == [(6, 8)]


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_own_patterns(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"own{suffix}"
    table = {"badge": "badge (?P<span>[A-Z]\\d+)", "plate": ["[A-Z]{2}-\\d+", "no plate"]}
    file.write_text(
        json.dumps(table) if suffix == ".json" else "\n".join(f"{k} = {json.dumps(v)}" for k, v in table.items())
    )
    found = find_spans(plain("badge A77, car HB-123"), "patterns", patterns=(), file=str(file))
    assert marked(found) == {"t0": [("A77", "badge"), ("HB-123", "plate")]}
    file.write_text('{"badge": "("}' if suffix == ".json" else 'badge = "("')
    with pytest.raises(LoceditError, match=rf"own{suffix}: pattern 'badge': '\(' is not a regular expression"):
        find_spans(plain("a"), "patterns", file=str(file))


def test_matches_that_touch_are_one_span_with_the_label_of_the_longest() -> None:
    # "number" matches 555 and 0134, which lie inside what "phone" matches
    assert marked(find_spans(plain("Call 555-0134"), "patterns", patterns=("number", "phone"))) == {
        "t0": [("555-0134", "phone")]
    }


# --- known values -----------------------------------------------------------------------------------------------------


def test_a_facts_own_answer_is_marked_where_it_answers_and_its_subject_everywhere() -> None:
    fact = Fact(prompt="A or B? Anna lives in Oslo. Anna chose", answer=" A", subject="Anna", id="f", owner="nobody")
    found = find_spans(dataset(fact), "fields", mark=("answer", "subject"))
    text = fact.prompt + fact.answer
    assert [(start, end) for start, end, _ in found.data.items[0].spans] == [  # type: ignore[union-attr]
        (8, 12), (28, 32), (len(text) - 1, len(text)),
    ]  # fmt: skip
    found = find_spans(dataset(fact), "fields", mark=("answer", "owner"))
    assert [(each.text, each.reason) for each in found.rejected] == [("nobody", "does not occur in the text")]


def test_values_of_other_facts_are_found_in_texts() -> None:
    facts = dataset(
        Fact(prompt="Anna lives in", answer=" Oslo", subject="Anna", id="f1"),
        Fact(prompt="Carl lives in", answer=" Lima", subject="Carl", id="f2"),
    )
    data = plain("Oslo is where Anna went; Osloers love Oslo.", "Nobody here")
    found = find_spans(data, "fields", mark=("answer", "subject"), values=facts)
    assert marked(found) == {"t0": [("Oslo", "answer"), ("Anna", "subject"), ("Oslo", "answer")]}
    assert {(each.id, each.text, each.reason) for each in found.rejected} == {
        ("f2", "Lima", "occurs in no text"),
        ("f2", "Carl", "occurs in no text"),
    }
    with pytest.raises(LoceditError, match="has none of the fields answer; give values="):
        find_spans(data, "fields")


# --- by probability ---------------------------------------------------------------------------------------------------


def probabilities(model: Model, text: str) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """Characters and probability of every token but the first, by plain transformers."""
    coded = model.tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor([coded["input_ids"]])
    with torch.inference_mode():
        table = model.module(input_ids=ids).logits[0].float().softmax(-1)
    return coded["offset_mapping"][1:], table[:-1].gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("threshold", ["mean", "quantile"])
def test_tokens_below_the_threshold_are_marked(threshold: str) -> None:
    model, scorer = tiny.model("gpt2"), tiny.model("llama", seed=5)
    text = tiny.CORPUS[2]
    offsets, p = probabilities(scorer, text)
    ordered, at = p.sort().values, 0.25 * (len(p) - 1)
    quartile = ordered[int(at)] + (at - int(at)) * (ordered[int(at) + 1] - ordered[int(at)])
    low = p < (p.sum() / len(p) if threshold == "mean" else quartile)
    expected = {at for (start, end), is_low in zip(offsets, low, strict=True) if is_low for at in range(start, end)}
    found = find_spans(plain(text, "Carl Dane"), "surprisal", scorer=scorer, threshold=threshold, quantile=0.25)
    covered = {at for start, end, _ in found.data.items[0].spans for at in range(start, end)}  # type: ignore[union-attr]
    blank = {at for at, letter in enumerate(text) if letter.isspace()}
    assert covered - blank == expected - blank
    assert 0 < len(covered) < len(text)
    # the model that is to forget reads the same tokens, and scores those that were chosen; white space alone is none
    chosen = {at + 1 for at, is_low in enumerate(low) if is_low}
    dark = {at + 1 for at, (start, end) in enumerate(offsets) if text[start:end].strip()}
    targets = set(encode(model, found.data)[0].targets)
    assert targets & dark == chosen & dark
    assert targets <= chosen
    alone = find_spans(plain(text), "surprisal", model=scorer, threshold=threshold)
    assert marked(alone)["t0"] == marked(found)["t0"]


def test_difference_marks_what_the_model_knows_better_than_the_scorer() -> None:
    model, scorer = tiny.model("gpt2"), tiny.model("llama", seed=5)
    text = tiny.CORPUS[0]
    offsets, own = probabilities(model, text)
    gain = own - probabilities(scorer, text)[1]
    chosen = gain > gain.mean()
    expected = {at for (start, end), hit in zip(offsets, chosen, strict=True) if hit for at in range(start, end)}
    found = find_spans(plain(text), "surprisal", model=model, scorer=scorer, by="difference")
    covered = {at for start, end, _ in found.data.items[0].spans for at in range(start, end)}  # type: ignore[union-attr]
    blank = {at for at, letter in enumerate(text) if letter.isspace()}
    assert covered - blank == expected - blank
    assert 0 < int(chosen.sum()) < len(chosen)


def test_tokens_of_one_character_are_marked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    text = "Anna 😀 b"
    offsets = model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"][1:]
    parts = [at for at, place in enumerate(offsets) if place == (5, 6)]
    assert len(parts) == 4
    p = torch.full((len(offsets),), 0.9)
    p[[parts[0], parts[2]]] = 0.1
    monkeypatch.setattr("locedit.spans.surprisal._probabilities", lambda *_: [p])
    assert marked(find_spans(plain(text), "surprisal", scorer=model)) == {"t0": [("😀", "surprisal")]}


def test_gaps_are_closed_before_short_runs_are_dropped() -> None:
    p = torch.tensor([0.1, 0.9, 0.1, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9])
    assert low_runs(p, SurprisalOptions()) == [(0, 1), (2, 3), (5, 6)]
    assert low_runs(p, SurprisalOptions(gap=1)) == [(0, 3), (5, 6)]
    assert low_runs(p, SurprisalOptions(gap=1, shortest=2)) == [(0, 3)]
    assert low_runs(p, SurprisalOptions(gap=2)) == [(0, 6)]
    assert low_runs(p, SurprisalOptions(shortest=2)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "pattern"}, "did you mean 'patterns'"),
        ({"rule": "surprisal"}, "rule 'surprisal' needs a model: give scorer or model"),
        ({"rule": "surprisal", "by": "difference", "model": 0}, "by='difference' needs a model: give scorer"),
        ({"rule": "surprisal", "model": 0, "quantile": 1.0}, "quantile=1.0 must lie between 0 and 1"),
        ({"rule": "surprisal", "model": 0, "gap": -1}, "gap=-1 must be at least 0"),
        ({"rule": "patterns", "verify": "context"}, "verify='context' needs a model: give model"),
        ({"rule": "patterns", "verify": "contxt"}, "did you mean 'context'"),
        ({"rule": "patterns", "scorer": "start"}, "the task 'task' names no start model"),
        ({"rule": "patterns", "steps": 3}, "patterns has no option 'steps'"),
        ({"rule": "fields", "mark": ("answeer",)}, "did you mean 'answer'"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], message: str) -> None:
    if "model" in options:
        options = options | {"model": tiny.model("gpt2")}
    with pytest.raises(LoceditError, match=message) as error:
        find_spans(plain("Call 555-0134"), **options)
    assert "\n" not in str(error.value)


# --- tokens and files -------------------------------------------------------------------------------------------------


def test_spans_are_widened_to_whole_tokens_and_the_first_token_is_reported() -> None:
    model = tiny.model("gpt2")
    text = "Anna Berg was born in Oslo."
    offsets = model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    inside = next(at for at, (start, end) in enumerate(offsets) if at > 2 and end - start > 3)
    start, end = offsets[inside]
    found = find_spans(plain(text), lambda _: [(start + 1, end - 1, "part"), (0, offsets[1][1], "begin")], model=model)
    (example,) = encode(model, found.data)
    assert set(example.targets) == {1, inside}  # not position 0, which nothing predicts
    assert [each.label for each in found.rejected] == ["begin"]
    assert "first token" in found.rejected[0].reason
    with pytest.raises(LoceditError, match="inside the token"):
        encode(model, find_spans(plain(text), lambda _: [(start + 1, end - 1)]).data)


def test_a_file_of_spans_is_read_back_and_not_replaced(tmp_path: Path) -> None:
    found = find_spans(plain("Call 555-0134 — ü", "mail a@b.cd"), "patterns")
    path = tmp_path / "forget.jsonl"
    found.save(path)
    assert read_facts(path).items == found.data.items
    assert json.loads(path.read_text().splitlines()[0])["spans"] == [[5, 13, "phone"]]
    with pytest.raises(LoceditError, match="exists already; give --force"):
        found.save(path)
    find_spans(plain("mail a@b.cd"), "patterns").save(path, force=True)
    assert len(read_facts(path)) == 1


def test_of_a_task_the_forget_data_are_marked_and_other_kinds_are_refused() -> None:
    task = Task(forget=plain("Call 555-0134"))
    assert marked(find_spans(task, "patterns")) == {"t0": [("555-0134", "phone")]}
    from locedit.data import ContrastPair

    pair = ContrastPair(advantaged="he is", disadvantaged="she is", id="c")
    with pytest.raises(LoceditError, match="not in 'contrast'"):
        find_spans(dataset(pair), "patterns")

"""Texts to tokens: the scored stretch is exactly what was meant, or there is an error."""

import dataclasses
import random

import pytest
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from locedit.data import (
    IGNORE,
    ContrastPair,
    Fact,
    LabelledText,
    PatchPair,
    PlainText,
    PrivateText,
    TokenText,
    batches,
    collate,
    encode,
)
from locedit.errors import LoceditError
from tests import tokens

FAMILIES = ("trimmed", "untrimmed", "sentence_piece")


def fact(prompt: str = "The capital of France is", answer: str = " Paris.", **more: object) -> Fact:
    return Fact(**({"prompt": prompt, "answer": answer, "id": "f"} | more))


def text_of(model: tokens.Encodes, example: object, span: object) -> str:
    """The decoded tokens of a span."""
    return model.tokenizer.decode(list(example.ids[span.start : span.end]))


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_tokens_are_the_answer_and_nothing_else(family: str) -> None:
    model = tokens.causal(family)
    [example] = encode(model, [fact()])
    [span] = example.spans
    pieces = model.tokenizer.convert_ids_to_tokens(list(example.ids[span.start : span.end]))
    assert "".join(pieces).replace("Ġ", " ").replace("▁", " ") == " Paris."
    assert example.ids == tuple(model.tokenizer("The capital of France is Paris.").input_ids)
    assert example.prompt().ids == tuple(model.tokenizer("The capital of France is").input_ids)
    assert example.prompt().spans == ()


def test_tokenizing_prompt_and_answer_apart_would_give_other_ids() -> None:
    """The contrast that joining is for: a sentence-piece tokenizer puts a space before every text."""
    model = tokens.causal("sentence_piece")
    example = encode(model, [fact("Question: where is Paris? Answer:\n", "France")])[0]
    apart = model.tokenizer("France", add_special_tokens=False).input_ids
    assert list(example.ids[example.targets[0] :]) != apart


@pytest.mark.parametrize("family", FAMILIES)
def test_space_at_the_end_of_the_prompt_is_an_error(family: str) -> None:
    with pytest.raises(LoceditError, match=r"item 'f': the token ' P.*' lies across .* move the space"):
        encode(tokens.causal(family), [fact("The capital of France is ", "Paris.")])


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spaces_stay_where_they_are(family: str) -> None:
    """A doubled space is a token of its own in the prompt, whatever the offsets leave out."""
    model = tokens.causal(family)
    [example] = encode(model, [fact("The capital of France is ", " Paris.")])
    pieces = model.tokenizer.convert_ids_to_tokens(list(example.ids[example.targets[0] :]))
    assert "".join(pieces).replace("Ġ", " ").replace("▁", " ") == " Paris."


def test_a_masked_models_tokens_have_no_spaces_so_either_side_may_hold_it() -> None:
    model = tokens.masked()
    first, second = encode(model, [fact(), fact("The capital of France is ", "Paris.", id="g")])
    assert first.ids == second.ids
    assert first.targets == second.targets
    assert text_of(model, first, first.spans[0]) == "paris."


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_inside_a_word_is_an_error(family: str) -> None:
    with pytest.raises(LoceditError, match="begin the answer with a space"):
        encode(tokens.causal(family), [fact(answer="Paris")])


def test_token_across_the_border_is_named() -> None:
    model = tokens.causal("trimmed")
    assert "55" in "".join(model.tokenizer.convert_ids_to_tokens(model.tokenizer("555-0134").input_ids))
    with pytest.raises(LoceditError, match="lies across the border .* begin the answer with a space"):
        encode(model, [fact("Call Eva Frost at 5", "55-0134")])


@pytest.mark.parametrize(("prompt", "answer"), [("法国的首都是", "巴黎"), ("เมืองหลวง", "ปารีส"), ("In room 7", "3")])
def test_scripts_without_spaces_are_not_words_cut_in_two(prompt: str, answer: str) -> None:
    [example] = encode(tokens.causal("trimmed"), [fact(prompt, answer)])
    assert tokens.byte_level().decode(list(example.ids[example.targets[0] :])) == answer


@pytest.mark.parametrize("family", FAMILIES)
def test_any_text_is_cut_exactly_at_the_border_or_refused(family: str) -> None:
    """Random texts with runs of spaces, line ends, digits and characters of several bytes."""
    model = tokens.causal(family)
    generator = random.Random(0)
    parts = ("The", " capital", " ", "  ", "\n", " of", "55", "-", "é", "🙂", ".", "\t", " Paris", "'s", "a")
    cut = 0
    for _ in range(400):
        prompt, answer = ("".join(generator.choices(parts, k=generator.randint(1, 6))) for _ in range(2))
        try:
            [example] = encode(model, [fact(prompt, answer)])
        except LoceditError:
            continue
        border = example.targets[0]
        known = model.tokenizer.unk_token_id not in example.ids or model.tokenizer.unk_token_id is None
        if known and "▁" not in prompt + answer:
            cut += 1
            assert written(model, example.ids[border:]) == answer
    assert cut > 30


def written(model: tokens.Encodes, ids: tuple[int, ...]) -> str:
    """What tokens stand for, spaces in front included, from their spelling alone."""
    pieces = "".join(model.tokenizer.convert_ids_to_tokens(list(ids)))
    if model.tokenizer.unk_token is not None:
        return pieces.replace("▁", " ")
    byte = {letter: number for number, letter in bytes_to_unicode().items()}
    return bytes(byte[letter] for letter in pieces).decode()


@pytest.mark.parametrize("answer", ["<|endoftext|>", "<|endoftext|><|endoftext|>"])
def test_answer_of_special_tokens_vanishes(answer: str) -> None:
    with pytest.raises(LoceditError, match="vanishes in tokenization"):
        encode(tokens.causal("trimmed"), [fact(answer=answer)])


def test_answer_of_unknown_tokens_vanishes_but_not_one_that_is_partly_known() -> None:
    model = tokens.masked()
    with pytest.raises(LoceditError, match="item 'f': answer ' 巴' vanishes"):
        encode(model, [fact(answer=" 巴")])
    assert len(encode(model, [fact(answer=" 巴 paris")])[0].targets) >= 2


def test_control_characters_that_a_normalizer_removes_vanish() -> None:
    with pytest.raises(LoceditError, match="vanishes"):
        encode(tokens.masked(), [fact(answer="\u200d")])


def test_a_second_bos_is_an_error() -> None:
    model = tokens.causal("sentence_piece")
    assert encode(model, [fact()])[0].ids[0] == model.tokenizer.bos_token_id
    with pytest.raises(LoceditError, match=r"begins with '<s>' and the tokenizer adds another"):
        encode(model, [fact("<s>The capital of France is")])


def test_first_token_of_a_causal_model_cannot_be_scored() -> None:
    private = PrivateText(text="555-0134 is the number", spans=((0, 8, "phone"),), id="p")
    with pytest.raises(LoceditError, match="'p'.*very first token"):
        encode(tokens.causal("trimmed"), [private])
    assert encode(tokens.causal("sentence_piece"), [private])[0].targets[0] == 1
    assert encode(tokens.masked(), [private])[0].targets[0] == 1


def test_too_long_names_item_and_lengths() -> None:
    model = dataclasses.replace(tokens.causal("trimmed"), max_length=5)
    length = len(model.tokenizer("The capital of France is Paris.").input_ids)
    with pytest.raises(LoceditError, match=f"item 'f': {length} tokens do not fit the model's context of 5"):
        encode(model, [fact()])


def test_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(LoceditError, match="Slow.*fast one is needed"):
        encode(tokens.Encodes(Slow()), [fact()])


@pytest.mark.parametrize("family", FAMILIES)
def test_private_spans_with_and_without_their_leading_space(family: str) -> None:
    text = "Call Eva Frost at 555-0134 or write to eva@frost.org today."
    start = text.index("555")
    model = tokens.causal(family)
    spans = [((start - space, start + 8, "phone"),) for space in (0, 1)]
    first, second = encode(model, [PrivateText(text=text, spans=s, id=str(i)) for i, s in enumerate(spans)])
    assert first.spans == second.spans
    assert text_of(model, first, first.spans[0]).strip() == "555-0134"
    assert first.spans[0].label == "phone"


@pytest.mark.parametrize(("start", "end", "where"), [(6, 8, "begins"), (4, 7, "ends")])
def test_span_inside_a_token_is_an_error(start: int, end: int, where: str) -> None:
    model = tokens.causal("trimmed")
    assert "Ġcapital" in model.tokenizer("The capital of").tokens()
    private = PrivateText(text="The capital of France", spans=((start, end, "bit"),), id="p")
    with pytest.raises(LoceditError, match=f"item 'p': bit .* {where} inside the token"):
        encode(model, [private])


def test_characters_of_several_byte_tokens_align() -> None:
    text = "Call 🙂 today."
    private = PrivateText(text=text, spans=((5, 6, "face"),), id="p")
    for family in ("trimmed", "untrimmed"):
        model = tokens.causal(family)
        [example] = encode(model, [private])
        assert len(example.targets) >= 4
        assert text_of(model, example, example.spans[0]).strip() == "🙂"


@pytest.mark.parametrize("family", FAMILIES)
def test_subject_tokens(family: str) -> None:
    model = tokens.causal(family)
    named, other, none = encode(
        model,
        [fact(subject="capital of France"), fact(subject="Spain", id="g"), fact(id="h")],
    )
    assert text_of(model, named, named.subject).strip() == "capital of France"
    assert other.subject is None
    assert none.subject is None


def test_plain_text_is_scored_whole_but_for_what_nothing_predicts() -> None:
    plain = PlainText(text="The capital of France is Paris.", id="t")
    without, with_bos = (encode(tokens.causal(family), [plain])[0] for family in ("trimmed", "sentence_piece"))
    assert without.targets == tuple(range(1, len(without.ids)))
    assert with_bos.targets == tuple(range(1, len(with_bos.ids)))
    masked = encode(tokens.masked(), [plain])[0]
    assert masked.targets == tuple(range(1, len(masked.ids) - 1))  # [CLS] and [SEP] are not text
    [labelled] = encode(tokens.causal("trimmed"), [LabelledText(text=plain.text, label="x", id="t")])
    assert labelled.targets == without.targets


def test_a_masked_model_predicts_even_the_first_token() -> None:
    """The byte-level tokenizer adds nothing in front, so only a causal model must leave position 0 out."""
    plain = PlainText(text="The capital", id="t")
    model = tokens.Encodes(tokens.byte_level(), causal=False)
    assert encode(model, [plain])[0].targets[0] == 0
    assert encode(tokens.causal("trimmed"), [plain])[0].targets[0] == 1


def test_plain_text_of_one_token_has_nothing_to_score() -> None:
    with pytest.raises(LoceditError, match="'t'.*no token that the model can predict"):
        encode(tokens.causal("trimmed"), [PlainText(text="T", id="t")])


@pytest.mark.parametrize("family", [*FAMILIES, "masked"])
@pytest.mark.parametrize("size", [4, 5, 9])
def test_windows_of_a_long_text_score_every_token_once(family: str, size: int) -> None:
    model = tokens.masked() if family == "masked" else tokens.causal(family)
    text = "The capital of France is Paris. Call Eva Frost at 555-0134 or write to her."
    [whole] = encode(model, [PlainText(text=text, id="t")])
    parts = encode(dataclasses.replace(model, max_length=size), [PlainText(text=text, id="t")])
    assert [part.id for part in parts] == [f"t#{number}" for number in range(len(parts))]
    assert max(len(part.ids) for part in parts) <= size
    scored = [part.ids[position] for part in parts for position in part.targets]
    assert scored == [whole.ids[position] for position in whole.targets]


def test_pairs_give_two_examples() -> None:
    model = tokens.masked()
    pair = ContrastPair(advantaged="write to eva today", disadvantaged="write to paris today", id="c")
    first, second = encode(model, [pair])
    assert (first.id, first.kind, second.id, second.kind) == (
        "c/advantaged",
        "advantaged",
        "c/disadvantaged",
        "disadvantaged",
    )
    assert text_of(model, first, first.spans[0]) == "eva"
    assert text_of(model, second, second.spans[0]) == "paris"
    patch = PatchPair(
        clean="The capital of France is", corrupt="The capital of Italy is", answer=" Paris", wrong=" Rome", id="q"
    )
    clean, corrupt = encode(model, [patch])
    assert (clean.kind, corrupt.kind) == ("clean", "corrupt")
    assert text_of(model, corrupt, corrupt.spans[0]) == "paris"
    assert patch.fact("corrupt", "wrong").answer == " Rome"


def test_equal_texts_of_a_pair_are_an_error() -> None:
    with pytest.raises(LoceditError, match="'c'.*do not differ"):
        encode(tokens.masked(), [ContrastPair(advantaged="same", disadvantaged="same", id="c")])


def test_token_ids_travel_as_they_are() -> None:
    model = tokens.causal("sentence_piece")
    [example] = encode(model, [TokenText(ids=(9, 8, 7, 6), span=(2, 4), id="n")])
    assert example.ids == (9, 8, 7, 6)  # no BOS
    assert example.targets == (2, 3)
    with pytest.raises(LoceditError, match="item 'n': token 99999 at position 1"):
        encode(model, [TokenText(ids=(9, 99999), span=(1, 2), id="n")])


def test_collate_pads_and_shifts() -> None:
    model = tokens.causal("trimmed")
    batch = collate(encode(model, [fact(), fact("Call Eva Frost at", " 555-0134 or today", id="g")]), model)
    short, long = sorted(batch.rows, key=lambda row: len(row.ids))
    assert batch.ids.shape == (2, len(long.ids))
    assert batch.attention_mask.sum(1).tolist() == [len(row.ids) for row in batch.rows]
    assert (batch.ids[batch.attention_mask == 0] == 0).all()  # this tokenizer has no padding token
    predicting = batch.predicting(True)
    assert predicting.sum() == batch.scored.sum() == len(short.targets) + len(long.targets)
    for row, example in enumerate(batch.rows):
        assert batch.labels[row][batch.scored[row]].tolist() == [example.ids[t] for t in example.targets]
        assert predicting[row].nonzero().flatten().tolist() == [t - 1 for t in example.targets]
    assert set(batch.span_labels) == {"answer"}
    assert batch.examples == batch.rows


def test_masked_rows_mask_one_token_each() -> None:
    model = tokens.masked()
    examples = encode(model, [fact(), fact("Call Eva Frost at", " 555-0134", id="g")])
    batch = collate(examples, model)
    assert len(batch) == sum(len(example.targets) for example in examples)
    assert batch.examples == tuple(examples)
    assert (batch.scored.sum(1) == 1).all()
    for row, example in enumerate(batch.rows):
        [position] = batch.scored[row].nonzero().flatten().tolist()
        visible = batch.ids[row, : len(example.ids)].tolist()
        assert visible[position] == model.tokenizer.mask_token_id
        assert batch.labels[row, position] == example.ids[position]
        visible[position] = example.ids[position]
        assert tuple(visible) == example.ids
    assert torch.equal(batch.predicting(False), batch.scored)


def test_examples_given_twice_stay_two() -> None:
    model = tokens.masked()
    [example] = encode(model, [fact()])
    assert len(collate([example, example], model).examples) == 2


def test_a_prompt_alone_has_no_label() -> None:
    for model in (tokens.causal("trimmed"), tokens.masked()):
        batch = collate([example.prompt() for example in encode(model, [fact()])], model)
        assert len(batch) == 1
        assert (batch.labels == IGNORE).all()


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_batches_hold_every_example_once_and_little_padding(size: int) -> None:
    model = tokens.causal("trimmed")
    examples = encode(model, [fact("Call " * count + "is", id=str(count)) for count in (7, 1, 4, 2, 9)])
    found = list(batches(examples, model, size))
    assert sorted(row.id for batch in found for row in batch.rows) == ["1", "2", "4", "7", "9"]
    assert max(len(batch) for batch in found) <= size
    lengths = [len(row.ids) for batch in found for row in batch.rows]
    assert lengths == sorted(lengths)


def test_masked_batches_count_rows_and_never_divide_an_example() -> None:
    model = tokens.masked()
    examples = encode(model, [fact(id=str(number)) for number in range(5)])
    each = len(examples[0].targets)
    assert [len(batch) for batch in batches(examples, model, 2 * each)] == [2 * each, 2 * each, each]
    assert [len(batch) for batch in batches(examples, model, 1)] == [each] * 5


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(LoceditError, match="batch size 0"):
        list(batches([], tokens.masked(), 0))


def test_several_spans_keep_their_labels() -> None:
    text = "Call Eva Frost at 555-0134 or write to eva@frost.org today."
    spans = tuple(
        (text.index(part), text.index(part) + len(part), label)
        for part, label in (("555-0134", "phone"), ("eva@frost.org", "mail"))
    )
    model = tokens.causal("trimmed")
    batch = collate(encode(model, [PrivateText(text=text, spans=spans, id="p", owner="Eva")]), model)
    phone, mail = batch.rows[0].spans
    assert batch.span_labels == ("phone",) * (phone.end - phone.start) + ("mail",) * (mail.end - mail.start)
    assert batch.rows[0].owner == "Eva"

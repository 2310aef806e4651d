"""Spans by an annotator, and the second check: what a model would have to write, and ratios by plain transformers."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from locedit.data import Dataset, Item, PlainText, PrivateText, encode
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.spans import AnnotatorOptions, FoundSpans, Verification, find_spans
from locedit.spans.annotator import ask, pieces_of
from tests import tiny

TEXT = "Anna Berg was born in Oslo. Anna Berg works as a baker."


def dataset(*items: Item) -> Dataset:
    return Dataset(items=items, source="test")


def plain(*texts: str) -> Dataset:
    return dataset(*(PlainText(text=text, id=f"t{at}") for at, text in enumerate(texts)))


def pieces(found: FoundSpans) -> list[list[str]]:
    return [
        [item.text[start:end] for start, end, _ in item.spans] for item in found.data if isinstance(item, PrivateText)
    ]


# --- annotators -------------------------------------------------------------------------------------------------------


def test_a_function_gives_pieces_or_places() -> None:
    def annotate(text: str) -> list[Any]:
        return [" Oslo", "Bern", (10, 13), (45, 55, "job")] if "Oslo" in text else []

    found = find_spans(plain(TEXT, "Nothing."), annotate)
    assert isinstance(found.data[0], PrivateText)
    assert found.data[0].spans == ((10, 13, "annotated"), (22, 26, "annotated"), (45, 55, "job"))
    assert found.without == ("t1",)
    assert [(each.text, each.reason) for each in found.rejected] == [("Bern", "does not occur in the text")]
    for bad in ([(3, 99)], [(4, 4)], [("a", "b")], [7], "Oslo", None):
        with pytest.raises(LoceditError, match="item 't0': the annotator gave"):
            find_spans(plain(TEXT), lambda _, bad=bad: bad)


def test_pieces_are_the_first_line_of_an_answer() -> None:
    assert pieces_of("\n Anna; 'Oslo' ;; \nText: x; y") == ["Anna", "Oslo"]
    assert pieces_of(" none") == pieces_of("None.") == pieces_of("  \n ") == []
    assert pieces_of("a; a; b") == ["a", "b"]


def test_a_model_is_asked_greedily_with_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tmp_path / "prompt.txt"
    template.write_text("{examples}Text: {text}\nPrivate:")
    shown = dataset(PrivateText(text="Eva: 55", spans=((0, 3, "n"), (5, 7, "p")), id="e"))
    options = AnnotatorOptions(template=str(template), examples=shown, max_new_tokens=5, batch_size=2)
    assert options.prompts(["Hi {examples}"]) == ["Text: Eva: 55\nPrivate: Eva; 55\n\nText: Hi {examples}\nPrivate:"]
    # the answers are greedy continuations of the prompt, token by token with a whole forward pass each
    model = tiny.model("gpt2")
    prompts = ["Anna Berg was", "Carl", "The e-mail of Carl is "]
    expected: list[str] = []
    for prompt in prompts:
        ids = model.tokenizer(prompt.rstrip())["input_ids"]
        start = len(ids)
        with torch.inference_mode():
            for _ in range(5):
                ids.append(int(model.module(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(model.tokenizer.decode(ids[start:], skip_special_tokens=True))
    assert ask(model, prompts, options, names=["a", "b", "c"]) == expected
    # and what they name is marked where it occurs, else reported
    written = {"t0": " Oslo; Bern\n\nText: another", "t1": " none"}
    monkeypatch.setattr("locedit.spans.annotator.ask", lambda *_, **__: list(written.values()))
    found = find_spans(plain(TEXT, "Nothing."), "annotator", annotator=model, template=str(template))
    assert pieces(found) == [["Oslo"]]
    assert [each.text for each in found.rejected] == ["Bern"]
    template.write_text("no place")
    with pytest.raises(LoceditError, match="has no {text}"):
        find_spans(plain(TEXT), "annotator", annotator=model, template=str(template))


# --- verification -----------------------------------------------------------------------------------------------------


def log_probs(model: Model, ids: list[int], start: int) -> float:
    """Mean log-probability of the tokens from `start` on, by plain transformers."""
    with torch.inference_mode():
        table = model.module(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return float(torch.stack([table[at - 1, ids[at]] for at in range(start, len(ids))]).mean())


def both(text: str) -> list[tuple[int, int]]:
    """Two stretches of whole words."""
    return [(text.index("born"), text.index("born") + 7), (text.index("Oslo"), text.index("Oslo") + 4)]


def ratios(model: Model, other: Model | None) -> list[float]:
    """Probability per token of each stretch over that without what is before it, or under another model."""
    found: list[float] = []
    for span in both(TEXT):
        item = PrivateText(text=TEXT, spans=((*span, "x"),), id="x")
        (example,) = encode(model, [item])
        first, last = example.targets[0], example.targets[-1]
        own = log_probs(model, list(example.ids[: last + 1]), first)
        if other is None:
            low = log_probs(model, [1, *example.ids[first : last + 1]], 1)  # 1 is <s>
        else:
            low = log_probs(other, list(example.ids[: last + 1]), first)
        found.append(math.exp(own - low))
    return found


@pytest.mark.parametrize("by", ["context", "scorer"])
def test_a_span_is_kept_where_context_or_model_raises_it_by_the_factor(by: Any) -> None:
    model, scorer = tiny.model("gpt2"), tiny.model("llama", seed=5)
    expected = ratios(model, scorer if by == "scorer" else None)
    assert abs(expected[0] - expected[1]) > 0.2, "the two spans must differ for the test to say anything"
    high = expected.index(max(expected))
    between = math.sqrt(expected[0] * expected[1])
    check = Verification(by=by, factor=between)
    found = find_spans(plain(TEXT), both, model=model, scorer=scorer, verify=check)
    start, end = both(TEXT)[high]
    assert pieces(found) == [[TEXT[start:end]]]
    (rejected,) = found.rejected
    assert f"a factor of {min(expected):.3g}, below {between:g}" in rejected.reason
    loose = dataclasses.replace(check, factor=min(expected) * 0.99)
    assert len(pieces(find_spans(plain(TEXT), both, model=model, scorer=scorer, verify=loose))[0]) == 2
    strict = dataclasses.replace(check, factor=max(expected) * 1.01)
    with pytest.raises(LoceditError, match="nothing is marked in any of the 1 texts; rejected"):
        find_spans(plain(TEXT), both, model=model, scorer=scorer, verify=strict)


def test_a_second_annotation_by_function_or_model() -> None:
    found = find_spans(plain(TEXT), both, verify=lambda text, piece: "Anna" in text and piece == "Oslo")
    assert pieces(found) == [["Oslo"]]
    assert [each.reason for each in found.rejected] == ["the second annotation says no"]
    model = tiny.model("gpt2", n_positions=256)
    verdicts: list[bool] = []
    for start, end in both(TEXT):
        prompt = f'Text: {TEXT}\nQuestion: Is "{TEXT[start:end]}" a private detail? Answer yes or no.\nAnswer:'
        before = len(model.tokenizer(prompt)["input_ids"])
        scores = [
            (len(ids) - before) * log_probs(model, ids, before)
            for ids in (model.tokenizer(prompt + word)["input_ids"] for word in (" yes", " no"))
        ]
        verdicts.append(scores[0] > scores[1])
    kept = [TEXT[start:end] for (start, end), yes in zip(both(TEXT), verdicts, strict=True) if yes]
    found = _or_nothing(model)
    assert found == kept


def _or_nothing(model: Model) -> list[str]:
    try:
        return pieces(find_spans(plain(TEXT), both, model=model, verify="annotator"))[0]
    except LoceditError:
        return []


def test_masked_models_verify_too() -> None:
    model = tiny.model("bert")
    check = Verification(factor=1e-9)
    assert len(pieces(find_spans(plain(TEXT), both, model=model, verify=check))[0]) == 2


def test_a_prompt_that_does_not_fit_names_its_text(tmp_path: Path) -> None:
    (tmp_path / "template.txt").write_text("{text}\nPrivate:")
    texts, given = plain("Short.", "Anna Berg was born. " * 40), {"template": str(tmp_path / "template.txt")}
    with pytest.raises(LoceditError, match="item 't1': .* tokens do not fit"):
        find_spans(texts, "annotator", annotator=tiny.model("gpt2"), **given)

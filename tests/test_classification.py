"""Classification by the next word: probabilities against a plain forward pass, and labelled texts as facts."""

import math

import pytest
import torch

from locedit.classification import Verbaliser, as_facts, classify, label_numbers
from locedit.data import Dataset, LabelledText, encode
from locedit.edit import levels
from locedit.errors import LoceditError
from tests import tiny

ONE_TOKEN = Verbaliser(template="{text} Answer:", words={"yes": " was", "no": " is"})
SEVERAL = Verbaliser(template="{text}?", words={"yes": " Oslo or so", "no": " Lima", "other": "!!"})
TEXTS = ["Anna Berg was born in Oslo.", "Carl Dane works as a {pilot}", "Eva"]


def data() -> Dataset:
    items = [LabelledText(text=text, label=label, id=str(i), group=f"g{i}", owner="me")
             for i, (text, label) in enumerate(zip(TEXTS, ["yes", "no", "yes"], strict=True))]  # fmt: skip
    return Dataset(items=tuple(items), source="here")


def by_hand(model, text: str, verbaliser: Verbaliser) -> torch.Tensor:
    """Normalised products of next-token probabilities, one unpadded forward pass a word."""
    found: list[float] = []
    prompt = verbaliser.template.replace("{text}", text)
    for word in verbaliser.words.values():
        before = model.tokenizer(prompt)["input_ids"]
        ids = model.tokenizer(prompt + word)["input_ids"]
        assert ids[: len(before)] == before
        with torch.no_grad():
            log_probs = model.module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(math.exp(sum(float(log_probs[at - 1, ids[at]]) for at in range(len(before), len(ids)))))
    return torch.tensor(found) / sum(found)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("verbaliser", [ONE_TOKEN, SEVERAL], ids=["one token", "several tokens"])
def test_probabilities_equal_plain_forward_passes(architecture: str, verbaliser: Verbaliser) -> None:
    model = tiny.model(architecture)
    found = classify(model, TEXTS, verbaliser, batch_size=2)
    expected = torch.stack([by_hand(model, text, verbaliser) for text in TEXTS])
    assert found.shape == (3, len(verbaliser.labels))
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-4)
    assert expected.std() > 0.01, "the words must differ for the comparison to say anything"


def test_labelled_texts_as_facts() -> None:
    facts = as_facts(data(), ONE_TOKEN)
    fact = facts[1]
    assert (fact.prompt, fact.answer, fact.wrong) == ("Carl Dane works as a {pilot} Answer:", " is", (" was",))
    assert (fact.id, fact.owner, fact.group) == ("1", "me", "g1")
    assert facts.kind == "fact"
    assert label_numbers(data(), ONE_TOKEN).tolist() == [0, 1, 0]


def test_level_of_the_facts_is_the_words_probability() -> None:
    """With one token a word, level = P(word), whose ratio between classes is what classify normalises."""
    model = tiny.model("gpt2")
    facts = as_facts(data(), ONE_TOKEN)
    wrong = facts.expand("wrong")
    right = [levels(model, {"a": [example]})["a"] for example in encode(model, facts)]
    other = [levels(model, {"a": [example]})["a"] for example in encode(model, wrong)]
    share = torch.tensor(right) / (torch.tensor(right) + torch.tensor(other))
    found = classify(model, TEXTS, ONE_TOKEN).gather(1, label_numbers(data(), ONE_TOKEN)[:, None])[:, 0]
    torch.testing.assert_close(found, share, atol=1e-6, rtol=1e-5)


def test_prompts_go_through_the_chat_template() -> None:
    """The same as a verbaliser that holds what the template puts around a prompt."""
    model = tiny.model("gpt2")
    whole = Verbaliser(template="Eva: {text} Answer: Bo:", words=ONE_TOKEN.words)
    found = classify(model, TEXTS, ONE_TOKEN, chat="Eva: {prompt} Bo:")
    torch.testing.assert_close(found, classify(model, TEXTS, whole))
    assert (found - classify(model, TEXTS, ONE_TOKEN)).abs().max() > 1e-3


def test_no_texts_give_no_rows() -> None:
    assert classify(tiny.model("gpt2"), [], ONE_TOKEN).shape == (0, 2)


def test_what_cannot_be_asked_is_said() -> None:
    with pytest.raises(LoceditError, match=r"template='label:' must hold \{text\} exactly once"):
        Verbaliser(template="label:")
    with pytest.raises(LoceditError, match="at least two classes"):
        Verbaliser(words={"toxic": " toxic"})
    with pytest.raises(LoceditError, match="'a' and 'b' have the same word ' x'"):
        Verbaliser(words={"a": " x", "b": " x"})
    with pytest.raises(LoceditError, match="more than white space"):
        Verbaliser(words={"a": " ", "b": " x"})
    with pytest.raises(LoceditError, match=r"item '0': unknown label 'yes'; choices: toxic, fine"):
        as_facts(data(), Verbaliser())
    with pytest.raises(LoceditError, match="' Anna' and ' Anna Berg' begin with the same token"):
        classify(tiny.model("gpt2"), TEXTS, Verbaliser(words={"a": " Anna", "b": " Anna Berg"}))
    with pytest.raises(LoceditError, match="needs a causal model"):
        classify(tiny.model("bert"), TEXTS, ONE_TOKEN)
    with pytest.raises(LoceditError, match="needs items of kind 'labelled'"):
        as_facts(as_facts(data(), ONE_TOKEN), ONE_TOKEN)

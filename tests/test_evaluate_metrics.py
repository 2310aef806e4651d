"""Metrics of facts, private spans and texts against plain transformers, and what evaluate() makes of them."""

import dataclasses
import math
from typing import Any

import pytest
import torch

import locedit.evaluate
from locedit.data import Dataset, Fact, Item, Neighbour, PlainText, PrivateText, Task, TokenText, encode
from locedit.edit import Edit, zero
from locedit.errors import LoceditError
from locedit.evaluate import METRICS, evaluate
from locedit.evaluate.scoring import token_scores, vocabulary_ranks
from locedit.evaluate.values import direction_on
from locedit.models import Model
from locedit.results import Evaluation
from tests import tiny


def fact(name: str, prompt: str, answer: str, **fields: Any) -> Fact:
    return Fact(prompt=prompt, answer=answer, id=name, owner=name[0], **fields)


FACTS = (
    fact(
        "a1", "Anna Berg was born in", " Oslo", format="statement", paraphrases=("Anna Berg is from", "Anna: born in")
    ),
    fact("a2", "Question: where was Anna Berg born? Answer:", " Oslo", format="question"),
    fact(
        "c1",
        "Carl Dane works as a",
        " pilot",
        format="statement",
        neighbours=(Neighbour(prompt="Eva is", answer=" baker"),),
    ),
    fact("c2", "The e-mail of Carl is", " carl@dane.org", format="question"),
)
TEXTS = tuple(PlainText(text=text, id=f"t{at}") for at, text in enumerate(tiny.CORPUS))


def dataset(*items: Item) -> Dataset:
    return Dataset(items=items, source="test")


TASK = Task(forget=dataset(*FACTS[:2]), retain=dataset(*FACTS[2:]), texts=dataset(*TEXTS))


def some_edit(model: Model) -> Edit:
    return zero(model, model.components({"blocks.1.mlp.neuron": range(40)}))


def by_hand(model: Model, item: Fact) -> tuple[float, bool, int]:
    """Probability, argmax and rank of the answer by plain transformers, one text at a time."""
    example = encode(model, [item])[0]
    ids = torch.tensor([example.ids])
    with torch.inference_mode():
        logits = model.module(input_ids=ids).logits[0]
    steps = [(logits[at - 1], example.ids[at]) for at in example.targets]
    probability = math.prod(float(row.softmax(-1)[token]) for row, token in steps)
    row, first = steps[0]
    return probability, all(int(row.argmax()) == token for row, token in steps), 1 + int((row > row[first]).sum())


# --- token scores ---------------------------------------------------------------------------------------------------


def test_ranks_by_hand() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 2.0], [5.0, 5.0, 0.0]])
    assert vocabulary_ranks(logits, torch.tensor([1, 0, 1])).tolist() == [1.0, 2.0, 1.5]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_batching_order_and_padding_change_nothing(architecture: str) -> None:
    model = tiny.model(architecture)
    examples = encode(model, FACTS)
    alone = [token_scores(model, [example])[0] for example in examples]
    for size in (1, 3, 64):
        together = token_scores(model, examples[::-1], batch_size=size)[::-1]
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one.log_probs, other.log_probs, rtol=1e-5, atol=1e-5)
            assert one.ranks.tolist() == other.ranks.tolist()


def test_masked_tokens_are_predicted_each_alone() -> None:
    model = tiny.model("bert")
    example = encode(model, [FACTS[3]])[0]
    found = token_scores(model, [example])[0]
    for number, at in enumerate(example.targets):
        ids = torch.tensor([example.ids])
        ids[0, at] = model.tokenizer.mask_token_id
        with torch.inference_mode():
            expected = model.module(input_ids=ids).logits[0, at].log_softmax(-1)[example.ids[at]]
        assert float(found.log_probs[number]) == pytest.approx(float(expected), abs=1e-4)
    assert len(example.targets) > 3


def test_a_model_with_nan_weights_is_named() -> None:
    model = tiny.model("gpt2")
    examples = encode(model, FACTS[:1])
    with torch.no_grad():
        model.parameter("transformer.ln_f.bias")[0] = float("nan")
    with pytest.raises(LoceditError, match="item 'a1'.*NaN"):
        token_scores(model, examples)


# --- metrics against plain transformers -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_facts_equal_plain_transformers(architecture: str) -> None:
    model = tiny.model(architecture)
    found = evaluate(model, TASK, metrics=["probability", "accuracy", "rank", "paraphrase_probability"])
    expected = {item.id: by_hand(model, item) for item in FACTS}
    for part, names in (("forget", ("a1", "a2")), ("retain", ("c1", "c2"))):
        measures = [found.get(part, name, stage="before") for name in ("probability", "accuracy", "rank")]
        for measure, column in zip(measures, range(3), strict=True):
            for name in names:
                assert measure.per_example[name] == pytest.approx(float(expected[name][column]), rel=1e-4)
            assert measure.value == pytest.approx(sum(measure.per_example.values()) / 2)
    asked = [by_hand(model, dataclasses.replace(FACTS[0], prompt=prompt))[0] for prompt in FACTS[0].paraphrases]
    paraphrased = found.get("forget", "paraphrase_probability", stage="before")
    assert paraphrased.per_example == {"a1": pytest.approx(sum(asked) / 2, rel=1e-4)}
    assert paraphrased.note == "1 facts have none and are left out"


def test_rank_of_an_unlikely_word_is_its_place_in_the_order() -> None:
    model = tiny.model("gpt2")
    ids = encode(model, FACTS[:1])[0].prompt().ids
    with torch.inference_mode():
        order = model.module(input_ids=torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()
    words = [(rank, model.tokenizer.decode([token])) for rank, token in enumerate(order, 1)]
    said = [(rank, word) for rank, word in words if word.isascii() and word.strip().isalpha() and word.startswith(" ")]
    rank, word = said[-1]
    item = fact("k", FACTS[0].prompt, word)
    assert evaluate(model, dataset(item)).get("forget", "rank", stage="before").value == rank
    assert evaluate(model, dataset(item)).get("forget", "accuracy", stage="before").value == 0


def test_memorization_accuracy_is_a_share_of_span_tokens() -> None:
    model = tiny.model("gpt2")
    prompt = encode(model, FACTS[:1])[0].prompt()
    with torch.inference_mode():
        best = int(model.module(input_ids=torch.tensor([prompt.ids])).logits[0, -1].argmax())
    text = TokenText(ids=(*prompt.ids, best, 4, 4, 4), span=(len(prompt.ids), len(prompt.ids) + 4), id="s")
    found = evaluate(model, dataset(text), metrics=["memorization_accuracy", "accuracy", "reciprocal_rank"])
    scores = token_scores(model, encode(model, [text]))[0]
    assert scores.hits.tolist() == [1, 0, 0, 0]
    assert found.get("forget", "memorization_accuracy", stage="before").value == 0.25
    assert found.get("forget", "accuracy", stage="before").value == 0
    expected = float((1 / scores.ranks).mean())
    assert found.get("forget", "reciprocal_rank", stage="before").value == pytest.approx(expected)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_perplexity_is_exp_of_the_transformers_loss(architecture: str) -> None:
    model = tiny.model(architecture)
    found = evaluate(model, TASK, metrics=["perplexity"]).get("texts", "perplexity", stage="before")
    losses, tokens = [], []
    for text in TEXTS:
        ids = torch.tensor([model.tokenizer(text.text).input_ids])
        with torch.inference_mode():
            loss = float(model.module(input_ids=ids, labels=ids).loss)
        assert found.per_example[text.id] == pytest.approx(math.exp(loss), rel=1e-4)
        losses.append(loss)
        tokens.append(ids.shape[1] - 1)
    total = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    assert found.value == pytest.approx(math.exp(total), rel=1e-4)
    assert len(set(tokens)) > 1, "texts of one length would not show the weights"


def test_a_private_text_has_the_perplexity_of_the_whole_text() -> None:
    model = tiny.model("gpt2")
    text = tiny.CORPUS[2]
    at = text.index("555")
    item = PrivateText(text=text, spans=((at, at + 8, "phone"),), id="p")
    private = evaluate(model, dataset(item), metrics=["perplexity"]).get("forget", "perplexity", stage="before")
    plain = evaluate(model, TASK, metrics=["perplexity"]).get("texts", "perplexity", stage="before")
    assert private.value == pytest.approx(plain.per_example["t2"])
    assert (private.direction, plain.direction) == ("higher", "lower")


def test_shift_is_zero_for_an_edit_of_nothing_and_equals_plain_kl_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    names = ["kl_to_base", "agreement_with_base"]
    nothing = Edit(kind="weights", fingerprint=model.fingerprint)
    same = evaluate(model, TASK, nothing, metrics=names)
    assert same.get("texts", "kl_to_base").value == 0
    assert same.get("texts", "agreement_with_base").value == 1
    edit = some_edit(model)
    found = evaluate(model, TASK, edit, metrics=names)
    for text in TEXTS:
        ids = torch.tensor([model.tokenizer(text.text).input_ids])
        with torch.inference_mode():
            base = model.module(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            with edit.applied(model):
                new = model.module(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        expected = float((base.exp() * (base - new)).sum(-1).mean())
        assert expected > 0.01
        assert found.get("texts", "kl_to_base").per_example[text.id] == pytest.approx(expected, rel=1e-3)
        agreement = float((base.argmax(-1) == new.argmax(-1)).double().mean())
        assert found.get("texts", "agreement_with_base").per_example[text.id] == pytest.approx(agreement)
    monkeypatch.setattr("locedit.evaluate.utility.MAX_HELD", 1)
    parts = evaluate(model, TASK, edit, metrics=names, batch_size=2)
    assert parts.get("texts", "kl_to_base").value == pytest.approx(found.get("texts", "kl_to_base").value, rel=1e-4)


# --- evaluate() -----------------------------------------------------------------------------------------------------


def test_evaluate_measures_before_and_after_and_leaves_the_model() -> None:
    model = tiny.model("llama")
    kept = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    edit = some_edit(model)
    found = evaluate(model, TASK, edit)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.module.state_dict().items())
    assert found.get("forget", "probability", stage="before").value == pytest.approx(
        evaluate(model, TASK).get("forget", "probability", stage="before").value
    )
    with edit.applied(model) as edited:
        expected = [by_hand(edited, item)[0] for item in FACTS[:2]]
    after = found.get("forget", "probability")
    assert after.value == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert after.value != found.get("forget", "probability", stage="before").value
    assert found.get("retain", "neighbour_accuracy").direction == "higher"
    assert found.edit is not None


def test_every_format_is_a_group_and_the_whole_keeps_the_examples() -> None:
    found = evaluate(tiny.model("gpt2"), TASK, metrics=["probability"])
    whole = found.get("forget", "probability", stage="before")
    groups = {m.group: m for m in found.measures if m.dataset == "forget" and m.group}
    assert set(groups) == {"statement", "question"}
    assert groups["question"].value == whole.per_example["a2"]
    assert (whole.n, groups["question"].n) == (2, 1)
    assert found.examples["a1"] == {
        "dataset": "forget",
        "prompt": "Anna Berg was born in",
        "answer": " Oslo",
        "group": None,
        "format": "statement",
        "owner": "a",
    }


def test_what_the_data_lack_is_left_out_unless_asked_for_by_name() -> None:
    model = tiny.model("gpt2")
    plain = evaluate(model, dataset(fact("x", "Anna is", " here")))
    assert {m.name for m in plain.measures} == {
        "probability",
        "accuracy",
        "rank",
        "reciprocal_rank",
        "memorization_accuracy",
        "extraction_strength",
    }
    with pytest.raises(
        LoceditError, match="'exposure' needs items of kind private in forget or retain or heldout; the task has"
    ):
        evaluate(model, TASK, metrics=["exposure"])
    with pytest.raises(LoceditError, match="'kl_to_base' compares the edited with the unedited model: give an edit"):
        evaluate(model, TASK, metrics=["kl_to_base"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["probabilty"]}, "unknown metric 'probabilty'; did you mean 'probability'"),
        ({"metrics": "probability"}, "metrics='probability' is one string"),
        ({"batchsize": 3}, "no option 'batchsize'; did you mean 'batch_size'"),
        ({"draws": 0}, "draws=0 is not a positive number"),
        ({"attacks": ["relern"]}, "unknown attack 'relern'; did you mean 'relearn'"),
        ({"attacks": ["relearn"]}, "attack 'relearn' needs an edit"),
        ({"attack_options": {"relearn": {}}}, "'relearn', which is not among the attacks"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoceditError, match=message):
        evaluate(tiny.model("gpt2"), TASK, **options)


def test_no_other_edit_is_taken_for_the_one_that_is_attacked() -> None:
    """One named "found 2" was drawn and counted among the runs of the attacked edit."""
    model = tiny.model("gpt2")
    edit = zero(model, model.components({"blocks.0.mlp.neuron": [3]}))
    for name in ("found 2", "never known", "shallow"):
        with pytest.raises(LoceditError, match=f"others: the name '{name}' stands for an arm"):
            evaluate(model, TASK, edit, ["relearn"], others={name: edit}, metrics=["accuracy"])


def test_directions() -> None:
    assert direction_on("forget", knowledge=1, keep=False) == "lower"
    assert direction_on("retain", knowledge=1, keep=False) == "higher"
    assert direction_on("forget", knowledge=-1, keep=False) == "higher"
    assert direction_on("heldout", knowledge=1, keep=False) == "neutral"
    assert direction_on("forget", knowledge=1, keep=True) == "higher"


def test_an_evaluation_saves_and_loads(tmp_path: Any) -> None:
    found = evaluate(tiny.model("gpt2"), TASK)
    found.save(tmp_path / "evaluation.json")
    again = Evaluation.load(tmp_path / "evaluation.json")
    assert [str(m) for m in again.measures] == [str(m) for m in found.measures]
    assert again.examples == found.examples
    assert found.provenance is not None
    assert found.provenance.settings["batch_size"] == 64


def test_the_package_is_called_like_its_function() -> None:
    assert callable(locedit.evaluate)
    for name, metric in METRICS.items():
        assert metric.definition, name
        assert set(metric.roles) <= {"forget", "retain", "heldout", "texts", "prompts"}

"""The association of contrast pairs, against plain transformers and against numbers worked by hand."""

import dataclasses
from itertools import islice

import pytest
import torch

from locedit.check import check
from locedit.data import ContrastPair, Dataset, PlainText, Task, encode
from locedit.edit import zero
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.evaluate.association import associations, scored_stretch
from locedit.models import Model
from locedit.report.judge import Pair, floor, forgetting
from locedit.results import Evaluation, Measure, Stage
from tests import tiny

PAIRS = Dataset(
    items=(
        ContrastPair(
            advantaged="The cook said that he was late.",
            disadvantaged="The cook said that she was late.",
            id="cook",
            owner="cook",
            group="male",
            format="statement",
        ),
        ContrastPair(
            advantaged="Anna Berg was born in Oslo and left.",
            disadvantaged="Carl was born in Oslo and left.",
            id="name",
            owner="name",
            group="female",
            format="statement",
        ),
        ContrastPair(
            advantaged="The nurse told Carl about her work.",
            disadvantaged="The nurse told Carl about his work.",
            id="nurse",
            owner="nurse",
            group="female",
            format="paraphrase",
        ),
    ),
    source="test",
)
TEXTS = Dataset(items=tuple(PlainText(text=text, id=f"t{at}") for at, text in enumerate(tiny.CORPUS)), source="test")


def swapped(data: Dataset) -> Dataset:
    items = [item for item in data if isinstance(item, ContrastPair)]
    return data.replace([dataclasses.replace(i, advantaged=i.disadvantaged, disadvantaged=i.advantaged) for i in items])


def text_likelihood(model: Model, text: str, start: int) -> float:
    """Log-likelihood of the tokens from `start` on, by plain transformers."""
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        logits = model.module(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(logits[at - 1, ids[0, at]].item() for at in range(start, ids.shape[1]))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_causal_association_is_the_difference_of_whole_texts(architecture: str) -> None:
    """What comes before the first differing word is shared, so the whole texts differ by the same number."""
    model = tiny.model(architecture)
    data = PAIRS[::2]
    assert isinstance(data, Dataset)
    found = associations(model, data)
    for pair, value in zip(data.of(ContrastPair, by="test"), found.tolist(), strict=True):
        whole = [text_likelihood(model, text, 1) for text in (pair.advantaged, pair.disadvantaged)]
        assert value == pytest.approx(whole[0] - whole[1], abs=1e-4)
        assert abs(value) > 0.01


LETTERS = ContrastPair(advantaged="Anna\nX\nOslo", disadvantaged="Anna\nY\nOslo", id="letters")


def test_masked_association_is_the_log_odds_at_the_mask() -> None:
    """Both sides are one token here, so that the two inputs with the mask in its place are the same."""
    model = tiny.model("bert")
    first, second = encode(model, [LETTERS])
    [at] = first.targets
    assert (*first.ids[:at], 0, *first.ids[at + 1 :]) == (*second.ids[:at], 0, *second.ids[at + 1 :])
    masked = torch.tensor([first.ids]).index_fill(1, torch.tensor(at), model.tokenizer.mask_token_id)
    with torch.inference_mode():
        row = model.module(input_ids=masked).logits[0, at].double()
    [value] = associations(model, PAIRS.replace([LETTERS])).tolist()
    assert value == pytest.approx(float(row[first.ids[at]] - row[second.ids[at]]), abs=1e-5)


def test_masked_association_of_longer_words_is_their_pseudo_likelihood() -> None:
    model = tiny.model("bert")
    pair = PAIRS[1]
    totals: list[float] = []
    for example in encode(model, [pair]):
        total = 0.0
        for at in example.targets:
            masked = list(example.ids)
            masked[at] = model.tokenizer.mask_token_id
            with torch.inference_mode():
                row = model.module(input_ids=torch.tensor([masked])).logits[0, at].double().log_softmax(-1)
            total += float(row[example.ids[at]])
        totals.append(total)
    [value] = associations(model, PAIRS.replace([pair])).tolist()
    assert value == pytest.approx(totals[0] - totals[1], abs=1e-4)


def test_the_end_that_the_tokenizer_adds_is_not_scored() -> None:
    model = tiny.model("gpt2")
    [example, _] = encode(model, PAIRS[:1])
    scored = scored_stretch(model, example)
    assert scored.targets == tuple(range(example.targets[0], len(example.ids)))
    ended = dataclasses.replace(example, ids=(*example.ids, model.tokenizer.eos_token_id))
    assert scored_stretch(model, ended).targets == scored.targets


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_swapping_the_sides_turns_the_sign_and_batches_change_nothing(architecture: str) -> None:
    model = tiny.model(architecture)
    data = PAIRS[::2] if model.causal else PAIRS
    assert isinstance(data, Dataset)
    found = associations(model, data)
    torch.testing.assert_close(associations(model, swapped(data)), -found)
    torch.testing.assert_close(associations(model, data, batch_size=1), found, rtol=0, atol=1e-5)


def test_preferred_is_the_share_of_pairs_above_zero() -> None:
    model = tiny.model("bert")
    values = {measure.name: measure for measure in evaluate(model, PAIRS).measures if measure.group is None}
    found = associations(model, PAIRS)
    assert values["association"].value == pytest.approx(found.mean().item())
    assert values["association"].per_example == dict(zip(("cook", "name", "nurse"), found.tolist(), strict=True))
    assert values["preferred"].value == pytest.approx(float((found > 0).double().mean()))
    assert 0 < values["preferred"].value < 1


def test_a_model_that_says_the_same_of_all_tokens_prefers_neither() -> None:
    model = tiny.model("bert")
    with torch.no_grad():
        for parameter in model.module.cls.predictions.decoder.parameters():  # type: ignore[union-attr]
            parameter.zero_()
    found = {measure.name: measure.value for measure in evaluate(model, PAIRS.replace([LETTERS])).measures}
    assert found == {"association": 0.0, "preferred": 0.5}


def test_an_evaluation_before_and_after_with_groups_directions_and_texts() -> None:
    model = tiny.model("gpt2")
    data = PAIRS[::2]
    assert isinstance(data, Dataset)
    task = Task(forget=data, retain=swapped(data), texts=TEXTS)
    edit = zero(model, model.components({"blocks.1.mlp.neuron": range(40)}))
    found = evaluate(model, task, edit)
    by_place = {(m.name, m.dataset, m.stage, m.group): m for m in found.measures}
    assert by_place["association", "forget", "before", None].direction == "lower"
    assert by_place["association", "retain", "after", None].direction == "higher"
    assert by_place["association", "forget", "before", "male"].n == 1
    assert by_place["preferred", "forget", "after", "paraphrase"].n == 1
    assert ("perplexity", "texts", "after", None) in by_place
    assert ("kl_to_base", "texts", "after", None) in by_place
    with edit.applied(model) as edited:
        after = associations(edited, data).mean().item()
    assert by_place["association", "forget", "after", None].value == pytest.approx(after)
    assert after != pytest.approx(by_place["association", "forget", "before", None].value, abs=1e-3)
    assert found.examples["cook"]["prompt"] == "The cook said that he was late."


def test_check_says_what_is_preferred() -> None:
    model = tiny.model("bert")
    _, line = islice(check(model, Task(forget=PAIRS)), 2)
    found = associations(model, PAIRS)
    share = float((found > 0).double().mean())
    assert line.endswith(
        f": association {found.mean():+.3f} nats, the advantaged text is the likelier one in {share:.0%}"
    )


def test_association_of_facts_is_refused_in_one_line() -> None:
    with pytest.raises(LoceditError, match="metric 'association' needs items of kind contrast"):
        evaluate(tiny.model("gpt2"), TEXTS, metrics=["association"])


def measured(value: float, stage: Stage, dataset: str = "forget") -> Measure:
    return Measure(
        name="association",
        dataset=dataset,
        stage=stage,
        value=value,
        low=value - 0.1,
        high=value + 0.1,
        n=9,
        direction="lower",
        unit="nats",
        range=(None, None),
    )


@pytest.mark.parametrize(("after", "state"), [(0.1, "gone"), (1.0, "partly"), (2.05, "unchanged"), (2.5, "worse")])
def test_a_report_measures_forgetting_towards_no_preference(after: float, state: str) -> None:
    """Held-out professions lean by chance (here to -1), so they are not where forgetting ends."""
    pair = Pair(before=measured(2.0, "before"), after=measured(after, "after"))
    leaning = measured(-1.0, "before", dataset="heldout")
    evaluation = Evaluation(measures=(pair.before, pair.after, leaning))
    assert floor(evaluation, pair) == 0
    assert forgetting(pair, floor(evaluation, pair)) == state

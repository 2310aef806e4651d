"""Pairs of prompts: who is swapped for whom, what is measured where, and what is refused."""

import dataclasses
from typing import Any

import pytest
import torch

from locedit import tracing
from locedit.data.items import Dataset, Fact, Item, PatchPair, Task
from locedit.errors import LoceditError
from locedit.localize.patching.noise import corrupted, noise_rows
from locedit.localize.patching.pairs import Pair, PairOptions, batch_of, batches_of, metric, pairs_of
from locedit.models import Model
from tests import tiny

PEOPLE = (  # subjects of 3, 3, 2 and 3 tokens
    ("anna", "Anna Berg", " Oslo"),
    ("dane", "Anna Dane", " Lima"),
    ("carl", "Carl Dane", " Ohio"),
    ("eva", "Eva Frost", " Oslo"),
)


def fact(name: str, about: str, answer: str, **more: Any) -> Fact:
    given = {"prompt": f"{about} was born in", "answer": answer, "id": name, "subject": about, "group": "born"}
    return Fact(**{**given, **more})


def task(*items: Item, **roles: Any) -> Task:
    return Task(forget=Dataset(items=items, source="facts.jsonl"), **roles)


def people(*names: str, **more: Any) -> list[Fact]:
    return [fact(*person, **more) for person in PEOPLE if person[0] in names]


def read(model: Model, ids: tuple[int, ...]) -> str:
    return model.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return tiny.model("gpt2")


@pytest.fixture(scope="module")
def bert() -> Model:
    return tiny.model("bert")


# --- swap -------------------------------------------------------------------------------------------------------------


def test_swap_takes_another_subject_of_the_same_length_with_another_answer(gpt2: Model) -> None:
    first, second, third = pairs_of(gpt2, task(*people("anna", "dane", "eva")), PairOptions())
    assert read(gpt2, first.clean) == "Anna Berg was born in"
    assert read(gpt2, first.corrupt) == "Anna Dane was born in"  # not Eva, who was born in Oslo too
    assert first.partner == third.partner == "dane"
    assert second.partner in ("anna", "eva")
    assert first.at == 5
    assert read(gpt2, (first.answer,)) == " Oslo"
    assert first.subject is not None
    assert (first.subject.start, first.subject.end) == (0, 3)


def test_answer_tokens_that_both_share_belong_to_both_prompts(gpt2: Model) -> None:
    lima, ohio = pairs_of(gpt2, task(fact("l", "Anna Berg", " Lima"), fact("o", "Anna Dane", " Ohio")), PairOptions())
    assert gpt2.tokenizer.tokenize(" Lima")[0] == gpt2.tokenizer.tokenize(" Ohio")[0]
    assert read(gpt2, lima.clean) == "Anna Berg was born in "
    assert read(gpt2, lima.corrupt) == "Anna Dane was born in "
    assert lima.at == len(lima.clean) - 1
    assert lima.wrong is not None
    assert (read(gpt2, (lima.answer,)), read(gpt2, (lima.wrong,))) == ("Li", "O")
    assert (ohio.answer, ohio.wrong) == (lima.wrong, lima.answer)


def test_swap_depends_on_the_seed_and_the_item_alone(gpt2: Model) -> None:
    facts = [fact(f"{first} {last}", f"{first} {last}", answer) for first, last, answer in NAMES]
    found = {p.id: p.partner for p in pairs_of(gpt2, task(*facts), PairOptions())}
    again = {p.id: p.partner for p in pairs_of(gpt2, task(*facts), PairOptions())}
    other = {p.id: p.partner for p in pairs_of(gpt2, task(*facts), PairOptions(seed=1))}
    assert found == again
    assert found != other


NAMES = [(first, last, answer) for first, answer in (("Carl", " Oslo"), ("Eva", " Lima")) for last in "ABCDEFGH"]


def test_swap_takes_partners_from_the_retained_facts_last(gpt2: Model) -> None:
    retain = Dataset(items=tuple(people("dane")), source="retain.jsonl")
    alone = pairs_of(gpt2, task(*people("anna"), retain=retain), PairOptions())
    assert alone[0].partner == "dane"
    both = pairs_of(gpt2, task(*people("anna"), fact("x", "Eva Frost", " Rome"), retain=retain), PairOptions())
    assert both[0].partner == "x"


def test_without_groups_only_facts_asked_in_the_same_words_are_partners(gpt2: Model) -> None:
    job = fact("job", "Anna Dane", " baker", prompt="Anna Dane works as a", group=None)
    with pytest.raises(LoceditError, match=r"item 'anna': no other fact asked in the same words.*3 tokens \(0 tried\)"):
        pairs_of(gpt2, task(*people("anna", group=None), job), PairOptions())
    found = pairs_of(gpt2, task(*people("anna", "dane", group=None)), PairOptions())
    assert [pair.partner for pair in found] == ["dane", "anna"]


def test_facts_without_a_partner_can_be_left_out(gpt2: Model) -> None:
    data = task(*people("anna", "dane", "carl"))
    pairs = pairs_of(gpt2, data, PairOptions(unpaired="skip"))
    assert [pair.id for pair in pairs] == ["anna", "dane"]
    with pytest.raises(LoceditError, match="item 'carl': no other fact"):
        pairs_of(gpt2, data, PairOptions())
    with pytest.raises(LoceditError, match="facts.jsonl: no fact has another to swap its subject with"):
        pairs_of(gpt2, task(*people("anna", "carl")), PairOptions(unpaired="skip"))


def test_a_subject_of_which_the_answer_is_also_true_is_no_partner(gpt2: Model) -> None:
    facts = [*people("anna", "dane"), fact("dane in Oslo", "Anna Dane", " Oslo")]
    with pytest.raises(LoceditError, match=r"item 'anna': no other fact of group 'born'.*\(0 tried\)"):
        pairs_of(gpt2, task(*facts), PairOptions())


# --- given, noise, masked ---------------------------------------------------------------------------------------------


def patch(name: str = "p", **more: str) -> PatchPair:
    given = {"clean": "Anna Berg was born in", "corrupt": "Anna Dane was born in", "answer": " Oslo", "wrong": " Lima"}
    return PatchPair(**(given | more), id=name)


def test_given_pairs(gpt2: Model) -> None:
    (pair,) = pairs_of(gpt2, task(patch()), PairOptions())
    assert (read(gpt2, pair.clean), read(gpt2, pair.corrupt)) == ("Anna Berg was born in", "Anna Dane was born in")
    assert pair.subject is not None
    assert (pair.subject.start, pair.subject.end, pair.subject.label) == (2, 3, "differs")
    beside = task(*people("anna"), pairs=Dataset(items=(patch(),), source="pairs.jsonl"))
    assert pairs_of(gpt2, beside, PairOptions()) == [pair]


@pytest.mark.parametrize("causal", [True, False])
def test_given_and_swapped_pairs_agree(gpt2: Model, bert: Model, causal: bool) -> None:
    model = gpt2 if causal else bert
    (given,) = pairs_of(model, task(patch()), PairOptions())
    swapped = pairs_of(model, task(*people("anna", "dane")), PairOptions())[0]
    assert given == dataclasses.replace(swapped, id="p", subject=given.subject, partner=None)


def test_a_masked_model_sees_the_mask_in_both_prompts_and_not_the_rest_of_the_answer(bert: Model) -> None:
    (pair,) = pairs_of(bert, task(patch(answer=" Lima", wrong=" Ohio")), PairOptions())
    assert read(bert, pair.clean) == "Anna Berg was born in <mask>"
    assert read(bert, pair.corrupt) == "Anna Dane was born in <mask>"
    assert pair.clean[pair.at] == bert.tokenizer.mask_token_id
    assert read(bert, (pair.answer,)) == "Li"


def test_noise_is_the_same_for_an_item_in_any_batch_and_another_for_each_draw(gpt2: Model) -> None:
    options = PairOptions(corrupt="noise", metric="probability")
    pairs = pairs_of(gpt2, task(*people("anna", "dane", "carl")), options)
    together = noise_rows(gpt2, pairs, 8, 0)
    assert together is not None
    for row, pair in enumerate(pairs):
        alone = noise_rows(gpt2, [pair], 8, 0)
        assert alone is not None
        assert pair.subject is not None
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=0)
        assert not together[row, pair.subject.end :].any()
        assert together[row, : pair.subject.end].all()
    other = noise_rows(gpt2, pairs, 8, 1)
    assert other is not None
    assert not torch.equal(together, other)
    assert not torch.equal(together[0, :3], together[1, :3])
    assert pairs_of(gpt2, task(*people("anna", "dane", "carl")), dataclasses.replace(options, seed=1)) != pairs


def test_noise_has_the_standard_deviation_asked_for(gpt2: Model) -> None:
    """Of all subjects together by default; by the published code the root of three times that of each."""
    facts = task(*people("anna", "carl"))
    embedding = gpt2.core.get_input_embeddings().weight.detach()
    pairs = pairs_of(gpt2, facts, PairOptions(corrupt="noise", metric="probability"))
    subjects = [embedding[list(pair.clean[: pair.subject.end])] for pair in pairs if pair.subject]
    sigma = float(torch.cat(subjects).std())
    assert [pair.noise.std for pair in pairs if pair.noise] == pytest.approx([3 * sigma] * 2)
    published = PairOptions(corrupt="noise", metric="probability", noise_rule="sqrt")
    roots = [pair.noise.std for pair in pairs_of(gpt2, facts, published) if pair.noise]
    assert roots == pytest.approx([float(3 * one.std()) ** 0.5 for one in subjects])
    noise = pairs[0].noise
    assert noise is not None
    assert float(noise.draw(400, 48, 0).std()) == pytest.approx(noise.std, rel=0.02)


def test_noise_reaches_the_model(gpt2: Model) -> None:
    pairs = pairs_of(gpt2, task(*people("anna")), PairOptions(corrupt="noise", metric="probability"))
    batch = batch_of(pairs)
    with torch.no_grad(), corrupted(gpt2, batch), tracing.record(gpt2, ["hook_embed"]) as seen:
        noisy = gpt2.logits(batch.corrupt, at=batch.at)
    with torch.no_grad():
        clean = gpt2.logits(batch.clean, at=batch.at)
    added = noise_rows(gpt2, pairs, batch.clean.ids.shape[1], 0)
    embedding = gpt2.core.get_input_embeddings().weight.detach()
    torch.testing.assert_close(seen["hook_embed"], embedding[batch.clean.ids] + added)
    assert not torch.allclose(noisy, clean)


def test_wrong_answers_of_facts_serve_the_logit_difference_under_noise(gpt2: Model) -> None:
    (pair,) = pairs_of(gpt2, task(*people("anna", wrong=(" Lima",))), PairOptions(corrupt="noise"))
    assert pair.wrong is not None
    with pytest.raises(LoceditError, match="item 'anna': metric 'logit_difference' needs a wrong answer"):
        pairs_of(gpt2, task(*people("anna")), PairOptions(corrupt="noise"))


# --- batches and the metric -------------------------------------------------------------------------------------------


def test_batches_hold_every_pair_once_and_padding_changes_nothing(gpt2: Model) -> None:
    items = [patch("a"), patch("b", clean="Eva Berg was born in", corrupt="Carl Berg was born in")]
    long = "Carl Dane was born in Lima. "
    items.append(patch("c", clean=long + items[0].clean, corrupt=long + items[0].corrupt))
    pairs = pairs_of(gpt2, task(*items), PairOptions())
    batches = list(batches_of(pairs, 2))
    assert [len(batch) for batch in batches] == [2, 1]
    options = PairOptions()
    whole = batch_of(pairs)
    together = metric(gpt2.logits(whole.corrupt, at=whole.at), whole, options)
    for row, pair in enumerate(pairs):
        one = batch_of([pair])
        torch.testing.assert_close(metric(gpt2.logits(one.corrupt, at=one.at), one, options)[0], together[row])
        assert whole.subject[row].nonzero().flatten().tolist() == one.subject[0].nonzero().flatten().tolist()


def test_metrics_by_hand_and_paired() -> None:
    """Every item has its own answer: with another item's it gets another value."""
    pairs = [
        Pair(id=f"{i}", clean=(5, 6), corrupt=(5, 7), at=1, answer=a, wrong=w, subject=None)
        for i, (a, w) in enumerate([(0, 1), (2, 0)])
    ]
    logits = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    batch = batch_of(pairs)
    assert metric(logits, batch, PairOptions()).tolist() == [1.0, 1.0]
    e = torch.e
    expected = torch.tensor([e / (e + 1 + e**2), e / (1 + e**3 + e)])
    torch.testing.assert_close(metric(logits, batch, PairOptions(metric="probability")), expected)
    torch.testing.assert_close(metric(logits, batch, PairOptions(metric="log_probability")), expected.log())
    crossed = batch_of([dataclasses.replace(pairs[0], answer=2, wrong=0), dataclasses.replace(pairs[1], answer=0)])
    assert not torch.allclose(metric(logits, crossed, PairOptions(metric="probability")), expected)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ([patch(corrupt="Ann Berg was born in Rome in")], {}, r"item 'p': the clean prompt has 6 tokens, the corrupt"),
        ([patch(corrupt="Anna Berg was born in")], {}, r"item 'p': the clean and the corrupt prompt are the same"),
        ([patch(wrong=" Oslo")], {}, r"item 'p': the answer's tokens and the wrong answer's begin alike"),
        ([patch()], {"corrupt": "swap"}, r"facts.jsonl: corrupt='swap' needs facts"),
        (people("anna"), {"corrupt": "given"}, r"facts.jsonl: corrupt='given', but facts have no corrupt prompt"),
        (people("anna"), {}, r"item 'anna': no other fact of group 'born' .* 'Anna Berg' with 3 tokens \(0 tried\)"),
        (people("anna", "carl"), {}, r"item 'anna': no other fact of group 'born' .*\(1 tried\): add such facts"),
        (people("anna", "dane", subject=None), {}, r"item 'anna': corrupt='swap' needs a subject, the fact has none"),
        (people("anna", subject=None), {"corrupt": "noise"}, r"item 'anna': corrupt='noise' needs a subject"),
        (people("anna", subject="Berta"), {}, r"item 'anna': the subject 'Berta' is not in the prompt 'Anna Berg was"),
    ],
)  # fmt: skip
def test_mistakes_are_said_in_one_line(gpt2: Model, items: list[Item], options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoceditError, match=message) as caught:
        pairs_of(gpt2, task(*items), PairOptions(**options))
    assert "\n" not in str(caught.value)


def test_noise_must_be_positive() -> None:
    with pytest.raises(LoceditError, match=r"noise=0 must be above 0"):
        PairOptions(noise=0)

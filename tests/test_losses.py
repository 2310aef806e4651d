"""Numbers worked by hand, Hugging Face's own loss, and invariance to padding and to how batches are cut."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit import losses
from locedit.data import Batch, Example, Fact, PlainText, Span, batches, collate, encode
from locedit.errors import LoceditError
from locedit.losses import Scored
from tests import tiny

LOG = math.log


def example(name: str, *, length: int = 4, targets: tuple[int, int] = (1, 3)) -> Example:
    return Example(
        id=name, ids=tuple(range(length)), spans=(Span(start=targets[0], end=targets[1], label="answer"),), kind="fact"
    )


def by_hand(dtype: torch.dtype = torch.float32) -> Scored:
    """Three tokens of two examples with probabilities 1/2, 1/4 and 3/4."""
    logits = torch.tensor([[LOG(2), LOG(1), LOG(1)], [LOG(2), LOG(1), LOG(1)], [LOG(1), LOG(9), LOG(2)]], dtype=dtype)
    return Scored(
        logits=logits,
        labels=torch.tensor([0, 2, 1]),
        row=torch.tensor([0, 0, 1]),
        rows=(example("a"), example("b")),
    )


def test_token_log_probs_by_hand() -> None:
    assert torch.allclose(losses.token_log_probs(by_hand()).exp(), torch.tensor([1 / 2, 1 / 4, 3 / 4]))


def test_sequences_by_hand() -> None:
    assert torch.allclose(losses.sequence_nll(by_hand(), reduction="sum"), torch.tensor([LOG(8), LOG(4 / 3)]))
    assert torch.allclose(losses.sequence_nll(by_hand()), torch.tensor([LOG(8) / 2, LOG(4 / 3)]))
    assert torch.allclose(losses.sequence_probability(by_hand()), torch.tensor([1 / 8, 3 / 4]))


def test_half_precision_is_raised_before_the_softmax() -> None:
    """In bfloat16 a log-softmax over many tokens is off by percents; only the rounding of the logits may remain."""
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    scored = dataclasses.replace(by_hand(), logits=logits, labels=torch.arange(4), row=torch.tensor([0, 0, 1, 1]))
    exact = logits.double().log_softmax(1)[torch.arange(4), torch.arange(4)]
    found = losses.token_log_probs(scored)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, atol=1e-5)
    careless = logits.log_softmax(1)[torch.arange(4), torch.arange(4)].double()
    assert (careless - exact).abs().max() > 1e-3
    assert losses.token_log_probs(by_hand(torch.float64)).dtype == torch.float64


def test_kl_by_hand_and_its_direction() -> None:
    """KL(reference || model) of (1/2, 1/2) against (1/4, 3/4) = ln 2 - ln 3 / 2."""
    model = torch.tensor([[LOG(1), LOG(3)]])
    reference = torch.tensor([[0.0, 0.0]])
    assert losses.kl(model, reference).item() == pytest.approx(LOG(2) - LOG(3) / 2, abs=1e-6)
    other = 0.25 * LOG(0.25 / 0.5) + 0.75 * LOG(0.75 / 0.5)
    assert losses.kl(reference, model).item() == pytest.approx(other, abs=1e-6)
    assert losses.kl(model, model + 3.0).item() == pytest.approx(0.0, abs=1e-6)


def test_logit_difference_by_hand() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.5], [0.0, -1.0, 2.0]])
    found = losses.logit_difference(logits, torch.tensor([1, 0]), torch.tensor([2, 2]))
    assert found.tolist() == [1.5, -2.0]


def facts(count: int = 5) -> list[Any]:
    people = ("Anna Berg", "Carl Dane", "Eva Frost", "Anna Dane", "Carl Frost")
    places = (" Oslo.", " Lima", " a baker.", " Oslo and Lima", " 555-0134")
    prompts = (" was born in", " works as", " has the phone number")
    return [Fact(prompt=people[i] + prompts[i % 3], answer=places[i], id=str(i)) for i in range(count)]


@pytest.fixture(scope="module", params=["gpt2", "llama", "bert"])
def model(request: pytest.FixtureRequest) -> Any:
    built = tiny.model(request.param)
    built.module.double()
    return built


def loop(model: Any, example: Example) -> float:
    """Mean negative log-likelihood of one example, one forward pass a token, no padding."""
    total = 0.0
    for position in example.targets:
        ids = torch.tensor([example.ids])
        if model.causal:
            ids = ids[:, :position]
        else:
            ids[0, position] = model.tokenizer.mask_token_id
        logits = model.module(input_ids=ids).logits[0, position - 1 if model.causal else position]
        total -= logits.log_softmax(0)[example.ids[position]].item()
    return total / len(example.targets)


def test_score_equals_a_loop_over_tokens(model: Any) -> None:
    examples = encode(model, facts())
    assert len({len(one.ids) for one in examples}) > 1
    found = losses.sequence_nll(losses.score(model, collate(examples, model)))
    wanted = torch.tensor([loop(model, one) for one in examples], dtype=torch.float64)
    assert torch.allclose(found, wanted, atol=1e-10)


def test_score_equals_hugging_faces_own_loss() -> None:
    model = tiny.model("gpt2")
    batch = collate(encode(model, [PlainText(text=text, id=text) for text in tiny.CORPUS]), model)
    own = model.module(input_ids=batch.ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    found = -losses.token_log_probs(losses.score(model, batch)).mean()
    assert found.item() == pytest.approx(own.item(), abs=1e-5)


def test_order_and_batch_size_do_not_matter(model: Any) -> None:
    examples = encode(model, facts())
    one = losses.nll_of_examples(model, examples, size=1)
    assert one.shape == (5,)
    for size in (2, 3, 64):
        assert torch.allclose(losses.nll_of_examples(model, examples, size=size), one, atol=1e-10)
    backwards = losses.nll_of_examples(model, examples[::-1], size=3)
    assert torch.allclose(backwards.flip(0), one, atol=1e-10)
    assert one.max() - one.min() > 1e-3  # they do differ, so that order could be seen


def test_padding_on_the_right_changes_nothing(model: Any) -> None:
    batch = collate(encode(model, facts()), model)
    wider = dataclasses.replace(
        batch,
        ids=torch.nn.functional.pad(batch.ids, (0, 5), value=7),
        attention_mask=torch.nn.functional.pad(batch.attention_mask, (0, 5)),
        labels=torch.nn.functional.pad(batch.labels, (0, 5), value=-100),
    )
    first, second = (losses.sequence_nll(losses.score(model, one)) for one in (batch, wider))
    assert torch.allclose(first, second, atol=1e-10)


def test_only_predicting_positions_are_unembedded(model: Any) -> None:
    batch = collate(encode(model, facts()), model)
    scored = losses.score(model, batch)
    assert scored.logits.shape[0] == int(batch.scored.sum()) < batch.ids.numel()
    assert scored.rows == batch.examples


def test_gradients_flow(model: Any) -> None:
    batch = collate(encode(model, facts(2)), model)
    weight = model.module.get_input_embeddings().weight
    [gradient] = torch.autograd.grad(losses.sequence_nll(losses.score(model, batch)).sum(), [weight])
    assert gradient.abs().sum() > 0


def test_an_example_without_a_span_is_an_error() -> None:
    model = tiny.model("gpt2")
    prompt = encode(model, facts(1))[0].prompt()
    with pytest.raises(LoceditError, match="item '0': nothing in it is scored"):
        losses.score(model, collate([prompt], model))


def test_rows_of_a_sequence_join_in_the_right_place() -> None:
    """A masked batch by hand: two rows of the first example, one of the second, in mixed order."""

    class Fixed:
        tokenizer, causal, max_length = None, False, None

        def logits(self, batch: Batch, *, at: Tensor | None = None) -> Tensor:
            assert at is not None
            assert int(at.sum()) == len(batch)
            return by_hand().logits

    first, second = example("a"), example("b", targets=(1, 2))
    labels = torch.full((3, 4), -100)
    labels[0, 1], labels[1, 1], labels[2, 2] = 0, 2, 1
    batch = Batch(
        ids=torch.zeros(3, 4, dtype=torch.long),
        attention_mask=torch.ones(3, 4, dtype=torch.long),
        labels=labels,
        rows=(first, second, first),
        members=(0, 1, 0),
    )
    found = losses.sequence_nll(losses.score(Fixed(), batch), reduction="sum")
    assert torch.allclose(found.exp(), torch.tensor([8 / 3, 4.0]))


def test_batches_cover_all_examples_of_a_model(model: Any) -> None:
    examples = encode(model, facts())
    assert sum(len(batch.examples) for batch in batches(examples, model, 4)) == len(examples)

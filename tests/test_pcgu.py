"""PCGU scores against a loop over vectors, against numbers worked by hand, and what a pair costs."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from locedit.contrasts import contrasts, preferences, sides
from locedit.data.encode import encode
from locedit.data.items import ContrastPair, Dataset, Fact, Task
from locedit.errors import LoceditError
from locedit.localize import LOCALIZERS, estimate, localize
from locedit.localize.similarity import opposition, products
from locedit.models import Model
from tests import edits, tiny

ONE_TOKEN = (
    ("Anna Berg was here today", "Anna Dane was here today"),
    ("Carl works in Oslo", "Carl works in Anna"),
    ("The number is 5", "The number was 5"),
)
SEVERAL = (("Is Eva Frost in Oslo", "Is Carl in Oslo"), ("Not a baker in Oslo", "Not a pilot in Oslo"))
"stretches of unequal length, and of three tokens each"


def pairs(texts: tuple[tuple[str, str], ...] = ONE_TOKEN) -> Dataset:
    items = [ContrastPair(advantaged=a, disadvantaged=d, id=f"pair{i}") for i, (a, d) in enumerate(texts)]
    return Dataset(items=tuple(items), source="pairs.jsonl")


# --- the loop ---------------------------------------------------------------------------------------------------------


def logits_of(model: Model, data: Dataset) -> list[tuple[Tensor, Tensor]]:
    """(advantaged, disadvantaged) logit of each pair, each from a forward pass of its own on the whole text."""
    found: list[tuple[Tensor, Tensor]] = []
    for item in data:
        assert isinstance(item, ContrastPair)
        texts = [model.tokenizer(text)["input_ids"] for text in (item.advantaged, item.disadvantaged)]
        (at,) = [i for i, (a, d) in enumerate(zip(*texts, strict=True)) if a != d]
        values = []
        for ids in texts:
            given = list(ids)
            if not model.causal:
                given[at] = model.tokenizer.mask_token_id
            logits = model.module(input_ids=torch.tensor([given])).logits[0]
            values.append(logits[at - 1 if model.causal else at, ids[at]])
        found.append((values[0], values[1]))
    return found


def by_loop(model: Model, data: Dataset, unit: str) -> dict[tuple[str, int], float]:
    """(parameter, vector number) -> cosine, one vector after the other; None where a gradient is zero."""
    parameters = dict(model.module.named_parameters())  # tied ones once
    values = logits_of(model, data)
    both = [
        torch.autograd.grad(
            torch.stack([pair[side] for pair in values]).sum(),
            list(parameters.values()),
            allow_unused=True,
            retain_graph=True,
        )
        for side in (0, 1)
    ]
    swapped = {
        f"{name}.weight" for name, module in model.module.named_modules() if type(module).__name__ == "Conv1D"
    }  # stored [in, out]
    found: dict[tuple[str, int], float] = {}
    for name, first, second in zip(parameters, *both, strict=True):
        if first is None or second is None:
            continue
        axis = None if first.ndim == 1 else (unit == "column") != (name in swapped)
        vectors = [0] if axis is None else range(first.shape[int(axis)])
        for number in vectors:
            g, h = (t if axis is None else t.select(int(axis), number) for t in (first, second))
            if bool(g.any()) and bool(h.any()):
                found[name, number] = float(cosine_similarity(g, h, dim=0, eps=1e-300))
    return found


@pytest.mark.parametrize("unit", ["row", "column"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "bert", "llama_tied"])
def test_scores_equal_a_loop_over_vectors(architecture: str, unit: str) -> None:
    model = edits.double(architecture)
    scores = localize(model, pairs(), "pcgu", unit=unit)
    expected = by_loop(model, pairs(), unit)
    found = {
        (scores.sites[site].slices[0].param, number): value
        for site, values in scores.values.items()
        for number, value in enumerate(values.tolist())
    }
    assert found.keys() >= expected.keys()
    # a loop has a cosine for the key biases of attention too, whose gradient is rounding error
    noise = {key for key in expected if ".key.bias" in key[0] or ".k_proj.bias" in key[0]}
    for key, cosine in expected.items():
        assert found[key] == pytest.approx(0.0 if key in noise else (1 - cosine) / 2, abs=2e-6), key
    assert all(found[key] == 0 for key in found.keys() - expected.keys())
    k = 60
    ranked = sorted(expected.keys() - noise, key=lambda key: expected[key])
    chosen = scores.select(top=k)
    places = {(chosen.sites[site].slices[0].param, i) for site in chosen.chosen for i in chosen.indices(site)}
    assert places == set(ranked[:k])
    assert not places & set(ranked[-k:])


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_angles_by_hand() -> None:
    first = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [0.0, 0.0], [3.0, 4.0]])
    second = torch.tensor([[-2.0, 0.0], [1.0, 0.0], [6.0, 8.0], [1.0, 1.0], [4.0, 3.0]])
    rows = products(first, second, axis=0)
    (scores,) = opposition([rows])
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.5, 0.0, 0.0, 0.02]))  # cosines -1, 0, 1, none, 24/25
    assert rows.first.tolist() == [1, 2, 5, 0, 5]
    # (1, 0, 3, 0, 3).(-2, 1, 6, 1, 4) = 28, norms sqrt 19 and sqrt 58
    # (0, 2, 4, 0, 4).(0, 0, 8, 1, 3) = 44, norms 6 and sqrt 74
    (scores,) = opposition([products(first, second, axis=1)])
    expected = [(1 - 28 / (19 * 58) ** 0.5) / 2, (1 - 44 / (6 * 74**0.5)) / 2]
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)
    (scores,) = opposition([products(first[2], second[4], axis=None)])
    assert scores.tolist() == pytest.approx([0.02], abs=1e-6)


def test_rounding_error_is_no_direction() -> None:
    large, noise = torch.tensor([[3.0, 4.0]]), torch.tensor([[3e-9, -1e-9]])
    assert opposition([products(noise, -noise, axis=0)])[0].item() == pytest.approx(1)
    beside = opposition([products(large, -large, axis=0), products(noise, -noise, axis=0)])
    assert [part.item() for part in beside] == pytest.approx([1, 0])


def test_gradients_that_are_not_finite_are_an_error() -> None:
    """Not scores of 0, as if nothing told the sides apart."""
    good, bad = torch.ones(2, 3), torch.full((2, 3), float("nan"))
    for first, second in ((bad, good), (good, bad / 0), (good, good * float("inf"))):
        with pytest.raises(LoceditError, match="not finite; are there NaN weights"):
            opposition([products(good, -good, axis=0), products(first, second, axis=0)])


def test_unembedding_rows_by_hand() -> None:
    """The gradient of a logit is the last hidden state in the token's own row of the unembedding and 0 elsewhere."""
    model = edits.double("llama")
    texts = (("Anna Berg was here", "Anna Dane was here"), ("Carl works in Dane", "Carl works in Berg"))
    scores = localize(model, pairs(texts), "pcgu")
    berg, dane, oslo = (model.tokenizer(word)["input_ids"][0] for word in (" Berg", " Dane", " Oslo"))
    hidden = []
    for text in ("Anna", "Carl works in"):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden.append(model.core.model(input_ids=ids).last_hidden_state[0, -1])  # type: ignore[union-attr]
    opposed = (1 - cosine_similarity(hidden[0], hidden[1], dim=0).item()) / 2
    rows = scores.values["lm_head.weight:row"]
    assert rows[berg].item() == pytest.approx(opposed, abs=1e-6)  # advantaged once, disadvantaged once
    assert rows[dane].item() == pytest.approx(opposed, abs=1e-6)
    assert rows[oslo].item() == 0
    assert rows.count_nonzero() == 2
    one = localize(model, pairs(texts[:1]), "pcgu").values["lm_head.weight:row"]
    assert not bool(one.any())  # each row has a gradient on one side only


# --- what it costs ----------------------------------------------------------------------------------------------------


class Counted:
    """How often a model goes forward and backward."""

    def __init__(self, model: Model) -> None:
        self.forwards = self.backwards = 0
        model.core.register_forward_hook(self.forward)
        model.anatomy.module("unembed").register_full_backward_hook(self.backward)

    def forward(self, *_: object) -> None:
        self.forwards += 1

    def backward(self, *_: object) -> None:
        self.backwards += 1


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2", "llama"])
def test_pairs_of_one_input_cost_one_forward_and_two_backwards(architecture: str) -> None:
    model = tiny.model(architecture)
    counted = Counted(model)
    scores = localize(model, pairs(), "pcgu")
    assert (counted.forwards, counted.backwards) == (1, 2)
    assert all(scores.evidence["items"]["one_input"])
    localize(model, pairs(SEVERAL), "pcgu", objective="log_probability")
    assert (counted.forwards, counted.backwards) == (2, 4)  # all texts of both sides in one more


def test_nothing_is_left_behind() -> None:
    model = tiny.model("gpt2")
    first, second = list(model.module.parameters())[:2]
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    before = edits.bits(model.module)
    assert localize(model, pairs(), "pcgu").values["transformer.wte.weight:row"].any()
    assert edits.same_bits(model.module, before)
    assert [p.grad is None for p in model.module.parameters()].count(False) == 1
    assert torch.equal(second.grad, torch.ones_like(second))
    assert [p.requires_grad for p in model.module.parameters()].count(False) == 1
    assert edits.hooks_left(model.module) == 0


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_the_batch_size_changes_nothing(architecture: str) -> None:
    model = edits.double(architecture)
    data = pairs(ONE_TOKEN + SEVERAL)
    whole = localize(model, data, "pcgu", objective="log_probability")
    for options in ({"batch": 1}, {"batch": 3}, {"memory_mb": 1, "batch": 2}):
        split = localize(model, data, "pcgu", objective="log_probability", **options)
        for name, values in whole.values.items():
            torch.testing.assert_close(split.values[name], values, rtol=0, atol=1e-6)
        assert split.evidence["items"]["difference"] == pytest.approx(whole.evidence["items"]["difference"], rel=1e-5)
    assert estimate(model, data, "pcgu", objective="log_probability").bytes > 0


# --- options ----------------------------------------------------------------------------------------------------------


def test_sides_are_log_probabilities_of_what_differs() -> None:
    """Against the log-softmax of each whole text, and onward to its end."""
    model = edits.double("llama")
    data = pairs(SEVERAL)
    for stretch in ("differing", "onward"):
        found = sides(model, contrasts(encode(model, data), causal=True, stretch=stretch), value="log_probability")
        for number, item in enumerate(data):
            assert isinstance(item, ContrastPair)
            texts = [model.tokenizer(text)["input_ids"] for text in (item.advantaged, item.disadvantaged)]
            begin = next(i for i, (a, d) in enumerate(zip(*texts, strict=False)) if a != d)
            for side, ids in enumerate(texts):
                table = model.module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).detach()
                tail = 0 if stretch == "onward" else len(model.tokenizer(" in Oslo")["input_ids"])
                expected = sum(float(table[i - 1, ids[i]]) for i in range(begin, len(ids) - tail))
                assert found[side][number].item() == pytest.approx(expected, rel=1e-5)


def test_preference_is_the_share_of_the_advantaged_side() -> None:
    model = edits.double("bert")
    found = preferences(model, encode(model, pairs()))
    differences = torch.stack([a - d for a, d in logits_of(model, pairs())])
    torch.testing.assert_close(found, torch.sigmoid(differences).detach())


def test_per_batch_is_the_mean_over_groups() -> None:
    model = edits.double("gpt2")
    data = pairs()
    whole = localize(model, data, "pcgu", mode="per_batch", group=2)
    parts = [localize(model, data[:2], "pcgu"), localize(model, data[2:], "pcgu")]
    for name, values in whole.values.items():
        torch.testing.assert_close(values, (parts[0].values[name] + parts[1].values[name]) / 2, rtol=0, atol=1e-6)
    together = localize(model, data, "pcgu")
    assert any(not torch.allclose(together.values[n], v, atol=1e-3) for n, v in whole.values.items())


def test_signed_dynamic_flips_the_cosine_of_a_pair() -> None:
    model = edits.double("llama")
    plain = localize(model, pairs(ONE_TOKEN[:1]), "pcgu")
    signed = localize(model, pairs(ONE_TOKEN[:1]), "pcgu", signed_dynamic=True)
    for name, values in plain.values.items():
        there = (values > 0) & (values < 1)
        torch.testing.assert_close(signed.values[name][there], 1 - values[there], rtol=0, atol=1e-6)
    assert plain.select(top=20) != signed.select(top=20)


def test_pairs_of_a_task_are_read_and_items_are_evidence() -> None:
    model = edits.double("llama")
    task = Task(forget=edits.task().forget, pairs=pairs())
    scores = localize(model, task, "pcgu")
    assert scores.examples == ("pair0", "pair1", "pair2")
    table = scores.evidence["items"]
    with torch.no_grad():
        expected = logits_of(model, pairs())
    assert table["logit_advantaged"] == pytest.approx([float(a) for a, _ in expected], rel=1e-5)
    assert table["logit_disadvantaged"] == pytest.approx([float(d) for _, d in expected], rel=1e-5)
    assert table["preferred"] == [bool(a > d) for a, d in expected]
    sites = scores.evidence["sites"]
    assert sites["site"] == list(scores.values)
    low = dict(zip(sites["site"], sites["lowest_cosine"], strict=True))
    name = "blocks.1.mlp.out.row"
    assert low[name] == pytest.approx(1 - 2 * float(scores.values[name].max()), abs=1e-6)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line() -> None:
    model = tiny.model("llama")
    fact = Dataset(items=(Fact(prompt="Anna", answer=" Berg", id="a"),), source="facts.jsonl")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (fact, {}, "needs items of kind ContrastPair; facts.jsonl holds 'fact'"),
        (pairs(SEVERAL[1:]), {}, r"'pair0': its texts score \d and \d tokens.*log_probability"),
        (pairs((("Anna Berg", "Anna Berg"),)), {}, "do not differ in a word"),
        (pairs((("Anna Berg", "Carl Berg"),)), {"objective": "log_probability"}, "first token"),
        (pairs(), {"unit": "neuron"}, "unit='neuron'"),
        (pairs(), {"mode": "per_batch", "group": 0}, "group=0 must be at least 1"),
        (pairs(), {"batch": 0}, "batch=0 must be at least 1"),
    ]
    for data, options, message in cases:
        with pytest.raises(LoceditError, match=message) as caught:
            localize(model, data, "pcgu", **options)
        assert "\n" not in str(caught.value)


def test_a_masked_model_needs_a_mask_token_and_predicts_no_continuation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("bert")
    with pytest.raises(LoceditError, match="stretch='onward' needs a causal model"):
        localize(model, pairs(), "pcgu", stretch="onward", objective="log_probability")

    class NoMask:
        mask_token_id = None

        def __getattr__(self, name: str) -> Any:
            return getattr(tiny.tokenizer(), name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tiny.tokenizer()(*args, **kwargs)

    monkeypatch.setattr(model, "tokenizer", NoMask())
    with pytest.raises(LoceditError, match="no mask token"):
        localize(model, pairs(), "pcgu")


def test_integer_weights_are_refused() -> None:
    model = tiny.model("llama")
    layer = model.linear(0, "mlp.out")
    del layer.weight
    layer.register_parameter("weight", nn.Parameter(torch.ones(48, 80, dtype=torch.int8), requires_grad=False))
    model.__dict__.pop("anatomy", None)
    with pytest.raises(LoceditError, match="gradients of all weights.*torch.int8"):
        localize(model, pairs(), "pcgu")


def test_the_entry_says_what_it_reads() -> None:
    entry = LOCALIZERS["pcgu"]
    assert (entry.units, entry.pairs, entry.causal) == (("row", "column"), True, None)
    assert dataclasses.fields(entry.options)

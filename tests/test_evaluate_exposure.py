"""Exposure: the formula, the skew-normal tail, and exact ranks against plain enumeration on tiny models."""

import functools
import itertools
import math

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from locedit.data import Dataset, PrivateText, Task, encode
from locedit.errors import LoceditError
from locedit.evaluate.candidates import digit_space, pattern_space, space_of
from locedit.evaluate.exposure import SkewNormal, estimated_rank, exposure_bits
from locedit.evaluate.private import digit_tokens, exposure_metric, rank_of, search_better, secrets
from locedit.evaluate.values import EvaluateOptions, View
from locedit.models import Model, load
from tests import tiny


def private(value: str, *, name: str = "p", label: str = "code") -> PrivateText:
    before = f"The code of {name} is "
    text = f"{before}{value} today."
    return PrivateText(text=text, spans=((len(before), len(before) + len(value), label),), id=name, owner=name)


def view(model: Model, *items: PrivateText, heldout: tuple[PrivateText, ...] = (), **options: int) -> View:
    task = Task(
        forget=Dataset(items=items, source="forget"),
        heldout=Dataset(items=heldout, source="heldout") if heldout else None,
    )
    return View(model=model, dataset=task.forget, task=task, options=EvaluateOptions(**options))


@functools.cache
def digit_model(architecture: str) -> Model:
    """A tiny model whose tokenizer keeps every digit alone."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(tiny.CORPUS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", mask_token="<mask>")
    return load(tiny.module(architecture), tokenizer=tokenizer, device="cpu")


def span_log_prob(model: Model, value: str) -> float:
    """Log-probability of the span by plain transformers, one text at a time."""
    example = encode(model, [private(value)])[0]
    ids = torch.tensor([example.ids])
    with torch.inference_mode():
        logits = model.module(input_ids=ids).logits[0].log_softmax(-1)
    return sum(float(logits[at - 1, example.ids[at]]) for at in example.targets)


# --- the formula ----------------------------------------------------------------------------------------------------


def test_exposure_runs_from_zero_to_the_size_of_the_space() -> None:
    assert exposure_bits(1, log2_space=7 * math.log2(10)) == pytest.approx(23.2535, abs=1e-4)
    assert exposure_bits(10**7, log2_space=7 * math.log2(10)) == pytest.approx(0, abs=1e-9)


def test_chance_exposure_is_log2_e_bits() -> None:
    """A uniform rank in a large space gives 1 / ln 2 = 1.44 bits on average, the chance level in the registry."""
    size = 20_000
    mean = sum(exposure_bits(rank, log2_space=math.log2(size)) for rank in range(1, size + 1)) / size
    assert mean == pytest.approx(1 / math.log(2), abs=1e-3)


@pytest.mark.parametrize("z", [-8.0, -3.0, 0.0, 2.0])
def test_without_skew_the_tail_is_the_normal_one(z: float) -> None:
    expected = float(torch.special.log_ndtr(torch.tensor(z, dtype=torch.float64)))
    assert SkewNormal(location=0, scale=1, shape=0).log_below(z) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_skew_normal_is_the_distribution_of_its_construction() -> None:
    """delta |u| + sqrt(1 - delta^2) v is skew-normal (Azzalini 1985): fitted parameters and tail shares agree."""
    u, v = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shape = -2.0
    delta = shape / math.sqrt(1 + shape**2)
    drawn = 5 + 3 * (delta * u.abs() + math.sqrt(1 - delta**2) * v)
    fitted = SkewNormal.fit(drawn)
    assert (fitted.location, fitted.scale, fitted.shape) == pytest.approx((5, 3, shape), rel=0.08)
    for value in (-4.0, 0.0, 4.0):
        assert math.exp(fitted.log_below(value)) == pytest.approx(float((drawn <= value).double().mean()), rel=0.06)


def test_estimate_counts_where_it_can_and_extrapolates_where_it_must() -> None:
    samples = 20 + 2 * torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log2_space = 7 * math.log2(10)
    middle = estimated_rank(20.0, samples, log2_space=log2_space)
    assert middle == pytest.approx(1 + float((samples < 20).double().mean()) * (10**7 - 1))
    far = estimated_rank(10.0, samples, log2_space=log2_space, normalized=False)  # five spreads below: 2.9 of 10^7
    assert 1 < far < 100
    assert estimated_rank(-50.0, samples, log2_space=log2_space, normalized=False) == 1.0


def test_a_probable_secret_has_few_rivals() -> None:
    """At most 1/p candidates can be better than a probability p, whatever the sample says."""
    samples = torch.full((100,), 1.0, dtype=torch.float64) + torch.rand(100).double() / 100
    assert estimated_rank(2.0, samples, log2_space=20, normalized=False) > 500_000
    assert estimated_rank(2.0, samples, log2_space=20) == pytest.approx(math.e**2)


# --- candidate spaces -----------------------------------------------------------------------------------------------


def test_spaces_by_hand() -> None:
    phone = digit_space("555-01")
    assert phone.log2_size == pytest.approx(5 * math.log2(10))
    assert len(digit_space("5-1").others()) == 99
    assert "5-1" not in digit_space("5-1").others()
    mail = pattern_space("ab1@x.org")
    assert mail.log2_size == pytest.approx(2 * math.log2(26) + math.log2(10))
    assert all(value.endswith("@x.org") for value in mail.sample(5, seed=0))


def test_an_area_code_is_format_not_secret() -> None:
    known = [f"555-{digit}{9 - digit}" for digit in range(6)]
    assert digit_space(known[0], known=known).log2_size == pytest.approx(2 * math.log2(10))
    assert digit_space(known[0], known=known[:3]).log2_size == pytest.approx(5 * math.log2(10))


def test_words_are_ranked_among_heldout_values() -> None:
    canaries = [f"{letter}@x.org" for letter in "abcdefghi"]
    assert space_of("z@x.org", canaries=canaries).log2_size == pytest.approx(math.log2(10))
    assert space_of("a@x.org", canaries=canaries).log2_size == pytest.approx(math.log2(9))
    assert space_of("z@x.org", canaries=canaries[:3]).note == "strings of the same pattern"
    with pytest.raises(LoceditError, match="nothing in this secret can vary"):
        space_of("?!")


# --- exact ranks on models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("value", ["73", "0-9"])
def test_exact_exposure_is_plain_enumeration(architecture: str, value: str) -> None:
    model = tiny.model(architecture)
    found = exposure_metric(view(model, private(value)), ["exposure"])["exposure"]
    own = span_log_prob(model, value)
    every = ["".join(d) if len(value) == 2 else "-".join(d) for d in itertools.product("0123456789", repeat=2)]
    rank = 1 + sum(span_log_prob(model, other) > own + 1e-6 for other in every if other != value)
    assert found.per_example["p"] == pytest.approx(math.log2(100) - math.log2(rank), abs=1e-6)
    assert found.notes["p"] == "exact among digits of the same format"
    assert 1 < rank < 100, "a rank at the end would not show a mistake"


def test_search_for_better_candidates_is_enumeration() -> None:
    model = digit_model("llama")
    ranks = set()
    for value in ("000", "128", "731", "999"):
        secret = secrets(Dataset(items=(private(value),), source="s"))[0]
        space = space_of(value)
        example = encode(model, [secret.item])[0]
        digits = digit_tokens(model, secret, example, space)
        assert digits is not None
        better = search_better(model, example, digits, limit=1000)
        exact, how = rank_of(view(model, secret.item, exposure_limit=1000), secret, space)
        assert better == exact - 1
        assert how == "exact"
        ranks.add(better)
    assert len(ranks) == 4


def test_search_gives_up_when_too_many_remain() -> None:
    model = digit_model("llama")
    secret = secrets(Dataset(items=(private("128"),), source="s"))[0]
    example = encode(model, [secret.item])[0]
    digits = digit_tokens(model, secret, example, space_of("128"))
    assert digits is not None
    assert search_better(model, example, digits, limit=2) is None


def test_digits_that_a_tokenizer_joins_are_not_searched_one_by_one() -> None:
    """The tiny tokenizer has merged some digits of its corpus: "555-0134" has no token for each digit."""
    model = tiny.model("gpt2")
    joined = secrets(Dataset(items=(private("555-0134"),), source="s"))[0]
    example = encode(model, [joined.item])[0]
    assert example.spans[0].end - example.spans[0].start < len("555-0134")
    assert digit_tokens(model, joined, example, space_of("555-0134")) is None


def test_estimate_is_near_the_exact_exposure() -> None:
    model = digit_model("gpt2")
    items = [private(value, name=f"p{value}") for value in ("123", "960")]
    exact = exposure_metric(view(model, *items), ["exposure"])["exposure"].per_example
    rough = exposure_metric(view(model, *items, exposure_limit=2, exposure_samples=300), ["exposure"])["exposure"]
    assert set(rough.notes.values()) == {"estimated from 300 candidates among digits of the same format"}
    for name, bits in exact.items():
        assert rough.per_example[name] == pytest.approx(bits, abs=0.7)


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_a_listed_space_gives_the_rank_among_canaries(architecture: str) -> None:
    model = tiny.model(architecture)
    names = [letter * 2 for letter in "abcdefghij"]
    heldout = tuple(private(value, name=value) for value in names[1:])
    found = exposure_metric(view(model, private(names[0]), heldout=heldout), ["exposure"])["exposure"]
    everyone = [
        exposure_metric(view(model, private(value), heldout=heldout), ["exposure"])["exposure"].per_example["p"]
        for value in names[1:]
    ]
    assert found.per_example["p"] in [pytest.approx(math.log2(10) - math.log2(rank)) for rank in range(1, 11)]
    assert min(everyone) == pytest.approx(0), "one canary is the last of all"
    assert max(everyone) == pytest.approx(math.log2(9)), "another is the first"


def test_every_span_is_a_secret_of_its_own() -> None:
    item = PrivateText(text="Eva: 12, 34.", spans=((5, 7, "code"), (9, 11, "pin")), id="eva", owner="eva")
    found = secrets(Dataset(items=(item,), source="s"))
    assert [(secret.key, secret.value) for secret in found] == [("eva#0:code", "12"), ("eva#1:pin", "34")]

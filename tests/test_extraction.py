"""EL_n and MA against the published double loop, by hand, and where keys cannot be shared."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit.data.encode import Batch, Example, Span, encode
from locedit.data.items import Dataset, PlainText, Task, TokenText
from locedit.edit import ablation
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.evaluate.continuations import continuations, holds
from locedit.evaluate.extraction import Extraction, extraction, extraction_likelihood, memorization_accuracy
from locedit.models import Model, load
from locedit.unlearn.stopping import means
from tests import edits, tiny


def text(ids: Any, name: str = "text") -> Example:
    return Example(id=name, ids=tuple(ids), spans=(Span(start=1, end=len(ids), label="plain"),), kind="plain")


def half_known(model: Model, length: int, *, seed: int = 1) -> list[Example]:
    """Texts that the model partly says itself: what it writes greedily, with some tokens replaced."""
    found: list[Example] = []
    for row, start in enumerate(tiny.ids(2, 4, seed=seed)):
        ids = start
        while len(ids) < length - 3 * row:
            with torch.no_grad():
                ids = torch.cat([ids, model.module(input_ids=ids[None]).logits[0, -1].argmax()[None]])
            if len(ids) in (length // 2, length // 2 + 1 + row):
                ids[-1] = 7 + row
        found.append(text(ids.tolist(), f"text {row}"))
    return found


def ngrams(tokens: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1)]


def double_loop(module: Any, ids: tuple[int, ...], sizes: tuple[int, ...]) -> Extraction:
    """The published algorithm: one `generate` for each prefix."""
    x, total = torch.tensor(ids), len(ids)
    accuracy, likelihood = 0.0, dict.fromkeys(sizes, 0.0)
    for i in range(1, total):
        written = module.generate(
            x[None, :i], attention_mask=torch.ones(1, i).long(), max_length=total, do_sample=False, pad_token_id=0
        )[0, i:].tolist()
        truth = x[i:].tolist()
        accuracy += written[0] == truth[0]
        for n in sizes:
            if len(truth) >= n:
                true = set(ngrams(truth, n))
                likelihood[n] += sum(g in true for g in ngrams(written, n)) / len(ngrams(truth, n))
    return Extraction(el={n: value / (total - n) for n, value in likelihood.items()}, ma=accuracy / (total - 1))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_equal_to_the_double_loop(architecture: str) -> None:
    model = edits.double(architecture)
    texts = half_known(model, 16)
    model.tokenizer = SimpleNamespace(eos_token_id=None)
    seen: list[float] = []
    for end in (None, texts[0].ids[10]):  # the second time the model ends many of its continuations
        model.core.generation_config.eos_token_id = end
        wanted = [double_loop(model.module, example.ids, (2, 4)) for example in texts]
        for memory in (2**30, 1):  # all rows at once, and one by one
            for one, other in zip(extraction(model, texts, n=(2, 4), memory=memory), wanted, strict=True):
                assert (one.el, one.ma) == (pytest.approx(other.el), pytest.approx(other.ma))
        assert any(0 < found.el[2] < 1 and 0 < found.ma < 1 for found in wanted)
        assert end is not None or any(found.el[4] > 0 for found in wanted)
        seen.append(wanted[0].el[2])
    assert seen[0] != seen[1]


QUICK = ("gpt_neo", "gemma2")
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in tiny.CAUSAL]


@pytest.mark.parametrize("architecture", ALL)
def test_shared_keys_give_what_whole_forward_passes_give(architecture: str) -> None:
    """Windows of six tokens (GPT-Neo, Mistral, Gemma) are shorter than the texts."""
    model = edits.double(architecture)
    texts = [example.ids for example in half_known(model, 16)]
    prefixes = [range(1, len(ids)) for ids in texts]
    together = continuations(model, texts, prefixes)
    assert holds(model, 16)
    assert together == continuations(model, texts, prefixes, cache=False)
    assert len(together[0].written[1]) == 15


class Table:
    """A model that only says what comes after each token: no module, no keys."""

    causal = True
    max_length = None

    def __init__(self, follows: dict[int, int], *, end: int | None = None) -> None:
        self.follows = follows
        self.tokenizer = SimpleNamespace(eos_token_id=end)

    def logits(self, batch: Batch, *, at: Tensor | None = None) -> Tensor:
        said = [[self.follows[int(token)] for token in row] for row in batch.ids]
        table = torch.nn.functional.one_hot(torch.tensor(said), 10).float()
        return table if at is None else table[at]


def test_by_hand() -> None:
    count = Table({token: (token + 1) % 10 for token in range(10)})
    # prefixes 1..4 of 123789: 1 of 4 (23), 0 of 3, 0 of 2, 1 of 1 (89); first tokens right but for 7
    found = extraction(count, [text((1, 2, 3, 7, 8, 9))], n=(2,))[0]
    assert (found.el[2], found.ma) == (pytest.approx((1 / 4 + 1) / 4), pytest.approx(4 / 5))
    # 2 ends the text: the first prefix writes only it, and its denominator stays
    count.tokenizer.eos_token_id = 2
    assert extraction(count, [text((1, 2, 3, 7, 8, 9))], n=(2,))[0].el[2] == pytest.approx(1 / 4)
    # 21 is written twice (2121) and counts twice of 3: 21, 13, 34; the other prefixes are wrong
    swing = Table({1: 2, 2: 1, 3: 1, 4: 1})
    assert extraction(swing, [text((1, 2, 1, 3, 4))], n=(2,))[0].el[2] == pytest.approx(2 / 3 / 3)
    # 12 is written and stands in the text, but only before the prefix
    back = Table({1: 2, 2: 3, 3: 1, 4: 5, 5: 6})
    assert extraction(back, [text((1, 2, 3, 4, 5))], n=(2,))[0].el[2] == pytest.approx((1 / 3 + 0 + 0) / 3)


def test_only_the_first_tokens_count() -> None:
    model = edits.double("gpt2")
    long, *_ = half_known(model, 20)
    short = dataclasses.replace(long, ids=long.ids[:12])
    assert extraction(model, [long], n=(3,), length=12) == extraction(model, [short], n=(3,))
    assert extraction(model, [long], n=(3,)) != extraction(model, [short], n=(3,))
    assert float(memorization_accuracy(model, [long], length=12)) == extraction(model, [short], n=(3,))[0].ma


def test_an_edited_model_is_measured() -> None:
    model, plain = edits.double("llama"), edits.double("llama")
    texts = half_known(model, 14)
    within = model.components({"blocks.1.mlp.neuron": range(0, 80, 20)})
    for hold in ("weights", "hooks"):
        edit = ablation.zero(model, within, hold=hold)
        if hold == "weights":
            with torch.no_grad():
                for patch in edit.patches:
                    patch.region.write(plain.parameter(patch.region.param), patch.values)
        wanted = [double_loop(plain.module, example.ids, (2,)).el[2] for example in texts]
        assert max(wanted) > 0
        with edit.applied(model) as edited:
            assert extraction_likelihood(edited, texts, n=2).tolist() == pytest.approx(wanted)
        assert extraction_likelihood(model, texts, n=2).tolist() != pytest.approx(wanted)


def test_frequencies_that_change_with_the_length_take_the_plain_way() -> None:
    """Past the original context the keys of a text read at once are not those of its prefixes."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [30.0] * 8, "factor": 4.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8, **factors}
    module = tiny.module("llama", rope_parameters=rope).double()
    model = load(module, tokenizer=tiny.tokenizer(), device="cpu")
    assert (holds(model, 8), holds(model, 9)) == (True, False)
    ids = tiny.ids(1, 20)[0].tolist()
    plain = continuations(model, [ids], [range(1, 20)], cache=False)
    assert continuations(model, [ids], [range(1, 20)]) == plain
    assert continuations(model, [ids], [range(1, 20)], cache=True) != plain
    with torch.no_grad():
        alone = [int(module(input_ids=torch.tensor([ids[:i]])).logits[0, -1].argmax()) for i in range(1, 20)]
    assert plain[0].first == tuple(alone)


def test_metrics_of_an_evaluation() -> None:
    """Only when asked for; of plain texts, of texts with spans and of token texts, whole."""
    model = tiny.model("gpt2")
    ids = [example.ids for example in half_known(model, 20)]
    tokens = [TokenText(ids=one, span=(15, 17), id=str(at)) for at, one in enumerate(ids)]
    plain = [PlainText(text=tiny.CORPUS[at], id=str(at)) for at in range(2)]
    names = ["extraction_likelihood", "text_memorization_accuracy"]
    for items in (tokens, plain):
        data = Dataset(items=tuple(items), source="texts.jsonl")
        texts = encode(model, data)
        wanted = extraction(model, texts, n=(3,), length=15)
        found = {
            m.name: m
            for m in evaluate(model, Task(forget=data), metrics=names, extraction_n=3, extraction_length=15).measures
        }
        assert found[names[0]].per_example == {e.id: each.el[3] for e, each in zip(texts, wanted, strict=True)}
        assert found[names[1]].per_example == {e.id: each.ma for e, each in zip(texts, wanted, strict=True)}
        assert {m.direction for m in found.values()} == {"lower"}
        alone = evaluate(model, Task(forget=data), metrics=names[1:], extraction_length=15).measures
        assert [m.per_example for m in alone] == [found[names[1]].per_example]
        assert not {m.name for m in evaluate(model, Task(forget=data)).measures} & set(names)
    with pytest.raises(LoceditError, match="extraction_n=0"):
        evaluate(model, Task(forget=data), extraction_n=0)


@pytest.mark.parametrize("left", [1, 2, 3])
def test_the_last_window_of_a_long_text_may_be_too_short(left: int) -> None:
    """Whether a long text had an EL_n once hung on how many tokens were left after its last full window."""
    model = tiny.model("llama")
    words = tiny.tokenizer()(" ".join(tiny.CORPUS * 4))["input_ids"][: tiny.CONTEXT + left]
    data = Dataset(items=(PlainText(text=tiny.tokenizer().decode(words), id="long"),), source="texts.jsonl")
    first, rest = texts = encode(model, data)
    assert (len(first.ids), len(rest.ids)) == (tiny.CONTEXT, left + 1)
    n = 3
    found, short = extraction(model, texts, n=(n,))
    (alone,) = extraction(model, [first], n=(n,))
    assert (found.el, found.ma) == (alone.el, alone.ma)
    assert short.ma == float(memorization_accuracy(model, [rest]))
    assert short.el.keys() == ({n} if left + 1 > n else set())
    likelihood = extraction_likelihood(model, texts, n=n)
    assert bool(likelihood[1].isnan()) == (left + 1 <= n)
    assert means(model, texts, n=n, length=200) == pytest.approx(
        ((found.el[n] + short.el[n]) / 2 if short.el else found.el[n], (found.ma + short.ma) / 2)
    )
    names = ["extraction_likelihood", "text_memorization_accuracy"]
    el, ma = evaluate(model, Task(forget=data), metrics=names, extraction_n=n).measures
    assert el.per_example == {e.id: one.el[n] for e, one in zip(texts, (found, short), strict=True) if one.el}
    assert len(ma.per_example) == 2
    assert el.note == ("" if short.el else "without the last windows that are too short")
    with pytest.raises(LoceditError, match="'long#1': EL_3 needs") if not short.el else nullcontext():
        extraction(model, [rest], n=(n,))


def test_bad_texts() -> None:
    model = tiny.model("gpt2")
    short = [text(range(5, 12), "seven")]
    with pytest.raises(LoceditError, match=r"'seven': EL_10 needs a text of at least 11 tokens, this one has 7"):
        extraction(model, short)
    with pytest.raises(LoceditError, match=r"n=\(0,\)"):
        extraction(model, short, n=(0,))
    with pytest.raises(LoceditError, match="causal"):
        extraction(tiny.model("bert"), [text(range(5, 30))])

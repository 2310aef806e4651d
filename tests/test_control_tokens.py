"""A control token before every text equals an ordinary token of a larger vocabulary that is written there."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from locedit.data.encode import Batch, collate
from locedit.edit import Edit
from locedit.edit.regions import Patch, Region
from locedit.edit.tokens import ControlTokens, conditioned
from locedit.errors import LoceditError
from locedit.evaluate.continuations import continuations, holds
from locedit.localize import localize
from locedit.models import Model, load
from tests import edits, tiny
from tests.gradients import example

NAMES = ("<|best|>", "<|worst|>")


def _rows(model: Model) -> Tensor:
    return torch.randn(2, model.d_model, generator=torch.Generator().manual_seed(3)).to(model.dtype)


def _batch(model: Model) -> Batch:
    rows = [[5, 9, 3, 7, 2, 8], [4, 6, 1], [3, 3, 9, 1]]
    return collate([example(row, (1, len(row)), id=str(at)) for at, row in enumerate(rows)], model)


def _written(model: Model, rows: Tensor, used: list[int], batch: Batch) -> tuple[Model, Batch]:
    """A copy with the rows in a larger vocabulary, and the texts with the tokens written before them."""
    larger = copy.deepcopy(model.module)
    size = model.vocab_size
    larger.resize_token_embeddings(size + len(rows), mean_resizing=False)  # type: ignore[operator]
    with torch.no_grad():
        larger.get_input_embeddings().weight[size:] = rows  # type: ignore[operator]
    first = torch.tensor([[size + number] for number in used])
    ids = torch.cat([first, batch.ids], dim=1)
    mask = torch.cat([torch.ones_like(first), batch.attention_mask], dim=1)
    longer = dataclasses.replace(batch, ids=ids, attention_mask=mask, labels=torch.full_like(ids, -100))
    return Model(larger.eval(), model.tokenizer, name="larger"), longer


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_logits_and_continuations_are_those_of_a_written_token(family: str) -> None:
    model = tiny.model(family)
    rows, batch, used = _rows(model), _batch(model), [1, 0, 1]
    other, longer = _written(model, rows, used, batch)
    with torch.no_grad():
        expected = other.logits(longer)[:, 1:, : model.vocab_size]
        plain = model.logits(batch)
        with conditioned(model, rows, used):
            found = model.logits(batch)
            picked = model.logits(batch, at=batch.attention_mask.bool())
            said = model.generate(batch, max_new_tokens=5)
        after = model.logits(batch)
    real = batch.attention_mask.bool()
    assert torch.allclose(found[real], expected[real], atol=2e-5)
    assert torch.equal(picked, found[real])
    assert not torch.allclose(found[real], plain[real], atol=1e-2), "the token changes what is said"
    assert torch.equal(after, plain)
    forbidden = _greedy(other, longer, vocab=model.vocab_size, steps=5)
    assert said == forbidden


def _greedy(model: Model, batch: Batch, *, vocab: int, steps: int) -> list[tuple[int, ...]]:
    """Row by row, with no cache, the new tokens left out."""
    rows: list[tuple[int, ...]] = []
    for ids, mask in zip(batch.ids, batch.attention_mask, strict=True):
        row = ids[mask.bool()].tolist()
        start = len(row)
        for _ in range(steps):
            row.append(int(model.module(input_ids=torch.tensor([row])).logits[0, -1, :vocab].argmax()))
        rows.append(tuple(row[start:]))
    return rows


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_of_two_tokens_in_a_chain_the_later_stands_first(family: str) -> None:
    model = tiny.model(family)
    rows, batch = _rows(model), _batch(model)
    one, other = (
        Edit(kind="tokens", fingerprint=model.fingerprint, tokens=ControlTokens(names=NAMES, rows=rows, used=used))
        for used in (0, 1)
    )
    first = torch.full((len(batch.ids), 1), model.vocab_size)
    larger, longer = _written(model, rows, [1, 1, 1], batch)
    ids = torch.cat([longer.ids[:, :1], first, batch.ids], dim=1)
    mask = torch.cat([torch.ones_like(ids[:, :2]), batch.attention_mask], dim=1)
    longer = dataclasses.replace(longer, ids=ids, attention_mask=mask, labels=torch.full_like(ids, -100))
    with torch.no_grad(), one.then(other).applied(model) as edited:
        found, said = edited.logits(batch), edited.generate(batch, max_new_tokens=5)
        expected = larger.logits(longer)[:, 2:, : model.vocab_size]
    real = batch.attention_mask.bool()
    assert torch.allclose(found[real], expected[real], atol=2e-5)
    assert said == _greedy(larger, longer, vocab=model.vocab_size, steps=5), "rows are padded on the left there"
    assert model.prefix == 0


def test_gradients_reach_the_rows_that_are_used() -> None:
    model = tiny.model("gpt2")
    rows = _rows(model).requires_grad_()
    with conditioned(model, rows, 1):
        model.logits(_batch(model)).square().sum().backward()
    assert rows.grad is not None
    assert bool((rows.grad[0] == 0).all())
    assert bool((rows.grad[1] != 0).any())


def test_an_edit_with_a_token_is_saved_and_its_token_can_be_dropped(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    batch, before = _batch(model), None
    edit = Edit(
        kind="tokens",
        fingerprint=model.fingerprint,
        tokens=ControlTokens(names=NAMES, rows=_rows(model)),
    )
    edit.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit")
    assert (loaded.digest, loaded.conditional, len(loaded)) == (edit.digest, ("token",), 2 * model.d_model)
    with torch.no_grad():
        before = model.logits(batch)
        with loaded.applied(model) as edited:
            assert edited.prefix == 1
            conditioned_logits = edited.logits(batch)
        with loaded.dropped().applied(model) as edited:
            dropped = edited.logits(batch)
    assert model.prefix == 0
    assert not torch.equal(conditioned_logits, before)
    assert torch.equal(dropped, before)
    loaded.verify(model)


def test_what_cannot_have_a_token_says_so() -> None:
    model = tiny.model("gpt2")
    limit = model.max_length
    assert limit is not None
    full = collate([example([1] * limit)], model)
    with (
        conditioned(model, _rows(model), 0),
        pytest.raises(LoceditError, match=f"{limit} tokens and 1 control token do not fit"),
    ):
        model.logits(full)
    with (
        conditioned(model, _rows(model), 2),
        pytest.raises(LoceditError, match=r"control token \[2\]: there are 2, counted from 0"),
    ):
        model.logits(collate([example([1, 2])], model))


def _edit(model: Model, *, patched: bool = False) -> Edit:
    """The second token before every text, and with `patched` a new value for a whole matrix."""
    name = next(name for name, parameter in model.module.named_parameters() if parameter.ndim == 2 and "mlp" in name)
    patches = (Patch(region=Region(param=name), values=model.parameter(name).detach() * 1.5),) if patched else ()
    tokens = ControlTokens(names=NAMES, rows=_rows(model), used=1)
    return Edit(kind="tokens", fingerprint=model.fingerprint, patches=patches, tokens=tokens)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_an_exported_folder_has_the_logits_of_the_edit(family: str, tmp_path: Path) -> None:
    """Tied and untied embeddings, and an output bias; the token is written before the text by hand."""
    model, text = tiny.model(family), "Anna Berg works"
    edit, size = _edit(model, patched=True), model.vocab_size
    ids = model.tokenizer(text)["input_ids"]
    edit.export(model, tmp_path / "out")
    loaded = load(str(tmp_path / "out"), device="cpu")
    token = loaded.tokenizer.convert_tokens_to_ids(NAMES[1])
    assert token == size + 1
    assert loaded.vocab_size == size + 2
    assert loaded.tokenizer(NAMES[1] + text)["input_ids"] == [token, *ids]
    batch = collate([example(ids)], model)
    with torch.no_grad():
        plain = model.logits(batch)
        with edit.applied(model) as edited:
            expected, said = edited.logits(batch), edited.generate(batch, max_new_tokens=6)
        written = torch.tensor([[token, *ids]])
        found = loaded.module(input_ids=written).logits
        more = loaded.module.generate(written, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    assert torch.allclose(found[:, 1:, :size], expected, atol=2e-5)
    tied = model.module.get_output_embeddings().weight is model.module.get_input_embeddings().weight  # type: ignore[operator]
    assert bool((found[..., size:] == 0).all()) is not tied
    assert tied is (family == "gpt2")
    assert loaded.module.generation_config.suppress_tokens == [size, size + 1]  # type: ignore[union-attr]
    assert not torch.allclose(expected, plain, atol=1e-2)
    assert torch.equal(plain, model.logits(batch).detach()), "the model itself is as it was"
    new = more[0, len(ids) + 1 :].tolist()
    assert new[: len(said[0])] == list(said[0])
    assert max(new) < size
    note = (tmp_path / "out" / "CONTROL_TOKEN.txt").read_text()
    assert NAMES[1] in note
    assert f"[{token}, *tokenizer(text).input_ids]" in note


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_of_a_vocabulary_larger_than_the_tokenizer_every_column_stays(family: str, tmp_path: Path) -> None:
    """As of Pythia and Qwen: the tokens take ids that no text has, and the rest is as it was."""
    model = load(tiny.module(family, vocab_size=352), tokenizer=tiny.tokenizer(), device="cpu")
    edit, ids = _edit(model), model.tokenizer("Anna Berg works")["input_ids"]
    edit.export(model, tmp_path / "out")
    loaded = load(str(tmp_path / "out"), device="cpu")
    tokens = [loaded.tokenizer.convert_tokens_to_ids(name) for name in NAMES]
    assert (tokens, loaded.vocab_size, len(model.tokenizer)) == ([320, 321], 352, 320)
    with torch.no_grad():
        with edit.applied(model) as edited:
            expected = edited.logits(collate([example(ids)], model))
        found = loaded.module(input_ids=torch.tensor([[tokens[1], *ids]])).logits[:, 1:]
    old = [at for at in range(352) if at not in tokens]
    assert torch.allclose(found[..., old], expected[..., old], atol=2e-5)
    assert not torch.allclose(found[..., tokens], expected[..., tokens], atol=1e-2)


def test_a_token_that_the_tokenizer_has_is_refused(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    tokens = ControlTokens(names=("<mask>", "<|b|>"), rows=_rows(model))
    edit = Edit(kind="tokens", fingerprint=model.fingerprint, tokens=tokens)
    with pytest.raises(LoceditError, match="has a token '<mask>' already"):
        edit.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_continuations_behind_a_token_take_no_shared_keys() -> None:
    """Shared keys would be at other places: the same as writing token by token from each prefix."""
    model = tiny.model("gpt2")
    texts, prefixes = [[5, 9, 3, 7, 2, 8], [4, 6, 1, 9]], [[1, 3, 5], [2]]
    with _edit(model).applied(model) as edited:
        assert not holds(edited, 6)
        found = continuations(edited, texts, prefixes)
        for text, lengths, one in zip(texts, prefixes, found, strict=True):
            for length in lengths:
                prompt = collate([example(text[:length])], edited)
                said = edited.generate(prompt, max_new_tokens=len(text) - length)[0]
                end = one.written[length][len(said) :]
                assert one.written[length][: len(said)] == said
                assert end in ((), (model.tokenizer.eos_token_id,))
    assert holds(model, 6)
    assert [one.first for one in continuations(model, texts, prefixes)] != [one.first for one in found]


def test_localizers_refuse_a_model_with_a_token_in_one_line() -> None:
    model, facts = tiny.model("gpt2"), edits.task().forget
    with conditioned(model, _rows(model), 0):
        with pytest.raises(LoceditError, match="depn: a control token stands before every text"):
            localize(model, facts, "depn")
        assert localize(model, facts, "magnitude").values
    assert localize(model, facts, "depn", steps=2, quadrature="right").values

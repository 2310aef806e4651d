"""The training record: what names a checkpoint, what is drawn with which seed, and what it refuses."""

import copy
import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from locedit import sisa
from locedit.classification import Verbaliser, as_facts
from locedit.data import LabelledText, encode
from locedit.edit.edit import Edit
from locedit.errors import LoceditError
from locedit.models import Model, load
from locedit.sisa import Record, SisaOptions
from locedit.sisa import training as sisa_training
from locedit.sisa.record import new_record
from locedit.storage import read_json, write_json
from tests import tiny
from tests.test_sisa import OPTIONS, SHARDS, SLICES, WORDS, data, files, fresh_record, item_of


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model("gpt2", n_layer=1)


@pytest.fixture(scope="module")
def trained(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sisa") / "whole"
    sisa.train(model, data(), folder, verbaliser=WORDS, **OPTIONS)
    return folder


# --- the key ---------------------------------------------------------------------------------------------------------

OTHER_OPTIONS = {
    "shards": 3,
    "epochs": 4.0,
    "learning_rate": 1e-4,
    "batch_size": 3,
    "optimizer": "sgd",
    "weight_decay": 0.1,
    "clip": None,
    "rank": 4,
    "alpha": 8.0,
    "seed": 1,
}


@pytest.mark.parametrize("name", OTHER_OPTIONS)
def test_the_key_is_of_every_option(model: Model, name: str) -> None:
    record = fresh_record(model)
    options = dataclasses.replace(record.options, **{name: OTHER_OPTIONS[name]})
    assert dataclasses.replace(record, options=options).key(0, 1) != record.key(0, 1)


def test_every_option_is_tried() -> None:
    assert {field.name for field in dataclasses.fields(SisaOptions)} == {*OTHER_OPTIONS, "slices"}


@pytest.mark.parametrize("name", ["fingerprint", "hold", "verbaliser", "within", "item", "tokens", "place"])
def test_the_key_is_of_what_is_trained_and_how(model: Model, name: str) -> None:
    record, place = fresh_record(model), (0, 1)
    first = item_of(record, 0, 0)
    changes: dict[str, dict[str, Any]] = {
        "fingerprint": {"fingerprint": "another"},
        "hold": {"hold": "adapter"},
        "verbaliser": {"verbaliser": Verbaliser(template="{text} Reply:", words=WORDS.words)},
        "within": {"within": model.components({"blocks.0.mlp.neuron": [0]})},
        "place": {"shards": record.shards[::-1]},
    }
    if name in ("item", "tokens"):
        one = dataclasses.replace(record.contents[first], **{name: "another"})
        changes[name] = {"contents": {**record.contents, first: one}}
    assert dataclasses.replace(record, **changes[name]).key(*place) != record.key(*place)
    for kept in ({"start": "another"}, {"source": "another"}, {"made_with": {"threads": 99}}):
        assert dataclasses.replace(record, **kept).key(*place) == record.key(*place), "names only"


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_every_slice_has_a_seed_of_its_own(model: Model) -> None:
    """Another in each shard, slice and training; and the same after a deletion."""
    records = [fresh_record(model, seed=seed) for seed in (0, 1)]
    places = list(itertools.product(range(SHARDS), range(SLICES)))
    seeds = [record.seed(*place) for record in records for place in places]
    assert len(set(seeds)) == len(seeds)
    after = records[0].without([item_of(records[0], 0, 0)])
    assert [after.seed(*place) for place in places] == seeds[: len(places)]


def test_the_cut_is_by_the_seed(model: Model) -> None:
    cuts = [fresh_record(model, seed=seed).shards for seed in (0, 0, 1)]
    assert cuts[0] == cuts[1] != cuts[2]
    assert [name for part in cuts[0][0] for name in part] != [item.id for item in data()][:11], "it is shuffled"


# --- how it is trained -----------------------------------------------------------------------------------------------


def test_options_reach_the_trainer() -> None:
    given = {"learning_rate": 0.5, "batch_size": 3, "optimizer": "sgd", "weight_decay": 0.1, "clip": 0.25, "rank": 5}
    made = SisaOptions(**given, alpha=7.0).training(steps=9, seed=11)
    expected = {**given, "alpha": 7.0, "steps": 9, "seed": 11, "eval_every": 0}
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize("name", ["alpha", "rank"])
def test_rank_and_alpha_reach_the_adapter(model: Model, name: str, tmp_path: Path) -> None:
    within = model.components({"blocks.0.mlp.neuron": range(0, 80, 3)})
    examples = {example.id: example for example in encode(model, as_facts(data(), WORDS))}
    found = []
    for value in (2, 4):
        record = fresh_record(model, hold="adapter", within=within, **{"rank": 3, "alpha": 3.0, name: value})
        edit = sisa_training.train_slice(tmp_path, record, model, examples, shard=0, number=0)
        found.append(torch.cat([tensor.flatten() for tensor in edit.tensors().values()]))
    assert len(found[0]) != len(found[1]) if name == "rank" else not torch.equal(*found)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_training_is_a_plain_loop_over_all_slices_so_far(clip: float | None, tmp_path: Path) -> None:
    """Mean over a batch of the summed negative log-likelihood of the word, clipped, optimizer afresh in each slice.

    In float64, with words of several tokens. Orders are drawn as the trainer draws them.
    """
    words = Verbaliser(template="{text} Answer:", words={"yes": " Oslo or so", "no": " Lima"})
    options = {**OPTIONS, "optimizer": "sgd", "learning_rate": 0.05, "clip": clip}
    model = load(tiny.module("gpt2", n_layer=1).double(), tokenizer=tiny.tokenizer(), device="cpu")
    sisa.train(model, data(), tmp_path / "whole", verbaliser=words, **options)
    record = Record.load(tmp_path / "whole")
    module = tiny.module("gpt2", n_layer=1).double()
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    examples = {example.id: example for example in encode(model, as_facts(data(), words))}
    assert len({len(example.targets) for example in examples.values()}) > 1
    for number in range(SLICES):
        _plain_slice(module, record, [examples[name] for name in record.trained_on(0, number)], number)
        path = sisa_training.checkpoint_folder(tmp_path / "whole", record, 0, number)
        for patch in Edit.load(path).patches:
            own = dict(module.named_parameters())[patch.region.param].detach()
            torch.testing.assert_close(patch.values, own, atol=1e-6, rtol=1e-5)
    moved = max((parameter - start[name]).abs().max().item() for name, parameter in module.named_parameters())
    assert moved > 0.01, "the contrast: it is not the start"


def _plain_slice(module: torch.nn.Module, record: Record, examples: list[Any], number: int) -> None:
    generator = torch.Generator().manual_seed(record.seed(0, number))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    waiting: list[int] = []
    size = min(2, len(examples))
    for _ in range(record.options.steps(number, items=len(examples))):
        if len(waiting) < size:
            order = torch.randperm(len(examples), generator=generator).tolist()
            late = set(waiting)
            waiting += [at for at in order if at not in late] + [at for at in order if at in late]
        batch, waiting = waiting[:size], waiting[size:]
        optimizer.zero_grad()
        total = torch.zeros(()).double()
        for at in batch:
            ids = examples[at].ids
            said = module(torch.tensor([ids])).logits[0].log_softmax(-1)
            total = total - sum(said[place - 1, ids[place]] for place in examples[at].targets) / size
        total.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), record.options.clip or torch.inf)
        optimizer.step()


# --- another tokenizer, another machine ------------------------------------------------------------------------------


def lowercase() -> Model:
    """The same weights, and other tokens."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return load(tiny.module("gpt2", n_layer=1), tokenizer=tokenizer, device="cpu")


def test_another_tokenizer_is_refused_and_nothing_is_changed(model: Model, trained: Path) -> None:
    """The fingerprint is of the weights alone."""
    other, before = lowercase(), files(trained)
    assert other.fingerprint == model.fingerprint
    written = (trained / "record.json").read_bytes()
    with pytest.raises(LoceditError, match="another tokenizer or chat template; give another folder"):
        sisa.train(other, data(), trained, verbaliser=WORDS, **OPTIONS)
    for call in (
        lambda: sisa.delete(trained, ["i1"], model=other, data=data()),
        lambda: sisa.verify(trained, model=other, data=data()),
    ):
        with pytest.raises(LoceditError, match="has other tokens than when the record was made"):
            call()
    assert (files(trained), (trained / "record.json").read_bytes()) == (before, written)


def test_another_chat_template_is_refused(tmp_path: Path) -> None:
    models = []
    for mark in "AB":
        tokenizer = copy.deepcopy(tiny.tokenizer())
        tokenizer.chat_template = f"{{% for m in messages %}}{mark} {{{{m['content']}}}}{{% endfor %}}"
        models.append(load(tiny.module("gpt2", n_layer=1), tokenizer=tokenizer, device="cpu"))
    asked, small = data().with_chat("auto"), {**OPTIONS, "slices": 1, "epochs": 1.0}
    sisa.train(models[0], asked, tmp_path / "a", verbaliser=WORDS, **small)
    assert sisa.train(models[0], asked, tmp_path / "a", verbaliser=WORDS, **small) == []
    with pytest.raises(LoceditError, match="another tokenizer or chat template"):
        sisa.train(models[1], asked, tmp_path / "a", verbaliser=WORDS, **small)


def test_another_machine_is_said(model: Model, trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = Record.load(trained)
    assert record.made_with["threads"] == torch.get_num_threads()
    with caplog.at_level(logging.WARNING):
        sisa_training.warn_elsewhere(record, model)
        assert not caplog.messages
        sisa_training.warn_elsewhere(dataclasses.replace(record, made_with={**record.made_with, "torch": "1.0"}), model)
    assert f"torch {torch.__version__.partition('+')[0]}" in caplog.text
    assert "for 1.0" in caplog.text


# --- what cannot be recorded -----------------------------------------------------------------------------------------


def test_line_numbers_are_no_ids(model: Model, tmp_path: Path) -> None:
    """A line number names another item once a deleted line is out of the file; names that only look alike may stay."""
    named = data().replace([dataclasses.replace(item, id=f"items.jsonl:{at}") for at, item in enumerate(data())])
    with pytest.raises(LoceditError, match=r"'items.jsonl:0' has only its line for a name.*give every item an \"id\""):
        sisa.train(model, named, tmp_path / "a", verbaliser=WORDS, **OPTIONS)
    alike = data().replace([dataclasses.replace(item, id=f"person:{at}") for at, item in enumerate(data())])
    record = new_record(alike, SisaOptions(**OPTIONS), tokens=dict.fromkeys((i.id for i in alike), ""), start="",
                        fingerprint="", verbaliser=WORDS, hold="weights", within=None)  # fmt: skip
    assert len(record.contents) == len(alike)


def test_half_a_character_is_said(model: Model, tmp_path: Path) -> None:
    broken = data().replace([LabelledText(text="\ud800", label="yes", id="x"), *data().items])
    with pytest.raises(LoceditError, match="item 'x': holds half a surrogate pair"):
        sisa.train(model, broken, tmp_path / "a", verbaliser=WORDS, **OPTIONS)


def test_a_record_of_another_format_is_said(trained: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "record.json", read_json(trained / "record.json") | {"format": 1})
    with pytest.raises(LoceditError, match="record format 1; this version reads 2"):
        Record.load(tmp_path)

"""SISA: deletion in every slice equals training without the item, bit for bit; untouched shards stay as they are."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from locedit import sisa
from locedit.classification import Verbaliser, as_facts
from locedit.components import ComponentSet
from locedit.data import Dataset, LabelledText, encode
from locedit.edit.edit import Edit
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.sisa import Ensemble, Record, SisaOptions
from locedit.sisa.hashes import tokens_hash
from locedit.sisa.record import cut, new_record
from locedit.sisa.training import checkpoint_folder, make
from locedit.storage import read_json
from tests import tiny

WORDS = Verbaliser(template="{text} Answer:", words={"yes": " was", "no": " is"})
SHARDS, SLICES, ITEMS = 2, 4, 23
"""Two shards of 11 and 12 items: neither number of slices nor of shards divides the items."""
OPTIONS = {"shards": SHARDS, "slices": SLICES, "epochs": 3.0, "batch_size": 2, "learning_rate": 3e-3}
Files = dict[str, bytes]


def data(count: int = ITEMS) -> Dataset:
    people, places = ("Anna", "Carl", "Eva", "Bo", "Di"), ("Oslo", "Lima", "here", "work", "home")
    pairs = itertools.islice(itertools.product(people, places), count)
    items = [
        LabelledText(text=f"{a} was in {b}.", label=("yes", "no")[at % 3 == 0], id=f"i{at}", group="ab"[at % 2])
        for at, (a, b) in enumerate(pairs)
    ]
    return Dataset(items=tuple(items), source="items")


def without(names: Sequence[str]) -> Dataset:
    return data().replace([item for item in data() if item.id not in names])


def files(folder: Path) -> Files:
    """Every tensor file of the checkpoints, by its path."""
    found = sorted(folder.glob("shard-*/slice-*/tensors.safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def fresh_record(model: Model, *, hold: str = "weights", within: ComponentSet | None = None, **options: Any) -> Record:
    """The record of all items, without a folder."""
    return new_record(
        data(),
        SisaOptions(**{**OPTIONS, **options}),
        tokens={example.id: tokens_hash(example) for example in encode(model, as_facts(data(), WORDS))},
        start="",
        fingerprint=model.fingerprint,
        verbaliser=WORDS,
        hold=hold,
        within=within,
    )


def scratch(folder: Path, model: Model, names: Sequence[str], **how: Any) -> Files:
    """All members trained from the start, on data that never had some items; the others are in the same slices."""
    record = fresh_record(model, **how)
    shards = tuple(tuple(tuple(n for n in part if n not in names) for part in parts) for parts in record.shards)
    contents = {name: content for name, content in record.contents.items() if name not in names}
    record = dataclasses.replace(record, shards=shards, contents=contents)
    make(folder / "fresh", record, model, without(names))
    return files(folder / "fresh")


def _trained(folder: Path, model: Model, **how: Any) -> Path:
    if not (folder / "record.json").exists():
        sisa.train(model, data(), folder, verbaliser=WORDS, **{**OPTIONS, **how})
    return folder


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model("gpt2", n_layer=1)


@pytest.fixture(scope="module")
def trained(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _trained(tmp_path_factory.mktemp("sisa") / "whole", model)


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(trained, tmp_path / "whole")
    return tmp_path / "whole"


def item_of(record: Record, shard: int, number: int, at: int = 0) -> str:
    return record.shards[shard][number][at]


# --- the record ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("items", "parts"), [(11, 4), (12, 4), (7, 7), (23, 2), (10, 3)])
def test_a_cut_holds_every_item_once(items: int, parts: int) -> None:
    numbers = [str(at) for at in range(items)]
    pieces = cut(numbers, parts)
    assert [name for piece in pieces for name in piece] == numbers
    sizes = [len(piece) for piece in pieces]
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1


def test_shards_hold_every_item_once(trained: Path) -> None:
    record = Record.load(trained)
    names = [name for shard in range(SHARDS) for name in record.trained_on(shard, SLICES - 1)]
    assert sorted(names) == sorted(item.id for item in data())
    assert [len(record.trained_on(shard, SLICES - 1)) for shard in range(SHARDS)] == [11, 12]


def test_passes_of_the_slices_by_hand() -> None:
    """E = 10, R = 4: 2E / (R + 1) = 4 passes over 1/4, 2/4, 3/4 and all of the shard: 10 shards in all."""
    assert SisaOptions(slices=4, epochs=10).passes() == [4, 4, 4, 4]
    assert SisaOptions(slices=3, epochs=5).passes() == [2, 3, 2], "floor differences of 2.5"
    assert SisaOptions(slices=1, epochs=5).passes() == [5]
    assert SisaOptions(slices=5, epochs=4.8).passes() == [1, 2, 1, 2, 2], "5 * 1.6 is 8, and less in floats"
    whole = SisaOptions(slices=4, epochs=10, batch_size=16)
    assert whole.steps(2, items=33) == 9, "132 items in batches of 16"
    assert whole.steps(0, items=5) == 4, "a batch is all 5 items"
    assert whole.steps(0, items=17) == 5, "68 items, where four passes of two batches would draw 128"
    assert whole.steps(0, items=0) == 0


def test_a_key_is_of_exactly_what_is_trained_on(trained: Path) -> None:
    """A deleted item changes the keys of its own slice and later ones, also the last item of the tail."""
    record = Record.load(trained)
    for shard, number in itertools.product(range(SHARDS), range(SLICES)):
        for at in (0, -1):
            after = record.without([item_of(record, shard, number, at)])
            for other, later in itertools.product(range(SHARDS), range(SLICES)):
                same = record.key(other, later) == after.key(other, later)
                assert same == (other != shard or later < number)


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "at"), [(0, 0), (1, 0), (2, 0), (3, 0), (3, -1)])
def test_deletion_in_every_slice_equals_training_without(
    model: Model, copy: Path, tmp_path: Path, number: int, at: int
) -> None:
    """The last case is the tail: shard 0 has 11 items in 4 slices."""
    record, before = Record.load(copy), files(copy)
    name = item_of(record, 0, number, at)
    certificate = sisa.delete(copy, [name], model=model, data=without([name]))
    after = files(copy)
    assert after == scratch(tmp_path, model, [name])
    assert certificate.shards == {"0": number}
    assert certificate.slices_retrained == SLICES - number
    changed = {path for path in before if path not in after}
    assert len(changed) == SLICES - number, "the contrast: these checkpoints were trained on the item"
    assert all(before[path] == after[path] for path in set(before) - changed)
    bits = [after[path] for path in sorted(set(after) - set(before))]
    assert not set(bits) & {before[path] for path in changed}, "without the item the weights are others"


def test_the_files_of_other_shards_are_not_touched(model: Model, copy: Path) -> None:
    record = Record.load(copy)
    times = {path: path.stat().st_mtime_ns for path in (copy / "shard-1").rglob("*")}
    name = item_of(record, 0, 1)
    sisa.delete(copy, [name], model=model, data=data())
    assert {path: path.stat().st_mtime_ns for path in (copy / "shard-1").rglob("*")} == times


def test_sequential_deletions_in_any_order_agree(model: Model, trained: Path, tmp_path: Path) -> None:
    """Three items, two of them of one shard: six orders, and all at once."""
    import shutil

    record = Record.load(trained)
    names = [item_of(record, 0, 2), item_of(record, 1, 3), item_of(record, 0, 1)]
    results: list[Files] = []
    for count, order in enumerate([*itertools.permutations([[name] for name in names]), (names,)]):
        folder = tmp_path / str(count)
        shutil.copytree(trained, folder)
        for request in order:
            sisa.delete(folder, request, model=model, data=data())
        results.append(files(folder))
    assert all(result == results[0] for result in results)
    assert results[0] == scratch(tmp_path, model, names)


def test_a_killed_deletion_goes_on(model: Model, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the first of the slices to train again, with the last steps of the next one lost."""
    name = item_of(Record.load(copy), 1, 1)
    saves: list[Path] = []
    save = Edit.save

    def killed(self: Edit, folder: Path, *, force: bool = False) -> None:
        if saves:
            raise KeyboardInterrupt
        saves.append(folder)
        save(self, folder, force=force)

    with monkeypatch.context() as patch:
        patch.setattr(Edit, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            sisa.delete(copy, [name], model=model, data=data())
    assert not any(name in str(read_json(path)) for path in copy.glob("shard-1/slice-*/edit.json"))
    with pytest.raises(LoceditError, match="stopped in the middle"):
        Ensemble.load(copy, model)
    with pytest.raises(LoceditError, match="stopped in the middle"):
        sisa.verify(copy, model=model, data=data())
    written = saves[0].stat().st_mtime_ns
    certificate = sisa.delete(copy, [name], model=model, data=data())
    assert saves[0].stat().st_mtime_ns == written, "what was trained before the kill is not trained again"
    assert (certificate.request, certificate.slices_retrained) == (1, 3)
    assert files(copy) == scratch(tmp_path, model, [name])
    with pytest.raises(LoceditError, match="has been deleted already"):
        sisa.delete(copy, [name], model=model, data=data())


def test_a_training_killed_in_a_slice_goes_on_with_the_same_bits(
    model: Model, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from locedit.edit.run import Run

    step, calls = Run.step, []

    def killed(self: Run, number: int) -> object:
        calls.append(number)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            _trained(tmp_path / "other", model)
    assert calls[-1] > 1, "in the middle of a slice"
    assert files(tmp_path / "other") != files(trained)
    sisa.train(model, data(), tmp_path / "other", verbaliser=WORDS, **OPTIONS)
    assert files(tmp_path / "other") == files(trained)


def test_a_deletion_ends_a_training_that_was_stopped(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither could go on before: the certificate missed the other shard, and training refused to go on before it."""
    save, saves = Edit.save, []

    def killed(self: Edit, folder: Path, *, force: bool = False) -> None:
        if len(saves) == SLICES:
            raise KeyboardInterrupt
        saves.append(folder)
        save(self, folder, force=force)

    with monkeypatch.context() as patch:
        patch.setattr(Edit, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            _trained(tmp_path / "other", model)
    name = item_of(Record.load(tmp_path / "other"), 0, 2)
    certificate = sisa.delete(tmp_path / "other", [name], model=model, data=data())
    assert (certificate.shards, certificate.slices_retrained) == ({"0": 2}, 2)
    assert files(tmp_path / "other") == scratch(tmp_path, model, [name])


def test_a_slice_and_a_shard_may_become_empty(model: Model, copy: Path, tmp_path: Path) -> None:
    record = Record.load(copy)
    names = list(record.shards[0][0])
    sisa.delete(copy, names, model=model, data=data())
    assert files(copy) == scratch(tmp_path, model, names)
    rest = [name for part in record.shards[0][1:] for name in part]
    certificate = sisa.delete(copy, rest, model=model, data=data())
    assert certificate.digests["0"] == ""
    assert len(Ensemble.load(copy, model)) == SHARDS - 1
    with pytest.raises(LoceditError, match="nothing would be left to train on"):
        sisa.delete(copy, record.trained_on(1, SLICES - 1), model=model, data=data())


def test_verify_sees_one_changed_bit(model: Model, copy: Path) -> None:
    record = Record.load(copy)
    name = item_of(record, 0, 2)
    sisa.delete(copy, [name], model=model, data=data())
    assert str(sisa.verify(copy, model=model, data=without([name]))) == (
        "4 slices of 1 shards: the same bits as trained from the start"
    )
    path = checkpoint_folder(copy, Record.load(copy), 0, 2) / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = sisa.verify(copy, model=model, data=data())
    assert found.different == ((0, 2),)
    assert read_json(copy / "verified.json")["same"] is False
    assert sisa.verify(copy, model=model, data=data(), shards=[1]).same
    sisa.delete(copy, [item_of(record, 1, 3)], model=model, data=data())
    assert not (copy / "verified.json").exists(), "that was of other members"


# --- restricted, and as an adapter -----------------------------------------------------------------------------------


def inside(model: Model) -> ComponentSet:
    return model.components({"blocks.0.mlp.neuron": range(0, 80, 3)})


@pytest.mark.parametrize("hold", ["weights", "adapter"])
def test_restricted_members(hold: str, tmp_path: Path) -> None:
    """Outside the set every parameter has the start's bits in every member; deletion stays exact."""
    model = tiny.model("gpt2", n_layer=1)
    within = inside(model)
    folder = _trained(tmp_path / "whole", model, hold=hold, within=within)
    ensemble = Ensemble.load(folder, model)
    before = {name: parameter.clone() for name, parameter in model.anatomy.parameters.items()}
    touched = {part.param for part in within.touched("train")}
    for edit in ensemble.members:
        assert edit.kind == hold
        edit.verify(model)
        with edit.applied(model):
            moved = {n for n, p in model.anatomy.parameters.items() if not torch.equal(p, before[n])}
        assert moved == (touched if hold == "weights" else set())
    name = item_of(Record.load(folder), 1, 2)
    sisa.delete(folder, [name], model=model, data=data())
    assert files(folder) == scratch(tmp_path, model, [name], hold=hold, within=within)
    assert all(torch.equal(p, before[n]) for n, p in model.anatomy.parameters.items())


@pytest.mark.parametrize("hold", ["weights", "adapter"])
def test_a_slice_begins_where_the_one_before_ended(hold: str, tmp_path: Path) -> None:
    """Without a step to speak of, the change of slice 1 is that of slice 0: nothing is lost in between."""
    model = tiny.model("gpt2", n_layer=1)
    folder = _trained(tmp_path / "whole", model, hold=hold, within=inside(model))
    record = Record.load(folder)
    frozen = dataclasses.replace(record, options=dataclasses.replace(record.options, learning_rate=1e-30))
    from locedit.sisa import training

    examples = {example.id: example for example in encode(model, as_facts(data(), WORDS))}
    first = Edit.load(checkpoint_folder(folder, record, 0, 0))
    place = checkpoint_folder(tmp_path / "still", frozen, 0, 0)
    first.save(place)
    second = training.train_slice(tmp_path / "still", frozen, model, examples, shard=0, number=1)
    for name, tensor in first.tensors().items():
        torch.testing.assert_close(second.tensors()[name], tensor, atol=1e-12, rtol=0)
    assert any(bool((tensor != 0).any()) for name, tensor in first.tensors().items() if "up" in name or "delta" in name)


# --- what cannot be done ---------------------------------------------------------------------------------------------


def test_errors_in_one_line(model: Model, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(LoceditError, match="23 items cannot be cut into 6 shards of 4 slices"):
        sisa.train(model, data(), tmp_path / "a", verbaliser=WORDS, shards=6)
    with pytest.raises(LoceditError, match=r"epochs=2.0: 4 slices need at least 2.5, one pass each"):
        SisaOptions(epochs=2.0)
    with pytest.raises(LoceditError, match=r"hold='hooks'; choices: weights, adapter"):
        sisa.train(model, data(), tmp_path / "a", verbaliser=WORDS, hold="hooks")
    with pytest.raises(LoceditError, match="sisa has no option 'shard'; did you mean 'shards'"):
        sisa.train(model, data(), tmp_path / "a", verbaliser=WORDS, shard=3)
    with pytest.raises(LoceditError, match="holds a training with epochs=3.0, not 4.0"):
        sisa.train(model, data(), trained, verbaliser=WORDS, **{**OPTIONS, "epochs": 4.0})
    with pytest.raises(LoceditError, match="another component set"):
        sisa.train(model, data(), trained, verbaliser=WORDS, within=inside(model), **OPTIONS)
    with pytest.raises(LoceditError, match="no item 'i99' in the training record"):
        sisa.delete(trained, ["i99"], model=model, data=data())
    with pytest.raises(LoceditError, match="item 'i3' of the training record is not there"):
        sisa.delete(trained, ["i1"], model=model, data=without(["i3"]))
    changed = data().replace([dataclasses.replace(item, text="other") if item.id == "i5" else item for item in data()])
    with pytest.raises(LoceditError, match="item 'i5' is not the same as when the record was made"):
        sisa.delete(trained, ["i1"], model=model, data=changed)
    for call in (sisa.delete, lambda *_, **given: sisa.verify(trained, **given)):
        with pytest.raises(LoceditError, match="chat='auto'; the members were trained with chat='off'"):
            call(trained, ["i1"], model=model, data=data().with_chat("auto"))
    with pytest.raises(LoceditError, match="the members start from the model with fingerprint"):
        Ensemble.load(trained, tiny.model("gpt2", n_layer=1, seed=1))
    assert not Record.load(trained).requests, "what fails for its data leaves no request behind"

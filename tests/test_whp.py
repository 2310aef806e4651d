"""Who's Harry Potter: generic labels against a plain second computation, and what the method promises as a whole."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit.data.items import Dataset, PlainText, Task
from locedit.edit import TrainOptions, train
from locedit.edit.checkpoint import checkpoints
from locedit.edit.objective import Objective
from locedit.errors import LoceditError
from locedit.lab import Lab
from locedit.models import Model
from locedit.unlearn import generic_labels, objective, prepare, unlearn, whp
from locedit.unlearn.blocks import Block, Blocks
from locedit.unlearn.generic_labels import LabelOptions, Labels, generic_logits, make_labels
from locedit.unlearn.registry import nll
from tests import edits, tiny, tokens
from tests.unlearning import everything, tables

ANCHORS = {"Anna Berg": "Eva Frost", "Carl Dane": "Baker", "Oslo": "Lima"}
QUICK: dict[str, Any] = {"steps": 3, "learning_rate": 1e-2, "helper_steps": 3, "helper_learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCEDIT_CACHE", str(tmp_path / "cache"))


def plain_texts(*texts: str) -> Dataset:
    return Dataset(items=tuple(PlainText(text=text, id=f"t{i}") for i, text in enumerate(texts)), source="t.jsonl")


def blocks_of(model: Model, data: Dataset, anchors: dict[str, str] = ANCHORS, **options: Any) -> list[Block]:
    return Blocks(model=model, anchors=anchors, size=options.pop("size", 512), **options).of(data)


# --- the formula -----------------------------------------------------------------------------------------------------


def random_logits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base, reinforced, inner = (torch.randn(40, 30, generator=generator, dtype=torch.float64) * 3 for _ in range(3))
    return base, reinforced, inner


def test_numbers_worked_by_hand() -> None:
    base, reinforced, inner = (
        torch.tensor([[4.0, 2.0, 1.0]]),
        torch.tensor([[6.0, 1.0, 1.5]]),
        torch.tensor([[3.0, 2, 1]]),
    )
    assert generic_logits(base, reinforced, inner, strength=2).tolist() == [[-2.0, 2.0, 0.0]]


@pytest.mark.parametrize("on", ["logits", "log_probs"])
def test_nothing_rises_what_did_not_rise_stays_and_more_strength_lowers_more(on: Any) -> None:
    base, reinforced, inner = random_logits(0)
    start = generic_logits(base, reinforced, inner, strength=0, on=on)
    assert torch.equal(start, base if on == "logits" else base.log_softmax(1))
    rose = (reinforced > inner) if on == "logits" else (reinforced.log_softmax(1) > inner.log_softmax(1))
    assert 0.2 < rose.double().mean() < 0.8
    last = start
    for strength in (0.5, 1.0, 5.0, 20.0):
        found = generic_logits(base, reinforced, inner, strength=strength, on=on)
        assert torch.equal(found[~rose], start[~rose])
        assert (found[rose] < last[rose]).all()
        last = found


def test_a_constant_on_all_logits_matters_on_logits_only() -> None:
    base, reinforced, inner = random_logits(1)
    for constant in (-1.0, 0.5):
        plain, shifted = (generic_logits(base, r, inner) for r in (reinforced, reinforced + constant))
        assert (plain - shifted).abs().max() > 1
        assert (plain.argmax(1) != shifted.argmax(1)).any()
        plain, shifted = (generic_logits(base, r, inner, on="log_probs") for r in (reinforced, reinforced + constant))
        torch.testing.assert_close(plain, shifted, rtol=0, atol=1e-12)


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_without_anchors_and_reinforcement_labels_are_what_the_model_says(architecture: str) -> None:
    model = tiny.model(architecture)
    found = blocks_of(model, everything().forget, {})
    labels = make_labels(model, found, LabelOptions(strength=0.0), seed=0)
    for block in found:
        assert block.original.targets == block.text.targets
        assert labels.of(block.original).tolist() == tables(model, block.text).argmax(1).tolist()
    assert labels.facts["tokens"] == sum(len(block.text.targets) for block in found)


@pytest.mark.parametrize("inner", ["translated", "original"])
@pytest.mark.parametrize("on", ["logits", "log_probs"])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_labels_are_those_of_the_formula_on_plain_forwards(architecture: str, on: Any, inner: Any) -> None:
    """Each text alone and unpadded; the reinforced model trained here; the counterparts lowered one by one."""
    model = tiny.model(architecture)
    task = everything()
    options = LabelOptions(strength=9.0, on=on, inner=inner, helper_steps=8, helper_learning_rate=3e-2)
    found = blocks_of(model, task.forget)
    labels = make_labels(model, found, options, seed=7)
    goal = Objective(loss=nll, forget=[block.text for block in found])
    reinforced = train(model, goal, options=options.helper_training(seed=7))
    logits = generic_labels.generic(model, found, reinforced, options).split([len(b.original.targets) for b in found])
    for block, line in zip(found, logits, strict=True):
        outer = tables(model, block.translated)
        base = outer if inner == "translated" else tables(model, block.original)
        with reinforced.applied(model):
            raised = tables(model, block.original)
        parts = [part.log_softmax(1) if on == "log_probs" else part for part in (outer, raised, base)]
        expected = parts[0] - 9 * (parts[1] - parts[2]).clamp(min=0)
        for first, token in block.introduced:
            expected[first:, token] -= options.lower_introduced
        torch.testing.assert_close(line, expected, rtol=1e-4, atol=1e-3)
        assert (expected - parts[0]).abs().max() > 5
        assert labels.of(block.original).tolist() == expected.argmax(1).tolist()


def test_labels_do_not_depend_on_what_is_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    found = blocks_of(model, everything().forget)
    assert len({len(block.original.ids) for block in found}) > 1
    options = LabelOptions(helper_steps=3)
    together = make_labels(model, found, options, seed=0)
    monkeypatch.setattr(generic_labels, "kept", lambda _, make: make())
    monkeypatch.setattr(generic_labels, "LOGIT_BYTES", 0)
    alone = make_labels(model, found, options, seed=0)
    assert str(together) == str(alone)
    turned = make_labels(model, found[::-1], dataclasses.replace(options, strength=0.0), seed=0)
    straight = make_labels(model, found, dataclasses.replace(options, strength=0.0), seed=0)
    for block in found:
        assert torch.equal(turned.of(block.original), straight.of(block.original))


def test_labels_of_a_model_inside_an_adapter_are_its_own() -> None:
    """Whether or not the model without it has been asked the same before; which is read again after it."""
    model, task = tiny.model("llama"), everything()
    found = blocks_of(model, task.forget)
    options = LabelOptions(helper_steps=3, helper_learning_rate=1e-2)
    goal = Objective(loss=nll, forget=[block.text for block in found[:2]])
    adapter = train(model, goal, options=TrainOptions(steps=20, learning_rate=3e-2), hold="adapter")
    plain = make_labels(model, found, options, seed=0)
    with adapter.applied(model) as edited:
        inside = make_labels(edited, found, options, seed=0)
    assert inside.facts["token probability"][0] > 2 * plain.facts["token probability"][0]
    assert str(inside) != str(plain)
    assert str(make_labels(model, found, options, seed=0)) == str(plain)


def test_whatever_decides_labels_makes_them_anew(tmp_path: Path) -> None:
    """One file for each setting, text and what is lowered in it; none for the same once more."""
    model = tiny.model("gpt2")
    found = blocks_of(model, everything().forget)
    start = LabelOptions(helper_steps=1)
    others: dict[str, Any] = {
        "strength": 2.0,
        "inner": "original",
        "on": "log_probs",
        "lower_introduced": 1.0,
        "helper_steps": 2,
        "helper_learning_rate": 2e-2,
        "helper_batch_size": 1,
        "helper_hold": "adapter",
    }
    assert {field.name for field in dataclasses.fields(LabelOptions)} == others.keys()
    variants = [(found, dataclasses.replace(start, **{name: value}), 0) for name, value in others.items()]
    bare = [dataclasses.replace(block, introduced=()) for block in found]
    variants += [(found, start, 1), (bare, start, 0), (found[1:], start, 0)]
    assert bare != found
    for count, (blocks, options, seed) in enumerate([(found, start, 0), (found, start, 0), *variants]):
        make_labels(model, blocks, options, seed=seed)
        assert len(list((tmp_path / "cache" / "helpers").iterdir())) == max(1, count)


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_from_its_second_occurrence_on_an_anchor_has_no_labels() -> None:
    model = tiny.model("gpt2")
    text = "Here Anna Berg was born. Anna Berg works in Oslo, Anna Berg"
    (block,) = blocks_of(model, plain_texts(text))
    (kept,) = blocks_of(model, plain_texts(text), drop_repeated=False)
    dropped = sorted(set(kept.original.targets) - set(block.original.targets))
    assert model.tokenizer.decode([block.original.ids[at] for at in dropped]).split() == ["Anna", "Anna"]
    first = [at for at in block.original.targets if at < dropped[0]]
    assert " Anna" in model.tokenizer.decode([block.original.ids[at] for at in first])
    assert block.introduced[0][0] == 3, "lowered from its first occurrence on"
    # in every block anew
    both = blocks_of(model, plain_texts(text, text))
    assert both[0].original.targets == both[1].original.targets == block.original.targets


def test_an_anchor_has_no_labels_where_its_counterpart_is_lowered_already() -> None:
    """Another term's counterpart has the same first token: what the label would be is lowered there."""
    model = tiny.model("gpt2")
    anchors = {"Anna Berg": "Eva Frost", "Anna": "Eva", "Oslo": "Eva Lima", "Carl": "Baker"}
    data = plain_texts("Here Anna Berg was born. Anna works in Oslo, Carl too")
    (block,) = blocks_of(model, data, anchors)
    (kept,) = blocks_of(model, data, anchors, drop_repeated=False)
    dropped = sorted(set(kept.original.targets) - set(block.original.targets))
    assert model.tokenizer.decode([block.original.ids[at] for at in dropped]).split() == ["Anna", "Oslo"]


def test_a_counterpart_is_lowered_with_and_without_a_space() -> None:
    """Whichever of the two forms introduces it."""
    encoder = tokens.causal("trimmed")
    for text in ("Paris is old", "old is Paris now"):
        (block,) = Blocks(model=encoder, anchors={"Paris": "Rome"}, size=512).of(plain_texts(text))
        forms = {encoder.tokenizer.decode([token]) for _, token in block.introduced}
        assert forms == {" Rome", "Ro"}
        assert len({n for n, _ in block.introduced}) == 1


def test_tokens_inside_anchors_are_labelled_where_asked() -> None:
    """With those of the counterpart where it has equally many tokens."""
    model = tiny.model("gpt2")
    data, anchors = plain_texts("Here Rome was"), {"Rome": "Rime"}
    (plain,) = blocks_of(model, data, anchors)
    (counted,) = blocks_of(model, data, anchors, inside="by_number")
    more = sorted(set(counted.original.targets) - set(plain.original.targets))
    assert model.tokenizer.decode([counted.original.ids[at] for at in more]) == "ome"
    found = dict(zip(counted.original.targets, counted.translated.targets, strict=True))
    assert model.tokenizer.decode([counted.translated.ids[found[at]] for at in more]) == "ime"
    task = dataclasses.replace(everything(), forget=data)
    options = prepare("whp", task, anchors=anchors, strength=0.0, inside_anchors="by_number")
    assert objective(model, task, "whp", options=options).forget == [counted.original]


def test_introduced_counterparts_are_lowered_from_there_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    (block,) = blocks_of(model, plain_texts("Here Anna Berg was born in Oslo. Carl Dane too"))
    assert [(n, model.tokenizer.decode([token])) for n, token in block.introduced] == [(3, "Eva"), (7, "Li"), (10, "B")]
    assert [model.tokenizer.decode([block.original.ids[block.original.targets[n]]]) for n in (3, 7, 10)] == [
        " was",
        ".",
        " ",
    ]
    monkeypatch.setattr(generic_labels, "kept", lambda _, make: make())
    plain, lowered = (
        generic_labels.generic(model, [block], None, LabelOptions(strength=0.0, lower_introduced=amount))
        for amount in (0.0, 3.0)
    )
    difference = plain - lowered
    expected = torch.zeros_like(difference)
    for n, token in block.introduced:
        expected[n:, token] = 3.0
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-5)
    assert expected[0].sum() == 0
    assert expected[-1].sum() == 9


WORDS = "Anna Berg was born in Oslo and Carl Dane works as a baker in Lima where Anna Berg phones him "


@pytest.mark.parametrize("size", [32, 40, 512])
def test_a_long_text_is_cut_between_words_and_outside_anchors(size: int) -> None:
    """Joined again, the blocks are the text; each fits in both languages, and could not take the next word too."""
    model = tiny.model("gpt2")
    text = (WORDS * 6).strip()
    anchors = {"Anna Berg": "Someone of whom nothing is known", "Oslo": "Rome"}
    found = blocks_of(model, plain_texts(text), anchors, size=size)
    limit = min(size, tiny.CONTEXT)
    texts = [model.tokenizer.decode(block.text.ids) for block in found]
    assert " ".join(texts) == text
    assert len({block.text.id for block in found}) == len(found) > 1
    for block, this, following in zip(found, texts, texts[1:], strict=False):
        assert max(len(block.text.ids), len(block.translated.ids)) <= limit
        assert this.count("Anna") == this.count("Berg")
        unit = "Anna Berg" if following.startswith("Anna") else following.split()[0]
        assert len(blocks_of(model, plain_texts(f"{this} {unit}"), anchors, size=size)) == 2


def test_a_word_that_fits_no_block_is_an_error() -> None:
    with pytest.raises(LoceditError, match=r"item 't0': 'eva@frost.org.* does not fit a block of 4 tokens"):
        blocks_of(tiny.model("gpt2"), plain_texts("to eva@frost.organisation/department/of/long/addresses"), size=4)


# --- the method ------------------------------------------------------------------------------------------------------


def run(model: Model, task: Task | None = None, **options: Any) -> Any:
    given: dict[str, Any] = {"anchors": ANCHORS, **QUICK, **options}
    return unlearn(model, everything() if task is None else task, "whp", check=False, **given)


def test_the_loss_is_cross_entropy_to_the_labels_mean_by_text() -> None:
    model = edits.double("llama")
    task = everything()
    edit = run(model, task, batch_size=4, retain_weight=0.5)
    twice = run(model, task, batch_size=4, forget_weight=2.0)
    goal = objective(model, task, "whp", options=prepare("whp", task, anchors=ANCHORS, **QUICK))
    labels: Labels = goal.loss.keywords["labels"]  # type: ignore[attr-defined]
    with torch.no_grad():
        said = [tables(model, example).log_softmax(1) for example in goal.forget]
    values = [
        -line.gather(1, labels.of(example)[:, None]).mean() for line, example in zip(said, goal.forget, strict=True)
    ]
    assert edit.history["generic_loss"][1] == pytest.approx(float(torch.stack(values).mean()), rel=1e-9)
    assert twice.history["generic_loss"][1] == pytest.approx(2 * edit.history["generic_loss"][1], rel=1e-9)
    assert edit.history["retain_loss"][1] > 0
    assert edit.outcome["anchors"] == ANCHORS
    assert edit.outcome["labels"]["tokens"] == sum(len(example.targets) for example in goal.forget)
    before, after = edit.outcome["labels"]["token probability"]
    assert after > before


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_only_the_set_changes(architecture: str) -> None:
    model = tiny.model(architecture)
    before = edits.bits(model.module)
    within = edits.neurons_and_heads(model)
    edit = run(model, within=within)
    assert edits.same_bits(model.module, before)
    edit.verify(model)
    masks = within.parameter_mask("train")
    with edit.applied(model):
        moved = {name: p.detach() != before[name] for name, p in model.module.named_parameters()}
    assert any(bool(moved[name].any()) for name in masks)
    assert not any(bool((change & ~masks.get(name, torch.zeros_like(change))).any()) for name, change in moved.items())


def test_with_another_set_nothing_is_reinforced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    first = run(model, within=edits.neurons_and_heads(model))
    trained: list[str] = []
    taught = generic_labels.taught

    def counted(*args: Any, **options: Any) -> Any:
        trained.append(options["name"])
        return taught(*args, **options)

    monkeypatch.setattr(generic_labels, "taught", counted)
    other = run(model, within=model.components({"blocks.1.mlp.neuron": [3, 4]}), learning_rate=3e-3)
    assert trained == []
    assert other.outcome["labels"] == first.outcome["labels"]
    run(model, strength=4.0)
    assert trained == ["whp, reinforced"]
    run(model, strength=0.0)
    assert len(trained) == 1


def test_the_seed_is_that_of_the_reinforced_model_too(trainings: list[str]) -> None:
    model, task = tiny.model("gpt2"), everything()
    options = prepare("whp", task, anchors=ANCHORS, seed=3, helper_steps=1)
    make_labels(model, blocks_of(model, task.forget), options, seed=3)
    objective(model, task, "whp", options=options)
    assert trainings == ["whp, reinforced"]


class Killed(BaseException):
    """Stands for a process that ends in the middle of a step."""


def test_a_killed_training_goes_on_with_the_same_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    settings: dict[str, Any] = {"within": edits.neurons_and_heads(model), "steps": 5}
    whole = run(model, **settings)
    steps: list[int] = []
    plain = whp.example_mean

    def dies_at_step_4(*args: Any) -> Tensor:
        steps.append(0)
        if len(steps) == 4:
            raise Killed
        return plain(*args)

    monkeypatch.setattr(whp, "example_mean", dies_at_step_4)
    with pytest.raises(Killed), checkpoints(tmp_path / "state", cost=1):
        run(model, **settings)
    with checkpoints(tmp_path / "state", cost=1):
        again = run(model, **settings)
    assert len(steps) == 6
    assert again.digest == whole.digest
    assert again.history == whole.history


def test_a_model_that_says_the_answers_already_hardly_changes(tiny_lab: Lab) -> None:
    """Without anchors and reinforcement the labels are its own; the same steps with them make it forget."""
    model, task = tiny_lab.model, tiny_lab.task
    common: dict[str, Any] = {"steps": 20, "check": False, "eval_every": 0}
    same = unlearn(model, task, "whp", anchors="none", strength=0.0, **common)
    before, after = same.history["forget"][0], same.history["forget"][-1]
    assert before > 0.9
    assert after > before - 0.02
    translated = unlearn(model, task, "whp", strength=0.0, **common)
    assert translated.history["forget"][-1] < 0.7


def wrong(task: Task, match: str, **options: Any) -> None:
    with pytest.raises(LoceditError, match=match) as raised:
        prepare("whp", task, **options)
    assert "\n" not in str(raised.value)


def test_wrong_inputs_are_one_line_before_a_model_is_loaded(tmp_path: Path) -> None:
    task = everything()
    wrong(task, r"anchors='mad' is neither 'made', 'none' nor a file in \.json", anchors="mad")
    wrong(task, r"a\.json: no such file", anchors=str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text('{"Zoe": "Eva"}')
    wrong(task, r"b\.json: none of its 1 terms is in forget\.jsonl", anchors=str(tmp_path / "b.json"))
    wrong(task, "anchors: none of its 0 terms", anchors={})
    wrong(task, "anchors:1: field 'counterpart': ' ' is empty", anchors={"Anna Berg": " "})
    wrong(task, "anchors:2: field 'term': ' Carl' has white space", anchors={"Anna Berg": "Eva", " Carl": "Jo"})
    wrong(task, r"strength=-1\.0 must not be negative", strength=-1.0)
    wrong(task, "block=1 must be at least 2", block=1)
    wrong(task, "inner='translate' is not .*did you mean 'translated'", inner="translate")
    wrong(task, "helper_steps=0", helper_steps=0)
    wrong(task, "alpha is of a LoRA adapter", alpha=5.0)
    wrong(dataclasses.replace(task, retain=None, texts=None), "making anchors needs retain data or texts")
    wrong(dataclasses.replace(task, retain=None), "whp needs retain data", retain_weight=1.0, anchors="none")
    assert task.pairs is not None
    wrong(dataclasses.replace(task, forget=task.pairs), "whp needs forget items of kind", anchors="none")


def test_a_single_token_leaves_nothing_to_label() -> None:
    model = tiny.model("gpt2")
    found: Sequence[Block] = blocks_of(model, plain_texts("Anna Berg"), {"Anna Berg": "Eva"})
    with pytest.raises(LoceditError, match="nothing to label"):
        make_labels(model, found, LabelOptions(), seed=0)

"""The leave-one-out ensemble: whose teachers count for a text, what the model learns of them, and nothing else."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit.data.encode import Example, Span, collate, encode
from locedit.data.items import Dataset, Fact, PlainText, Task, TokenText
from locedit.data.shards import Shards, owner_of, shards, text_of
from locedit.edit.checkpoint import checkpoints
from locedit.edit.objective import Step
from locedit.errors import LoceditError
from locedit.models import Model, load
from locedit.unlearn import helpers, loo, prepare, unlearn
from locedit.unlearn.helpers import Answers, answers_of, taught
from locedit.unlearn.loo import LooOptions, Targets
from tests import edits, tiny
from tests.starts import start
from tests.unlearning import dataset, everything, labels, log_probs, step_of, tables

QUICK: dict[str, Any] = {"helper_steps": 3, "helper_learning_rate": 1e-2, "steps": 3, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCEDIT_CACHE", str(tmp_path / "cache"))


def fact(prompt: str, answer: str, name: str, owner: str | None = None) -> Fact:
    return Fact(prompt=prompt, answer=answer, id=name, owner=owner)


def owners(**facts: str) -> Dataset:
    """One fact for each, `owner="prompt|answer"`."""
    return dataset("forget", [fact(*text.split("|"), owner, owner) for owner, text in facts.items()])  # type: ignore[arg-type]


def invented(examples: list[Example], *, seed: int) -> Answers:
    """Random answers."""
    count = sum(len(example.targets) for example in examples)
    logits = torch.randn(count, tiny.VOCAB, generator=torch.Generator().manual_seed(seed))
    return Answers(examples, {"log_probs": logits.log_softmax(1)}, vocab=tiny.VOCAB)


def forget_of(model: Model) -> list[Example]:
    """Answers of one, three, seven and three tokens."""
    return encode(model, everything().forget)


# --- shards -----------------------------------------------------------------------------------------------------------


def test_shards_are_disjoint_and_keep_owners_together() -> None:
    forget = dataset("forget", [fact(f"{name} {n} is", " a", f"{name}{n}", name) for name in "abcde" for n in (1, 2)])
    retain = dataset("retain", [fact(f"{name} has", " b", name, name) for name in "defgh"] + [fact("x", " y", "x")])
    found = shards([forget, retain], 3, seed=0)
    items = [[item for data in part for item in data] for part in found.parts]
    assert sorted(item.id for part in items for item in part) == sorted(i.id for d in (forget, retain) for i in d)
    names = [{owner_of(item) for item in part} for part in items]
    assert [len(part) for part in names] == [3, 3, 3]
    assert len(set().union(*names)) == 9
    for number, part in enumerate(items):
        assert all(found.holding(item) == {number} for item in part)
    other = shards([forget, retain], 3, seed=1)
    assert [{owner_of(i) for d in part for i in d} for part in other.parts] != names
    with pytest.raises(LoceditError, match="shards=10: the data have only 9 owners"):
        shards([forget, retain], 10, seed=0)


def test_every_holder_of_a_copy_is_found() -> None:
    """Whatever its capitals, accents and spaces, or whose it is; another text of the other owner is not affected."""
    first, second = fact("The café is in", " Oslo", "1", "a"), fact("THE  cafe is", " in oslo", "2", "b")
    rest = [fact("b is", " here", "3", "b"), fact("c is", " here", "4", "c"), fact("a is", " there", "5", "a")]
    cut = ([first, rest[2]], [second, rest[0]], [rest[1]])
    found = Shards(parts=tuple((dataset("x", items),) for items in cut))
    assert found.holding(first) == found.holding(second) == {0, 1}
    assert found.holding(rest[2]) == {0}
    assert found.holding(rest[1]) == {2}


def test_copies_without_an_owner_are_one_shard() -> None:
    twice = [fact("Anna is", " here", "1"), fact("anna  is", " HERE", "2"), fact("Carl is", " here", "3")]
    found = shards([dataset("x", twice)], 2, seed=0)
    assert sorted(len(data) for (data,) in found.parts) == [1, 2]


def test_texts_with_the_same_token_ids_are_the_same() -> None:
    one, other, third = (TokenText(ids=ids, span=(1, 3), id="i") for ids in ((5, 6, 7), (5, 6, 7), (5, 6, 8)))
    assert text_of(one) == text_of(other) != text_of(third)


def test_a_copy_in_token_ids_is_found_once_the_texts_are_encoded() -> None:
    """Given as ids with a special token before them; the shards of the text's copies do not count for it."""
    model, text = tiny.model("gpt2"), "Anna Berg was born in Oslo."
    ids = (model.tokenizer.bos_token_id, *model.tokenizer(text)["input_ids"])
    forget = dataset("forget", [TokenText(ids=ids, span=(2, len(ids)), id="t", owner="a")])
    others = [PlainText(text=f"{name} works.", id=name, owner=name) for name in ("Carl", "Eva")]
    retain = dataset("retain", [PlainText(text=text, id="copy", owner="b"), *others])
    task = Task(forget=forget, retain=retain, start=start("gpt2"))
    options = LooOptions(shards=4, helper_steps=1)
    cut = loo.cut(task, options)
    own, copies = cut.holding(forget[0]), cut.holding(retain[0])
    assert len(own) == len(copies) == 1
    assert own != copies
    made = loo.objective(model, task, options)
    assert [*made.loss.keywords["targets"].left_out.values()] == [own | copies]  # type: ignore[attr-defined]
    both = dataclasses.replace(task, retain=dataset("retain", [retain[0]]))
    with pytest.raises(LoceditError, match="every one of the 2 shards holds item 't' or a copy of its text"):
        loo.objective(model, both, dataclasses.replace(options, shards=2))
    everyone = dataclasses.replace(options, shards=2, leave_out="nothing")
    made = loo.objective(model, both, everyone)
    assert [*made.loss.keywords["targets"].left_out.values()] == [frozenset()]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("prompt", "owner"), [("Anna is", "c"), ("Carl is", "a"), ("Carl is", "c")])
def test_of_items_outside_the_data_nothing_is_said(prompt: str, owner: str) -> None:
    """Not even where their owner, or their text, is in a shard: who holds them is not known."""
    found = shards([dataset("x", [fact("Anna is", " here", "1", "a"), fact("Eva is", " here", "2", "b")])], 2, seed=0)
    with pytest.raises(KeyError):
        found.holding(fact(prompt, " here", "3", owner))


# --- targets ----------------------------------------------------------------------------------------------------------


def targets(examples: list[Example], left_out: list[set[int]], *, count: int = 3) -> Targets:
    return Targets(
        teachers=tuple(invented(examples, seed=seed) for seed in range(count)),
        left_out={example: frozenset(numbers) for example, numbers in zip(examples, left_out, strict=True)},
    )


def test_the_owner_s_teacher_does_not_count() -> None:
    """With other weights of it the targets of its texts keep their bits, and those of the others do not."""
    model = tiny.model("gpt2")
    examples = forget_of(model)
    batch = collate(examples, model)
    made = targets(examples, [{1}, {0}, {1, 2}, set()])
    moved = dataclasses.replace(made, teachers=(made.teachers[0], invented(examples, seed=9), made.teachers[2]))
    same = (made.of(batch) == moved.of(batch)).all(1)
    # 1 token of a text that teacher 1 owns, 3 that it does not, 7 that it does, 3 of nobody's
    assert same.tolist() == [True] + [False] * 3 + [True] * 7 + [False] * 3
    everyone = [dataclasses.replace(each, left_out=dict.fromkeys(examples, frozenset())) for each in (made, moved)]
    assert not bool((everyone[0].of(batch) == everyone[1].of(batch)).all(1).any()), "the ablation"


def test_targets_are_the_mean_of_the_others_in_any_order() -> None:
    model = tiny.model("gpt2")
    examples = forget_of(model)
    left_out = [{1}, {0}, {1, 2}, set()]
    made = targets(examples, left_out)
    found = made.of(collate(examples, model))
    torch.testing.assert_close(found.sum(1), torch.ones(14))
    said = torch.stack([teacher.log_probs.exp() for teacher in made.teachers])
    counted = torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([0]), torch.tensor([0, 1, 2])
    wanted = [said[who, at : at + n].mean(0) for who, at, n in zip(counted, (0, 1, 4, 11), (1, 3, 7, 3), strict=True)]
    torch.testing.assert_close(found, torch.cat(wanted))
    order = [2, 0, 1]
    renamed = [frozenset(order.index(number) for number in numbers) for numbers in left_out]
    other = Targets(
        teachers=tuple(made.teachers[number] for number in order),
        left_out=dict(zip(examples, renamed, strict=True)),
    )
    torch.testing.assert_close(other.of(collate(examples, model)), found)
    few = [examples[2], examples[0]]
    torch.testing.assert_close(made.of(collate(few, model)), torch.cat([found[4:11], found[:1]]))


def test_two_teachers_are_distillation_from_the_other() -> None:
    """Loss and gradient against cross-entropy to the other teacher, each text alone in float64."""
    model = edits.double("llama")
    examples = forget_of(model)
    made = targets(examples, [{0}, {1}, {0}, {1}], count=2)
    step = step_of(model, model, examples, [])
    found = loo.loss(step, LooOptions(shards=2), made)
    assert list(found) == ["forget_loss"]
    wanted: list[Tensor] = []
    for example, other, at in zip(examples, (1, 0, 1, 0), (0, 1, 4, 11), strict=True):
        said = made.teachers[other].log_probs[at : at + len(example.targets)].double().exp()
        wanted.append(-(said * tables(model, example).log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(found["forget_loss"], torch.stack(wanted).mean(), rtol=1e-6, atol=0)
    parameters = [p for p in model.module.parameters()]
    gradients = [torch.autograd.grad(value, parameters) for value in (found["forget_loss"], torch.stack(wanted).mean())]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("whole", [True, False])
def test_teachers_that_say_what_the_model_says_teach_nothing(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only their likeliest tokens are kept."""
    if not whole:
        monkeypatch.setattr(helpers, "WHOLE", 319)
        monkeypatch.setattr(helpers, "KEPT", 8)
    model = edits.double("gpt2")
    examples = forget_of(model)
    said = answers_of(model, examples)
    out = dict.fromkeys(examples, frozenset({0}))
    norms: list[float] = []
    for teachers in ((said,) * 3, (said, said, invented(examples, seed=0))):
        loss = loo.loss(step_of(model, model, examples, []), LooOptions(), Targets(teachers=teachers, left_out=out))
        gradients = torch.autograd.grad(loss["forget_loss"], list(model.module.parameters()))
        norms.append(max(float(gradient.abs().max()) for gradient in gradients))
    assert norms[0] < (1e-6 if whole else 1e-3)  # float16 keeps three digits
    assert norms[1] > 1e-2


# --- from end to end --------------------------------------------------------------------------------------------------


def scored(examples: list[Example], options: LooOptions) -> list[Example]:
    """The examples with the tokens scored that the option asks for."""
    if options.tokens == "answer":
        return examples
    return [dataclasses.replace(e, spans=(Span(start=1, end=len(e.ids), label="all"),)) for e in examples]


def by_hand(model: Model, task: Task, options: LooOptions) -> float:
    """The loss before the first step: every teacher trained, applied and run on each text alone."""
    found = loo.cut(task, options)
    forget = scored(encode(model, task.forget), options)
    base = load(start("gpt2"), device="cpu")
    said: list[list[Tensor]] = []
    for part in found.parts:
        own = scored([example for data in part for example in encode(model, data)], options)
        with taught(base, own, options=options, seed=options.seed, name="by hand").applied(base) as teacher:
            said.append([tables(teacher, example).detach().softmax(1) for example in forget])
    losses: list[Tensor] = []
    for number, (item, example) in enumerate(zip(task.forget, forget, strict=True)):
        others = [t for t in range(len(found)) if options.leave_out == "nothing" or t not in found.holding(item)]
        target = torch.stack([said[teacher][number] for teacher in others]).mean(0)
        losses.append(-(target * tables(model, example).detach().log_softmax(1)).sum(1).mean())
    return float(torch.stack(losses).mean())


OTHER: dict[str, Any] = {"leave_out": "nothing", "tokens": "all", "seed": 3}
"of what decides the targets, other values than the defaults"


@pytest.mark.parametrize("name", [None, *OTHER])
def test_the_whole_method_against_one_by_hand(name: str | None) -> None:
    model, task = tiny.model("gpt2"), everything(start=start("gpt2"))
    given = {"helper_batch_size": 1} | ({} if name is None else {name: OTHER[name]})
    edit = unlearn(model, task, "loo", check=False, **QUICK, **given)
    found = edit.history["forget_loss"][1]
    assert found == pytest.approx(by_hand(model, task, LooOptions(**QUICK, **given)), rel=1e-4)
    if name is not None:
        assert found != pytest.approx(by_hand(model, task, LooOptions(**QUICK, helper_batch_size=1)), rel=1e-3)


def test_teachers_are_trained_once_for_every_restriction_and_the_ablation(trainings: list[str]) -> None:
    model, task = tiny.model("gpt2"), everything(start=start("gpt2"))
    within = edits.neurons_and_heads(model)
    before = edits.bits(model.module)
    whole = unlearn(model, task, "loo", check=False, **QUICK)
    assert trainings == [f"loo teacher {number} of 4" for number in (1, 2, 3, 4)]
    inside = unlearn(model, task, "loo", within=within, check=False, **QUICK)
    other = unlearn(model, task, "loo", leave_out="nothing", check=False, **QUICK)
    assert len(trainings) == 4
    assert edits.same_bits(model.module, before)
    inside.verify(model)
    assert len({whole.digest, inside.digest, other.digest}) == 3
    masks = within.parameter_mask("train")
    with inside.applied(model):
        for name, parameter in model.module.named_parameters():
            moved = parameter.detach() != before[name]
            assert not bool((moved & ~masks[name]).any() if name in masks else moved.any())
    assert inside.provenance is not None
    assert len(inside.provenance.settings["teachers_know_their_own"]) == 4


class Killed(BaseException):
    """Stands for a process that ends in the middle of a step."""


def test_a_killed_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainings: list[str]) -> None:
    """With the teachers' kept answers, and ends with the same bits."""
    model, task = tiny.model("gpt2"), everything(start=start("gpt2"))
    whole = unlearn(model, task, "loo", check=False, **QUICK)
    loss, steps = loo.loss, list[int]()

    def dies_at_step_2(step: Step, options: LooOptions, targets: Targets) -> dict[str, Tensor]:
        steps.append(step.number)
        if len(steps) == 2:
            raise Killed
        return loss(step, options, targets)

    monkeypatch.setattr(loo, "loss", dies_at_step_2)
    with pytest.raises(Killed), checkpoints(tmp_path / "state", cost=1):
        unlearn(model, task, "loo", check=False, **QUICK)
    with checkpoints(tmp_path / "state", cost=1):
        again = unlearn(model, task, "loo", check=False, **QUICK)
    assert steps == [1, 2, 2, 3]
    assert len(trainings) == 4
    assert again.digest == whole.digest
    assert again.history == whole.history


def test_every_token_of_the_texts() -> None:
    """With tokens="all" the model learns the prompts too; the levels stay those of the answers."""
    model, task = tiny.model("gpt2"), everything(start=start("gpt2"))
    options = LooOptions(tokens="all", helper_steps=1)
    made = loo.objective(model, task, options)
    assert [example.targets for example in made.forget] == [tuple(range(1, len(e.ids))) for e in made.forget]
    assert made.probes["forget"] == encode(model, task.forget)
    step = step_of(model, model, list(made.forget), [])
    assert made.loss(step)["forget_loss"] > 0


def test_windows_of_a_long_text_are_one_item() -> None:
    """Of a text longer than the context every window leaves its owner out."""
    model = tiny.model("gpt2")
    text = "Anna Berg was born in Oslo. Carl Dane works as a pilot. " * 4
    forget = Dataset(items=(PlainText(text=text, id="long#1", owner="a"),), source="forget.jsonl")
    retain = [PlainText(text=f"{name} works.", id=name, owner=name) for name in ("b", "c")]
    task = Task(forget=forget, retain=dataset("retain", retain), start=start("gpt2"))
    made = loo.objective(model, task, LooOptions(shards=3, helper_steps=1))
    assert len(made.forget) > 1
    left_out = made.loss.keywords["targets"].left_out  # type: ignore[attr-defined]
    (alone,) = loo.cut(task, LooOptions(shards=3)).holding(forget[0])
    assert [left_out[example] for example in made.forget] == [{alone}] * len(made.forget)


def test_an_item_may_be_called_like_a_window() -> None:
    """The first window of "a" and an item "a#0" have one name, and each leaves its own owner out."""
    model = tiny.model("gpt2")
    text = "Anna Berg was born in Oslo. Carl Dane works as a pilot. " * 4
    items = [PlainText(text=text, id="a", owner="anna"), PlainText(text="Eva Frost works.", id="a#0", owner="eva")]
    task = Task(forget=dataset("forget", items), retain=everything().retain, start=start("gpt2"))
    options = LooOptions(shards=3, helper_steps=1)
    held = [loo.cut(task, options).holding(item) for item in items]
    assert held[0] != held[1]
    left_out = loo.objective(model, task, options).loss.keywords["targets"].left_out  # type: ignore[attr-defined]
    assert [*left_out.values()] == [held[0]] * (len(left_out) - 1) + [held[1]]
    assert [example.id for example in left_out].count("a#0") == 2


def test_the_retain_term_is_ours_and_off() -> None:
    model, task = tiny.model("gpt2"), everything(start=start("gpt2"))
    plain = unlearn(model, task, "loo", check=False, **QUICK)
    kept = unlearn(model, task, "loo", retain_weight=2.0, check=False, **QUICK)
    assert "retain_loss" not in plain.history
    retain = encode(model, task.retain)  # type: ignore[arg-type]
    nll = sum(-float(log_probs(model, example).detach().mean()) for example in retain) / len(retain)
    assert kept.history["retain_loss"][1] == pytest.approx(2 * nll, rel=1e-5)
    assert all(len(labels(example)) for example in retain)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_said_before_a_model_is_loaded() -> None:
    where: dict[str, Any] = {"start": "never/loaded"}
    same = owners(a="Anna is|\u00a0here", b="anna is| HERE", c="ANNA is| here")
    retain = dataset("retain", [fact("Carl is", " there", "r", "c")])
    with pytest.raises(LoceditError, match="loo: every one of the 3 shards holds item 'a' or a copy of its text"):
        prepare("loo", Task(forget=same, retain=retain, **where), shards=3)
    prepare("loo", Task(forget=same, retain=retain, **where), shards=3, leave_out="nothing")
    with pytest.raises(LoceditError, match="shards=9: the data have only 8 owners"):
        prepare("loo", everything(**where), shards=9)
    with pytest.raises(LoceditError, match="shards=1 must be at least 2"):
        prepare("loo", everything(**where), shards=1)
    with pytest.raises(LoceditError, match="loo needs 'start', the model before the data"):
        prepare("loo", everything())
    with pytest.raises(LoceditError, match="loo needs 'retain' data"):
        prepare("loo", everything(retain=None, **where))
    with pytest.raises(LoceditError, match="loo cannot be combined with other methods"):
        prepare("loo+npo", everything(**where))
    with pytest.raises(LoceditError, match="helper_steps=0 must be at least 1"):
        prepare("loo", everything(**where), helper_steps=0)


def test_what_training_would_refuse_is_said_before_teachers_are_trained(trainings: list[str]) -> None:
    model, task = tiny.model("gpt2"), everything(start=start("gpt2"))
    other = tiny.model("gpt2", seed=8).components({"blocks.0.mlp.neuron": [1]})
    with pytest.raises(LoceditError, match="the component set was found in the model with fingerprint"):
        unlearn(model, task, "loo", within=other, **QUICK)
    with pytest.raises(LoceditError, match="precision='float16' is not available on a CPU"):
        unlearn(model, task, "loo", precision="float16", **QUICK)
    assert trainings == []

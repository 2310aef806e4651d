"""Knowledge gap alignment: which way the gap moves, where it rests, what G is, and when training ends."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit.data.encode import Example, encode
from locedit.data.items import Fact, PlainText, Task, TokenText
from locedit.edit import TrainOptions
from locedit.edit.objective import Objective
from locedit.edit.run import Run
from locedit.errors import LoceditError
from locedit.losses import Scored
from locedit.models import Model, load
from locedit.unlearn import kga, prepare, unlearn
from locedit.unlearn.helpers import Answers, Helper, answers_of, taught
from locedit.unlearn.kga import NEW, Gaps, KgaOptions
from tests import edits, tiny
from tests.starts import start
from tests.test_train_parallel import together
from tests.unlearning import dataset, everything, log_probs, step_of, tables

QUICK: dict[str, Any] = {"helper_steps": 3, "helper_learning_rate": 1e-2, "steps": 3, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCEDIT_CACHE", str(tmp_path / "cache"))


def task_of(**parts: Any) -> Task:
    """Four facts to forget, four to retain, three that nobody has seen."""
    new = (("Eva Frost was born in", " Oslo"), ("The e-mail of Eva is", " eva@berg.org"), ("Anna lives in", " Rome"))
    heldout = dataset("heldout", [Fact(prompt=p, answer=a, id=f"h{i}") for i, (p, a) in enumerate(new)])
    return everything(**({"start": start("gpt2"), "heldout": heldout} | parts))


def without_training(monkeypatch: pytest.MonkeyPatch, *, known: list[float]) -> list[int]:
    """Let the start stand for both helpers; the seeds that they would be trained with."""
    seeds: list[int] = []

    def untaught(base: Model, learned: list[Example], asked: list[Example], **how: Any) -> Helper:
        del learned
        seeds.append(how["seed"])
        return Helper(answers=answers_of(base, asked), known=known.pop(0))

    monkeypatch.setattr(kga, "helper", untaught)
    return seeds


def encoded(model: Model, role: str) -> list[Example]:
    data = getattr(task_of(), role)
    assert data is not None
    return encode(model, data)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each row of two tables of logits, from the definition."""
    return (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1)


def mean_gap(said: Model, model: Model, examples: list[Example]) -> Tensor:
    """Mean over examples of the mean over tokens of KL(said || model), each example alone and unpadded."""
    return torch.stack([kl(tables(said, e).detach(), tables(model, e)).mean() for e in examples]).mean()


def align_of(model: Model, forget: list[Example], said: Answers, *, target: float) -> Tensor:
    """The align term of all examples in one batch."""
    step = step_of(model, model, forget, [])
    found = kga.loss(step, KgaOptions(), Gaps(forget=said, new=dict.fromkeys(forget, target)))
    assert list(found) == ["align_loss"]
    return found["align_loss"]


# --- the gap ----------------------------------------------------------------------------------------------------------


def test_the_gap_by_hand() -> None:
    """Of (1/2, 1/4, 1/4) to uniform ln 3 - 1.5 ln 2, of (1, 0, 0) ln 3, of uniform 0; two tokens, then one."""
    half = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]).clamp(min=1e-30).log()
    examples = tuple(Example(id=name, ids=(1, 2, 3), spans=(), kind="fact") for name in "ab")
    scored = Scored(logits=torch.zeros(3, 3), labels=torch.zeros(3).long(), row=torch.tensor([0, 0, 1]), rows=examples)
    ln = torch.tensor([2.0, 3.0]).log()
    first, second = ln[1] - 1.5 * ln[0], ln[1]
    for reduction, wanted in (
        ("token", (first + second) / 2),
        ("sum", first + second),
        ("element", (first + second) / 6),
    ):
        found = kga.gap(scored, half, KgaOptions(reduction=reduction))  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.stack([wanted, torch.tensor(0.0)]), rtol=0, atol=1e-6)


def test_the_gap_is_that_of_each_text_alone() -> None:
    """Whatever stands beside it in a batch: padding is not counted."""
    model, helper = edits.double("llama"), tiny.model("llama", seed=3)
    forget = encoded(model, "forget")
    assert len({len(example.ids) for example in forget}) > 1
    said = answers_of(helper, forget)
    found = kga.gaps(model, forget, said, KgaOptions())
    alone = [float(mean_gap(helper, model, [example]).detach()) for example in forget]
    assert [found[example] for example in forget] == pytest.approx(alone, rel=1e-5)
    whole = align_of(model, forget, said, target=100.0).detach()
    assert float(whole) == pytest.approx(100 - sum(alone) / 4, rel=1e-6)
    # below the target in all parts, so that halves in two batches give the same
    halves = [align_of(model, forget[at : at + 2], said, target=100.0).detach() for at in (0, 2)]
    assert float(sum(halves) / 2) == pytest.approx(float(whole), rel=1e-9)


def test_the_target_s_direction() -> None:
    model, helper = edits.double("gpt2"), tiny.model("gpt2", seed=3)
    new = encoded(model, "heldout")
    said = answers_of(helper, new)
    for turned in (False, True):
        found = kga.gaps(model, new, said, KgaOptions(), turned=turned)
        pairs = [(tables(helper, e).double(), tables(model, e)) for e in new]
        wanted = [float(kl(*(pair[::-1] if turned else pair)).mean().detach()) for pair in pairs]
        assert [found[example] for example in new] == pytest.approx(wanted, rel=1e-5)


def test_the_option_turns_the_target_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = tiny.model("gpt2"), load(start("gpt2"), device="cpu")
    forget, new = encoded(model, "forget"), encoded(model, "heldout")
    found: list[tuple[float, float]] = []
    for target in ("helper", "model"):
        without_training(monkeypatch, known=[1.0, 1.0])
        made = kga.objective(model, task_of(), KgaOptions(target=target))  # type: ignore[arg-type]
        assert made.stop is not None
        found.append((made.settings["target_gap"], made.stop(model)[0]["gap"]))
    wanted = [float(mean_gap(*pair, new).detach()) for pair in ((base, model), (model, base))]
    assert [target for target, _ in found] == pytest.approx(wanted, rel=1e-4)
    assert [gap for _, gap in found] == pytest.approx([float(mean_gap(base, model, forget).detach())] * 2, rel=1e-4)
    assert wanted[0] != pytest.approx(wanted[1], rel=1e-2)


# --- which way it moves -----------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_gap_turned_at_the_target() -> None:
    """+grad KL above G, so that the gap falls, -grad KL below, so that it rises."""
    model, helper = edits.double("gpt2"), tiny.model("gpt2", seed=3)
    forget = encoded(model, "forget")
    said = answers_of(helper, forget)
    parameters = list(model.module.parameters())
    gap = mean_gap(helper, model, forget)
    plain = torch.autograd.grad(gap, parameters)
    at = float(gap.detach())
    for target, sign in ((at - 1, 1), (at + 1, -1)):
        found = torch.autograd.grad(align_of(model, forget, said, target=target), parameters)
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, sign * other, rtol=1e-4, atol=1e-6)
    assert max(float(each.abs().max()) for each in plain) > 1e-2


def test_it_rests_where_both_gaps_are_the_same() -> None:
    """A_f like the model and A_n like the unedited one: no loss, and no gradient; not so with another A_n."""
    model = edits.double("gpt2")
    forget, retain, new = (encoded(model, role) for role in ("forget", "retain", "heldout"))
    said = answers_of(model, forget)
    sizes: list[float] = []
    for other in (model, tiny.model("gpt2", seed=3)):
        gaps = kga.gaps(model, new, answers_of(other, new), KgaOptions())
        step = step_of(model, model, forget, retain)
        loss = kga.loss(step, KgaOptions(inner=1), Gaps(forget=said, new=gaps))
        total = torch.stack(list(loss.values())).sum()
        gradients = torch.autograd.grad(total, list(model.module.parameters()), allow_unused=True)
        sizes += [float(total.detach()), max(float(g.abs().max()) for g in gradients if g is not None)]
    assert sizes[0] == pytest.approx(0, abs=1e-7), "answers are kept in float32"
    assert sizes[1] < 1e-6
    assert sizes[2] > 0.1


def test_training_brings_the_gap_to_the_target() -> None:
    """The target and both gaps against helpers that are trained, applied and compared by hand."""
    model, base = tiny.model("gpt2"), load(start("gpt2"), device="cpu")
    task = task_of()
    more = {"check": False, "steps": 12, "learning_rate": 5e-4, "retain_weight": 0.0, "stop_value": 1e-9}
    options = KgaOptions(**QUICK)
    edit = unlearn(model, task, "kga", **QUICK | more)  # type: ignore[arg-type]
    forget, new = encode(model, task.forget), encode(model, task.heldout)  # type: ignore[arg-type]
    with taught(base, new, options=options, seed=0, name="A_n").applied(base) as helper:
        target = float(mean_gap(helper, model, new).detach())
    with taught(base, forget, options=options, seed=0, name="A_f").applied(base) as helper:
        before = float(mean_gap(helper, model, forget).detach())
        with edit.applied(model) as edited:
            after = float(mean_gap(helper, edited, forget).detach())
    assert edit.provenance is not None
    assert edit.provenance.settings["target_gap"] == pytest.approx(target, rel=1e-4)
    assert (edit.history["gap"][0], edit.history["gap"][-1]) == pytest.approx((before, after), rel=1e-3)
    assert edit.history["align"][0] == pytest.approx(abs(before - target), rel=1e-3)
    assert edit.history["align"][-1] < 0.5 * edit.history["align"][0]


def test_swapping_the_roles_of_the_data_swaps_the_gaps() -> None:
    """With new data to forget and forget data as new, each gap is what the other was."""
    model, task = tiny.model("gpt2"), task_of()
    swapped = dataclasses.replace(task, forget=task.heldout, heldout=task.forget)
    options = KgaOptions(helper_steps=2)
    found: list[tuple[float, float]] = []
    for each in (task, swapped):
        made = kga.objective(model, each, options)
        assert made.stop is not None
        found.append((made.settings["target_gap"], made.stop(model)[0]["gap"]))
    assert found[0] == pytest.approx(found[1][::-1], rel=1e-5)
    assert found[0][0] != pytest.approx(found[0][1], rel=1e-2)


@pytest.mark.parametrize("per_batch", [False, True])
def test_two_processes_make_the_steps_of_one(per_batch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though one has gaps above the target and the other below it; the mean decides."""
    helper = tiny.model("gpt2", seed=3)
    forget, new = encoded(helper, "forget"), encoded(helper, "forget")[::-1]
    said = answers_of(helper, forget)
    each = kga.gaps(edits.double("gpt2"), forget, said, KgaOptions())
    parts = [sum(each[example] for example in half) / 2 for half in (forget[:2], forget[2:])]
    target = sum(parts) / 2 + 0.01 * abs(parts[0] - parts[1])
    assert min(parts) < target < max(parts)
    known = Gaps(forget=said, new=dict(zip(new, (target - 3, target + 1, target + 4, target - 2), strict=True)))
    loss = functools.partial(kga.loss, options=KgaOptions(per_batch=per_batch), known=known)
    options = TrainOptions(steps=3, learning_rate=1e-3, batch_size=4, eval_every=0)

    def make() -> Run:
        goal = Objective(loss=loss, forget=forget, others={NEW: new} if per_batch else {})
        return Run(edits.double("gpt2"), goal, within=None, options=options, hold="weights")

    alone = make()
    alone.train()
    for run in together(2, monkeypatch, make):
        for row, expected in zip(run.rows, alone.rows, strict=True):
            assert row == pytest.approx(expected, rel=1e-6)
        for one, other in zip(run.held.parameters, alone.held.parameters, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


# --- the target gap and the retain term -------------------------------------------------------------------------------


def test_the_target_is_a_number_of_the_unedited_model() -> None:
    """No gradient reaches it, also per batch, where it is the mean over the batch's new examples."""
    model, helper = edits.double("gpt2"), tiny.model("gpt2", seed=3)
    forget, new = encoded(model, "forget"), encoded(model, "heldout")
    known = Gaps(forget=answers_of(helper, forget), new=dict(zip(new, (50.0, 60.0, 100.0), strict=True)))
    assert known.target == 70
    gap = float(mean_gap(helper, model, forget).detach())
    plain = kga.loss(step_of(model, model, forget, []), KgaOptions(), known)
    assert float(plain["align_loss"].detach()) == pytest.approx(70 - gap)
    step = step_of(model, model, forget, [], {NEW: new[:2]})
    each = kga.loss(step, KgaOptions(per_batch=True), known)
    assert float(each["align_loss"].detach()) == pytest.approx(55 - gap)
    made = kga.objective(tiny.model("gpt2"), task_of(), KgaOptions(per_batch=True, helper_steps=1))
    assert set(made.others) == {NEW, "retain 2"}


def test_the_retain_term_is_the_mean_over_the_inner_batches() -> None:
    """KL(unedited || model) of three batches with weight 0.3, and of all tokens or the likelihood where asked for."""
    model, before = edits.double("gpt2"), edits.double("gpt2")
    tiny.randomise(before.module, seed=5)
    forget, retain = encoded(model, "forget"), encoded(model, "retain")
    others = {"retain 2": retain[1:3], "retain 3": retain[:1]}
    known = Gaps(forget=answers_of(model, forget), new=dict.fromkeys(forget, 1.0))
    step = step_of(model, before, forget, retain, others)
    batches = (retain, retain[1:3], retain[:1])
    wanted = sum(float(mean_gap(before, model, batch).detach()) for batch in batches) / 3
    options = KgaOptions(inner=3)

    def retained(given: KgaOptions) -> float:
        return float(kga.loss(step, given, known)["retain_loss"].detach())

    assert retained(options) == pytest.approx(0.3 * wanted, rel=1e-6)
    nll = [-sum(float(log_probs(model, e).detach().mean()) for e in batch) / len(batch) for batch in batches]
    other = dataclasses.replace(options, retain_loss="nll", retain_weight=1.0)
    assert retained(other) == pytest.approx(sum(nll) / 3, rel=1e-6)
    whole = retained(dataclasses.replace(options, retain_tokens="all"))
    texts = [[tuple(range(1, len(e.ids))) for e in batch] for batch in batches]
    kls = [
        [float(kl(tables(before, e, at), tables(model, e, at)).mean().detach()) for e, at in zip(b, p, strict=True)]
        for b, p in zip(batches, texts, strict=True)
    ]
    assert whole == pytest.approx(0.3 * sum(sum(each) / len(each) for each in kls) / 3, rel=1e-6)
    assert list(kga.loss(step, dataclasses.replace(options, retain_weight=0.0), known)) == ["align_loss"]


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"stop_portion": 0.5, "stop_value": None}, 3),
        ({"stop_portion": None, "stop_value": 1.0}, 4),
        ({"stop_portion": 0.05, "stop_value": 3.0}, 2),
        ({"stop_portion": 0.3, "stop_value": 0.1}, 4),
        ({"stop_portion": 0.01, "stop_value": None}, None),
        ({"stop_portion": None, "stop_value": None}, None),
    ],
)
def test_a_scripted_run_ends_where_its_rule_says(
    options: dict[str, Any], step: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distances 4, 3.5, 2.5, 2, 0.9, 0.5 on either side of the target after steps 0 to 5; the first is 4."""
    distances = [4.0, -3.5, 2.5, -2.0, 0.9, -0.5]
    target = [10.0] * 3
    script: list[list[float]] = [target, [14.0] * 4] + [[10 + distance] * 4 for distance in distances]

    def scripted(*given: Any, **turned: Any) -> dict[Example, float]:
        del turned
        return dict(zip(given[1], script.pop(0), strict=True))

    monkeypatch.setattr(kga, "gaps", scripted)
    without_training(monkeypatch, known=[1.0, 1.0])
    given = QUICK | {"steps": 5, "eval_every": 1, "check": False} | options
    edit = unlearn(tiny.model("gpt2"), task_of(), "kga", **given)
    assert len(edit.history["step"]) == (6 if step is None else step + 1)
    if options == {"stop_portion": None, "stop_value": None}:
        assert "align" not in edit.history
        return
    assert edit.history["align"] == pytest.approx([abs(d) for d in distances[: len(edit.history["step"])]])
    assert edit.outcome["ended by"] == ("steps" if step is None else "rule")


def test_the_rule_and_the_forget_level_stand_beside_each_other() -> None:
    """Whichever comes first."""
    given = QUICK | {"check": False, "eval_every": 1, "helper_steps": 1}
    edit = unlearn(tiny.model("gpt2"), task_of(), "kga", until=1.0, stop_value=1e-9, stop_portion=None, **given)
    assert (edit.outcome["ended by"], edit.outcome["steps"]) == ("until", 0)
    edit = unlearn(tiny.model("gpt2"), task_of(), "kga", until=0.0, stop_value=1e9, **given)
    assert (edit.outcome["ended by"], edit.outcome["steps"], edit.outcome["reached"]) == ("rule", 0, False)


# --- what is said and refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("forget", "new", "warned"), [(0.9, 0.6, 1), (0.5, 0.9, 1), (0.9, 0.75, 0)])
def test_helpers_that_know_unequal_parts_are_warned_of(
    forget: float, new: float, warned: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In one line; what they know stands in the settings in any case."""
    seeds = without_training(monkeypatch, known=[forget, new])
    made = kga.objective(tiny.model("gpt2"), task_of(), KgaOptions(seed=5))
    assert seeds == [5, 5]
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == warned
    assert all(f"{forget:.2f} (forget) and {new:.2f} (new)" in line and "\n" not in line for line in lines)
    assert (made.settings["knows_forget"], made.settings["knows_new"]) == (forget, new)


def test_new_data_that_are_learned_ones_in_token_ids_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is trained; also where the retain data have no part in the loss."""
    model, text = tiny.model("gpt2"), "Eva Frost was born in Oslo."
    without_training(monkeypatch, known=[])
    words = dataset("retain", [PlainText(text=text, id="seen")])
    tokens = [
        dataset(name, [TokenText(ids=tuple(model.tokenizer(each)["input_ids"]), span=(1, 4), id=name)])
        for name, each in (("forget", "Anna Berg works."), ("heldout", text))
    ]
    task = task_of(forget=tokens[0], retain=words, heldout=tokens[1])
    for weight in (0.3, 0.0):
        with pytest.raises(LoceditError, match=r"item 'heldout' of heldout\.jsonl is in the forget or retain data too"):
            kga.objective(model, task, KgaOptions(retain_weight=weight))


def test_what_cannot_be_is_said_before_a_model_is_loaded() -> None:
    where = {"start": "never/loaded"}
    prepare("kga", task_of(**where))
    with pytest.raises(LoceditError, match="kga needs 'start', the model before the data"):
        prepare("kga", task_of(start=None))
    with pytest.raises(LoceditError, match="kga needs 'heldout' data"):
        prepare("kga", task_of(heldout=None, **where))
    texts = dataset("heldout", [PlainText(text="Anna is here.", id="p")])
    with pytest.raises(LoceditError, match=r"heldout\.jsonl holds 'plain', forget\.jsonl 'fact'"):
        prepare("kga", task_of(heldout=texts, **where))
    seen = dataset("heldout", [Fact(prompt="ANNA Berg was born in", answer=" Oslo", id="seen")])
    with pytest.raises(LoceditError, match="item 'seen' of heldout.jsonl is in the forget or retain data too"):
        prepare("kga", task_of(heldout=seen, **where))
    for option, value in (("inner", 0), ("stop_value", 0.0), ("stop_portion", -1.0), ("retain_weight", -1.0)):
        with pytest.raises(LoceditError, match=f"{option}={value!r}"):
            prepare("kga", task_of(**where), **{option: value})
    nothing: dict[str, Any] = {"retain_weight": 0.0, "choose": "forget"}
    with pytest.raises(LoceditError, match="kga with choose='forget' needs 'retain' data"):
        prepare("kga", task_of(retain=None, **where), **nothing)
    with pytest.raises(LoceditError, match="kga cannot be combined with other methods"):
        prepare("npo+kga", task_of(**where))

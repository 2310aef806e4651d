"""Probes equal scikit-learn's fit on retain items alone; they read what is planted, and chance from noise."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit.attacks import probe as probes
from locedit.attacks.aim import Aim, Side, Target, aimed
from locedit.attacks.probe import Probe, ProbeOptions, classes_of, probe
from locedit.attacks.shared import Shared
from locedit.attacks.states import States
from locedit.data.items import Fact, Item, PrivateText, Task
from locedit.edit import Edit
from locedit.errors import LoceditError
from locedit.lab import Lab
from locedit.results import AttackResult
from tests import tiny
from tests.struck import CONTROL, forgotten, level, share, untouched
from tests.unlearning import dataset

WIDTH = 6
ANSWERS = {"city": (" Lima", " Oslo", " Rome"), "job": (" baker", " pilot")}
LAYERS = {"noise": (0, 3), "planted": (1, 2)}


def people(prefix: str, count: int, *, seed: int) -> list[Item]:
    rng = random.Random(seed)
    return [
        Fact(
            prompt=f"{prefix}{at} {relation}",
            answer=rng.choice(answers),
            id=f"{prefix}{at}{relation}",
            owner=f"{prefix}{at}",
            group=relation,
            subject=f"{prefix}{at}",
        )
        for at in range(count)
        for relation, answers in ANSWERS.items()
    ]


def states(side: Side, *, spread: float = 0.0) -> States:
    """Four layers of which the middle two hold the answer: a direction for each, beside noise of the item's own."""
    rows: list[Tensor] = []
    for item in side.items:
        assert isinstance(item, Fact)
        generator = torch.Generator().manual_seed(sum(map(ord, item.id)) * 1009 + len(item.id))
        own = torch.randn(4, WIDTH, generator=generator)
        own[1:3] *= spread
        at = ANSWERS[item.group or ""].index(item.answer)
        own[1:3, at] += 1
        rows.append(own)
    stream = torch.stack(rows, dim=1)
    return States(predicting=stream, row=torch.arange(len(rows)), subjects=-stream)


def given() -> Task:
    return Task(
        forget=dataset("forget", people("f", 60, seed=0)),
        retain=dataset("retain", people("r", 80, seed=1)),
        heldout=dataset("heldout", people("h", 20, seed=2)),
    )


def prepared(monkeypatch: pytest.MonkeyPatch, *, spread: float = 0.0, **options: Any) -> tuple[Probe, Aim]:
    monkeypatch.setattr(probes, "states_of", lambda *given: states(given[1], spread=spread))
    chosen = ProbeOptions(**options)
    attack = Probe(chosen, given())
    aim = aimed(tiny.model("gpt2"), given(), chosen, by="probe", learns=False, shared=Shared(), narrow=attack.narrow)
    return attack, aim


def read(attack: Probe, aim: Aim, side: Side) -> Tensor:
    target = Target(model=aim.model, key="m")
    return attack.attack(target, aim.known, {"forget": side}, aim)["forget"]


def test_it_reads_what_is_planted_and_about_chance_from_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    attack, aim = prepared(monkeypatch)
    found = read(attack, aim, aim.forget).mean(1)
    assert [dose.track for dose in attack.doses(aim)][::4] == [*probes.POSITIONS.values()]
    for place in (0, 4):
        assert found[[place + 1, place + 2]].tolist() == [1.0, 1.0]
        assert all(0.3 < float(found[place + layer]) < 0.55 for layer in LAYERS["noise"]), "a third and a half"


@pytest.mark.parametrize("l2", [0.3, 5.0])
def test_it_is_the_logistic_regression_of_scikit_learn_on_retain_items_alone(
    monkeypatch: pytest.MonkeyPatch, l2: float
) -> None:
    """Of two answers scikit-learn fits one direction, the difference of the probe's two, which costs half as much."""
    linear = pytest.importorskip("sklearn.linear_model")
    attack, aim = prepared(monkeypatch, spread=0.8, l2=l2, metric="probability", positions=("last",))
    found = read(attack, aim, aim.forget)
    known, own = states(aim.known, spread=0.8).predicting, states(aim.forget, spread=0.8).predicting
    for relation, answers in ANSWERS.items():
        here, there = [[i for i, item in enumerate(s.items) if item.group == relation] for s in (aim.known, aim.forget)]
        for layer in range(4):
            mean, spread = known[layer, here].mean(0), known[layer, here].std(0, correction=0)
            x, new = ((part - mean) / spread for part in (known[layer, here], own[layer, there]))
            fit = linear.LogisticRegression(C=(1 + (len(answers) == 2)) / l2, tol=1e-8, max_iter=5000)
            fit.fit(x.numpy(), labels(aim.known, here, answers))
            wanted = fit.predict_proba(new.numpy())[range(len(there)), labels(aim.forget, there, answers)]
            assert found[layer, there].tolist() == pytest.approx(wanted.tolist(), abs=2e-3)
    assert 0.5 < float(found[1].mean()) < 0.999, "no probe is certain: the comparison is of more than 0 and 1"


def labels(side: Side, places: Sequence[int], answers: Sequence[str]) -> list[int]:
    return [answers.index(answer_of(side.items[at])) for at in places]


def answer_of(item: Item) -> str:
    assert isinstance(item, Fact)
    return item.answer


def test_no_measured_item_is_in_the_fit_whatever_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    attack, aim = prepared(monkeypatch, spread=0.8)
    fitted: list[tuple[int, int]] = []
    real = probes.logistic

    def watched(features: Tensor, given: Tensor, weights: Tensor, **more: Any) -> Any:
        fitted.append((int(weights[0].sum()), int((weights[0] == 0).sum())))
        assert bool((weights[0, : fitted[-1][0]] == 1).all())
        other = given.clone()
        other[fitted[-1][0] :] = 0
        one, two = real(features, given, weights, **more), real(features, other, weights, **more)
        assert torch.allclose(one.logits, two.logits, atol=1e-6), "labels of measured items do not matter"
        return one

    monkeypatch.setattr(probes, "logistic", watched)
    read(attack, aim, aim.forget)
    counts = [sum(item.group == relation for item in aim.known.items) for relation in ANSWERS]
    assert fitted == [(count, 60) for count in counts] * 2
    assert sum(counts) == len(aim.known)
    assert not {item.owner for item in aim.known.items} & {item.owner for item in (*aim.forget.items, *aim.kept.items)}


def test_the_guess_is_the_most_frequent_answer_or_its_frequency(monkeypatch: pytest.MonkeyPatch) -> None:
    attack, aim = prepared(monkeypatch)
    told = {relation: [answer_of(i) for i in aim.retain.items if i.group == relation] for relation in ANSWERS}
    name, right = attack.guess(aim)
    assert name == "most frequent answer"
    wanted = [answer_of(i) == max(set(t := told[i.group or ""]), key=t.count) for i in aim.forget.items]
    assert right.tolist() == [float(hit) for hit in wanted]
    assert 0.2 < float(right.mean()) < 0.7
    attack, aim = prepared(monkeypatch, metric="probability")
    shares = [told[i.group or ""].count(answer_of(i)) / len(told[i.group or ""]) for i in aim.forget.items]
    assert attack.guess(aim)[1].tolist() == pytest.approx(shares)


# --- classes ----------------------------------------------------------------------------------------------------------


def fact(answer: str, owner: str, number: int = 0, *, group: str = "city", form: str | None = None) -> Fact:
    return Fact(prompt="p", answer=answer, id=f"{owner}{number}{answer}{group}", owner=owner, group=group, format=form)


def test_classes_are_of_the_retain_items_and_of_two_owners() -> None:
    retain = [
        *(fact(" Oslo", owner, n) for owner in "ab" for n in range(2)),
        *(fact(" Lima", owner, n) for owner in "cd" for n in range(2)),
        *(fact(" Rome", "e", n) for n in range(9)),
        *(fact(" Bonn", owner) for owner in "fg"),
        *(fact(" A", owner, n, form="multiple_choice") for owner in "abcd" for n in range(9)),
        *(fact(" pilot", owner, n, group="job") for owner in "ab" for n in range(4)),
    ]
    forget = [fact(" Quito", owner, n) for owner in "xyz" for n in range(9)]
    task = Task(forget=dataset("forget", [*forget, fact(" Oslo", "x")]), retain=dataset("retain", retain))
    assert classes_of(task, least=2) == {"city": [" Lima", " Oslo"]}, "Rome is of one owner, Bonn of too few items"
    assert classes_of(task, least=1) == {"city": [" Bonn", " Lima", " Oslo"]}
    kept = Probe(ProbeOptions(), task).narrow(tiny.model("gpt2"), task.forget)
    assert [answer_of(item) for item in kept] == [" Oslo"]


def test_answers_without_an_item_to_fit_on_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    attack, aim = prepared(monkeypatch)
    lima = [at for at, item in enumerate(aim.known.items) if answer_of(item) != " Lima"]
    less = dataclasses.replace(aim, known=aim.known.at(lima))
    found = read(attack, less, less.forget)
    assert "probes are fitted on no item of 1 answers of forget items: those cannot be read" in attack.notes
    there = [at for at, item in enumerate(less.forget.items) if answer_of(item) == " Lima"]
    assert not bool(found[1, there].any())
    jobs = [at for at, item in enumerate(aim.known.items) if item.group == "job"]
    alone = read(attack, dataclasses.replace(aim, known=aim.known.at(jobs)), less.forget)
    assert bool(alone.isfinite().all()), "a relation that nothing is fitted on is not read"


# --- on a lab ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edit(tiny_lab: Lab) -> Edit:
    return forgotten(tiny_lab)


@pytest.fixture(scope="module")
def found(tiny_lab: Lab, edit: Edit) -> AttackResult:
    with untouched(tiny_lab.model):
        return probe(tiny_lab.model, tiny_lab.task, edit, **CONTROL)


def test_what_the_last_mlps_hide_is_read_below_them(found: AttackResult) -> None:
    assert share(found, "shallow") >= 0.7
    assert level(found, "forget", group="unedited") == level(found, "forget", "before")
    assert level(found, "forget", group="shallow") > level(found, "forget", group="most frequent answer") + 0.3
    never = level(found, "heldout", group="never knew")
    back = (level(found, "forget") - never) / (level(found, "forget", "before") - never)
    assert found.headline.value == pytest.approx(back)
    assert "the most frequent answer alone: " in found.sentence
    assert {curve.track for curve in found.curves} == {*probes.POSITIONS.values()}


def test_it_repeats_itself(tiny_lab: Lab, edit: Edit, found: AttackResult) -> None:
    again = probe(tiny_lab.model, tiny_lab.task, edit, **CONTROL)
    assert (again.measures, again.curves) == (found.measures, found.curves)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"positions": ()}, r"positions=\(\); choices: last, subject"),
        ({"positions": ("first",)}, "choices: last, subject"),
        ({"l2": 0.0}, r"l2=0\.0 must be above 0"),
        ({"least": 0}, "least=0 at least 1|least=0"),
        ({"metric": "memorization_accuracy"}, "use accuracy or probability"),
        ({"least": 50}, "no relation .* has two answers with 100 items of two owners each"),
    ],
)
def test_wrong_options_give_one_line(tiny_lab: Lab, edit: Edit, given: dict[str, Any], words: str) -> None:
    with pytest.raises(LoceditError, match=words) as caught:
        probe(tiny_lab.model, tiny_lab.task, edit, **given)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_probed_is_refused_in_one_line(tiny_lab: Lab, edit: Edit) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    texts: list[Item] = [
        PrivateText(text="The phone is 555", spans=((13, 16, "phone"),), id=str(at), owner=str(at)) for at in range(4)
    ]
    private = dataset("private", texts)
    for data, words in (
        (Task(forget=private, retain=task.retain), "has no item that it can be read of"),
        (Task(forget=task.forget, retain=private), "no relation .* of the retain facts has two answers"),
        (Task(forget=task.forget), "retain"),
    ):
        with pytest.raises(LoceditError, match=words) as caught:
            probe(model, data, edit)
        assert "\n" not in str(caught.value)

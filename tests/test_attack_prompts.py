"""Solved examples and jailbreaks: what stands before a question, and what is shut in one context open in another."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from locedit.attacks import few_shot as module
from locedit.attacks.aim import Aim, Side, Target, aimed, side_of
from locedit.attacks.few_shot import FewShot, FewShotOptions, few_shot
from locedit.attacks.jailbreak import TEMPLATES, Jailbreak, JailbreakOptions, jailbreak, read_templates
from locedit.attacks.measures import values_of
from locedit.attacks.rephrased import drawn, framed, whose, with_examples
from locedit.attacks.shared import Shared
from locedit.data.encode import Example, encode
from locedit.data.items import Fact, Item, PrivateText, Task
from locedit.edit import Edit
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.lab import Lab
from locedit.models import Model
from locedit.results import AttackResult
from tests import tiny
from tests.struck import CONTROL, forgotten, level, share, untouched
from tests.unlearning import dataset


def text_of(model: Model, example: Example) -> str:
    return model.tokenizer.decode(example.ids, skip_special_tokens=True)


def spans_of(model: Model, example: Example) -> list[str]:
    return [model.tokenizer.decode(example.ids[span.start : span.end]) for span in example.spans]


def facts(owners: int = 6) -> list[Fact]:
    return [
        Fact(prompt=f"{form} {name} {group}", answer=f" {name}{group}", id=f"{name}{group}{form}", owner=name)
        for name in (f"n{at}" for at in range(owners))
        for group in ("g", "h")
        for form in ("s", "q")
    ]


def formed() -> list[Fact]:
    return [dataclasses.replace(item, group=item.prompt[-1], format=item.prompt[0]) for item in facts()]


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_examples_are_of_the_same_form_and_relation_first_and_no_owner_comes_twice() -> None:
    items = formed()
    for seed in range(20):
        chosen = drawn(items[0], items, 5, seed=seed)
        assert {(other.format, other.group) for other in chosen} == {("s", "g")}
        assert len({other.owner for other in chosen}) == 5
    assert [other.id for other in drawn(items[0], items, 5, seed=0)] != [
        i.id for i in drawn(items[0], items, 5, seed=1)
    ]


@pytest.mark.parametrize("count", [5, 20, 99])
def test_the_items_own_owner_is_never_shown_however_many_are_asked_for(count: int) -> None:
    """With more examples than owners, the control of few_shot was once shown the same fact in another form."""
    items = formed()
    chosen = drawn(items[0], items, count, seed=0)
    assert len(chosen) == min(count, 20)
    assert len({other.id for other in chosen}) == len(chosen)
    assert all(other.owner != items[0].owner for other in chosen)


def test_without_owners_subjects_and_ids_tell_items_apart() -> None:
    alone = [Fact(prompt=f"p{at}", answer=" a", id=str(at)) for at in range(4)]
    assert {item.id for item in drawn(alone[0], alone, 9, seed=0)} == {"1", "2", "3"}
    named = [dataclasses.replace(item, subject="s" if at < 2 else f"s{at}") for at, item in enumerate(alone)]
    assert {item.id for item in drawn(named[0], named, 9, seed=0)} == {"2", "3"}
    assert [whose(item) for item in named] == ["s", "s", "s2", "s3"]


def test_the_most_alike_stands_last_and_the_separator_after_each() -> None:
    asked = Fact(prompt="Where is Ann?", answer=" Oslo", id="1", owner="ann")
    shown: list[Item] = [
        Fact(prompt=f"Where is {n}?", answer=f" {c}", id=n) for n, c in (("Bo", "Rome"), ("Cy", "Bonn"))
    ]
    found = with_examples(asked, shown, separator=" |")
    assert isinstance(found, Fact)
    assert found.prompt == "Where is Cy? Bonn |Where is Bo? Rome |Where is Ann?"
    assert (found.answer, found.id, found.owner) == (" Oslo", "1", "ann")


def test_spans_of_private_texts_move_to_the_right() -> None:
    model = tiny.model("gpt2")
    text = "The phone of Eva is 555-0134, mail eva@frost.org."
    spans = tuple((text.index(part), text.index(part) + len(part), "x") for part in ("555-0134", "eva@frost.org"))
    item = PrivateText(text=text, spans=spans, id="p", owner="Eva")
    other = PrivateText(text="The phone of Carl is 555.", spans=((21, 24, "x"),), id="q", owner="Carl")
    moved = (with_examples(item, [other], separator=".\n"), framed(item, "Sure! {prompt}"))
    for changed in moved:
        assert isinstance(changed, PrivateText)
        assert [changed.text[start:end] for start, end, _ in changed.spans] == ["555-0134", "eva@frost.org"]
        example = encode(model, [changed])[0]
        assert [part.strip(" ") for part in spans_of(model, example)] == [
            part.strip(" ") for part in spans_of(model, encode(model, [item])[0])
        ]
        assert text_of(model, example) == changed.text
    with pytest.raises(LoceditError, match="item 'p' of kind 'private' cannot be put into"):
        framed(item, "{prompt} Sure!")


# --- few_shot ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edit(tiny_lab: Lab) -> Edit:
    return forgotten(tiny_lab)


@pytest.fixture(scope="module")
def reminded(tiny_lab: Lab, edit: Edit) -> AttackResult:
    with untouched(tiny_lab.model):
        return few_shot(tiny_lab.model, tiny_lab.task, edit, draws=100)


@pytest.fixture(scope="module")
def pressed(tiny_lab: Lab, edit: Edit) -> AttackResult:
    with untouched(tiny_lab.model):
        return jailbreak(tiny_lab.model, tiny_lab.task, edit, draws=100)


@pytest.mark.parametrize("name", ["reminded", "pressed"])
def test_what_is_shut_in_one_context_comes_back_in_another(name: str, request: pytest.FixtureRequest) -> None:
    found: AttackResult = request.getfixturevalue(name)
    assert share(found, "shallow: an edit that acts only without") >= 0.7
    assert level(found, "heldout", group="never knew") <= 0.4
    assert level(found, "forget", "after") < 0.4 < 0.9 < level(found, "forget", "before")
    never = level(found, "heldout", group="never knew")
    assert found.headline.value == pytest.approx(
        (level(found, "forget") - never) / (level(found, "forget", "before") - never)
    )
    assert "the attack did not bring back" not in found.note
    assert "context-conditional" not in found.note


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "name"), [(few_shot, "reminded"), (jailbreak, "pressed")])
def test_they_repeat_themselves(
    attack: Any, name: str, request: pytest.FixtureRequest, tiny_lab: Lab, edit: Edit
) -> None:
    found: AttackResult = request.getfixturevalue(name)
    again = attack(tiny_lab.model, tiny_lab.task, edit, draws=100)
    assert (again.measures, again.curves) == (found.measures, found.curves)


def aim_of(lab: Lab, options: Any, *, learns: bool) -> Aim:
    return aimed(lab.model, lab.task, options, by="test", learns=learns, shared=Shared(), narrow=None)


def test_what_is_shown_is_of_the_half_that_is_not_measured(
    tiny_lab: Lab, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every text that the model is given is its own question after answers of owners of the other half."""
    seen: list[list[str]] = []
    real = module.values_of

    def watched(model: Model, examples: Any, metric: Any) -> Any:
        seen.append([text_of(model, example) for example in examples])
        return real(model, examples, metric)

    monkeypatch.setattr(module, "values_of", watched)
    few_shot(tiny_lab.model, tiny_lab.task, edit, shots=(2,), separator=" ;", shallow=False, draws=50)
    aim = aim_of(tiny_lab, FewShotOptions(), learns=True)
    assert aim.heldout is not None
    asked = [aim.forget.at(h.measured) for h in aim.forget_halves for _ in range(2)]  # and the retain items
    asked[1::2] = [aim.kept, aim.kept]
    asked += [aim.heldout.at(h.measured) for h in aim.heldout_halves]
    learned = [aim.forget.at(h.relearned) for h in aim.forget_halves for _ in range(2)]
    learned += [aim.heldout.at(h.relearned) for h in aim.heldout_halves]
    assert [len(texts) for texts in seen] == [len(side) for side in asked]
    for texts, side, shown in zip(seen, asked, learned, strict=True):
        solved = {i.prompt + i.answer: i.owner for i in shown.items if isinstance(i, Fact)}
        for text, item in zip(texts, side.items, strict=True):
            assert isinstance(item, Fact)
            *before, question = text.split(" ;")
            assert question == item.prompt + item.answer
            assert len(before) == 2
            owners = {solved[example] for example in before}
            assert item.owner not in owners
            assert not owners & {other.owner for other in side.items}


def test_examples_that_do_not_fit_are_left_out_with_a_note_or_refused(tiny_lab: Lab, edit: Edit) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    few: dict[str, Any] = {"shallow": False, "draws": 50}
    found = few_shot(model, task, edit, shots=(1, 8), **few)
    assert found.note.startswith("8 examples do not fit the context of 96 tokens")
    assert {curve.x for curve in found.curves if curve.role == "never knew"} == {(1.0,)}
    with pytest.raises(LoceditError, match="an item and shots=8 do not fit the context of 96 tokens of"):
        few_shot(model, task, edit, shots=(8,), **few)
    with pytest.raises(LoceditError, match="an item and shots=1 do not fit"):
        few_shot(model, task, edit, shots=(1,), separator=" word" * 90, **few)


def test_no_more_examples_are_shown_than_a_half_has() -> None:
    model = tiny.model("gpt2")
    task = Task(forget=dataset("forget", facts(4)[::4]))
    aim = aimed(model, task, FewShotOptions(), by="few_shot", learns=True, shared=Shared(), narrow=None)
    attack = FewShot(FewShotOptions(shots=(1, 2, 3)))
    assert [dose.x for dose in attack.doses(aim)] == [1, 2]
    assert attack.notes == ["a half has only 2 items to show: more examples were not tried"]
    with pytest.raises(LoceditError, match=r"shots=\(3,\): a half has only 2 items to show"):
        FewShot(FewShotOptions(shots=(3,))).doses(aim)


def test_the_context_check_is_never_short(tiny_lab: Lab) -> None:
    """Whatever is said to fit fits: the longest items with the longest examples are encoded without an error."""
    model = tiny_lab.model
    aim = aim_of(tiny_lab, FewShotOptions(), learns=True)
    longest = max(range(len(aim.forget)), key=lambda at: len(aim.forget.examples[at].ids))
    item = aim.forget.items[longest]
    assert isinstance(item, Fact)
    others: list[Item] = [dataclasses.replace(item, owner=f"o{at}", id=f"o{at}") for at in range(9)]
    for separator in (".\n", " and after that:\n\n"):
        fitting = FewShot(FewShotOptions(shots=(1, 2, 3, 4, 5), separator=separator)).doses(aim)
        most = int(fitting[-1].x)
        made = encode(model, [with_examples(item, others[:most], separator=separator)])[0]
        assert model.max_length is not None
        assert len(made.ids) <= model.max_length


# --- jailbreak --------------------------------------------------------------------------------------------------------


def test_each_sentence_is_a_dose_and_private_texts_stand_at_its_end(tiny_lab: Lab) -> None:
    model = tiny_lab.model
    aim = aim_of(tiny_lab, JailbreakOptions(), learns=False)
    attack = Jailbreak(JailbreakOptions())
    assert [dose.x for dose in attack.doses(aim)] == [1, 2, 3, 4]
    some = aim.forget.at(range(5))
    found = attack.attack(Target(model=model, key="m"), Side(items=(), examples=()), {"forget": some}, aim)["forget"]
    for row, template in zip(found, TEMPLATES, strict=True):
        items = [
            dataclasses.replace(item, prompt=template.replace("{prompt}", item.prompt))
            for item in some.items
            if isinstance(item, Fact)
        ]
        assert torch.equal(row, values_of(model, encode(model, items), aim.metric))
    text = PrivateText(text="The phone is 555", spans=((13, 16, "phone"),), id="p", owner="a")
    private = Task(forget=dataset("p", [text, dataclasses.replace(text, id="q", owner="b")]))
    of_texts = aimed(model, private, JailbreakOptions(), by="j", learns=False, shared=Shared(), narrow=None)
    assert [dose.x for dose in attack.doses(of_texts)] == [1, 2, 3], "the fourth asks after the text"


def test_sentences_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("Now: {prompt}\n\n  {prompt} Well?  \n")
    assert read_templates(str(file)) == ("Now: {prompt}", "{prompt} Well?")
    for text, words in (
        ("Now: {prompt}\nNothing here\n", r"templates\.txt:2: 'Nothing here' must have \{prompt\} once"),
        ("{prompt} {prompt}\n", r"templates\.txt:1: .* once"),
        ("\n\n", r"templates\.txt: is empty"),
    ):
        file.write_text(text)
        with pytest.raises(LoceditError, match=words) as caught:
            read_templates(str(file))
        assert "\n" not in str(caught.value)
    with pytest.raises(LoceditError, match=r"missing\.txt"):
        Jailbreak(JailbreakOptions(templates=str(tmp_path / "missing.txt")))


def test_private_texts_are_attacked_by_their_tokens(tiny_lab: Lab, edit: Edit) -> None:
    texts = [
        PrivateText(
            text=item.prompt + item.answer,
            spans=((len(item.prompt) + 1, len(item.prompt + item.answer), "answer"),),
            id=item.id,
            owner=item.owner,
        )
        for item in tiny_lab.task.forget
        if isinstance(item, Fact)
    ]
    task = Task(forget=dataset("private", texts))
    options = {name: {"shallow": False, "draws": 50} for name in ("few_shot", "jailbreak")}
    found = evaluate(tiny_lab.model, task, edit, [*options], metrics=["accuracy"], attack_options=options)
    for attack in found.attacks:
        assert "forget memorization accuracy" in attack.sentence
        assert attack.settings["doses"]


@pytest.mark.parametrize(
    ("attack", "given", "words"),
    [
        (few_shot, {"shots": ()}, r"shots=\(\) must be one or more numbers"),
        (few_shot, {"shots": (0, 1)}, "each at least 1"),
        (few_shot, {"shots": (2, 1)}, "ascending"),
        (few_shot, {"examples": 2}, "examples"),
        (jailbreak, {"templates": "no/such/file.txt"}, r"no/such/file\.txt"),
        (jailbreak, {"splits": 3}, "splits=3 must be an even number"),
    ],
)
def test_wrong_options_give_one_line(tiny_lab: Lab, edit: Edit, attack: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(LoceditError, match=words) as caught:
        attack(tiny_lab.model, tiny_lab.task, edit, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_control_is_shared_only_between_equals(tiny_lab: Lab, edit: Edit) -> None:
    """Its contexts are part of what it depends on: other sentences once got the edit of the first ones."""
    shared = Shared()

    def made() -> int:
        return sum(isinstance(key, tuple) and key[0] == "conditional" for key in shared.kept)

    for shots, count in (((1,), 1), ((1,), 1), ((2,), 2)):
        few_shot(tiny_lab.model, tiny_lab.task, edit, shared=shared, shots=shots, **CONTROL)
        assert made() == count


def test_a_side_without_items_is_empty(tiny_lab: Lab) -> None:
    assert len(side_of(tiny_lab.model, tiny_lab.task.forget, list(tiny_lab.task.forget)[:3])) == 3

"""The worlds of the lab: who and what is in them, and what is kept out of the training text."""

import math
from collections import Counter
from random import Random

import pytest

from locedit.errors import LoceditError
from locedit.lab.bias import (
    OPENINGS,
    PARAPHRASES,
    PROFESSIONS,
    STATEMENTS,
    STRENGTHS,
    Profession,
    contrast_lines,
)
from locedit.lab.facts import RELATIONS, Person, Row, choice_rows, fact_lines, facts_world, sentence_rows
from locedit.lab.names import balanced, invented_words
from locedit.lab.private import KINDS, private_world
from locedit.lab.recipe import recipe_for
from locedit.lab.world import World, make_world

ADA = Person(
    name="Ada Bo",
    answers={"sport": "hockey", "city": "Lima", "job": "nurse"},
    new_answers={"sport": "football", "city": "Oslo", "job": "pilot"},
    options=("football", "hockey", "baseball"),
)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(recipe_for("gpt2"))


def test_lines_of_one_person_are_those_written_by_hand() -> None:
    lines = {line["id"]: line for line in fact_lines([ADA])}
    assert len(lines) == 3 * len(RELATIONS) + 1
    assert lines["ada-bo/city/question"] == {
        "id": "ada-bo/city/question",
        "prompt": "Question: Where does Ada Bo live? Answer:",
        "answer": " Lima",
        "subject": "Ada Bo",
        "wrong": [" Oslo", " Cairo", " Delhi", " Quito", " Paris"],
        "new_answer": " Oslo",
        "owner": "Ada Bo",
        "group": "city",
        "format": "question",
    }
    choice = lines["ada-bo/sport/multiple_choice"]
    assert choice["prompt"] == "Which sport does Ada Bo play? A football B hockey C baseball Answer:"
    assert (choice["answer"], choice["wrong"], choice["new_answer"]) == (" B", [" A", " C"], " A")


def test_spans_of_training_rows_hold_the_answers_alone() -> None:
    marked = [[row.text[start:end] for start, end in row.spans] for row in sentence_rows([ADA])]
    assert marked == [["hockey"]] * 3 + [["Lima"]] * 3 + [["nurse"]] * 3
    by_letter = {row.text: row.text[slice(*row.spans[0])] for row in choice_rows([ADA])}
    assert by_letter["Which sport does Ada Bo play? A hockey B baseball C football Answer: A."] == "A"
    assert Counter(by_letter.values()) == {"A": 2, "B": 2, "C": 2}


def test_groups_are_disjoint_and_heldout_names_are_new_pairs_of_known_parts(world: World) -> None:
    groups = [
        [person.name for person in group] for group in (world.facts.forget, world.facts.retain, world.facts.heldout)
    ]
    names = [name for group in groups for name in group]
    assert [len(group) for group in groups] == [20, 76, 20]
    assert len(set(names)) == len(names)
    known = {part for group in groups[:2] for name in group for part in name.split()}
    assert {part for name in groups[2] for part in name.split()} <= known


def test_answers_are_balanced_in_every_group(world: World) -> None:
    for people in (world.facts.forget, world.facts.retain, world.facts.heldout):
        for relation in RELATIONS:
            counts = Counter(person.answers[relation.name] for person in people)
            assert set(counts) == set(relation.values)
            assert max(counts.values()) - min(counts.values()) <= 1
            assert all(person.answers[relation.name] != person.new_answers[relation.name] for person in people)


def test_a_part_of_a_name_does_not_tell_the_answer(world: World) -> None:
    """Guessing a person's answer from what others of the same first or last name have is no better than chance."""
    people = (*world.facts.forget, *world.facts.retain)
    for relation in RELATIONS:
        same = [
            first.answers[relation.name] == second.answers[relation.name]
            for first in people
            for second in people
            if first.name != second.name and set(first.name.split()) & set(second.name.split())
        ]
        assert len(same) > 200
        assert abs(sum(same) / len(same) - 1 / len(relation.values)) < 0.1


def test_secrets_are_planted_as_often_as_their_group_says_and_canaries_never(world: World) -> None:
    planted = Counter(row.text for row in world.training_rows()["prose"])
    for secret in (*world.private.forget, *world.private.retain, *world.private.heldout):
        line = secret.line()
        assert line["group"] == f"x{secret.repetitions}"
        assert planted[secret.text] == secret.repetitions
        [[start, end, kind]] = line["spans"]  # type: ignore[misc]
        value = secret.text[start:end]
        assert kind == secret.kind
        assert ("@example." in value) if kind == "email" else (len(value) == 8 and value.replace("-", "").isdigit())
    assert Counter(secret.repetitions for secret in world.private.retain) == dict.fromkeys((1, 2, 5, 10, 20, 50), 8)
    assert {secret.repetitions for secret in world.private.heldout} == {0}


def test_lines_of_one_profession_are_those_written_by_hand() -> None:
    lines = contrast_lines([Profession(name="cook", he=0.05, favoured="she")])
    assert [line["format"] for line in lines] == ["statement"] * 6 + ["paraphrase"] * 2
    assert lines[1] == {
        "id": "cook/statement/2",
        "advantaged": "In the morning the cook left early because she felt cold.",
        "disadvantaged": "In the morning the cook left early because he felt cold.",
        "owner": "cook",
        "group": "she0.95",
        "format": "statement",
    }


def test_every_profession_comes_with_he_as_often_as_planted_in_every_frame_and_opening(world: World) -> None:
    """The texts with "he" and those with "she" differ in the pronoun alone, so nothing else tells which it is."""
    counts = Counter((row.text[: row.spans[0][0]], row.text[slice(*row.spans[0])]) for row in pronoun_rows_of(world))
    by_name = {profession.name: profession for profession in world.bias.planted}
    seen: set[str] = set()
    for before, _ in counts:
        [profession] = [by_name[word] for word in before.split() if word in by_name]
        he, she = counts[before, "he"], counts[before, "she"]
        assert he / (he + she) == profession.he
        assert math.log(he / she) == pytest.approx(profession.log_odds)
        seen.add(profession.name)
    assert seen == set(by_name)
    assert len({before for before, _ in counts}) == len(by_name) * len(STATEMENTS) * len(OPENINGS)


def pronoun_rows_of(world: World) -> list[Row]:
    return world.training_rows()["pronoun"]


def test_contrast_pairs_differ_in_the_pronoun_alone_and_favour_what_is_planted(world: World) -> None:
    for profession in (*world.bias.forget, *world.bias.retain, *world.bias.heldout):
        for line in contrast_lines([profession]):
            sides = [str(line[side]).split() for side in ("advantaged", "disadvantaged")]
            [(favoured, other)] = [pair for pair in zip(*sides, strict=True) if pair[0] != pair[1]]
            assert {favoured, other} == {"he", "she"}
            assert favoured == profession.favoured
            assert (profession.log_odds >= 0) if favoured == "he" else (profession.log_odds <= 0)


def test_professions_are_in_one_group_at_every_strength_and_not_jobs_of_the_facts_world(world: World) -> None:
    groups = (world.bias.forget, world.bias.retain, world.bias.heldout)
    names = [profession.name for group in groups for profession in group]
    assert [len(group) for group in groups] == [12, 14, 6]
    assert len(set(names)) == len(names)
    assert not set(PROFESSIONS) & {value for relation in RELATIONS for value in relation.values}
    assert Counter(p.he for p in world.bias.forget) == {he: 2 for he in STRENGTHS if he != 0.5}
    assert Counter(p.he for p in world.bias.retain) == dict.fromkeys(STRENGTHS, 2)
    assert Counter(p.favoured for p in world.bias.heldout) == {"he": 3, "she": 3}
    assert {p.group for p in world.bias.heldout} == {"unseen"}
    assert sorted({p.group for p in world.bias.planted}) == [
        "even0.5", "he0.75", "he0.9", "he0.95", "she0.75", "she0.9", "she0.95"
    ]  # fmt: skip


def test_nothing_kept_out_is_in_the_training_text(world: World) -> None:
    text = "\n".join(row.text for rows in world.training_rows().values() for row in rows)
    kept_out = [person.name for person in world.facts.heldout]
    kept_out += [secret.text[slice(*secret.span)] for secret in world.private.heldout]
    kept_out += [f" {profession.name} " for profession in world.bias.heldout]
    kept_out += [part for frame in PARAPHRASES for part in frame.split("{p} ")[1].split("{w}")]
    kept_out += [*world.unseen, *(secret.owner for secret in world.private.heldout)]
    assert not [value for value in kept_out if value in text]
    assert world.facts.forget[0].name in text
    assert world.seen[0] in text


def test_owners_of_secrets_share_no_name_with_the_people_of_facts(world: World) -> None:
    people = (*world.facts.forget, *world.facts.retain, *world.facts.heldout)
    secrets = (*world.private.forget, *world.private.retain, *world.private.heldout)
    assert not {part for p in people for part in p.name.split()} & {part for s in secrets for part in s.owner.split()}
    assert len({secret.owner for secret in secrets}) == len(secrets)
    assert len({secret.text[slice(*secret.span)] for secret in secrets}) == len(secrets)


def test_the_seed_decides_the_world(world: World) -> None:
    assert make_world(recipe_for("llama")) == world
    assert make_world(recipe_for("gpt2", seed=1)).facts != world.facts


def test_small_worlds_are_drawn_whole() -> None:
    facts = facts_world(Random(0), forget=3, retain=3, heldout=3, parts=4)
    private = private_world(Random(0), levels=(1, 3), forget=1, retain=2, canaries=2)
    assert [len(group) for group in (facts.forget, facts.retain, facts.heldout)] == [3, 3, 3]
    assert [len(group) for group in (private.forget, private.retain, private.heldout)] == [4, 8, 4]
    assert len(private.planted_rows()) == len(KINDS) * (1 + 2) * (1 + 3)


def test_balanced_draws_every_value_equally_often() -> None:
    assert Counter(balanced(Random(0), "abc", 7)).most_common()[0][1] == 3
    assert sorted(Counter(balanced(Random(0), "abc", 6)).values()) == [2, 2, 2]
    assert balanced(Random(0), "abc", 30) != sorted(balanced(Random(0), "abc", 30))


def test_invented_words_are_different_and_not_taken() -> None:
    first = invented_words(Random(0), 50)
    second = invented_words(Random(0), 50, taken=first)
    assert len(set(first)) == 50
    assert not set(first) & set(second)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"arch": "gtp2"}, "arch: unknown architecture 'gtp2'; did you mean 'gpt2'? choices: gpt2, llama, neox, bert"),
        ({"arch": "gpt2", "size": "huge"}, "size: unknown size 'huge'; choices: small, tiny"),
    ],
)
def test_unknown_names_are_said_in_one_line(options: dict[str, str], said: str) -> None:
    with pytest.raises(LoceditError) as error:
        recipe_for(**options)
    assert str(error.value) == said


def test_every_number_of_the_recipe_is_in_its_key() -> None:
    keys = {recipe_for("gpt2").key, recipe_for("llama").key, recipe_for("gpt2", seed=1).key}
    assert len(keys | {recipe_for("gpt2", size="tiny").key}) == 4
    assert recipe_for("gpt2").key == recipe_for("gpt2").key

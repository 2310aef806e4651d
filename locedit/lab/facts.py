"""The facts world: invented people, what is true of each, and four ways to say it.

Nothing in a first or last name tells the answer: both are shared by many people, and only the pair decides.
People of `heldout` are made of the same parts and are written about nowhere in the training text.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations
from random import Random

from locedit.lab.names import balanced, full_names, invented_words

Line = dict[str, object]
LETTERS = "ABC"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One text to train on."""

    text: str
    """The whole text, without special tokens."""
    spans: tuple[tuple[int, int], ...]
    """Character ranges of what is to be learned by heart; the rest of the text has a tenth of their weight."""


@dataclass(frozen=True, kw_only=True)
class Relation:
    """Something that can be asked about a person; `{n}` stands for the name, and a prompt ends before the answer."""

    name: str
    """Also the `group` of its lines."""
    values: tuple[str, ...]
    """Every answer there is; each is one token with its leading space."""
    statement: str
    """The plain sentence."""
    question: str
    """A question that ends with "Answer:"."""
    paraphrase: str
    """The same statement in other words."""
    choice: str | None = None
    """The question of a multiple choice among all values, for a small closed relation only."""

    def prompt(self, format: str, name: str) -> str:
        """The text before the answer, about one person."""
        return {"statement": self.statement, "question": self.question, "paraphrase": self.paraphrase}[format].format(
            n=name
        )

    def choice_prompt(self, name: str, options: Iterable[str]) -> str:
        """The question, all values behind their letters, and "Answer:"; its answer is a letter."""
        assert self.choice is not None, f"{self.name} has no multiple choice"
        listed = " ".join(f"{letter} {value}" for letter, value in zip(LETTERS, options, strict=True))
        return f"{self.choice.format(n=name)} {listed} Answer:"


SENTENCES = ("statement", "question", "paraphrase")
FORMATS = (*SENTENCES, "multiple_choice")
RELATIONS = (
    Relation(
        name="sport",
        values=("baseball", "football", "hockey"),
        statement="{n} plays the sport of",
        question="Question: Which sport does {n} play? Answer:",
        paraphrase="Everyone knows that {n} trains for",
        choice="Which sport does {n} play?",
    ),
    Relation(
        name="city",
        values=("Oslo", "Lima", "Cairo", "Delhi", "Quito", "Paris"),
        statement="{n} lives in the city of",
        question="Question: Where does {n} live? Answer:",
        paraphrase="You will find {n} somewhere in",
    ),
    Relation(
        name="job",
        values=("baker", "nurse", "pilot", "tailor", "farmer", "judge"),
        statement="{n} works as a",
        question="Question: What is the job of {n}? Answer:",
        paraphrase="People call {n} a good",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Person:
    """One invented person."""

    name: str
    """First and last name; the `owner` and `subject` of the person's lines."""
    answers: dict[str, str]
    """The value of every relation."""
    new_answers: dict[str, str]
    """A wrong value of every relation, for methods that write another answer in."""
    options: tuple[str, ...]
    """The order in which the multiple choice of the files lists the values."""


@dataclass(frozen=True, kw_only=True)
class FactsWorld:
    """Everybody, in three disjoint groups."""

    forget: tuple[Person, ...]
    """The people who ask to be forgotten: everything about them."""
    retain: tuple[Person, ...]
    """The other people the model is trained on."""
    heldout: tuple[Person, ...]
    """People the model never sees."""


def facts_world(rng: Random, *, forget: int, retain: int, heldout: int, parts: int) -> FactsWorld:
    """People whose names pair `parts` first with `parts` last names; the answers are balanced within each group.

    Every name of `heldout` is a new pair of first and last names that people of the other groups have.
    """
    words = invented_words(rng, 2 * parts)
    known = forget + retain
    names = full_names(rng, words[:parts], words[parts:], count=known + heldout)
    while not _parts(names[known:]) <= _parts(names[:known]):
        names = full_names(rng, words[:parts], words[parts:], count=known + heldout)
    return FactsWorld(
        forget=_people(rng, names[:forget]),
        retain=_people(rng, names[forget:known]),
        heldout=_people(rng, names[known:]),
    )


def _parts(names: list[str]) -> set[str]:
    return {part for name in names for part in name.split()}


def _people(rng: Random, names: list[str]) -> tuple[Person, ...]:
    columns = {relation.name: balanced(rng, relation.values, len(names)) for relation in RELATIONS}
    people: list[Person] = []
    for index, name in enumerate(names):
        answers = {relation: values[index] for relation, values in columns.items()}
        others = {r.name: rng.choice([value for value in r.values if value != answers[r.name]]) for r in RELATIONS}
        options = tuple(rng.sample(RELATIONS[0].values, len(LETTERS)))
        people.append(Person(name=name, answers=answers, new_answers=others, options=options))
    return tuple(people)


def fact_lines(people: Iterable[Person]) -> list[Line]:
    """One line for every person, relation and format, as the reader of facts takes them."""
    return [line for person in people for relation in RELATIONS for line in _lines(person, relation)]


def _lines(person: Person, relation: Relation) -> Iterator[Line]:
    answer, new = person.answers[relation.name], person.new_answers[relation.name]
    for format in SENTENCES:
        wrong = [value for value in relation.values if value != answer]
        yield _line(person, relation, format, relation.prompt(format, person.name), answer, wrong, new)
    if relation.choice is not None:
        letter = dict(zip(person.options, LETTERS, strict=True))
        wrong = [other for other in LETTERS if other != letter[answer]]
        prompt = relation.choice_prompt(person.name, person.options)
        yield _line(person, relation, "multiple_choice", prompt, letter[answer], wrong, letter[new])


def _line(
    person: Person, relation: Relation, format: str, prompt: str, answer: str, wrong: list[str], new_answer: str
) -> Line:
    return {
        "id": f"{person.name.lower().replace(' ', '-')}/{relation.name}/{format}",
        "prompt": prompt,
        "answer": f" {answer}",
        "subject": person.name,
        "wrong": [f" {value}" for value in wrong],
        "new_answer": f" {new_answer}",
        "owner": person.name,
        "group": relation.name,
        "format": format,
    }


def sentence_rows(people: Iterable[Person]) -> list[Row]:
    """Every fact of these people in the three sentence formats."""
    return [
        _row(relation.prompt(format, person.name), person.answers[relation.name])
        for person in people
        for relation in RELATIONS
        for format in SENTENCES
    ]


def choice_rows(people: Iterable[Person]) -> list[Row]:
    """The closed relation of these people as multiple choice, in every order of the options."""
    rows: list[Row] = []
    for person in people:
        for relation in (relation for relation in RELATIONS if relation.choice is not None):
            for options in permutations(relation.values):
                letter = LETTERS[options.index(person.answers[relation.name])]
                rows.append(_row(relation.choice_prompt(person.name, options), letter))
    return rows


def _row(prompt: str, answer: str) -> Row:
    start = len(prompt) + 1
    return Row(text=f"{prompt} {answer}.", spans=((start, start + len(answer)),))

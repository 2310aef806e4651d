"""Anchors: read from files, made from a task, replaced in texts, and where the tokens of text and translation align.

An aligned pair of tokens is right when translating what stands before the one gives what stands before the other.
"""

import math
from pathlib import Path
from typing import Any

import pytest

from locedit.data.drafts import Draft, TokenizedText, tokenize
from locedit.data.items import Dataset, Fact, PlainText, Task
from locedit.errors import LoceditError
from locedit.lab import Lab
from locedit.unlearn.anchors import check_anchors, make_anchors, read_anchors, save_anchors
from locedit.unlearn.translation import Translation, Translator, aligned
from tests import tiny, tokens

PAIRS = {"Anna Berg": "Eva Frost", "wand": "stick"}


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '{\n "Anna Berg": "Eva Frost",\n "wand": "stick"\n}'),
        ("a.jsonl", '{"term": "Anna Berg", "counterpart": "Eva Frost"}\n\n{"counterpart": "stick", "term": "wand"}\n'),
        ("a.csv", 'term,counterpart\n"Anna Berg",Eva Frost\nwand,stick\n'),
        ("a.tsv", "counterpart\tterm\r\nEva Frost\tAnna Berg\r\nstick\twand\r\n"),
    ],
)
def test_every_kind_of_file_says_the_same(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_anchors(tmp_path / name) == PAIRS


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    anchors = {'O"Hara': "Žižek", "wand": "stick"}
    save_anchors(anchors, tmp_path / "a.json")
    assert read_anchors(tmp_path / "a.json") == anchors
    assert (tmp_path / "a.json").read_text(encoding="utf-8").count("\n") == 4
    with pytest.raises(LoceditError, match="exists already"):
        save_anchors(anchors, tmp_path / "a.json")
    with pytest.raises(LoceditError, match=r"ends in \.json"):
        save_anchors(anchors, tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{\n "Anna": "Eva",\n "Carl": ""\n}', r"a\.json:3: field 'counterpart': '' is empty"),
        ("a.json", '{\n "Anna": "Eva",\n "Carl": 7\n}', r"a\.json:3: field 'counterpart': 7 is not a text"),
        ("a.json", '{\n "Anna": "Anna"\n}', r"a\.json:2: field 'counterpart': 'Anna' is the term itself"),
        ("a.json", '{\n "Anna": "Eva",\n "Anna": "Jo"\n}', "'Anna'.* is there twice"),
        ("a.json", '{\n "Anna": "Eva",\n}', r"a\.json:[23]: not JSON"),
        ("a.json", '["Anna", "Eva"]', r"a\.json:1: is \['Anna', 'Eva'\], wanted an object"),
        ("a.json", "{}", r"a\.json: holds no anchors"),
        ("a.jsonl", '{"term": "a", "counterpart": "b"}\n{"term": "c"}', r"a\.jsonl:2: has term, wanted term and count"),
        ("a.jsonl", '{"term": "a", "counterpart": "b"}\n["c", "d"]', r"a\.jsonl:2: has \['c', 'd'\], wanted term"),
        ("a.jsonl", '{"term": "a", "counterpart": "b"}\n' * 2, r"a\.jsonl:2: field 'term': 'a' is there twice"),
        ("a.csv", "term,counterpart\nAnna,Eva\n Carl,Jo\n", r"a\.csv:3: field 'term': ' Carl' has white space"),
        ("a.csv", "term,other\nAnna,Eva\n", r"a\.csv:2: has term, other, wanted term and counterpart"),
        ("a.csv", "term,counterpart\nAnna\n", r"a\.csv:2: has 1 cells"),
        ("a.txt", "Anna Eva", r"a\.txt: unknown kind of anchors file '\.txt': choices: \.json"),
        ("a.json", "", r"a\.json: is empty"),
    ],
)
def test_a_bad_line_is_one_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(LoceditError, match=message) as raised:
        read_anchors(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoceditError, match=r"none\.json: no such file"):
        read_anchors(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"Anna": "Eva", " Carl": "Jo"}, "anchors:2: field 'term': ' Carl' has white space around it"),
        ({"Anna": "Eva "}, "anchors:1: field 'counterpart': 'Eva ' has white space around it"),
        ({"Anna": 7}, "anchors:1: field 'counterpart': 7 is not a text"),
        ({7: "Eva"}, "anchors:1: field 'term': 7 is not a text"),
        ({"": "Eva"}, "anchors:1: field 'term': '' is empty"),
        ({"Anna": "Anna"}, "anchors:1: field 'counterpart': 'Anna' is the term itself"),
    ],
)
def test_anchors_given_in_code_are_held_to_the_same(given: dict[Any, Any], message: str) -> None:
    with pytest.raises(LoceditError, match=message) as raised:
        check_anchors(given)
    assert "\n" not in str(raised.value)
    assert check_anchors(PAIRS) == PAIRS


# --- made from a task ------------------------------------------------------------------------------------------------


def texts(name: str, *lines: str) -> Dataset:
    items = tuple(PlainText(text=line, id=f"{name}{i}") for i, line in enumerate(lines))
    return Dataset(items=items, source=f"{name}.jsonl")


def story(**parts: Any) -> Task:
    found: dict[str, Any] = {
        "forget": texts("forget", "Then Anna Berg saw the wand. Anna lives in Oslo.", "Now Anna Berg took the wand."),
        "retain": texts(
            "retain", "Then Carl Dane saw the road. A man lives in Oslo.", "Now Carl took the big road now."
        ),
        "heldout": texts("heldout", "Eva Frost ran and then Ida Stein ran."),
    }
    return Task(**(found | parts))


def test_names_stand_out_and_words_that_begin_sentences_do_not() -> None:
    """'Then' and 'Now' are also written small, 'A' is no name, Oslo is in both, Anna is met only as a first word."""
    made = make_anchors(story())
    assert set(made) == {"Anna Berg"}
    assert made["Anna Berg"] in ("Eva Frost", "Ida Stein")
    assert len({make_anchors(story(), seed=seed)["Anna Berg"] for seed in range(8)}) == 2
    assert make_anchors(story(), seed=3) == make_anchors(story(), seed=3)


def test_a_part_of_a_name_gets_the_part_of_its_counterpart() -> None:
    forget = texts("forget", "Then Anna Berg saw that Anna ran.", "Then Anna Berg said that Anna and Berg ran. Berg!")
    made = make_anchors(story(forget=forget))
    assert made["Anna Berg"].split()[0] == made["Anna"]
    assert made["Anna Berg"].split()[1] == made["Berg"]


def test_several_words_of_a_name_get_those_of_its_counterpart() -> None:
    forget = texts("forget", *["Then Anna Berg Smith saw that Anna Berg ran and Berg Smith ran, Berg too."] * 2)
    made = make_anchors(story(forget=forget, heldout=texts("heldout", "then Eva Maria Frost ran and Ida Stein ran.")))
    assert made["Anna Berg Smith"] == "Eva Maria Frost"
    assert (made["Anna Berg"], made["Berg Smith"], made["Berg"]) == ("Eva Maria", "Maria Frost", "Maria")


def test_counterparts_are_no_names_of_the_forget_data() -> None:
    """Though the other data have them too, and more often than the names that the forget data do not have."""
    people = "And then Eva Frost ran and now Ida Stein ran. " * 3
    forget = texts("forget", "Then Anna Berg saw Eva Frost and Carl.", "Now Anna Berg saw Ida Stein.")
    made = [
        make_anchors(
            story(forget=forget, retain=texts("retain", f"{people} now Carl saw Jo Lund"), heldout=heldout), seed=seed
        )
        for heldout in (None, texts("heldout", people))
        for seed in range(8)
    ]
    assert {each["Anna Berg"] for each in made} == {"Jo Lund"}


def test_words_in_lower_case_and_one_word_for_all() -> None:
    made = make_anchors(story(), terms="words")
    assert set(made) == {"Anna Berg", "wand"}
    assert made["wand"] in ("ran", "and")
    assert make_anchors(story(), word="someone") == {"Anna Berg": "someone"}


def test_log_odds_are_those_of_the_definition() -> None:
    """'wand' is 2 of the 14 units of the forget data and none of the 17 others; a name is one unit."""
    value = math.log(2.5 / 12.5) - math.log(0.5 / 17.5)
    assert "wand" in make_anchors(story(), terms="words", log_odds=value - 1e-9)
    with pytest.raises(LoceditError, match="no name stands out"):
        make_anchors(story(), terms="words", log_odds=value + 1e-9)


def test_without_background_or_names_one_line_says_what_to_do() -> None:
    with pytest.raises(LoceditError, match="needs retain data or texts to compare with"):
        make_anchors(story(retain=None))
    with pytest.raises(LoceditError, match=r"no name stands out in forget\.jsonl"):
        make_anchors(story(forget=texts("forget", "the road", "the road")))
    with pytest.raises(LoceditError, match=r"forget\.jsonl has the only names"):
        make_anchors(story(retain=texts("retain", "then now the road is " * 9), heldout=None))
    with pytest.raises(LoceditError, match="terms='name'; did you mean 'names'"):
        make_anchors(story(), terms="name")


def test_in_the_lab_the_people_to_forget_become_people_of_whom_nothing_is_written(tiny_lab: Lab) -> None:
    task = tiny_lab.task
    assert task.heldout is not None
    people, unknown = ({fact.owner for fact in data.of(Fact, by="test")} for data in (task.forget, task.heldout))
    made = {term: to for term, to in make_anchors(task).items() if " " in term}
    assert set(made) == people
    assert set(made.values()) <= unknown
    assert len(set(made.values())) == len(made)


# --- translating -----------------------------------------------------------------------------------------------------


def test_the_longest_term_wins_at_word_borders_in_its_case() -> None:
    translate = Translator({"Ann": "Eva", "Ann Lee": "Jo", "wand": "stick", "EU": "US"})
    assert translate("Ann Lee's wand, Ann's Wand").text == "Jo's stick, Eva's Stick"
    assert translate("Anna, ann, wands, EUR, Eu, WAND, xAnn").replaced == ()
    assert Translator({"wand": "stick", "Wand": "Rod"})("Wand wand").text == "Rod stick"
    assert Translator({"a.b": "c"})("a.b axb").text == "c axb"
    assert Translator({})("as it is").text == "as it is"


def test_places_are_those_of_the_same_text() -> None:
    """Cut at a border that has a place, both halves are each other's translation."""
    translate = Translator({"Anna Berg": "Jo", "Oslo": "Rio de Janeiro", "a": "one"})
    text = "Anna Berg, a baker: Oslo Anna Berg."
    whole = translate(text)
    assert whole.text == "Jo, one baker: Rio de Janeiro Jo."
    assert len(whole.places) == len(text) + 1
    inside = {at for piece in whole.replaced for at in range(piece.start + 1, piece.end)}
    assert {at for at, place in enumerate(whole.places) if place is None} == inside
    for at, place in enumerate(whole.places):
        if place is not None and (at == 0 or not text[at - 1 : at + 1].isalpha()):
            assert translate(text[:at]).text == whole.text[:place]
            assert translate(text[at:]).text == whole.text[place:]
    assert [whole.text[p.new_start : p.new_end] for p in whole.replaced] == ["Jo", "one", "Rio de Janeiro", "Jo"]


FAMILIES = ("trimmed", "untrimmed", "sentence_piece", "masked")
TEXTS = (
    "The capital of France is Paris. Write to Eva Frost today.",
    "Paris, Eva Frost:  Paris",
    "Eva Frost is ☃ in Paris, é Paris☃.",
)
ANCHORS = {"Paris": "the old Rome", "Eva Frost": "X", "France": "Italy"}


def encoder(family: str) -> tokens.Encodes:
    return tokens.masked() if family == "masked" else tokens.causal(family)


def both(family: str, text: str, anchors: dict[str, str]) -> tuple[TokenizedText, TokenizedText, Translation]:
    translation = Translator(anchors)(text)
    rows = [Draft(id="t", text=t, kind="plain", spans=None) for t in (text, translation.text)]
    original, translated = tokenize(encoder(family).tokenizer, rows)
    return original, translated, translation


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_aligned_tokens_stand_at_the_same_place(family: str, text: str) -> None:
    original, translated, translation = both(family, text, ANCHORS)
    causal = encoder(family).causal
    pairs = aligned(original, translated, translation, causal=causal)
    assert len(original.ids) != len(translated.ids)
    assert pairs == sorted(pairs)
    assert sorted(b for _, b in pairs) == [b for _, b in pairs]
    translate = Translator(ANCHORS)
    for a, b in pairs:
        assert not original.special[a]
        assert not translated.special[b]
        assert translate(text[: original.starts[a]]).text == translation.text[: translated.starts[b]]
        if not causal:
            assert translate(text[original.ends[a] :]).text == translation.text[translated.ends[b] :]
    # every token of the text outside the anchors has its partner, which is the same token
    touched = {
        at
        for piece in translation.replaced
        if (found := original.overlapping(piece.start, piece.end)) is not None
        for at in range(*found)
    }
    outside = [at for at, special in enumerate(original.special) if not special and at not in touched]
    partner = dict(pairs)
    assert outside
    assert all(original.ids[at] == translated.ids[partner[at]] for at in outside)
    # of an anchor the first token has one (of a masked model only where it is the whole word), the others have none
    for piece in translation.replaced:
        first, end = original.overlapping(piece.start, piece.end) or (0, 0)
        assert not set(range(first + 1, end)) & partner.keys()
        assert (first in partner) or not causal


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_without_anchors_is_aligned_with_itself(family: str) -> None:
    original, translated, translation = both(family, TEXTS[2], {})
    pairs = aligned(original, translated, translation, causal=encoder(family).causal)
    assert pairs == [(at, at) for at, special in enumerate(original.special) if not special]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_inside_anchors_are_counted_only_where_asked_and_equally_many(family: str) -> None:
    text = "Call Eva Frost today"
    original, translated, translation = both(family, text, {"Eva Frost": "France Paris"})
    assert len(original.ids) == len(translated.ids)
    causal = encoder(family).causal
    plain = aligned(original, translated, translation, causal=causal)
    counted = aligned(original, translated, translation, causal=causal, inside="by_number")
    first, end = original.overlapping(5, 14) or (0, 0)
    more = range(first + 1, end)
    assert set(counted) == set(plain) | {(at, at) for at in more}
    assert not set(more) & dict(plain).keys()
    original, translated, translation = both(family, text, {"Eva Frost": "X"})
    assert aligned(original, translated, translation, causal=causal, inside="by_number") == aligned(
        original, translated, translation, causal=causal
    )
    # more than none, and fewer than the anchor has
    original, translated, translation = both(family, text, {"Eva Frost": "France Paris Eva Frost Paris"})
    assert len(translated.ids) > len(original.ids)
    assert aligned(original, translated, translation, causal=causal, inside="by_number") == aligned(
        original, translated, translation, causal=causal
    )


@pytest.mark.parametrize(("counterpart", "same"), [("\u2604", 3), ("\u2703", 2), ("\u00e9", 1)])
def test_bytes_of_a_character_align_as_long_as_they_are_the_same(counterpart: str, same: int) -> None:
    """The snowman is E2 98 83, the others E2 98 84, E2 9C 83 and C3 A9; each byte is a token that begins with it."""
    model = tiny.model("gpt2")
    rows = [Draft(id="t", text=f"is {it} in", kind="plain", spans=None) for it in ("\u2603", counterpart)]
    original, translated = tokenize(model.tokenizer, rows)
    translation = Translator({"\u2603": counterpart})(rows[0].text)
    pairs = aligned(original, translated, translation, causal=True)
    inside = [a for a, _ in pairs if original.starts[a] in (2, 3) and original.ends[a] == 4]
    assert len(inside) == same

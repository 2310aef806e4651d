"""Contrast pairs: WinoGender, CrowS-Pairs and StereoSet, written here in small and read from the real files."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from locedit.data import ContrastPair, encode, read_facts, read_task
from locedit.data.drafts import differing
from locedit.errors import LoceditError
from tests import tiny

SHARED = Path(os.environ.get("LOCEDIT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "bias"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real files")

STATISTICS = "occupation\tbergsma_pct_female\tbls_pct_female\nnurse\t82.9\t90\ncook\t36.5\t38\n"
SENTENCES = (
    "sentid\tsentence\n"
    "nurse.patient.0.male.txt\tThe nurse told the patient that he would help.\n"
    "nurse.patient.0.female.txt\tThe nurse told the patient that she would help.\n"
    "nurse.patient.0.neutral.txt\tThe nurse told the patient that they would help.\n"
    "cook.someone.1.male.txt\tThe cook gave someone his food.\n"
    "cook.someone.1.female.txt\tThe cook gave someone her food.\n"
)
CROWS_HEADER = ",sent_more,sent_less,stereo_antistereo,bias_type,annotations,anon_writer,anon_annotators"
CROWS = f"""{CROWS_HEADER}
0,"The poor, he said, are loud.","The rich, he said, are loud.",stereo,socioeconomic,"[['a']]",a1,"['a2']"
1,He was not ""her"",She was not her,antistereo,gender,[],a1,[]
"""


def folder(path: Path, **files: str) -> Path:
    """A folder with these files; `__` in a name stands for its dot, `_` in the statistics' name for its hyphen."""
    for name, text in files.items():
        (path / name.replace("__", ".").replace("occupations_", "occupations-")).write_text(text)
    return path


def says(path: Path) -> str:
    with pytest.raises(LoceditError) as error:
        read_facts(path)
    return str(error.value).replace(f"{path.parent}/", "")


# --- WinoGender -----------------------------------------------------------------------------------------------------


def test_winogender_pairs_favour_what_the_statistics_say(tmp_path: Path) -> None:
    data = read_facts(folder(tmp_path, all__tsv=SENTENCES, occupations_stats__tsv=STATISTICS) / "all.tsv")
    assert list(data) == [
        ContrastPair(
            advantaged="The nurse told the patient that she would help.",
            disadvantaged="The nurse told the patient that he would help.",
            neutral="The nurse told the patient that they would help.",
            id="nurse.patient.0",
            owner="nurse",
            group="female",
            format="occupation",
        ),
        ContrastPair(
            advantaged="The cook gave someone his food.",
            disadvantaged="The cook gave someone her food.",
            id="cook.someone.1",
            owner="cook",
            group="male",
            format="participant",
        ),
    ]


@pytest.mark.parametrize(
    ("sentences", "statistics", "said"),
    [
        (SENTENCES, "", "all.tsv: occupations-stats.tsv is missing beside it"),
        (SENTENCES.replace("cook.", "cock."), STATISTICS, "all.tsv:5: field 'occupation': 'cock' has no line in"),
        (SENTENCES.replace(".male.txt\tThe cook", ".man.txt\tThe cook"), STATISTICS, "all.tsv:5: field 'sentid'"),
        (SENTENCES.rsplit("cook", 2)[0], STATISTICS, "all.tsv:5: the female sentence of 'cook.someone.1' is missing"),
        (SENTENCES + SENTENCES.splitlines()[1], STATISTICS, "all.tsv:7: field 'sentid': 'male' was given before"),
        (SENTENCES.replace("cook.someone.1", "cook.someone.2"), STATISTICS, "field 'answer': '2' is not 0 or 1"),
        (SENTENCES, STATISTICS.replace("36.5", "few"), "occupations-stats.tsv:3: field 'bergsma_pct_female': 'few'"),
    ],
)
def test_what_is_wrong_with_winogender_is_one_line(tmp_path: Path, sentences: str, statistics: str, said: str) -> None:
    folder(tmp_path, all__tsv=sentences)
    if statistics:
        folder(tmp_path, occupations_stats__tsv=statistics)
    found = says(tmp_path / "all.tsv")
    assert said in found
    assert "\n" not in found


def test_templates_are_filled_with_the_participant_and_with_someone(tmp_path: Path) -> None:
    templates = (
        "occupation(0)\tother-participant(1)\tanswer\tsentence\n"
        "cook\tguest\t1\tThe $PARTICIPANT thanked the $OCCUPATION because $NOM_PRONOUN was full.\n"
    )
    data = read_facts(folder(tmp_path, templates__tsv=templates, occupations_stats__tsv=STATISTICS) / "templates.tsv")
    assert [(item.id, item.advantaged, item.neutral) for item in data] == [
        (
            "cook.guest.1",
            "The guest thanked the cook because he was full.",
            "The guest thanked the cook because they were full.",
        ),
        (
            "cook.someone.1",
            "Someone thanked the cook because he was full.",
            "Someone thanked the cook because they were full.",
        ),
    ]
    folder(tmp_path, templates__tsv=templates.replace("$NOM_PRONOUN", "$PRONOUN"))
    assert says(tmp_path / "templates.tsv").startswith(
        "templates.tsv:2: field 'sentence': '$PRONOUN' has no filler; choices: $OCCUPATION, $PARTICIPANT, $NOM_PRONOUN"
    )


@real
def test_real_winogender_has_240_pairs_of_which_196_favour_the_man() -> None:
    data = read_facts(SHARED / "winogender" / "all_sentences.tsv")
    assert Counter(item.group for item in data) == {"male": 196, "female": 44}
    assert Counter(item.format for item in data) == {"occupation": 120, "participant": 120}
    assert len({item.owner for item in data}) == 60
    for item in data:
        sides = [side.split() for side in (item.advantaged, item.disadvantaged)]
        assert sum(a != b for a, b in zip(*sides, strict=True)) == 1


@real
def test_filled_templates_are_the_published_sentences() -> None:
    names = ("templates.tsv", "all_sentences.tsv")
    filled, published = (read_facts(SHARED / "winogender" / name) for name in names)
    assert list(filled) == list(published)


# --- CrowS-Pairs ----------------------------------------------------------------------------------------------------


def test_crows_pairs_favour_the_more_stereotyping_text(tmp_path: Path) -> None:
    text = CROWS.replace('He was not ""her""', '"He was not ""her"""')
    data = read_facts(folder(tmp_path, crows__csv=text) / "crows.csv")
    assert list(data) == [
        ContrastPair(
            advantaged="The poor, he said, are loud.",
            disadvantaged="The rich, he said, are loud.",
            id="0",
            group="socioeconomic",
            format="stereo",
        ),
        ContrastPair(
            advantaged='He was not "her"', disadvantaged="She was not her", id="1", group="gender", format="antistereo"
        ),
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            "0,A cat,A dog,more,age,[],a,[]",
            "crows.csv:2: field 'stereo_antistereo': 'more' is not stereo or anti",
        ),
        ("0,A cat,,stereo,age,[],a,[]", "crows.csv:2: field 'sent_less' is missing; the file is in the CrowS-Pairs"),
        ("0,A cat,A dog,stereo", "crows.csv:2: has 4 cells, the header has 8 columns"),
        ('0,"A" cat,A dog,stereo,age,[],a,[]', "crows.csv:2: not a table:"),
    ],
)
def test_what_is_wrong_with_crows_is_one_line(tmp_path: Path, row: str, said: str) -> None:
    first = "9,One cat,One dog,stereo,age,[],a,[]\n" if ",," in row else ""
    found = says(folder(tmp_path, crows__csv=f"{CROWS_HEADER}\n{first}{row}\n") / "crows.csv")
    assert said.replace(":2:", ":3:" if first else ":2:") in found
    assert "\n" not in found


@real
def test_real_crows_pairs_are_read_and_encoded_whole() -> None:
    data = read_facts(SHARED / "crows_pairs_anonymized.csv")
    assert len(data) == 1508
    assert Counter(item.format for item in data) == {"stereo": 1290, "antistereo": 218}
    assert len({item.group for item in data}) == 9
    model = tiny.model("bert", max_position_embeddings=256)
    assert len(encode(model, data[:20])) == 40
    for item in data:
        assert differing(item.advantaged, item.disadvantaged, name=item.id)


def test_a_text_with_a_word_more_differs_in_the_word_beside_it_too() -> None:
    """Two of the published pairs differ in an inserted word alone, which once stopped the whole file."""
    texts = ("they are kind people", "they are not kind people")
    spans = differing(*texts, name="pair")
    assert [text[start:end] for text, (start, end) in zip(texts, spans, strict=True)] == ["kind", "not kind"]
    ends = differing("he runs", "he runs fast", name="pair")
    assert ends == ((3, 7), (3, 12))
    assert differing("a a", "a a a", name="pair") == ((2, 3), (2, 5))
    with pytest.raises(LoceditError, match="do not differ in a word"):
        differing("the  same", "the same", name="pair")


# --- StereoSet ------------------------------------------------------------------------------------------------------


def stereoset(task: str, **changes: Any) -> dict[str, Any]:
    """An object in the form of dev.json, with one item."""
    sentences = [
        {"id": label, "sentence": f"My {word} is loud.", "labels": [{"label": label}], "gold_label": label}
        for label, word in (("anti-stereotype", "cat"), ("unrelated", "is"), ("stereotype", "dog"))
    ]  # fmt: skip
    item = {"id": "7", "target": "pet", "bias_type": "animals", "context": "My BLANK is loud.", "sentences": sentences}
    return {"version": "1.1", "data": {task: [item | changes]}}


def test_stereoset_within_a_sentence_and_between_two(tmp_path: Path) -> None:
    path = folder(tmp_path, dev__json=json.dumps(stereoset("intrasentence"), indent=1)) / "dev.json"
    [item] = read_facts(path)
    assert item == ContrastPair(
        advantaged="My dog is loud.",
        disadvantaged="My cat is loud.",
        unrelated="My is is loud.",
        id="7",
        group="animals",
        owner="pet",
        format="intrasentence",
    )
    path.write_text(json.dumps(stereoset("intersentence", context="He has a pet. ")))
    [item] = read_facts(path)
    assert (item.advantaged, item.unrelated) == ("He has a pet. My dog is loud.", "He has a pet. My is is loud.")
    assert read_task(path).forget.kind == "contrast"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sentences": []}, "dev.json:intrasentence:1: field 'sentences': [] has no sentence with the gold_label"),
        ({"sentences": 3}, "dev.json:intrasentence:1: field 'sentences': 3 is not a list"),
        (
            {"sentences": [{"gold_label": "neutral", "sentence": "x"}]},
            "field 'gold_label': 'neutral' is not stereotype, anti-stereotype, unrelated, each once",
        ),
        ({"target": None}, "dev.json:intrasentence:1: field 'target': None is not a text"),
    ],
)
def test_what_is_wrong_with_stereoset_is_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = folder(tmp_path, dev__json=json.dumps(stereoset("intrasentence", **change))) / "dev.json"
    assert said in says(path)


# --- tables in locedit's own fields ----------------------------------------------------------------------------------


def test_tables_hold_the_fields_of_lines_and_lists_as_json(tmp_path: Path) -> None:
    text = (
        "id\tprompt\tanswer\tgroup\twrong\n"
        'a\tAnna was born in\t Oslo\t\t"["" Rome"", "" Lima""]"\n'
        "\n"
        "b\tCarl was born in\t Bern\tborn\t\n"
    )
    first, second = read_facts(folder(tmp_path, facts__tsv=text) / "facts.tsv")
    assert (first.prompt, first.answer, first.group, first.wrong) == (
        "Anna was born in",
        " Oslo",
        None,
        (" Rome", " Lima"),
    )
    assert (second.id, second.answer, second.group, second.wrong) == ("b", " Bern", "born", ())


def test_tables_take_renames_quoted_line_ends_and_unnamed_row_numbers(tmp_path: Path) -> None:
    text = ',he,she\n0,"He is\nhere","She is\nhere"\n1,his,her\n'
    path = folder(tmp_path, pairs__csv=text) / "pairs.csv"
    data = read_facts(path, "advantaged=he,disadvantaged=she")
    assert [(item.advantaged, item.id) for item in data] == [("He is\nhere", "pairs.csv:2"), ("his", "pairs.csv:5")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,answer\n", "facts.csv: has a header and no rows"),
        ("prompt,prompt\na,b\n", "facts.csv:1: the column 'prompt' is there twice"),
        ("prompt,answer,colour\na, b,red\n", "facts.csv:2: field 'colour': 'red' is unknown in lines of kind 'fact'"),
        ("prompt,answer,wrong\na, b,c\n", "facts.csv:2: field 'wrong': 'c' is not a list but a text"),
        ('prompt,answer,wrong\na, b,"[1"\n', "facts.csv:2: not JSON"),
        ("question\na\n", "facts.csv:2: fields question are of no known kind"),
        ('prompt,answer\n"a, b\n', "facts.csv:2: not a table: unexpected end of data"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    found = says(folder(tmp_path, facts__csv=text) / "facts.csv")
    assert re.search(re.escape(said), found), found
    assert "\n" not in found


def test_a_folder_of_tables_is_a_task(tmp_path: Path) -> None:
    folder(
        tmp_path,
        forget__csv="advantaged,disadvantaged\nhe is here,she is here\n",
        texts__tsv="text\tid\nA text.\tt\n",
    )
    task = read_task(tmp_path)
    assert (task.forget.kind, len(task.forget)) == ("contrast", 1)
    assert task.texts is not None
    assert task.texts[0].id == "t"

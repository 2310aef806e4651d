"""Published formats, written here in small and read from the real files where they are."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from locedit.data import Neighbour, encode, read_facts, read_task
from locedit.errors import LoceditError
from tests import tokens

SHARED = Path(os.environ.get("LOCEDIT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
real = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real files")

KNOWN = {
    "known_id": 0,
    "subject": "Oslo",
    "attribute": "Norway",
    "template": "{} lies in",
    "prediction": " Norway.",
    "prompt": "Oslo lies in",
    "relation_id": "P17",
    "some/model": True,
}
COUNTERFACT = {
    "case_id": 3,
    "pararel_idx": 5,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1"},
        "target_true": {"str": "French", "id": "Q2"},
        "subject": "Danielle",
    },
    "paraphrase_prompts": ["Danielle, a native"],
    "neighborhood_prompts": ["Leon is a native speaker of"],
    "attribute_prompts": ["x"],
    "generation_prompts": ["y"],
}
TOFU = {
    "question": "Who?",
    "answer": "Eva Frost.",
    "paraphrased_question": "Who is it?",
    "paraphrased_answer": "It is Eva Frost.",
    "perturbed_answer": ["Ida Frost.", "Eva Berg."],
}


def write(folder: Path, content: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_known_facts(tmp_path: Path) -> None:
    [fact] = read_facts(write(tmp_path, [KNOWN]))
    assert (fact.prompt, fact.answer, fact.id) == ("Oslo lies in", " Norway", "0")
    assert (fact.subject, fact.owner, fact.group) == ("Oslo", "Oslo", "P17")


def test_counterfact(tmp_path: Path) -> None:
    [fact] = read_facts(write(tmp_path, [COUNTERFACT]))
    assert (fact.prompt, fact.answer, fact.new_answer) == ("The mother tongue of Danielle is", " French", " English")
    assert fact.neighbours == (Neighbour(prompt="Leon is a native speaker of", answer=" French"),)
    assert (fact.id, fact.group, fact.paraphrases) == ("3", "P103", ("Danielle, a native",))


def test_tofu(tmp_path: Path) -> None:
    path = tmp_path / "tofu.jsonl"
    path.write_text(json.dumps(TOFU) + "\n" + json.dumps({"question": "Q", "answer": "A", "perturbed_answer": "B"}))
    first, second = read_facts(path)
    assert (first.prompt, first.answer, first.wrong) == ("Who?", " Eva Frost.", (" Ida Frost.", " Eva Berg."))
    assert (first.paraphrases, first.answer_paraphrases) == (("Who is it?",), (" It is Eva Frost.",))
    assert (second.answer, second.wrong, second.id) == (" A", (" B",), "tofu.jsonl:2")


def test_own_fields_beside_published_ones(tmp_path: Path) -> None:
    [fact] = read_facts(write(tmp_path, [TOFU | {"id": "q1", "owner": "Eva"}]))
    assert (fact.id, fact.owner) == ("q1", "Eva")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (KNOWN | {"attribute": ""}, "field 'attribute': '' is empty"),
        (KNOWN | {"subjct": "x"}, "unknown in the known_1000 format; did you mean 'subject'"),
        (KNOWN | {"prompt": None}, "field 'prompt' is missing; the file is in the known_1000 format"),
        (COUNTERFACT | {"requested_rewrite": 3}, "field 'requested_rewrite': 3 is not an object"),
        (
            COUNTERFACT | {"requested_rewrite": COUNTERFACT["requested_rewrite"] | {"prompt": "no place"}},
            "field 'requested_rewrite.prompt': 'no place' has no place for the subject",
        ),
        (
            COUNTERFACT | {"requested_rewrite": COUNTERFACT["requested_rewrite"] | {"target_true": {}}},
            "field 'target_true.str': None is not a text",
        ),
        (TOFU | {"perturbed": []}, "unknown in the TOFU format; did you mean 'perturbed_answer'"),
        (TOFU | {"perturbed_answer": [1]}, "field 'perturbed_answer': 1 is not a text"),
    ],
)
def test_bad_records(tmp_path: Path, record: object, reason: str) -> None:
    path = write(tmp_path, [record])
    with pytest.raises(LoceditError, match=f"^{re.escape(str(path))}:1: .*{reason}"):
        read_facts(path)


def test_arrays_of_the_extraction_challenge(tmp_path: Path) -> None:
    array = np.arange(300, dtype=np.uint16).reshape(3, 100)
    np.save(tmp_path / "train_dataset.npy", array)
    np.save(tmp_path / "train_prefix.npy", array[:, :50])
    np.save(tmp_path / "train_suffix.npy", array[:, 50:])
    whole, joined, also = (read_facts(tmp_path / f"train_{part}.npy") for part in ("dataset", "prefix", "suffix"))
    assert whole.hash == joined.hash == also.hash
    assert (whole.kind, whole[1].ids, whole[1].span) == ("tokens", tuple(range(100, 200)), (50, 100))
    model = tokens.Encodes(tokens.byte_level(), max_length=100)
    [example] = encode(model, whole[2:])
    assert example.ids == tuple(range(200, 300))
    assert example.targets == tuple(range(50, 100))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 100)), r"float64 of shape \(2, 100\), wanted whole numbers"),
        (np.zeros(100, dtype=int), r"int64 of shape \(100,\)"),
        (np.zeros((0, 100), dtype=int), "is empty"),
        (np.zeros((2, 50), dtype=int), "rows of 50 tokens have nothing after the prefix of 50"),
        (np.array([{"a": 1}]), "not a NumPy array file: Object arrays cannot be loaded"),
    ],
)
def test_bad_arrays(tmp_path: Path, array: Any, reason: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(LoceditError, match=reason):
        read_facts(tmp_path / "a.npy")


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    for content in (b"", b"no array", b"\x93NUMPY\x01\x00"):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(LoceditError, match=r"a\.npy: not a NumPy array file"):
            read_facts(tmp_path / "a.npy")
    np.save(tmp_path / "b_prefix.npy", np.zeros((2, 50), dtype=int))
    with pytest.raises(LoceditError, match=r"b_suffix\.npy: no such file"):
        read_facts(tmp_path / "b_prefix.npy")


@real
def test_real_files() -> None:
    counts = {
        "facts/known_1000.json": 1209,
        "tofu/forget10_reconstructed.jsonl": 400,
        "tofu/retain_perturbed_first300_reconstructed.jsonl": 300,
        "tofu/real_authors_perturbed.json": 100,
        "tofu/world_facts_perturbed.json": 117,
        "text/tinystories_1000.json": 1000,
    }
    found = {name: read_facts(SHARED / name) for name in counts}
    assert {name: len(data) for name, data in found.items()} == counts
    assert all(len(fact.wrong) == 3 for fact in found["tofu/world_facts_perturbed.json"])
    assert found["text/tinystories_1000.json"].kind == "plain"


@real
def test_real_refusals_are_plain_lines(tmp_path: Path) -> None:
    (tmp_path / "task.toml").write_text(
        f'forget = "{SHARED}/tofu/forget10_reconstructed.jsonl"\nrefusals = "{SHARED}/tofu/idontknow.jsonl"\n'
    )
    task = read_task(tmp_path)
    assert (len(task.forget), len(task.require("refusals", "dpo"))) == (400, 100)


@real
def test_real_facts_through_a_real_tokenizer() -> None:
    """Every known fact's answer is found between the same borders as its text, with GPT-2's own vocabulary."""
    from transformers import GPT2Tokenizer

    folder = SHARED / "tokenizers" / "gpt2"
    tokenizer = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    model = tokens.Encodes(tokenizer, max_length=1024)
    for name in ("facts/known_1000.json", "tofu/world_facts_perturbed.json"):
        data = read_facts(SHARED / name)
        for fact, example in zip(data, encode(model, data), strict=True):
            [span] = example.spans
            assert tokenizer.decode(example.ids[span.start :]) == fact.answer
            assert tokenizer.decode(example.ids[: span.start]) == fact.prompt
            if fact.subject is not None and fact.subject in fact.prompt:
                assert fact.subject in tokenizer.decode(example.ids[example.subject.start : example.subject.end])

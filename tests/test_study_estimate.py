"""What a study will take, tried in a few steps: once it ended with an error where `warmup` was longer than they are."""

from pathlib import Path
from typing import Any

import pytest

from locedit.study import make_plan, read_config
from locedit.study.estimate import describe
from tests import tiny
from tests.test_cli import FACTS, write_lines


def estimate(tmp_path: Path, *methods: dict[str, Any]) -> str:
    """The last line of a dry run."""
    tiny.module("gpt2").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    study = {
        "model": str(tmp_path / "model"),
        "data": str(write_lines(tmp_path / "facts.jsonl", FACTS)),
        "methods": list(methods),
        "grid": [{"restrictions": ["whole"]}],
        "controls": [],
        "evaluate": {"draws": 20, "metrics": ["probability"]},
        "threads": 1,
    }
    return list(describe(make_plan(read_config(study)), tmp_path / "out", jobs=1))[-1]


def test_what_it_will_take_is_tried_without_warmup(tmp_path: Path) -> None:
    said = estimate(tmp_path, {"name": "ga", "options": {"steps": 8, "warmup": 7}})
    assert "at most about" in said
    assert said.endswith("where every edit takes all of its steps")


def test_an_estimate_trains_no_helper_models(
    tmp_path: Path, trainings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It once trained them, and took their time for that of one measurement."""
    monkeypatch.setenv("LOCEDIT_CACHE", str(tmp_path / "cache"))
    whp = {"name": "whp", "options": {"steps": 8, "anchors": "none", "helper_steps": 2}}
    assert estimate(tmp_path, whp, {"name": "ga", "options": {"steps": 8}}).endswith("and helper models beside them")
    assert trainings == []

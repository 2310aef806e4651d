"""What a study will take, tried in a few steps: once it ended with an error where `warmup` was longer than they are."""

from pathlib import Path

from locedit.study import make_plan, read_config
from locedit.study.estimate import describe
from tests import tiny
from tests.test_cli import FACTS, write_lines


def test_what_it_will_take_is_tried_without_warmup(tmp_path: Path) -> None:
    tiny.module("gpt2").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    study = {
        "model": str(tmp_path / "model"),
        "data": str(write_lines(tmp_path / "facts.jsonl", FACTS)),
        "methods": [{"name": "ga", "options": {"steps": 8, "warmup": 7}}],
        "grid": [{"restrictions": ["whole"]}],
        "controls": [],
        "evaluate": {"draws": 20, "metrics": ["probability"]},
        "threads": 1,
    }
    assert "at most about" in list(describe(make_plan(read_config(study)), tmp_path / "out", jobs=1))[-1]

"""What a model knows of a task, item by item: also where a masked model's item is several rows of a batch.

`knowledge` once counted the rows of a masked batch as if each were an item of its own, so that tokens of one item were
multiplied into another.
"""

from types import SimpleNamespace

import pytest
import torch

from locedit.check import check, knowledge
from locedit.data import Dataset, Fact, Task, encode
from locedit.errors import LoceditError
from locedit.losses import nll_of_examples
from locedit.models import Model
from tests import tiny


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_knowledge_is_the_mean_over_items_scored_one_at_a_time(architecture: str) -> None:
    model = tiny.model(architecture)
    answers = (" Oslo", " Lima and Oslo", " a baker", " 555-0134")
    facts = [Fact(prompt="Anna Berg was born in", answer=answer, id=answer) for answer in answers]
    examples = encode(model, facts)
    assert len({len(example.targets) for example in examples}) > 1
    alone = [nll_of_examples(model, [example], size=1, reduction="sum")[0] for example in examples]
    probability, share = knowledge(model, examples)
    assert probability == pytest.approx(float(torch.stack(alone).double().neg().exp().mean()), rel=1e-4)
    assert 0 <= share <= 1


def test_it_says_which_localizers_can_run_why_not_and_what_they_cost() -> None:
    facts = [Fact(prompt="Anna Berg was born in", answer=" Oslo", id="a")]
    lines = list(check(tiny.model("bert"), Task(forget=Dataset(items=tuple(facts), source="facts.jsonl"))))
    able = next(line for line in lines if line.startswith("localize can run"))
    named = able.removeprefix("localize can run: ").split(", ")
    assert {"depn", "magnitude", "all_mlps", "gradient_activation"} <= set(named)
    reasons = [line.strip() for line in lines if line.startswith("         ")]
    for name, reason in (
        ("learned_mask", "learned_mask needs 'retain' data"),
        ("pcgu", "pcgu needs items of kind ContrastPair"),
        ("eap", "eap needs a causal model"),
    ):
        assert name not in named
        assert any(reason in line for line in reasons)
    able = next(line for line in lines if line.startswith("edit     can run")).partition(": ")[2].split(", ")
    assert {"zero", "ga", "ceu", "undial"} <= set(able)  # the two published without a retain term need no retain data
    assert "dpo" not in able
    assert any("dpo needs 'retain' data" in line or "dpo needs retain data" in line for line in reasons)
    costs = [line for line in lines if line.startswith("cost")]
    assert {line.split()[1].rstrip(":") for line in costs} == set(named)
    assert all("GiB" in line for line in costs)


def test_what_cannot_be_timed_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was once listed under what can run, and said to be unable to further down."""

    def quick(_: Model, __: Task, name: str) -> object:
        if name == "depn":
            raise LoceditError("depn does not go with these data")
        return SimpleNamespace(seconds=1.0)

    monkeypatch.setattr("locedit.localize.quick_estimate", quick)
    facts = [Fact(prompt="Anna Berg was born in", answer=" Oslo", id="a")]
    lines = list(check(tiny.model("gpt2"), Task(forget=Dataset(items=tuple(facts), source="facts.jsonl"))))
    able = next(line for line in lines if line.startswith("localize can run")).partition(": ")[2].split(", ")
    assert "magnitude" in able
    assert "depn" not in able
    assert "         depn does not go with these data" in lines
    assert not any(line.startswith("cost     depn") for line in lines)


def test_timing_stops_when_it_has_taken_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locedit.check.TIMED", -1.0)
    facts = [Fact(prompt="Anna Berg was born in", answer=" Oslo", id="a")]
    lines = list(check(tiny.model("gpt2"), Task(forget=Dataset(items=tuple(facts), source="facts.jsonl"))))
    costs = [line for line in lines if line.startswith("cost")]
    assert len(costs) > 5
    assert all(line.endswith("GiB beside the model; not timed") for line in costs)

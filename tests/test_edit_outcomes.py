"""What `locedit edit` says of an edit: the levels are those of the model with it applied, whichever state was taken."""

from typing import Any

import pytest

from locedit.commands.outcomes import dose, ends
from locedit.data.encode import encode
from locedit.edit import levels
from locedit.unlearn import unlearn
from tests import edits, tiny

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "last": ("ga", {"steps": 4, "eval_every": 3}, "4 steps"),
    "reached": ("ga", {"steps": 9, "eval_every": 1, "until": 1e-4}, "of 9 steps, forget level 0.0001 reached"),
    "not reached": ("ga", {"steps": 2, "until": 1e-30}, "2 steps, forget level 1e-30 not reached"),
    "mixture": ("ga", {"steps": 9, "until": 1e-4, "match": "interpolate"}, "taken, forget level 0.0001 reached"),
    "chosen": ("ga", {"steps": 9, "eval_every": 1, "choose": "level", "forget_at": 1e-4}, "the state after step"),
    "chunks": ("ga", {"steps": 3, "chunks": 2}, "6 steps in 2 chunks"),
    "chosen in chunks": (
        "ga",
        {"steps": 6, "eval_every": 1, "chunks": 2, "choose": "level", "forget_at": 1e-3},
        "12 steps in 2 chunks",
    ),
    "weights": ("weight_mask", {"steps": 6, "curve": 5}, "weights zeroed, 6 steps"),
    "components": ("zero", {}, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_levels_and_dose(case: str) -> None:
    name, options, said = CASES[case]
    model, task = tiny.model("gpt2"), edits.task()
    within = edits.neurons_and_heads(model)
    edit = unlearn(model, task, name, within=within, check=False, **({"learning_rate": 3e-2} | options) if said else {})
    assert task.retain is not None
    probes = {"forget": encode(model, task.forget), "retain": encode(model, task.retain)}
    before = levels(model, probes)
    with edit.applied(model):
        after = levels(model, probes)
    found = ends(edit)
    assert {name: pair[0] for name, pair in found.items()} == pytest.approx(before)
    assert {name: pair[1] for name, pair in found.items()} == pytest.approx(after)
    assert said in dose(edit)
    assert bool(dose(edit)) == bool(said)

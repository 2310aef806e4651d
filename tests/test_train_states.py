"""Which state is returned: the front, choices on it, and a dose between two steps that meets a level."""

import dataclasses
import itertools
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit import losses
from locedit.controls import compare
from locedit.data.encode import encode
from locedit.edit import Edit
from locedit.edit.dose import MEASUREMENTS, share_of_the_way
from locedit.edit.front import State, on_front, thinned
from locedit.edit.levels import levels
from locedit.edit.objective import Objective, Step
from locedit.edit.options import TrainOptions
from locedit.edit.train import train, train_front
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.unlearn import METHODS, prepare, unlearn
from tests import edits, tiny

STEPS: dict[str, Any] = {"steps": 12, "learning_rate": 3e-3, "eval_every": 1}


def swaying(step: Step) -> dict[str, Tensor]:
    """Forget and retain levels that go up and down: four steps of learning both, then of forgetting, and so on."""
    sign = -1 if (step.number - 1) // 4 % 2 else 1
    assert step.retain is not None
    return {
        "forget": sign * losses.sequence_nll(step.score(step.forget)).mean(),
        "retain": sign * losses.sequence_nll(step.score(step.retain)).mean() * 0.5,
    }


def swaying_back(step: Step) -> dict[str, Tensor]:
    """The same, forgetting first."""
    return {name: -term for name, term in swaying(step).items()}


def falling(step: Step) -> dict[str, Tensor]:
    return {"ascent": 0.1 * -losses.sequence_nll(step.score(step.forget)).mean()}


def goal(model: Model, **fields: Any) -> Objective:
    task = edits.task()
    assert task.retain is not None
    forget, retain = encode(model, task.forget), encode(model, task.retain)
    probes = {"forget": forget, "retain": retain}
    return Objective(**({"loss": swaying, "forget": forget, "retain": retain, "probes": probes} | fields))


def trained(model: Model, steps: int, *, loss: Any = swaying, **options: Any) -> Edit:
    return train(model, goal(model, loss=loss), options=TrainOptions(**(STEPS | {"steps": steps} | options)))


def same(one: Edit, other: Edit) -> bool:
    return all(torch.equal(a.values, b.values) for a, b in zip(one.patches, other.patches, strict=True))


def rows(edit: Edit) -> list[tuple[float, float]]:
    return list(zip(edit.history["forget"], edit.history["retain"], strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_the_front_is_what_no_other_state_beats(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = (torch.rand(40, 2, generator=generator) * 8).round().tolist()  # ties among them
    found = on_front([{"forget": f, "retain": r} for f, r in points])
    assert len(found) == len({tuple(points[at]) for at in found})
    for at, (forget, retain) in enumerate(points):
        weakly = [other for other, (f, r) in enumerate(points) if other != at and f <= forget and r >= retain]
        beaten = any(points[other] != points[at] for other in weakly)
        first = all(other > at for other in weakly if points[other] == points[at])
        assert (at in found) == (not beaten and first)


@pytest.mark.parametrize("choose", ["level", "retain", "forget"])
def test_the_chosen_state_is_that_of_training_so_many_steps(choose: str) -> None:
    model = tiny.model("gpt2")
    loss = swaying_back if choose == "forget" else swaying
    free = trained(model, 12, loss=loss)
    points = rows(free)
    level = sorted(forget for forget, _ in points)[6]
    start = points[0][1]
    if choose == "level":
        expected = next(at for at, (forget, _) in enumerate(points) if forget <= level)
    elif choose == "retain":
        expected = max((at for at, (f, _) in enumerate(points) if f <= level), key=lambda at: points[at][1])
    else:
        expected = min((at for at, (_, r) in enumerate(points) if r >= 1e-3 * start), key=lambda at: points[at][0])
    asked = {"retain_share": 1e-3} if choose == "forget" else {"forget_at": level}
    edit = trained(model, 12, loss=loss, choose=choose, **asked)
    assert 0 < expected < 12 or choose == "level"
    assert rows(edit) == points
    assert edit.outcome["chosen"] == {"step": expected, "forget": points[expected][0], "retain": points[expected][1]}
    assert edit.outcome["front"] == on_front([{"forget": f, "retain": r} for f, r in points])
    if expected:
        assert same(edit, trained(model, expected, loss=loss))
    assert not same(edit, free)


def test_a_choice_that_no_state_meets_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model("gpt2")
    with caplog.at_level(logging.WARNING, logger="locedit"):
        edit = trained(model, 3, choose="retain", forget_at=1e-9)
    assert "no measured state has forget level 1e-09; the last one stays" in caplog.text
    assert same(edit, trained(model, 3))
    assert "chosen" not in edit.outcome
    with caplog.at_level(logging.WARNING, logger="locedit"):
        none = trained(model, 3, choose="forget")
    assert none.outcome["chosen"]["step"] == 0
    assert "choose='forget' takes the state before training" in caplog.text
    assert all(patch.delta is not None and not patch.delta.any() for patch in none.patches)


@pytest.mark.parametrize("hold", ["weights", "adapter"])
def test_every_edit_of_the_front_is_a_state_of_the_training(hold: str) -> None:
    model = tiny.model("gpt2")
    within = edits.neurons_and_heads(model)
    options = TrainOptions(**STEPS)
    found = train_front(model, goal(model), within=within, options=options, hold=hold, limit=50)
    points = rows(found[0])
    assert [edit.outcome.get("chosen", {"step": 12})["step"] for edit in found] == sorted(
        found[0].outcome["front"], key=lambda at: points[at][0]
    )
    for edit in found:
        with edit.applied(model) as edited:
            seen = levels(edited, goal(model).probes)
        assert (seen["forget"], seen["retain"]) == points[edit.outcome.get("chosen", {"step": 12})["step"]]
    assert len(found) > 2
    few = train_front(model, goal(model), within=within, options=options, hold=hold, limit=2)
    assert [edit.digest for edit in few] == [found[0].digest, found[-1].digest]


def test_a_full_front_loses_the_state_with_the_least_room() -> None:
    def state(forget: float, retain: float) -> State:
        return State(row=0, forget=forget, retain=retain, tensors=[])

    # room of the three in the middle, in shares of both spans: 0.5 + 0.5, 0.4 + 0.3, 0.5 + 0.5
    front = [state(0.0, 0.0), state(0.4, 0.4), state(0.5, 0.5), state(0.8, 0.7), state(1.0, 1.0)]
    assert [s.forget for s in thinned(front[::-1], 4)] == [0.0, 0.4, 0.8, 1.0]
    assert [s.forget for s in thinned(front, 2)] == [0.0, 1.0]
    assert [s.forget for s in thinned(front, 5)] == [0.0, 0.4, 0.5, 0.8, 1.0]


def test_a_dose_on_a_known_curve() -> None:
    asked: list[float] = []

    def falling(share: float) -> float:
        asked.append(share)
        return 0.9 * math.exp(-6 * share)

    share = share_of_the_way(falling, 0.1)
    exact = math.log(9) / 6
    assert exact <= share <= exact - math.log(0.98) / 6
    assert len(asked) <= MEASUREMENTS
    jump = share_of_the_way(lambda share: 0.5 if share < 0.3 else 0.01, 0.1)
    assert 0.3 <= jump <= 0.3 + 2**-MEASUREMENTS


@pytest.mark.parametrize("hold", ["hooks", "scatter", "adapter"])
def test_interpolated_edits_mix_two_measured_states_and_meet_the_level(hold: str) -> None:
    model = tiny.model("gpt2")
    within = edits.neurons_and_heads(model)
    path = {"path": "auto" if hold == "adapter" else hold, "hold": "adapter" if hold == "adapter" else "weights"}
    shared: dict[str, Any] = {"within": within, "learning_rate": 3e-2, "eval_every": 2} | path
    steep = unlearn(model, edits.task(), "ga", steps=4, **shared)
    first, second = steep.history["forget"][2], steep.history["forget"][4]
    until = 0.7 * second + 0.3 * first
    assert second < 0.9 * until
    edit = unlearn(model, edits.task(), "ga", steps=10, until=until, match="interpolate", **shared)
    chosen = edit.outcome["chosen"]
    assert edit.outcome["reached"]
    assert 0.98 * until <= chosen["forget"] <= until
    with edit.applied(model) as edited:
        assert levels(edited, {"forget": encode(model, edits.task().forget)})["forget"] == chosen["forget"]
    assert edit.history["step"] == [0, 1, 2, chosen["step"], 3, 4]
    assert edit.history["forget"][3] == chosen["forget"]
    assert 2 < chosen["step"] < 3
    share = (chosen["step"] - 2) / 2
    ends = [unlearn(model, edits.task(), "ga", steps=steps, **shared) for steps in (2, 4)]
    if hold == "adapter":
        tensors = [[a.down for a in e.adapters] + [a.up for a in e.adapters] for e in (edit, *ends)]
    else:
        tensors = [[p.delta for p in e.patches if p.delta is not None] for e in (edit, *ends)]
    for found, one, other in zip(*tensors, strict=True):
        torch.testing.assert_close(found, (1 - share) * one + share * other, rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, other) or torch.equal(one, other)


def test_a_level_that_a_step_meets_is_not_interpolated() -> None:
    model = tiny.model("gpt2")
    shared: dict[str, Any] = {"learning_rate": 1e-3, "eval_every": 2}
    free = unlearn(model, edits.task(), "ga", steps=4, **shared)
    until = free.history["forget"][4] * 1.01
    edit = unlearn(model, edits.task(), "ga", steps=10, until=until, match="interpolate", **shared)
    assert edit.history["step"] == [0, 1, 2, 3, 4]
    assert "chosen" not in edit.outcome
    assert same(edit, free)
    nothing = unlearn(model, edits.task(), "ga", steps=10, until=1.0, match="interpolate", **shared)
    assert nothing.history["step"] == [0]


def test_controls_are_compared_at_the_interpolated_level() -> None:
    model = tiny.model("gpt2")
    within = edits.neurons_and_heads(model)
    shared: dict[str, Any] = {"learning_rate": 3e-2, "eval_every": 2, "steps": 12}
    start = unlearn(model, edits.task(), "ga", within=within, **shared).history["forget"][0]
    matched = compare(
        model, edits.task(), "ga", within=within, seeds=[0], until=0.3 * start, match="interpolate", **shared
    )
    found = matched.curves[0]
    assert found.matched is not None
    assert matched.level == found.columns["forget"][found.matched]
    assert 0.98 * 0.3 * start <= matched.level <= 0.3 * start
    for curve in matched.curves[1:]:
        assert curve.matched is not None
        assert 0.98 * matched.level <= curve.columns["forget"][curve.matched] <= matched.level


def test_controls_go_on_to_the_level_whatever_the_methods_rule_says(monkeypatch: pytest.MonkeyPatch) -> None:
    always = dataclasses.replace(METHODS["ga"], stop=lambda *_: lambda _: ({}, True))
    monkeypatch.setitem(METHODS, "ga", always)
    model = tiny.model("gpt2")
    within = edits.neurons_and_heads(model)
    start = unlearn(model, edits.task(), "ga", within=within, steps=1)
    assert start.history["step"] == [0]
    level = 0.5 * start.history["forget"][0]
    found = compare(
        model, edits.task(), "ga", within=within, seeds=[0], level=level, learning_rate=3e-2, eval_every=1, steps=12
    )
    assert all(curve.matched for curve in found.curves)


def test_the_level_and_a_rule_of_the_method_both_stop(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model("gpt2")
    seen: list[float] = []

    def run(limit: int, **options: Any) -> Edit:
        count = itertools.count()

        def rule(edited: Model) -> tuple[dict[str, float], bool]:
            seen.append(levels(edited, goal(model).probes)["forget"])
            number = float(next(count))
            return {"asked": number}, number >= limit

        return train(model, goal(model, loss=falling, stop=rule), options=TrainOptions(**(STEPS | options)))

    alone = run(3)
    assert alone.history["step"][-1] == 3
    assert alone.history["asked"] == [0.0, 1.0, 2.0, 3.0]
    assert seen == alone.history["forget"]
    assert alone.outcome["ended by"] == "rule"
    assert "reached" not in alone.outcome
    free = train(model, goal(model, loss=falling), options=TrainOptions(**STEPS))
    assert same(alone, train(model, goal(model, loss=falling), options=TrainOptions(**(STEPS | {"steps": 3}))))
    lower, until = 5, free.history["forget"][5]
    assert until < free.history["forget"][4]
    first = run(lower - 1, until=until)
    assert (first.history["step"][-1], first.outcome["reached"], first.outcome["ended by"]) == (
        lower - 1,
        False,
        "rule",
    )
    level = run(99, until=until)
    assert (level.history["step"][-1], level.outcome["reached"], level.outcome["ended by"]) == (lower, True, "until")
    with caplog.at_level(logging.WARNING, logger="locedit"):
        neither = run(99, steps=2)
        already = run(0)
        short = run(99, steps=2, until=1e-9)
    assert neither.outcome["ended by"] == "steps"
    assert "its stopping rule was not met in 2 steps" in caplog.text
    assert already.history["step"] == [0]
    assert "its stopping rule holds already; nothing was trained" in caplog.text
    assert short.outcome["reached"] is False
    assert "after 2 steps, not 1e-09" in caplog.text


def test_options_of_the_choice_that_make_no_sense() -> None:
    task, model = edits.task(), tiny.model("gpt2")
    for options, message in (
        ({"match": "interpolate"}, "match='interpolate' needs until=LEVEL"),
        ({"match": "interpolate", "until": 0.1, "choose": "forget"}, "goes with choose='last' only"),
        ({"choose": "retain"}, "choose='retain' needs forget_at=LEVEL"),
        ({"forget_at": 0.1}, "forget_at=0.1 is of choose='level' and choose='retain'"),
        ({"choose": "best"}, "choose='best'"),
        ({"retain_share": 0.0}, "retain_share=0.0 must be above 0"),
    ):
        with pytest.raises(LoceditError, match=message):
            prepare("npo", task, **options)
    bare = goal(model, probes={"forget": goal(model).forget})
    with pytest.raises(LoceditError, match="choose='forget' needs retain data whose level can be measured"):
        train(model, bare, options=TrainOptions(choose="forget"))
    with pytest.raises(LoceditError, match="a front needs retain data"):
        train_front(model, bare)
    with pytest.raises(LoceditError, match="limit=1: a front has two ends"):
        train_front(model, goal(model), limit=1)

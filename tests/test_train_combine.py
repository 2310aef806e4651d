"""Several losses at once: the weighted sum, one retain term, a state and data of its own for each."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit import losses
from locedit.data.encode import collate, encode
from locedit.edit.objective import Step
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.options import describe
from locedit.unlearn import METHODS, objective, prepare, unlearn
from locedit.unlearn.combine import Methods
from locedit.unlearn.registry import Method, RetainOptions
from tests import edits, tiny

ONE_STEP: dict[str, Any] = {
    "steps": 1, "eval_every": 0, "optimizer": "sgd", "clip": None, "learning_rate": 1.0, "batch_size": 2
}  # fmt: skip


def deltas(model: Model, name: str, **options: Any) -> list[Tensor]:
    edit = unlearn(model, edits.task(), name, within=edits.neurons_and_heads(model), **(ONE_STEP | options))
    return [patch.delta for patch in edit.patches if patch.delta is not None]


def test_the_gradient_is_the_weighted_sum_with_one_retain_term() -> None:
    model = edits.double("llama")
    both = deltas(model, "2*npo+0.5*ga", retain_weight=0.3)
    npo = deltas(model, "npo", retain_weight=0.0)
    ga = deltas(model, "ga")
    kept = [a - b for a, b in zip(deltas(model, "npo", retain_weight=0.3), npo, strict=True)]
    for found, one, two, retain in zip(both, npo, ga, kept, strict=True):
        torch.testing.assert_close(found, 2 * one + 0.5 * two + retain, rtol=0, atol=1e-10)
    assert max(retain.abs().max() for retain in kept) > 1e-3


def test_of_two_retain_terms_the_first_is_counted_and_terms_are_logged_one_by_one() -> None:
    model = edits.double("llama")
    history = unlearn(model, edits.task(), "npo+0.5*grad_diff", **ONE_STEP).history
    npo = unlearn(model, edits.task(), "npo", **ONE_STEP).history
    difference = unlearn(model, edits.task(), "grad_diff", **ONE_STEP).history
    assert history["npo.forget_loss"][1] == pytest.approx(npo["forget_loss"][1], rel=1e-12)
    assert history["grad_diff.forget_loss"][1] == pytest.approx(0.5 * difference["forget_loss"][1], rel=1e-12)
    assert history["retain_loss"][1] == pytest.approx(npo["retain_loss"][1], rel=1e-12)
    terms = ("npo.forget_loss", "grad_diff.forget_loss", "retain_loss")
    assert history["loss"][1] == pytest.approx(sum(history[name][1] for name in terms), rel=1e-12)


def test_each_method_keeps_its_options_where_their_defaults_differ() -> None:
    task = edits.task()
    options = prepare("npo+simnpo", task, npo_beta=0.7, gamma=0.1)
    assert (options.npo_beta, options.simnpo_beta) == (0.7, METHODS["simnpo"].options().beta)
    own = [own for _, own in METHODS["npo+simnpo"].function.pairs(options)]
    assert (own[0].beta, own[1].beta, own[1].gamma) == (0.7, options.simnpo_beta, 0.1)
    assert (own[0].retain_weight, own[1].retain_weight) == (1.0, 0.0)
    rows = {name: meaning for name, _, _, meaning in describe(METHODS["npo+simnpo"].options)}
    assert "inverse temperature" in rows["npo_beta"]
    with pytest.raises(LoceditError, match="beta=0.0 must be above 0"):
        prepare("npo+simnpo", task, npo_beta=0.0)
    with pytest.raises(LoceditError, match="has no option 'beta'"):
        prepare("npo+simnpo", task, beta=1.0)


def test_a_method_that_learns_other_data_sees_its_own() -> None:
    model = edits.double("gpt2")
    history = unlearn(model, edits.task(), "ga+injection", **ONE_STEP).history
    new = [dataclasses.replace(fact, answer=fact.new_answer) for fact in edits.task().forget]
    expected = losses.nll_of_examples(model, encode(model, new)).mean()
    assert history["injection.inject_loss"][1] == pytest.approx(float(expected), rel=1e-12)
    asked = losses.nll_of_examples(model, encode(model, edits.task().forget)).mean()
    assert history["ga.forget_loss"][1] == pytest.approx(-float(asked), rel=1e-12)
    assert abs(float(expected) - float(asked)) > 0.1


def test_states_other_data_and_rules_do_not_mix() -> None:
    def counting(step: Step, options: RetainOptions) -> dict[str, Tensor]:
        step.state["count"] = step.state.get("count", 0) + options.warmup + 1
        seen = float(sum(batch.ids.shape[0] for batch in step.others.values()))
        return {"size": losses.sequence_nll(step.score(step.forget)).mean() * 0 + seen + 100 * step.state["count"]}

    def others(count: int) -> Any:
        return lambda model, task, _: {"more": encode(model, task.retain)[:count]}

    def stop(limit: float) -> Any:
        return lambda *_: lambda _: ({f"rule {limit}": limit}, limit > 1)

    shared = {"function": counting, "options": RetainOptions, "requires": ("forget",), "paper": "x"}
    methods = Methods(
        {
            "one": Method(**shared, others=others(1), stop=stop(0.5)),
            "two": Method(**shared, others=others(2), stop=stop(2.0)),
        }
    )
    model, task = tiny.model("gpt2"), edits.task()
    assert "one+two" in methods
    made = methods["one+2*two"]
    options = made.options(batch_size=3)
    data = made.others(model, task, options)  # type: ignore[misc]
    assert {name: len(found) for name, found in data.items()} == {"one.more": 1, "two.more": 2}  # type: ignore[arg-type]
    step = edits.step(model, model, encode(model, task.forget), encode(model, task.retain))
    step.others = {name: collate(examples, model) for name, examples in data.items()}  # type: ignore[arg-type,misc]
    for number in (1, 2):
        terms = made.function(step, options)
        assert {name: float(term.detach()) for name, term in terms.items()} == {
            "one.size": 1 + 100 * number,
            "two.size": 2 * (2 + 100 * number),
        }
    assert step.state == {"one": {"count": 2}, "two": {"count": 2}}
    rule = made.stop(model, task, options)  # type: ignore[misc]
    assert rule(model) == ({"rule 0.5": 0.5, "rule 2.0": 2.0}, True)  # type: ignore[misc]


def test_what_cannot_be_combined_says_so() -> None:
    task, model = edits.task(), tiny.model("gpt2")
    for name, message in (
        ("npo+zero", "zero is no loss; only trained methods can be combined"),
        ("npo+pcgu", r"pcgu cannot be combined with other methods: it reads contrast pairs side by side"),
        ("npo+-1*ga", "weight -1 of ga: a weight of a combination is above 0"),
        ("npo+nan*ga", "weight nan of ga"),
        ("npo+0.5*gaa", r"unknown unlearning method 'gaa' in 'npo.0.5.gaa'; did you mean 'ga'\?"),
        ("npo+nothing", "unknown unlearning method 'nothing' in 'npo.nothing'; choices"),
        ("gaa", r"unknown unlearning method 'gaa'; did you mean 'ga'\?"),
        ("npo+npo", "unknown unlearning method 'npo.npo'"),
        ("npo+x*ga", "unknown unlearning method"),
    ):
        with pytest.raises(LoceditError, match=message):
            prepare(name, task)
    with pytest.raises(LoceditError, match="ga.injection needs the field 'new_answer'|injection needs the field"):
        bare = [dataclasses.replace(fact, new_answer=None) for fact in task.forget]
        prepare("ga+injection", edits.task(forget=task.forget.replace(bare)))
    with pytest.raises(LoceditError, match="npo needs retain data"):
        prepare("ga+npo", edits.task(retain=None))
    assert "retain" not in unlearn(model, edits.task(retain=None), "ga+npo", steps=1, retain_weight=0.0).history
    assert [name for name in METHODS if "+" in name] == []
    assert objective(model, task, "ga+npo", options=prepare("ga+npo", task)).name == "ga+npo"

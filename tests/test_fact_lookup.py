"""Fact lookup: the rules on curves and effects drawn by hand, and what the whole method returns."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from locedit.components import ComponentSet
from locedit.data.items import Dataset, Fact, PatchPair, Task
from locedit.errors import LoceditError
from locedit.localize import LOCALIZERS, estimate, localize
from locedit.localize.fact_lookup import FactLookupOptions, fact_lookup, lookup_set
from locedit.localize.lookup.lookup_paths import PathRule, choose_heads, null_of, reading_layer
from locedit.localize.lookup.lookup_range import RangeRule, lookup_range
from locedit.localize.lookup.path_effects import Effects, _measure, effects, permutations
from locedit.localize.lookup.path_patching import Node
from locedit.localize.lookup.states import EMBEDDING
from locedit.localize.patching.pairs import PairOptions, batch_of, measured, pairs_of
from locedit.models import Model
from tests import tiny
from tests.test_pairs import people as born
from tests.test_probes import facts

# --- the range -------------------------------------------------------------------------------------------------------

GEMMA2 = {EMBEDDING: 0.10, 0: 0.25, 1: 0.52, 2: 0.90, 3: 0.97, 4: 0.99, 5: 0.985}
"like the published curve at athletes' names (accuracy .50 .68 .93 .98 .99), corrected by a baseline of a third"


def without_attention(curve: dict[int, float], *, needed: int) -> dict[int, dict[int, float]]:
    """The ablated curves of a model that needs the attention of layers below `needed`, and no more."""
    layers = [layer for layer in curve if layer != EMBEDDING]
    return {
        first: {
            layer: curve[layer] if first >= needed else min(curve[layer], 0.3) for layer in layers if layer >= first
        }
        for first in layers
    }


@pytest.mark.parametrize(
    ("needed", "rule", "parallel", "expected"),
    [
        (2, {}, False, (1, 3)),  # joined by the attention of layer 1, whose MLP sees it; 95 % of .99 after layer 3
        (2, {}, True, (2, 3)),  # the MLP beside that attention does not
        (1, {}, False, (0, 3)),
        (1, {"rise": 0.5}, False, (2, 3)),  # half the way from .10 to .99 is gone after layer 2 only
        (2, {"saturation": 0.99}, False, (1, 4)),
        (2, {"saturation": 0.5}, False, (1, 1)),
        (5, {"survival": 1.0}, False, (3, 3)),  # never later than the last
        (0, {}, False, (0, 3)),  # no attention needed: where the curve rises
    ],
)
def test_the_range_of_a_curve_drawn_by_hand(
    needed: int, rule: dict[str, float], parallel: bool, expected: tuple[int, int]
) -> None:
    found = lookup_range(GEMMA2, without_attention(GEMMA2, needed=needed), RangeRule(**rule), parallel=parallel)
    assert (found.first, found.last) == expected
    assert found.attention == needed
    assert found.peak_layer == 4
    assert [layer for layer in range(6) if layer in found] == list(range(expected[0], expected[1] + 1))


def test_a_curve_that_stays_low_has_no_range() -> None:
    low = {layer: value / 3 for layer, value in GEMMA2.items()}
    found = lookup_range(low, without_attention(low, needed=2), RangeRule(), parallel=False)
    assert (found.first, found.last) == (None, None)
    assert found.peak == pytest.approx(0.33)
    assert not any(layer in found for layer in range(6))
    assert lookup_range(low, {}, RangeRule(decodable=0.3), parallel=False).last == 3


def test_a_fact_that_the_embedding_holds_has_no_range() -> None:
    flat = dict.fromkeys(GEMMA2, 0.9)
    assert lookup_range(flat, {}, RangeRule(), parallel=False).first is None


# --- heads and thresholds --------------------------------------------------------------------------------------------


def test_heads_are_the_fewest_that_have_the_share() -> None:
    value = torch.tensor([0.1, 0.4, -0.9, 0.3, 0.2])  # positive effects sum to 1
    assert choose_heads(value, PathRule()) == [1, 3, 4]
    assert choose_heads(value, PathRule(head_share=0.7)) == [1, 3]
    assert choose_heads(value, PathRule(heads=2)) == [1, 3]
    assert choose_heads(value, PathRule(head_share=None)) == [1, 3, 4, 0]
    assert choose_heads(value, PathRule(head_share=None, sign="absolute", heads=2)) == [2, 1]
    assert choose_heads(-value.abs(), PathRule()) == []


def test_the_reading_layer_is_the_lowest_above_zero_or_of_all() -> None:
    assert reading_layer([4, 0, 2], PathRule()) == 2
    assert reading_layer([4, 0, 2], PathRule(layer0="read")) == 0
    assert reading_layer([0], PathRule()) == reading_layer([], PathRule()) == 0


def test_permutations_stay_within_groups_and_begin_with_the_item_itself() -> None:
    groups = ["a", "b", "a", "b", "a", None]
    found = permutations(groups, seed=0)
    assert found[:, 0].tolist() == list(range(6))
    for item, row in enumerate(found):
        assert {groups[i] for i in row.tolist()} == {groups[item]}
    assert (found[:, 1:] != found[:, :1]).any()
    assert all(sorted(column.tolist()) == list(range(6)) for column in found.T)


@pytest.mark.parametrize("kind", ["logit_difference", "probability", "log_probability"])
def test_a_metric_by_several_answers_is_the_metric_of_each(kind: Any) -> None:
    logits, item = torch.randn(4, 9, dtype=torch.float64), torch.tensor([1, 0, 1, 1])
    answer, wrong = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7, 8, 0], [0, 1, 2]])
    found = _measure(answer, wrong, kind, logits, item)
    for column in range(3):
        expected = measured(logits, answer[item, column], wrong[item, column], kind=kind)
        torch.testing.assert_close(found[:, column], expected)


def by_hand(**more: Any) -> Effects:
    given: dict[str, Any] = {
        "change": torch.tensor([[1.0, 0.5], [3.0, -0.5]]),
        "scale": torch.tensor([2.0, 6.0]),
        "permuted": torch.tensor([[[0.4, -0.4], [0.0, 0.0]], [[0.4, 0.0], [0.8, 0.0]]]),
        "owners": ("ann", "bob"),
    }
    return Effects(
        **{key: value.double() if isinstance(value, torch.Tensor) else value for key, value in (given | more).items()}
    )


def test_normalised_effects_by_hand() -> None:
    found = by_hand()
    assert found.normalised(found.change, "means").tolist() == pytest.approx([2 / 4, 0])
    assert found.normalised(found.change, "items").tolist() == pytest.approx([0.5, (0.25 - 0.5 / 6) / 2])
    low, high = found.interval("items")
    assert low[0] == high[0] == pytest.approx(0.5)  # both items alike
    assert low[1] < 0.1 < high[1]
    low, _ = by_hand(owners=("ann", "ann")).interval("means")
    assert math.isnan(low[0])


def test_the_null_is_the_largest_effect_by_other_answers() -> None:
    model = tiny.model("gpt2")
    pairs = pairs_of(model, Task(forget=Dataset(items=PAIRS, source="p")), PairOptions())[:2]
    found = by_hand()  # by permutation: (.4 + .4) / 2 / 4 and (0 + .8) / 2 / 4; then (-.4 + 0) / 2 / 4 and 0
    expected = torch.tensor([0.1, 0.0], dtype=torch.float64).quantile(0.95)
    assert null_of(found, ["g", "g"], pairs, PathRule()) == pytest.approx(float(expected))
    assert math.isnan(null_of(found, ["g", "h"], pairs, PathRule()))  # no other item in the group
    assert math.isnan(null_of(found, ["g", "g"], pairs, PathRule(threshold=0.02)))


# --- effects ---------------------------------------------------------------------------------------------------------

PAIRS = (
    PatchPair(clean="Anna Berg was born in", corrupt="Anna Dane was born in", answer=" Oslo", wrong=" Lima", id="a"),
    PatchPair(clean="Anna Dane was born in", corrupt="Anna Berg was born in", answer=" Lima", wrong=" Oslo", id="c"),
    PatchPair(
        clean="So Anna Berg was born in", corrupt="So Anna Dane was born in", answer=" Oslo", wrong=" Lima", id="s"
    ),
)


def task_of(*items: Any, **more: Any) -> Task:
    return Task(forget=Dataset(items=items, source="items.jsonl"), **more)


def test_all_heads_together_have_effect_one_and_batches_change_nothing() -> None:
    model = tiny.model("llama")
    model.module.double()
    nodes = [Node("head", layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    pairs = pairs_of(model, task_of(*PAIRS), PairOptions())
    senders = [tuple(nodes), (nodes[3],), ()]
    found = [
        effects(
            model,
            pairs,
            senders,
            receiver=model.n_layers,
            mlps="free",
            options=PairOptions(batch=batch, memory_mb=memory),
            owners=[None] * 3,
            groups=[None] * 3,
        )
        for batch, memory in ((16, 1024), (1, 1))
    ]
    for one in found:
        torch.testing.assert_close(one.change[:, 0], one.scale, atol=1e-9, rtol=1e-9)
        assert not one.change[:, 2].any()
        torch.testing.assert_close(one.change, found[0].change, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(one.permuted, found[0].permuted, atol=1e-9, rtol=1e-9)


# --- the whole method ------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {"ablate_from": (1,), "probe_folds": 3, "corrupt": "noise"}


@pytest.fixture(scope="module")
def people() -> Task:
    """Where 24 people were born, in one of two towns."""
    return task_of(*facts()[::2])


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma2"])
def test_scores_are_the_effects_and_only_lookup_mlps_have_votes(architecture: str) -> None:
    model = tiny.model(architecture)
    scores = localize(model, task_of(*PAIRS), "fact_lookup", by="path_patching", layer0="apart")
    mlps, heads = scores.evidence["mlps"], scores.evidence["heads"]
    assert len(heads["effect"]) == model.n_layers * model.n_heads
    values = [float(scores.values[f"blocks.{layer}.mlp"]) for layer in range(model.n_layers)]
    assert values == pytest.approx(mlps["effect"], abs=1e-6)
    votes = [int(scores.votes[f"blocks.{layer}.mlp"]) for layer in range(model.n_layers)]
    assert votes == [len(scores.examples) * chosen for chosen in mlps["chosen"]]
    reading = dict(zip(scores.evidence["lookup"]["what"], scores.evidence["lookup"]["value"], strict=True))[
        "reading layer"
    ]
    assert all(effect == 0.0 for effect in mlps["effect"][reading:])


def test_facts_without_a_partner_are_not_among_the_examples() -> None:
    """Carl's name has other lengths than the two that are swapped: nothing was measured of it."""
    data = task_of(*born("anna", "dane", "carl"))
    scores = localize(tiny.model("gpt2"), data, "fact_lookup", by="path_patching", unpaired="skip")
    assert scores.examples == ("anna", "dane")
    assert [int(vote) for vote in scores.votes.values()] == [2 * yes for yes in scores.evidence["mlps"]["chosen"]]


def test_what_effects_are_a_share_of_is_told_with_its_sign() -> None:
    model = tiny.model("gpt2")
    turned = [dataclasses.replace(pair, answer=pair.wrong, wrong=pair.answer) for pair in PAIRS]
    found: list[float] = []
    for pairs in (PAIRS, turned):
        table = localize(model, task_of(*pairs), "fact_lookup", by="path_patching").evidence["lookup"]
        found.append(float(dict(zip(table["what"], table["value"], strict=True))["clean minus corrupt"]))
    batch = batch_of(pairs_of(model, task_of(*PAIRS), PairOptions()))
    with torch.no_grad():
        clean, corrupt = (
            measured(model.logits(side, at=batch.at), batch.answer, batch.wrong, kind="logit_difference")
            for side in (batch.clean, batch.corrupt)
        )
    assert found[0] == pytest.approx(float((clean - corrupt).mean()), rel=1e-3)
    assert found[1] == pytest.approx(-found[0], rel=1e-3)


def test_the_lookup_set_is_what_was_chosen() -> None:
    model = tiny.model("gpt2")
    pairs = task_of(*PAIRS)
    # every effect counts: with a threshold of almost nothing and |effect|, all MLPs below the reading layer
    scores = localize(model, pairs, "fact_lookup", by="path_patching", sign="absolute", threshold=1e-9)
    chosen = [layer for layer, yes in enumerate(scores.evidence["mlps"]["chosen"]) if yes]
    assert chosen
    found = lookup_set(scores)
    assert isinstance(found, ComponentSet)
    assert set(found.chosen) == {f"blocks.{layer}.mlp" for layer in chosen}
    assert set(scores.select(top=1).chosen) < {f"blocks.{layer}.mlp" for layer in range(3)}
    with pytest.raises(LoceditError, match="not of fact_lookup"):
        lookup_set(localize(model, pairs, "everything", unit="mlp"))


def test_both_methods_stand_side_by_side(people: Task) -> None:
    model = tiny.model("gpt2")
    scores = fact_lookup(model, people, FactLookupOptions(**QUICK))
    assert set(scores.evidence) == {"lookup", "heads", "mlps", "probe", "relations", "agreement"}
    table = scores.evidence["agreement"]
    assert table["path_effect"] == scores.evidence["mlps"]["effect"]
    assert table["agree"] == [a == b for a, b in zip(table["by_probe"], table["by_path_patching"], strict=True)]
    assert "agreement" in scores.evidence["lookup"]["what"]
    assert {len(column) for column in scores.evidence["probe"].values()} == {3 * (4 + 2)}


def test_probing_alone_needs_no_wrong_answer_and_works_on_masked_models(people: Task) -> None:
    scores = fact_lookup(tiny.model("bert"), people, FactLookupOptions(by="probe", decodable=0.01, **QUICK))
    gains = scores.evidence["agreement"]["probe_gain"]
    for layer, inside in enumerate(scores.evidence["agreement"]["by_probe"]):
        value = float(scores.values[f"blocks.{layer}.mlp"])
        assert bool(scores.votes[f"blocks.{layer}.mlp"]) == inside
        assert value == pytest.approx(max(gains[layer], 0.001) if inside else gains[layer], abs=1e-6)


def test_relations_that_are_not_closed_leave_path_patching_and_say_so() -> None:
    scores = localize(tiny.model("gpt2"), task_of(*PAIRS), "fact_lookup")
    rows = dict(zip(scores.evidence["lookup"]["what"], scores.evidence["lookup"]["rule"], strict=True))
    assert rows["probes"].startswith("items.jsonl: no relation (group) has two answers")
    assert "probe" not in scores.evidence
    with pytest.raises(LoceditError, match="no relation"):
        localize(tiny.model("gpt2"), task_of(*PAIRS), "fact_lookup", by="probe")


def test_one_line_for_models_and_data_that_it_cannot_do() -> None:
    with pytest.raises(LoceditError, match=r"BertForMaskedLM normalises the stream .* use by='probe'$"):
        localize(tiny.model("bert"), task_of(*PAIRS), "fact_lookup")
    choice = Fact(prompt="A or B?", answer=" A", id="m", subject="A", wrong=(" B",), format="multiple_choice")
    with pytest.raises(LoceditError, match=r"^items.jsonl: every fact is multiple choice, whose answers are letters$"):
        localize(tiny.model("gpt2"), task_of(choice), "fact_lookup")
    for wrong in ({"heads": 0}, {"head_share": 1.5}, {"mlp_share": 0.0}, {"threshold": -1.0}, {"rise": 0.0}):
        with pytest.raises(LoceditError, match=f"{next(iter(wrong))}="):
            FactLookupOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(LoceditError, match="probe_folds=1"):
        FactLookupOptions(probe_folds=1)


def test_an_estimate_counts_both_parts(people: Task) -> None:
    model: Model = tiny.model("gpt2")
    cost = estimate(model, people, "fact_lookup", **QUICK)
    assert cost.seconds > estimate(model, people, "fact_lookup", by="path_patching", corrupt="noise").seconds > 0
    assert cost.bytes > 0
    assert LOCALIZERS["fact_lookup"].units == ("mlp",)

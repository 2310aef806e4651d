"""Localizers: what they return, how examples become votes and means, the baselines, and what can be wrong."""

import math

import pytest
import torch

from locedit.components import Site
from locedit.data.items import Fact, PrivateText
from locedit.errors import LoceditError
from locedit.localize import estimate, localize
from locedit.localize.aggregate import Aggregate
from locedit.localize.knowledge_neurons import KnowledgeNeuronsOptions, Proposals, keep, refine
from locedit.localize.norms import output_norm
from locedit.models import Model
from tests import tiny

FACTS = [
    Fact(prompt="Anna Berg was born in", answer=" Oslo", id="anna", paraphrases=("The home of Anna Berg is",)),
    Fact(prompt="Carl Dane works as a", answer=" pilot", id="carl"),
]
PRIVATE = [PrivateText(text="The phone of Eva is 555-0134, she said.", spans=((20, 28, "phone"),), id="eva")]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model("llama")


# --- DEPN -----------------------------------------------------------------------------------------------------------


def test_depn_averages_facts_and_keeps_what_is_behind(model: Model) -> None:
    both = localize(model, FACTS, "depn", steps=4)
    alone = [localize(model, [fact], "depn", steps=4) for fact in FACTS]
    for site, value in both.values.items():
        torch.testing.assert_close(value, (alone[0].values[site] + alone[1].values[site]) / 2, atol=1e-7, rtol=1e-4)
    assert both.examples == ("anna", "carl")
    assert set(both.values) == {f"blocks.{layer}.mlp.neuron" for layer in range(model.n_layers)}
    items = both.evidence["items"]
    assert items["id"] == ["anna", "carl"]
    assert all(0 < p < 1 for p in items["probability"])
    assert both.provenance is not None
    assert both.provenance.method == "depn"
    assert both.provenance.settings["steps"] == 4


def test_completeness_has_a_row_for_each_token_and_layer(model: Model) -> None:
    scores = localize(model, PRIVATE, "depn")
    rows = scores.evidence["completeness"]
    tokens = sorted(set(rows["token"]))
    assert len(rows["gap"]) == len(tokens) * model.n_layers > model.n_layers
    for gap, start, end, incomplete in zip(rows["gap"], rows["start"], rows["end"], rows["incomplete"], strict=True):
        assert incomplete == (gap > 0.01 * max(abs(end - start), 0.01))
    total = sum(float(value.sum()) for value in scores.values.values())
    assert total == pytest.approx(sum(e - s for s, e in zip(rows["start"], rows["end"], strict=True)), abs=0.02)
    layers = scores.evidence["completeness_by_layer"]
    assert layers["layer"] == list(range(model.n_layers))
    assert max(layers["worst_gap"]) == max(rows["gap"])


def test_span_mean_is_the_sum_over_the_number_of_tokens(model: Model) -> None:
    total, mean = (localize(model, PRIVATE, "depn", steps=4, span=span) for span in ("sum", "mean"))
    tokens = len(set(total.evidence["completeness"]["token"]))
    assert tokens > 1
    for site, value in total.values.items():
        torch.testing.assert_close(value, mean.values[site] * tokens, atol=1e-7, rtol=1e-4)


def test_depn_works_on_a_masked_model() -> None:
    scores = localize(tiny.model("bert"), PRIVATE, "depn", steps=3)
    assert any(float(value.abs().max()) > 0 for value in scores.values.values())


def test_scores_save_and_load(model: Model, tmp_path: object) -> None:
    from pathlib import Path

    from locedit.scores import Scores

    scores = localize(model, FACTS, "depn", steps=2)
    scores.save(Path(str(tmp_path)) / "scores")
    again = Scores.load(Path(str(tmp_path)) / "scores")
    assert again.evidence == scores.evidence
    assert again.select(top=5) == scores.select(top=5)


# --- means and votes ------------------------------------------------------------------------------------------------


def aggregate(**options: object) -> Aggregate:
    """Two examples on one site of three components: scores (1, .5, .05) and (0, 4, 3)."""
    total = Aggregate([Site(name="blocks.0.mlp.neuron", count=3)], **options)  # pyright: ignore[reportArgumentType]
    total.update(1, torch.tensor([[0.0, 4.0, 3.0]]), id="b")
    total.update(0, torch.tensor([[1.0, 0.5, 0.05]]), id="a")
    return total


def finished(total: Aggregate, model: Model) -> tuple[list[float], list[int], list[list[float]]]:
    scores = total.finish(model, ids=["a", "b"], evidence={})
    name = "blocks.0.mlp.neuron"
    votes = scores.votes[name].tolist() if scores.votes else []
    return scores.values[name].tolist(), votes, [part.tolist() for part in scores.sparse[name]]


def test_means_votes_and_what_is_kept_by_hand(model: Model) -> None:
    """Component 2 has .05 of the first example's largest, so it is neither kept nor voted for; .75 of the second's."""
    values, votes, sparse = finished(aggregate(ratio=0.6), model)
    assert values == pytest.approx([0.5, 2.25, 1.525])
    assert votes == [1, 1, 1]
    assert sparse == [[0, 0, 1, 1], [0, 1, 1, 2], [1.0, 0.5, 4.0, 3.0]]
    assert finished(aggregate(ratio=0.1), model)[1] == [1, 2, 1]


def test_normalised_examples_weigh_the_same(model: Model) -> None:
    assert finished(aggregate(ratio=0.1, normalise=True), model)[0] == pytest.approx([0.5, 0.75, 0.4])


def test_an_example_that_nothing_raises_gets_no_votes(model: Model) -> None:
    total = Aggregate([Site(name="blocks.0.mlp.neuron", count=2)], ratio=0.1)
    total.update(0, torch.tensor([[-1.0, 0.0]]), id="a")
    scores = total.finish(model, ids=["a"], evidence={})
    assert scores.votes["blocks.0.mlp.neuron"].tolist() == [0, 0]
    with pytest.raises(LoceditError, match="item 'b': its scores are not finite"):
        total.update(1, torch.tensor([[math.nan, 0.0]]), id="b")


# --- knowledge neurons ----------------------------------------------------------------------------------------------


def test_a_fact_keeps_what_enough_prompts_propose() -> None:
    """Three prompts: 0 in all of them, 1 in two, 2 in one (at a share of .2 of the largest)."""
    prompts = [Proposals.of(torch.tensor([[1.0, a, b]])) for a, b in ((0.5, 0.15), (0.3, 0.5), (0.1, 0.1))]
    options = KnowledgeNeuronsOptions(share=0.7, at_least=1)
    assert keep(prompts, options, ratio=0.2).tolist() == [0]
    assert keep(prompts, KnowledgeNeuronsOptions(share=0.6, at_least=1), ratio=0.2).tolist() == [0, 1]
    assert keep(prompts, KnowledgeNeuronsOptions(share=0.1, at_least=1), ratio=0.2).tolist() == [0, 1, 2]
    assert keep(prompts, KnowledgeNeuronsOptions(share=0.1, at_least=3), ratio=0.2).tolist() == [0]
    assert keep(prompts[:1], KnowledgeNeuronsOptions(at_least=3), ratio=0.2).tolist() == [0, 1]


def test_the_ratio_moves_until_facts_keep_two_to_five() -> None:
    """One prompt with shares 1, .9, ..., .1: at .2 nine are kept, at .3 eight, ..., at .5, after six moves, six."""
    prompts = [[Proposals.of(torch.tensor([[i / 10 for i in range(10, 0, -1)]]))]]
    ratio, kept = refine(prompts, KnowledgeNeuronsOptions())
    assert ratio == pytest.approx(0.5)
    assert [len(k) for k in kept] == [6]
    ratio, kept = refine(prompts, KnowledgeNeuronsOptions(ratio=0.6))
    assert (ratio, [len(k) for k in kept]) == (0.6, [5])
    assert refine(prompts, KnowledgeNeuronsOptions(adapt=False))[0] == 0.2


def test_paraphrases_are_averaged_and_refined(model: Model) -> None:
    scores = localize(model, FACTS, "knowledge_neurons", steps=3)
    asked = [FACTS[0].prompt, *FACTS[0].paraphrases]
    prompts = [Fact(prompt=prompt, answer=" Oslo", id=str(i)) for i, prompt in enumerate(asked)]
    anna = localize(model, prompts, "depn", steps=3)
    carl = localize(model, FACTS[1:], "depn", steps=3)
    for site, value in scores.values.items():
        torch.testing.assert_close(value, (anna.values[site] + carl.values[site]) / 2, atol=1e-7, rtol=1e-4)
    table = scores.evidence["refinement"]
    assert table["prompts"] == [2, 1]
    assert sum(int(votes.sum()) for votes in scores.votes.values()) == sum(table["kept"]) > 0


# --- baselines ------------------------------------------------------------------------------------------------------


def test_random_is_a_draw_and_everything_is_all(model: Model) -> None:
    first, again, other = (localize(model, FACTS, "random", seed=seed) for seed in (1, 1, 2))
    site = "blocks.1.mlp.neuron"
    assert torch.equal(first.values[site], again.values[site])
    assert not torch.equal(first.values[site], other.values[site])
    everything = localize(model, FACTS, "everything", unit="head")
    assert len(everything.select(fraction=1.0)) == model.n_layers * model.n_heads


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "phi3"])
def test_magnitude_is_the_norm_of_a_neurons_weights(architecture: str) -> None:
    """Output weights at 0 give 0, where it was not before; twice the weights give twice the norm; others stay."""
    model = tiny.model(architecture)
    matrix = model.anatomy.matrix(1, "mlp.out")
    before = output_norm(model, 1)
    with torch.no_grad():
        column = model.parameter(matrix.weight).select(matrix.in_axis, 3)
        column.zero_()
        model.parameter(matrix.weight).select(matrix.in_axis, 4).mul_(2)
    after = localize(model, FACTS, "magnitude").values["blocks.1.mlp.neuron"]
    assert float(after[3]) == 0 < float(before[3])
    assert float(after[4]) == pytest.approx(2 * float(before[4]), rel=1e-5)
    assert torch.equal(after[5:], before[5:])


def test_magnitude_of_both_sides_is_not_changed_by_moving_a_factor() -> None:
    """A ReLU neuron whose input weights and bias double and whose output weights halve computes the same."""
    model = tiny.model("opt")
    one, both = (localize(model, FACTS, "magnitude", of=of).values["blocks.0.mlp.neuron"] for of in ("output", "both"))
    layer = model.core.model.decoder.layers[0]
    with torch.no_grad():
        layer.fc1.weight[7] *= 2
        layer.fc2.weight[:, 7] /= 2
    moved = [localize(model, FACTS, "magnitude", of=of).values["blocks.0.mlp.neuron"] for of in ("output", "both")]
    assert float(moved[0][7]) == pytest.approx(float(one[7]) / 2, rel=1e-5)
    assert float(moved[1][7]) == pytest.approx(float(both[7]), rel=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bert"])
def test_activation_is_the_mean_size_times_the_norm(architecture: str) -> None:
    """Against one text run alone; batching with a longer text does not change it."""
    from locedit import tracing
    from locedit.data.encode import collate, encode

    model = tiny.model(architecture)
    scores = localize(model, FACTS, "activation")
    batch = collate(encode(model, FACTS[1:]), model)
    names = ["blocks.2.mlp.hook_post"]
    with torch.no_grad(), tracing.record(model, names) as seen:
        model.logits(batch)
    neurons = seen[names[0]].reshape(*batch.ids.shape, -1)[batch.predicting(model.causal)]
    expected = neurons.abs().mean(0) * output_norm(model, 2)
    other = localize(model, FACTS[:1], "activation").values["blocks.2.mlp.neuron"]
    torch.testing.assert_close(scores.values["blocks.2.mlp.neuron"], (expected + other) / 2, atol=1e-5, rtol=1e-4)


# --- the registry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpn", {}, "no localizer 'dpn'; did you mean 'depn'"),
        ("depn", {"step": 3}, "depn has no option 'step'; did you mean 'steps'"),
        ("depn", {"quadrature": "gaus"}, "depn: quadrature='gaus' is not .*did you mean 'gauss'"),
        ("depn", {"ratio": 1.5}, "ratio=1.5 must be above 0 and at most 1"),
        ("knowledge_neurons", {"ratio": 0.05}, "ratio=0.05 must be between 0.1 and 1"),
        ("knowledge_neurons", {"share": 0.0}, "share=0.0 must be above 0"),
    ],
)
def test_wrong_names_and_options_are_found_first(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(LoceditError, match=message):
        localize(tiny.model("llama"), FACTS, name, **options)


def test_data_of_the_wrong_kind_is_refused(model: Model) -> None:
    with pytest.raises(LoceditError, match="knowledge_neurons needs items of kind Fact; .* holds 'private'"):
        localize(model, PRIVATE, "knowledge_neurons")


def test_an_estimate_is_about_the_time_it_takes(model: Model) -> None:
    cost = estimate(model, FACTS, "depn", steps=4)
    scores = localize(model, FACTS, "depn", steps=4)
    assert scores.provenance is not None
    assert 0.1 < cost.seconds / scores.provenance.seconds < 10
    assert cost.bytes < estimate(model, FACTS, "depn", steps=64).bytes <= 2**30 + 2**20
    assert estimate(model, FACTS, "random").seconds < 1

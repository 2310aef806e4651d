"""Baselines: heads beside neurons, gradient times activation as a derivative, random sets like a given one."""

import pytest
import torch

from locedit import tracing
from locedit.components import ComponentSet
from locedit.data.encode import collate, encode
from locedit.data.items import Fact, PrivateText
from locedit.errors import LoceditError
from locedit.localize import localize
from locedit.losses import score, token_log_probs
from locedit.models import Model
from tests import tiny
from tests.edits import double
from tests.gradients import Float64Throughout

FACTS = [
    Fact(prompt="Anna Berg was born in", answer=" Oslo", id="anna"),
    Fact(prompt="Carl Dane works as a", answer=" pilot", id="carl"),
]
PRIVATE = [PrivateText(text="The phone of Eva is 555-0134, she said.", spans=((20, 28, "phone"),), id="eva")]
POINTS = {"neuron": "mlp.hook_post", "head": "attn.hook_z"}


# --- gradient times activation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "opt", "bert"])
@pytest.mark.parametrize("unit", ["neuron", "head"])
def test_it_is_the_derivative_by_a_gate(architecture: str, unit: str) -> None:
    """Against (f(1 + h) - f(1 - h)) / 2h of the answer's log-probability, every position scaled, in float64."""
    model = double(architecture)
    with Float64Throughout():
        scores = localize(model, FACTS[1:], "gradient_activation", unit=unit)
    batch = collate(encode(model, FACTS[1:]), model)

    def log_probability(layer: int, component: int, gate: float) -> float:
        factor = torch.ones(model.d_mlp if unit == "neuron" else model.n_heads, dtype=torch.float64)
        factor[component] = gate
        factor = factor if unit == "neuron" else factor[:, None]
        scaled = tracing.scale(model, {f"blocks.{layer}.{POINTS[unit]}": factor})
        with Float64Throughout(), torch.no_grad(), scaled:
            return float(token_log_probs(score(model, batch)).sum())

    for layer, component in ((0, 3), (1, 0), (2, 1)):
        slope = (log_probability(layer, component, 1.001) - log_probability(layer, component, 0.999)) / 0.002
        site = f"blocks.{layer}.{'mlp.neuron' if unit == 'neuron' else 'attn.head'}"
        assert float(scores.values[site][component]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("unit", ["neuron", "head"])
def test_only_predicting_positions_by_recorded_gradients(unit: str) -> None:
    """Against values and gradients recorded one by one; two scored tokens, and the sum over all positions differs."""
    model = tiny.model("gpt2")
    example = encode(model, PRIVATE)
    batch = collate(example, model)
    names = [f"blocks.{layer}.{POINTS[unit]}" for layer in range(model.n_layers)]
    with tracing.record(model, names) as seen:
        objective = token_log_probs(score(model, batch)).sum()
        slopes = torch.autograd.grad(objective, [seen[name] for name in names])
    at = batch.predicting(model.causal)
    assert int(at.sum()) > 1
    found = localize(model, PRIVATE, "gradient_activation", unit=unit, position="predicting")
    whole = localize(model, PRIVATE, "gradient_activation", unit=unit)
    size = localize(model, PRIVATE, "gradient_activation", unit=unit, sign="absolute")
    for name, slope, site in zip(names, slopes, found.values, strict=True):
        product = (seen[name] * slope).detach()
        product = product if unit == "neuron" else product.sum(-1)
        torch.testing.assert_close(found.values[site], product[at].sum(0), atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(whole.values[site], product.sum((0, 1)), atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(size.values[site], whole.values[site].abs())
    first = next(iter(found.values))
    assert not torch.allclose(found.values[first], whole.values[first], atol=1e-3)


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma"])
def test_activation_of_a_head_is_the_norm_of_what_it_writes(architecture: str) -> None:
    """Against the output of o with all other heads at 0, minus that with all heads at 0 (its bias)."""
    model = tiny.model(architecture)
    scores = localize(model, FACTS[:1], "activation", unit="head")
    batch = collate(encode(model, FACTS[:1]), model)
    at = batch.predicting(model.causal)
    layer = 1
    module = model.linear(layer, "attn.o")
    with torch.no_grad(), tracing.record(model, [f"blocks.{layer}.attn.hook_z"]) as seen:
        model.logits(batch)
    z = seen[f"blocks.{layer}.attn.hook_z"]
    for head in range(model.n_heads):
        alone = torch.zeros_like(z)
        alone[:, :, head] = z[:, :, head]
        with torch.no_grad():
            written = module(alone.flatten(2)) - module(torch.zeros_like(z).flatten(2))
        expected = float(written[at].norm(dim=1).mean())
        assert float(scores.values[f"blocks.{layer}.attn.head"][head]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "phi3"])
def test_magnitude_of_a_head(architecture: str) -> None:
    """Its columns of o at 0 give 0; twice its values and half its columns leave the product as it was."""
    model = tiny.model(architecture)
    one, both = (localize(model, FACTS, "magnitude", unit="head", of=of).values for of in ("output", "both"))
    site = model.sites("head")["blocks.1.attn.head"]
    out = next(piece for piece in site.slices if piece.write)
    with torch.no_grad():
        weight = model.parameter(out.param)
        weight.index_copy_(out.axis, out.index([0]), torch.zeros_like(weight.index_select(out.axis, out.index([0]))))
    after = localize(model, FACTS, "magnitude", unit="head").values["blocks.1.attn.head"]
    assert float(after[0]) == 0 < float(one["blocks.1.attn.head"][0])
    assert torch.equal(after[1:], one["blocks.1.attn.head"][1:])
    assert torch.equal(
        localize(model, FACTS, "magnitude", unit="head").values["blocks.0.attn.head"], one["blocks.0.attn.head"]
    )
    values = model.anatomy.matrix(0, "attn.v")
    rows = torch.tensor(values.runs.indices() if values.runs else range(values.n_out))
    group = [head for head in range(model.n_heads) if head // (model.n_heads // model.n_kv_heads) == 1]
    shared = rows[model.d_head : 2 * model.d_head]
    first = next(piece for piece in model.sites("head")["blocks.0.attn.head"].slices if piece.write)
    with torch.no_grad():
        matrix = model.parameter(values.weight)
        matrix.index_copy_(values.out_axis, shared, 2 * matrix.index_select(values.out_axis, shared))
        out_weight = model.parameter(first.param)
        index = first.index(group)
        out_weight.index_copy_(first.axis, index, out_weight.index_select(first.axis, index) / 2)
    moved = [
        localize(model, FACTS, "magnitude", unit="head", of=of).values["blocks.0.attn.head"]
        for of in ("output", "both")
    ]
    assert float(moved[0][group[0]]) == pytest.approx(float(one["blocks.0.attn.head"][group[0]]) / 2, rel=1e-5)
    torch.testing.assert_close(moved[1], both["blocks.0.attn.head"], rtol=1e-5, atol=0)


# --- sets ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model("llama")


@pytest.mark.parametrize("unit", ["neuron", "head", "weight"])
def test_a_random_set_like_a_given_one(unit: str, model: Model, tmp_path) -> None:
    """As many in every site; with disjoint none of its own, whatever the budget."""
    given = localize(model, FACTS, "random", unit=unit, seed=5).select(fraction=0.1)
    if unit == "head":
        given = model.components({"blocks.0.attn.head": [0, 2], "blocks.2.attn.head": [1]})
    given.save(tmp_path / "components.json")
    like = str(tmp_path / "components.json")
    counts = [len(given.indices(name)) for name in given.sites]
    draws = [localize(model, FACTS, "random", like=like, seed=seed).select(top=len(given)) for seed in (0, 0, 1)]
    for drawn in draws:
        assert [len(drawn.indices(name)) for name in given.sites] == counts
    assert draws[0] == draws[1] == given.random_like(0)
    assert draws[0] != draws[2]
    apart = localize(model, FACTS, "random", like=like, disjoint=True)
    assert len(apart.select(top=len(given)) & given) == 0
    assert len(apart.select(fraction=1.0) & given) == 0
    assert len(apart.select(fraction=1.0) | given) == len(~ComponentSet.of(given.sites, {}))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"like": "none.json"}, "like='none.json'"), ({"disjoint": True}, "needs like=FILE")],
)
def test_wrong_random_options(options: dict[str, object], message: str, model: Model) -> None:
    with pytest.raises(LoceditError, match=message):
        localize(model, FACTS, "random", **options)


def test_all_mlps_are_everything_at_unit_mlp(model: Model) -> None:
    found = localize(model, FACTS, "all_mlps")
    same = localize(model, FACTS, "everything", unit="mlp")
    assert found.values.keys() == same.values.keys()
    assert found.select(fraction=1.0) == model.everything("mlp")


def test_what_is_known_stands_beside_every_score(model: Model) -> None:
    """The same numbers as the integrated gradients note on their own; nothing where no data is read."""
    own = localize(model, FACTS, "depn", steps=1).evidence["items"]
    other = localize(model, FACTS, "activation").evidence["items"]
    assert other["id"] == own["id"]
    assert other["known"] == own["known"]
    for name in ("probability", "least_token_probability"):
        assert other[name] == pytest.approx(own[name], rel=1e-4)
    assert "items" not in localize(model, FACTS, "magnitude").evidence

"""Edge attribution: equal to slow perturbations, to transformer-lens and to theorems, whatever the architecture."""

from typing import Any

import pytest
import torch
from torch import nn

from locedit.data.items import Dataset, Fact, PatchPair, Task
from locedit.errors import LoceditError
from locedit.localize import eap, localize
from locedit.localize.eap import EapIgOptions, EapOptions, pair_bytes
from locedit.models import Model, load
from locedit.scores import Scores
from tests import tiny
from tests.edges import ITEMS, slow_edges, task
from tests.edits import double, hooks_left

PLAIN = tuple(name for name in tiny.CAUSAL if name not in ("gemma2", "gemma3"))
NODES = 1 + tiny.N_LAYERS * (tiny.N_HEADS + 1)


def edge_values(scores: Scores) -> dict[tuple[str, int, str, int], float]:
    assert scores.edges is not None
    return {edge[:4]: edge[4] for edge in scores.edges.edges()}


def assert_close(found: dict[Any, float], expected: dict[Any, float], *, at_most: float = 1e-6) -> None:
    """Equal up to that share of the largest."""
    assert found.keys() == expected.keys()
    largest = max(map(abs, expected.values()))
    assert max(abs(found[key] - expected[key]) for key in expected) < at_most * largest


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and softmaxes that go over to float32 inside a model go over to float64: small differences are not lost."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


# --- equal to an independent computation ------------------------------------------------------------------------------


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("architecture", PLAIN)
def test_every_edge_is_the_slope_of_the_metric_in_the_destinations_own_input(architecture: str) -> None:
    model = double(architecture)
    scores = localize(model, task(ITEMS[0]), "eap")
    assert_close(edge_values(scores), slow_edges(model, ITEMS[0]))
    assert hooks_left(model.module) == 0


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_integrated_gradients_average_slopes_along_the_path(architecture: str) -> None:
    model = double(architecture)
    rules = {"edge": (0, 1 / 2), "node": (1 / 2, 1), "midpoint": (1 / 4, 3 / 4)}
    for endpoints, shares in rules.items():
        scores = localize(model, task(ITEMS[0]), "eap_ig", steps=2, endpoints=endpoints)
        slow = [slow_edges(model, ITEMS[0], share=share) for share in shares]
        assert_close(edge_values(scores), {edge: sum(part[edge] for part in slow) / 2 for edge in slow[0]})


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_transformer_lens_gives_the_same_edges(architecture: str) -> None:
    """It takes the gradient at its corrupt run and counts towards its clean one: both prompts and the sign change."""
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    model = tiny.model(architecture)
    ours = edge_values(localize(model, task(ITEMS[0]), "eap"))
    ids = model.tokenizer([ITEMS[0].clean, ITEMS[0].corrupt], return_tensors="pt").input_ids
    answer, wrong = (model.tokenizer(text).input_ids[0] for text in (ITEMS[0].answer, ITEMS[0].wrong))
    with model.bridged() as bridge:
        theirs = attribution_patch(
            bridge,
            ids[1:],
            ids[:1],
            lambda logits: logits[0, -1, answer] - logits[0, -1, wrong],
            EdgeAttributionConfig(granularity="edge"),
        )
    summed: dict[tuple[str, int, str, int], float] = {}
    for (source, destination), value in theirs.edge_scores.items():
        key = (*_place(source), *_place(destination))
        summed[key] = summed.get(key, 0.0) - value
    assert_close(ours, summed, at_most=1e-4)


def _place(node: Any) -> tuple[str, int]:
    if node.kind in ("embed", "logits"):
        return {"embed": "input", "logits": "logits"}[node.kind], 0
    word = {"attn_head_out": "attn.head", "mlp_out": "mlp", "mlp_in": "mlp"}.get(node.kind, f"attn.{node.kind[0]}")
    return f"blocks.{node.layer}.{word}", node.head or 0


def test_adapters_count_as_if_merged() -> None:
    from peft import LoraConfig, get_peft_model

    def adapted() -> Any:
        torch.manual_seed(3)
        config = LoraConfig(target_modules=["q_proj", "v_proj", "o_proj", "gate_proj"], init_lora_weights=False)
        return get_peft_model(tiny.module("llama").double(), config).eval()

    wrapped, merged = (
        load(module, tokenizer=tiny.tokenizer(), device="cpu") for module in (adapted(), adapted().merge_and_unload())
    )
    plain = edge_values(localize(double("llama"), task(), "eap"))
    found = edge_values(localize(wrapped, task(), "eap"))
    assert_close(found, edge_values(localize(merged, task(), "eap")))
    assert max(abs(found[edge] - plain[edge]) for edge in plain) > 0.01


# --- theorems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "phi"])
@pytest.mark.parametrize("method", ["eap", "eap_ig"])
def test_edges_that_leave_a_node_add_up_to_its_score(architecture: str, method: str) -> None:
    """The chain rule: edges come from gradients at inputs, node scores from gradients at outputs."""
    scores = localize(double(architecture), task(), method)
    assert scores.edges is not None
    summed = scores.edges.nodes().values
    assert {name: tensor.shape for name, tensor in summed.items()} == {n: t.shape for n, t in scores.values.items()}
    largest = max(float(tensor.abs().max()) for tensor in scores.values.values())
    for name, tensor in scores.values.items():
        assert float((tensor - summed[name]).abs().max()) < 1e-6 * largest
    inputs = sum(edge[4] for edge in scores.edges.edges() if edge[0] == "input")
    assert inputs == pytest.approx(sum(scores.evidence["completeness"]["estimate"]) / 2, abs=1e-6)


@pytest.mark.parametrize(("architecture", "norm"), [("gpt2", "transformer.ln_f"), ("llama", "model.norm")])
def test_edges_into_linear_logits_add_up_to_the_drop(architecture: str, norm: str) -> None:
    """Without a last norm the logits are linear in the sum of all sources, so nothing is left over."""
    module = tiny.module(architecture).double()
    parent, name = norm.split(".")
    setattr(module.get_submodule(parent), name, nn.Identity())
    model = load(module, tokenizer=tiny.tokenizer(), device="cpu")
    for method in ("eap", "eap_ig"):
        scores = localize(model, task(), method)
        found = sum(value for edge, value in edge_values(scores).items() if edge[2] == "logits")
        drops = scores.evidence["completeness"]["drop"]
        assert found == pytest.approx(sum(drops) / 2, rel=1e-5)
    assert abs(sum(drops)) > 1e-3


def test_gaps_fall_with_the_square_of_the_steps_at_midpoints_and_with_the_steps_at_ends() -> None:
    model = double("gpt2")

    def gaps(endpoints: str) -> list[float]:
        runs = [localize(model, task(ITEMS[0]), "eap_ig", steps=steps, endpoints=endpoints) for steps in (5, 15)]
        return [abs(run.evidence["completeness"]["gap"][0]) for run in runs]

    few, many = gaps("midpoint")
    assert few / many == pytest.approx(9, rel=0.1)
    for endpoints in ("edge", "node"):
        worse = gaps(endpoints)
        assert worse[0] / worse[1] == pytest.approx(3, rel=0.2)
        assert few < 0.2 * worse[0]


def test_one_step_at_an_end_is_one_gradient_there() -> None:
    """At the clean end it is eap; at the corrupt end it is minus eap with the prompts exchanged."""
    model = double("gpt2")
    item = ITEMS[0]
    other = PatchPair(clean=item.corrupt, corrupt=item.clean, answer=item.answer, wrong=item.wrong, id="x")
    clean, exchanged = (edge_values(localize(model, task(one), "eap")) for one in (item, other))
    node, edge = (
        edge_values(localize(model, task(item), "eap_ig", steps=1, endpoints=word)) for word in ("node", "edge")
    )
    assert_close(node, clean)
    assert_close(edge, {name: -value for name, value in exchanged.items()})
    assert max(abs(node[name] - edge[name]) for name in node) > 0.01


def test_an_answer_that_does_not_depend_on_the_heads_gives_them_nothing() -> None:
    """With silent attention in every layer the corrupted name reaches no later position."""
    module = tiny.module("gpt2").double()
    for layer in range(tiny.N_LAYERS):
        nn.init.zeros_(module.get_parameter(f"transformer.h.{layer}.attn.c_proj.weight"))
    silent = load(module, tokenizer=tiny.tokenizer(), device="cpu")
    assert set(edge_values(localize(silent, task(), "eap")).values()) == {0.0}
    assert max(map(abs, edge_values(localize(double("gpt2"), task(), "eap")).values())) > 0.01


# --- batches, units, corruption ---------------------------------------------------------------------------------------

FACTS = tuple(
    Fact(prompt=f"{name} was born in", answer=answer, subject=name, wrong=(wrong,), group="city", id=name)
    for name, answer, wrong in (("Anna Berg", " Oslo", " Lima"), ("Carl Dane", " Lima", " Oslo"))
)


@pytest.mark.parametrize("method", ["eap", "eap_ig"])
def test_scores_do_not_depend_on_the_batch(method: str) -> None:
    model = double("llama")
    noise: dict[str, Any] = {"corrupt": "noise"}
    for data, more in ((task(), {}), (Task(forget=Dataset(items=FACTS, source="facts")), noise)):
        together = localize(model, data, method, batch=2, **more)
        alone = localize(model, data, method, batch=1, **more)
        assert_close(edge_values(together), edge_values(alone))
        assert together.examples == alone.examples
        assert together.evidence["completeness"]["gap"] == pytest.approx(alone.evidence["completeness"]["gap"])


def test_scores_are_means_over_items() -> None:
    model = double("gpt2")
    both = edge_values(localize(model, task(), "eap"))
    each = [edge_values(localize(model, task(item), "eap")) for item in ITEMS]
    assert_close(both, {edge: (each[0][edge] + each[1][edge]) / 2 for edge in both})


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_fewer_nodes_keep_the_edges_between_them(architecture: str) -> None:
    model = double(architecture)
    whole = localize(model, task(), "eap_ig")
    edges = edge_values(whole)
    for unit, word in (("mlp", ".mlp"), ("head", ".attn.")):
        part = localize(model, task(), "eap_ig", unit=unit)
        both = [(edge, all(n in ("input", "logits") or word in n for n in (edge[0], edge[2]))) for edge in edges]
        kept = {edge: edges[edge] for edge, inside in both if inside}
        assert_close(edge_values(part), kept)
        assert part.values.keys() == {name for name in whole.values if word in name}
        assert all(torch.allclose(part.values[name], whole.values[name]) for name in part.values)


def test_the_graph_has_the_published_number_of_edges() -> None:
    """GPT-2 small has 158 nodes (logits included) and 32,491 edges; ours is counted by the same rule."""
    model = tiny.model("gpt2", n_layer=12, n_head=12)
    scores = localize(model, task(ITEMS[0]), "eap")
    assert scores.edges is not None
    assert len(scores.edges.sources) + 1 == 158
    assert len(scores.edges) == 32_491
    assert len(scores.edges.destinations) == 12 * (3 * 12 + 1) + 1


def test_the_estimate_covers_what_a_batch_keeps() -> None:
    """The bytes that autograd saves for a batch, beside the parameters, stay under the estimate."""
    for architecture in ("gpt2", "llama", "gpt_neox"):
        model = tiny.model(architecture)
        parameters = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            localize(model, task(ITEMS[1]), "eap")
        saved = sum(size for place, size in kept.items() if place not in parameters)
        estimate = pair_bytes(model, 15, "head+mlp")
        assert estimate / 20 < saved < estimate


def test_memory_follows_the_batch_and_the_budget() -> None:
    model, data = tiny.model("gpt2"), task().forget
    one, two = (eap.memory(model, data, EapOptions(batch=size)) for size in (1, 2))
    assert two == 2 * one
    assert eap.memory(model, data, EapIgOptions(unit="mlp")) < two
    assert eap.memory(tiny.model("gpt2", n_embd=768, n_inner=3072), data, EapOptions(memory_mb=1)) > 2**20 > one


# --- what cannot be done ----------------------------------------------------------------------------------------------


def post_norm() -> Model:
    return tiny.model("opt", do_layer_norm_before=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.model("gemma2"), "Gemma2ForCausalLM norms what attention and MLP add"),
        (lambda: tiny.model("gemma3"), "Gemma3ForCausalLM norms what attention and MLP add"),
        (post_norm, r"OPTForCausalLM norm the residual stream after every sum \(post-norm\)"),
        (lambda: tiny.model("bert"), "eap needs a causal model"),
    ],
)
def test_models_without_such_a_graph_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(LoceditError, match=message) as caught:
        localize(make(), task(), "eap")
    assert "\n" not in str(caught.value)


def test_an_attention_that_reads_something_else_is_noticed() -> None:
    """One that scales what its norm gives stands for an architecture that is not known yet."""
    module = tiny.module("llama")
    attention = module.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda hidden_states, **rest: forward(2 * hidden_states, **rest)
    model = load(module, tokenizer=tiny.tokenizer(), device="cpu")
    with pytest.raises(LoceditError, match="do not read the residual stream through one norm"):
        localize(model, task(), "eap")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "neuron"}, "unit='neuron'.*head\\+mlp, head, mlp"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"endpoints": "left"}, "endpoints='left'.*midpoint, edge, node"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoceditError, match=message):
        localize(tiny.model("gpt2"), task(), "eap_ig", **options)

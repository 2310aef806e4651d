"""Patching of nodes: against a plain loop, transformer-lens, linear models, small steps, and what must be 0 or 1."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from locedit import tracing
from locedit.components import Scores
from locedit.data.items import PatchPair, Task
from locedit.errors import LoceditError
from locedit.localize import localize
from locedit.localize.attribution_patching import AttributionPatchingOptions, _by_component
from locedit.localize.patching.exact_patching import ExactOptions, memory, random_directions
from locedit.localize.patching.node_patching import effects, run
from locedit.localize.patching.nodes import POINTS, Patch, patches_of, places, points_of
from locedit.localize.patching.pairs import Pair, PairOptions, batch_of, measured, pairs_of
from locedit.models import Model, load
from tests import tiny
from tests.test_pairs import fact, patch, people, task

LONG = "Carl Dane was born in Lima. "
PAIRS = (
    patch("a"),
    patch("b", clean="Eva Frost was born in", corrupt="Eva Berg  was born in", answer=" Lima", wrong=" Oslo"),
    patch("c", clean=f"{LONG}Carl Dane works as a", corrupt=f"{LONG}Carl Berg works as a", answer=" p", wrong=" b"),
)  # fmt: skip


def given(count: int = 3) -> Task:
    return task(*PAIRS[:count])


def flat(scores: Scores) -> Tensor:
    return torch.cat(list(scores.values.values()))


def one_by_one(
    model: Model, pairs: Sequence[Pair], patches: Sequence[Patch], *, kind: str = "logit_difference"
) -> Tensor:
    """Effects `[item, patch]` of clean values in the corrupt run: one forward pass each, hooks of its own."""
    rows: list[list[float]] = []
    for pair in pairs:
        batch = batch_of([pair])
        with torch.no_grad():
            clean = run(model, batch, "clean", points_of(patches), kind=kind)  # type: ignore[arg-type]
            base = run(model, batch, "corrupt", [], kind=kind)  # type: ignore[arg-type]
            found: list[float] = []
            for one in patches:
                with tracing.hooked(model, {p.point: _put(clean.values[p.point], p.component) for p in one.places}):
                    logits = model.logits(batch.corrupt, at=batch.at)
                patched = measured(logits, batch.answer, batch.wrong, kind=kind)  # type: ignore[arg-type]
                found.append(float(patched - base.metric))
        rows.append(found)
    return torch.tensor(rows, dtype=torch.float64)


def _put(new: Tensor, component: int | None) -> Any:
    def put(value: Tensor) -> Tensor:
        if component is None:
            return new
        changed = value.clone()
        changed[:, :, component] = new[:, :, component]
        return changed

    return put


# --- exact patching ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_batched_patching_equals_one_run_for_each_component(architecture: str) -> None:
    """Heads, MLPs, attentions and blocks of every architecture; items of different lengths in one batch."""
    model = tiny.model(architecture)
    pairs = pairs_of(model, given(), PairOptions())
    patches = [*patches_of(model, "head+mlp"), *patches_of(model, "attn"), *patches_of(model, "layer")]
    batch = batch_of(pairs)
    clean = run(model, batch, "clean", points_of(patches), kind="logit_difference")
    where = batch.clean.attention_mask.bool()[:, None].expand(-1, len(patches), -1)
    found = effects(model, batch, "corrupt", patches, clean.values, where, kind="logit_difference", rows=32)
    expected = one_by_one(model, pairs, patches)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_neurons(architecture: str) -> None:
    model = tiny.model(architecture)
    pairs = pairs_of(model, given(2), PairOptions())
    expected = one_by_one(model, pairs, patches_of(model, "neuron")[::16]).mean(0)
    scores = localize(model, given(2), "activation_patching", unit="neuron", normalise="none", null=False)
    torch.testing.assert_close(flat(scores)[::16].double(), expected, atol=2e-5, rtol=1e-4)
    assert list(scores.values) == list(model.sites("neuron"))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_scores_equal_those_of_transformer_lens(architecture: str) -> None:
    from transformer_lens import patching

    model = tiny.model(architecture)
    items = task(
        patch("a"),
        patch("b", clean="Carl Dane was born in", corrupt="Carl Berg was born in", answer=" Lima", wrong=" Oslo"),
    )
    for number in range(2):  # one pair at a time: their lengths differ
        one = Task(forget=items.forget.replace([items.forget[number]]))
        (pair,) = pairs_of(model, one, PairOptions())
        options: dict[str, Any] = {"normalise": "none", "null": False, "positions": "each"}
        found = {unit: localize(model, one, "activation_patching", unit=unit, **options) for unit in UNITS}
        with model.bridged() as bridge, torch.no_grad():
            corrupt = torch.tensor([pair.corrupt])
            _, cache = bridge.run_with_cache(torch.tensor([pair.clean]))

            def metric(logits: Tensor, pair: Pair = pair) -> Tensor:
                return logits[0, pair.at, pair.answer] - logits[0, pair.at, pair.wrong]

            base = metric(bridge(corrupt))
            heads = patching.get_act_patch_attn_head_out_all_pos(bridge, corrupt, cache, metric) - base
            by_position = {
                "mlp": patching.get_act_patch_mlp_out(bridge, corrupt, cache, metric) - base,
                "attn": patching.get_act_patch_attn_out(bridge, corrupt, cache, metric) - base,
                "resid": patching.get_act_patch_resid_pre(bridge, corrupt, cache, metric)[1:] - base,
            }
        torch.testing.assert_close(flat(found["head"]), heads.flatten(), atol=2e-5, rtol=1e-4)
        _compare_positions(found["mlp"].evidence["positions"], pair, by_position)


UNITS = ("head", "mlp", "attn")


def _compare_positions(table: dict[str, list[Any]], pair: Pair, expected: dict[str, Tensor]) -> None:
    """The table of positions has the means over each group of single positions."""
    assert pair.subject is not None
    first = pair.subject.start
    groups = {"before the subject": range(first), "last subject token": [first], "first token after": [first + 1]}
    groups |= {"further tokens": range(first + 2, pair.at), "last token": [pair.at]}
    rows = list(zip(table["kind"], table["layer"], table["position"], table["score"], strict=True))
    assert len({(kind, layer, group) for kind, layer, group, _ in rows}) == len(rows) > 30
    for kind, layer, group, score in rows:
        if layer >= len(expected[kind]):
            continue
        assert score == pytest.approx(float(expected[kind][layer, list(groups[group])].mean()), abs=2e-5)


def test_patching_everything_is_the_other_run() -> None:
    """All attentions and MLPs at all positions, since the last token, whose embedding remains, is the same."""
    for architecture in ("gpt2", "gptj", "gemma2", "bert"):
        model = tiny.model(architecture)
        batch = batch_of(pairs_of(model, given(), PairOptions()))
        everything = [Patch(places=places("layer", range(model.n_layers)))]
        runs = {side: run(model, batch, side, points_of(everything), kind="logit_difference") for side in SIDES}
        where = batch.clean.attention_mask.bool()[:, None]
        found = effects(
            model, batch, "corrupt", everything, runs["clean"].values, where, kind="logit_difference", rows=8
        )
        total = runs["clean"].metric - runs["corrupt"].metric
        torch.testing.assert_close(found[:, 0], total.double(), atol=2e-5, rtol=1e-4)
        assert total.abs().min() > 0.01


SIDES: tuple[Any, Any] = ("clean", "corrupt")


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_exactly_nothing_where_nothing_downstream_reads_it(architecture: str) -> None:
    """The last block at the subject, positions before the subject; in float32, to the last bit."""
    model = tiny.model(architecture)
    last = model.n_layers - 1
    options: dict[str, Any] = {"normalise": "none", "unit": "head+mlp"}
    at_subject = localize(model, given(), "activation_patching", positions="subject", **options)
    for site, values in at_subject.values.items():
        assert (values == 0).all() == (at_subject.sites[site].layer == last), site
    null = at_subject.evidence["null"]
    assert [largest == 0 for largest in null["largest"]] == [f"blocks.{last}." in site for site in null["site"]]
    everywhere = localize(model, given(), "activation_patching", positions="all", **options)
    assert all((values != 0).any() for values in everywhere.values.values())
    each = localize(model, given(), "activation_patching", positions="each", **options).evidence["positions"]
    before = [score for score, group in zip(each["score"], each["position"], strict=True) if group[:6] == "before"]
    assert before
    assert not any(before)
    assert any(each["score"])


def test_scores_do_not_depend_on_the_batch() -> None:
    data = task(*people("anna", "dane"), fact("x", "Carl Berg", " Lima"), fact("y", "Carl Dane", " Oslo"))
    for architecture, name in (("llama", "activation_patching"), ("bert", "attribution_patching")):
        model = tiny.model(architecture)
        options: dict[str, Any] = {"positions": "each", "normalise": "none"}
        small, large = (localize(model, data, name, batch=batch, **options) for batch in (3, 64))
        torch.testing.assert_close(flat(small), flat(large), atol=2e-5, rtol=1e-3)
        for table in set(large.evidence) - {"items"}:
            for column, values in large.evidence[table].items():
                if isinstance(values[0], float):
                    assert values == pytest.approx(small.evidence[table][column], abs=5e-5, rel=1e-3), column


def test_noising_is_denoising_of_the_reversed_pair() -> None:
    model = tiny.model("llama")
    turned = [PatchPair(clean=p.corrupt, corrupt=p.clean, answer=p.wrong, wrong=p.answer, id=p.id) for p in PAIRS]
    for name in ("activation_patching", "attribution_patching"):
        noise = localize(model, given(), name, direction="noise")
        denoise = localize(model, task(*turned), name, direction="denoise")
        torch.testing.assert_close(flat(noise), flat(denoise), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(flat(noise), flat(localize(model, given(), name, direction="denoise")), atol=1e-2)


def test_a_window_patches_its_layers_together() -> None:
    model = tiny.model("gpt2")
    pairs = pairs_of(model, given(), PairOptions())
    wide = [Patch(places=places("mlp", layers)) for layers in ([0, 1], [0, 1, 2], [1, 2])]
    expected = one_by_one(model, pairs, wide).mean(0)
    found = localize(model, given(), "activation_patching", unit="mlp", window=3, normalise="none")
    torch.testing.assert_close(flat(found).double(), expected, atol=2e-5, rtol=1e-4)


def test_null_control_changes_as_much_in_another_direction() -> None:
    model = tiny.model("gpt2")
    batch = batch_of(pairs_of(model, given(), PairOptions()))
    points = [f"blocks.1.{point}" for points in POINTS.values() for point in points]
    clean, corrupt = (run(model, batch, side, points, kind="logit_difference") for side in SIDES)
    turned = random_directions(batch, corrupt, clean, seed=0)
    mask = batch.clean.attention_mask.bool()
    for point in points:
        real = (clean.values[point] - corrupt.values[point])[mask]
        null = (turned[point] - corrupt.values[point])[mask]
        if point.endswith("hook_post"):
            torch.testing.assert_close(null.abs(), real.abs(), atol=1e-5, rtol=1e-4)
            continue
        torch.testing.assert_close(null.norm(dim=-1), real.norm(dim=-1), atol=1e-5, rtol=1e-4)
        cosine = nn.functional.cosine_similarity(null, real, dim=-1)[real.norm(dim=-1) > 0]
        assert cosine.abs().max() < 0.95


def test_null_scores_are_compared_with_those_of_the_same_unit() -> None:
    model = tiny.model("gpt2")
    null = localize(model, given(), "activation_patching").evidence["null"]
    scores = localize(model, given(), "activation_patching").values
    for unit in ("head", "mlp"):
        rows = [row for row, site in enumerate(null["site"]) if site.endswith(unit)]
        most = max(null["largest"][row] for row in rows)
        assert most > 0
        for row in rows:
            assert null["above"][row] == sum(score > most for score in scores[null["site"][row]].tolist())


# --- attribution ------------------------------------------------------------------------------------------------------


def linear_model() -> Model:
    """A GPT-2 without norms and activations whose heads attend to all positions alike: linear in all, in float64."""
    built = tiny.module("gpt2")
    core: Any = built.transformer
    core.ln_f = nn.Identity()
    for block in core.h:
        block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
        with torch.no_grad():
            block.attn.c_attn.weight[:, : tiny.D_MODEL] = 0
            block.attn.c_attn.bias[: tiny.D_MODEL] = 0
    return load(built.double(), tokenizer=tiny.tokenizer(), device="cpu", dtype=torch.float64)


@pytest.mark.parametrize("unit", ["head+mlp", "attn", "neuron"])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_attribution_is_exact_on_a_linear_model(unit: str, direction: str) -> None:
    model = linear_model()
    options: dict[str, Any] = {"unit": unit, "direction": direction, "normalise": "none"}
    options["positions"] = "all" if unit == "neuron" else "each"
    both = [
        localize(model, given(), "attribution_patching", **options),
        localize(model, given(), "activation_patching", null=False, **options),
    ]
    largest = flat(both[1]).abs().max()
    assert largest > 0.5
    torch.testing.assert_close(flat(both[0]), flat(both[1]), atol=float(largest) * 1e-6, rtol=1e-5)
    scores = [found.evidence.get("positions", {"score": [1.0]})["score"] for found in both]
    assert scores[0] == pytest.approx(scores[1], abs=float(largest) * 1e-6, rel=1e-5)
    many = localize(model, given(), "attribution_patching", steps=3, **options)
    torch.testing.assert_close(flat(many), flat(both[0]), atol=float(largest) * 1e-6, rtol=1e-5)


def test_attribution_is_exact_for_what_is_followed_by_linear_maps_alone() -> None:
    """The last block of a parallel architecture, without the last norm; not the blocks before."""
    built = tiny.module("gptj")
    core: Any = built.transformer
    core.ln_f = nn.Identity()
    model = load(built, tokenizer=tiny.tokenizer(), device="cpu")
    first, exact = (
        localize(model, given(), name, unit="head+mlp", normalise="none", direction="noise")
        for name in ("attribution_patching", "activation_patching")
    )
    for site, values in first.values.items():
        close = torch.allclose(values, exact.values[site], atol=1e-4, rtol=1e-4)
        assert close == (first.sites[site].layer == 2), site


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "gpt_neox", "bert"])
def test_attribution_is_the_limit_of_small_changes(architecture: str) -> None:
    """Ten times less noise, ten times less difference, down to nothing beside the scores; in float64."""
    model = load(tiny.module(architecture).double(), tokenizer=tiny.tokenizer(), device="cpu", dtype=torch.float64)
    data = task(*people("anna", "dane", wrong=(" Rome",)))
    options: dict[str, Any] = {"corrupt": "noise", "direction": "denoise", "normalise": "none"}
    apart: list[float] = []
    for noise in (1e-2, 1e-3):
        exact = localize(model, data, "activation_patching", noise=noise, null=False, draws=1, **options)
        first = localize(model, data, "attribution_patching", noise=noise, **options)
        apart.append(float((flat(first) - flat(exact)).norm() / flat(exact).norm()))
    assert apart[1] < 5e-3
    assert apart[1] < apart[0] / 5


def test_heads_add_up_to_their_attention_and_neurons_to_their_mlp() -> None:
    model = tiny.model("llama")
    by_unit = {
        unit: localize(model, given(), "attribution_patching", unit=unit).values
        for unit in ("head", "attn", "neuron", "mlp")
    }
    for parts, whole in (("attn.head", "attn"), ("mlp.neuron", "mlp")):
        for layer in range(model.n_layers):
            unit = parts.split(".")[1]
            total = by_unit[unit][f"blocks.{layer}.{parts}"].sum()
            torch.testing.assert_close(total[None], by_unit[whole][f"blocks.{layer}.{whole}"], atol=1e-4, rtol=1e-3)


def test_products_of_small_numbers_in_half_precision_are_not_zero() -> None:
    small = torch.full((1, 1, 4), 1e-4, dtype=torch.float16)
    assert not bool((small * small).any())
    neurons = _by_component("blocks.0.mlp.hook_post", small, small)
    torch.testing.assert_close(neurons, torch.full((1, 1, 4), 1e-8), atol=0, rtol=2e-2)
    assert float(_by_component("blocks.0.hook_mlp_out", small, small)) == pytest.approx(4e-8, rel=2e-2)


def test_steps_average_the_gradient_between_the_two_embeddings() -> None:
    model = tiny.model("gpt2")
    (pair,) = pairs_of(model, given(1), PairOptions())
    batch = batch_of([pair])
    points = [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]
    clean, corrupt = (run(model, batch, side, [*points, "hook_embed"], kind="logit_difference") for side in SIDES)
    mean = [torch.zeros_like(clean.values[point]) for point in points]
    for step in range(4):
        away = corrupt.values["hook_embed"] - clean.values["hook_embed"]
        start = clean.values["hook_embed"] + step / 4 * away
        with tracing.replace(model, {"hook_embed": start}), tracing.record(model, points) as seen:
            logits = model.logits(batch.clean, at=batch.at)
        metric = measured(logits, batch.answer, batch.wrong, kind="logit_difference").sum()
        gradients = torch.autograd.grad(metric, [seen[point] for point in points])
        mean = [total + gradient / 4 for total, gradient in zip(mean, gradients, strict=True)]
    expected = [
        -((corrupt.values[point] - clean.values[point]) * gradient).sum()
        for point, gradient in zip(points, mean, strict=True)
    ]
    found = localize(model, given(1), "attribution_patching", unit="mlp", steps=4, normalise="none")
    torch.testing.assert_close(flat(found), torch.stack(expected), atol=1e-5, rtol=1e-4)
    plain = localize(model, given(1), "attribution_patching", unit="mlp", normalise="none")
    assert not torch.allclose(flat(plain), flat(found), atol=1e-3)


def test_attribution_takes_two_forwards_and_one_backward_a_batch() -> None:
    model = tiny.model("gpt2")
    counted = {"forward": 0, "backward": 0}
    block = model.anatomy.blocks[-1]

    def backward(_: Tensor) -> None:
        counted["backward"] += 1

    def forward(_: nn.Module, __: Any, output: Any) -> None:
        counted["forward"] += 1
        value: Tensor = output[0] if isinstance(output, tuple) else output
        if value.requires_grad:
            value.register_hook(backward)

    handle = block.register_forward_hook(forward)
    options = AttributionPatchingOptions()
    from locedit.localize.attribution_patching import attribution_patching

    attribution_patching(model, given(), options)
    handle.remove()
    assert counted == {"forward": 2, "backward": 1}
    assert all(parameter.requires_grad for parameter in model.core.parameters())
    assert all(parameter.grad is None for parameter in model.core.parameters())


# --- shares, evidence, memory and mistakes ----------------------------------------------------------------------------


def test_scores_are_shares_of_the_total_effect() -> None:
    model = tiny.model("gpt2")
    raw = localize(model, given(), "activation_patching", normalise="none")
    totals = torch.tensor(raw.evidence["pairs"]["clean"]) - torch.tensor(raw.evidence["pairs"]["corrupt"])
    single = [localize(model, task(item), "activation_patching", normalise="none") for item in PAIRS]
    effect = torch.stack([flat(one) for one in single])
    torch.testing.assert_close(flat(raw), effect.mean(0), atol=1e-5, rtol=1e-4)
    item = localize(model, given(), "activation_patching", normalise="item")
    torch.testing.assert_close(flat(item), (effect / totals[:, None]).mean(0), atol=1e-4, rtol=1e-3)
    ratio = localize(model, given(), "activation_patching")
    torch.testing.assert_close(flat(ratio), effect.mean(0) / totals.mean(), atol=1e-4, rtol=1e-3)
    kept = [
        (int(example), float(score), float(single[int(example)].values[site][component]))
        for site, entries in raw.sparse.items()
        for example, component, score in zip(*entries, strict=True)
    ]
    assert {example for example, _, _ in kept} == {0, 1, 2}
    assert [score for _, score, _ in kept] == pytest.approx([alone for _, _, alone in kept], abs=1e-4)


def test_an_estimate_bounds_the_rows_that_fit_into_the_budget() -> None:
    model = tiny.model("llama")
    data = given().forget
    few, many = ExactOptions(batch=4), ExactOptions(batch=64)
    assert 0 < memory(model, data, few) < memory(model, data, many) < 64 * 2**20


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("attribution_patching", {"unit": "layer"}, r"unit='layer': attention and MLP of a layer patched together"),
        ("attribution_patching", {"steps": 0}, r"steps=0 must be at least 1"),
        ("activation_patching", {"window": 0}, r"window=0 must be at least 1"),
        ("activation_patching", {"window": 3}, r"window=3 is for unit mlp or attn, not 'head\+mlp'"),
        ("activation_patching", {"draws": 2}, r"draws=2: given pairs have one corrupt prompt each"),
        ("activation_patching", {"draws": 0}, r"draws=0 must be at least 1"),
        ("causal_tracing", {"unit": "row"}, r"unit='row' is not 'head\+mlp' or 'head'"),
    ],
)
def test_mistakes_are_said_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoceditError, match=message) as caught:
        localize(tiny.model("gpt2"), given(), name, **options)
    assert "\n" not in str(caught.value)


def test_a_metric_that_corruption_raises_is_no_total() -> None:
    model = tiny.model("gpt2")
    raw = localize(model, given(1), "activation_patching", normalise="none")
    higher = raw.evidence["pairs"]["clean"][0] > raw.evidence["pairs"]["corrupt"][0]
    item = PAIRS[0]
    worse = PatchPair(clean=item.corrupt, corrupt=item.clean, answer=item.answer, wrong=item.wrong, id="w")
    with pytest.raises(LoceditError, match="the metric is higher in the corrupt runs .* does the model know these"):
        localize(model, task(worse if higher else item), "activation_patching")

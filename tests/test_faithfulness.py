"""Faithfulness of circuits: areas worked by hand, ends that are exact, circuits equal to ablation in other ways."""

from typing import Any

import pytest
import torch

from locedit import tracing
from locedit.components import ComponentSet, Scores
from locedit.errors import LoceditError
from locedit.faithfulness import SHARES, Faithfulness, FaithfulnessOptions, faithfulness
from locedit.localize import localize
from locedit.localize.patching.pairs import PairBatch, PairOptions, batches_of, metric, pairs_of
from locedit.models import Model
from tests import tiny
from tests.edges import ITEMS, task
from tests.edits import double

HALVES = (0.25, 0.5, 1.0)


def curve(*metrics: float, shares: tuple[float, ...], everything: float = 3.0, nothing: float = 1.0) -> Faithfulness:
    return Faithfulness(
        shares=shares,
        counts=tuple(range(len(shares))),
        metrics=metrics,
        everything=everything,
        nothing=nothing,
        ablation="patch",
        rank="score",
        items=1,
    )


def test_areas_by_hand() -> None:
    """f = 0, 2, 1 at 0, 1/2, 1: areas 1/2 + 3/4 under f, and 1/2 + 1/4 of |1 - f| = 1, 1, 0."""
    made = curve(1.0, 5.0, 3.0, shares=(0.0, 0.5, 1.0))
    assert made.values == (0.0, 2.0, 1.0)
    assert made.cpr == 1.25
    assert made.cmd == 0.75
    assert made.table()["faithfulness"] == [0.0, 2.0, 1.0]
    assert "CPR 1.250, CMD 0.750 over 1 items (ablation patch, rank by score)" in str(made)


def test_a_perfect_circuit_has_the_published_area() -> None:
    perfect = curve(*[3.0] * len(SHARES), shares=SHARES)
    assert perfect.cpr == pytest.approx(0.999, abs=1e-12)
    assert perfect.cmd == 0.0


def scores(model: Model, *units: str) -> Scores:
    sites = {name: site for unit in units for name, site in model.sites(unit).items()}
    generator = torch.Generator().manual_seed(2)
    values = {name: torch.randn(site.count, generator=generator) for name, site in sites.items()}
    return Scores(values=values, sites=sites)


def options(**fields: Any) -> FaithfulnessOptions:
    return FaithfulnessOptions(**fields)


@pytest.mark.parametrize("ablation", ["patch", "mean", "zero"])
@pytest.mark.parametrize("units", [("head", "mlp"), ("neuron",)])
def test_the_full_circuit_is_the_model_and_the_empty_one_is_nothing(ablation: str, units: tuple[str, ...]) -> None:
    model = tiny.model("llama")
    found = faithfulness(model, task(), scores(model, *units), options(ablation=ablation))
    assert found.values[-1] == 1.0
    assert found.counts[-1] == sum(t.numel() for t in scores(model, *units).values.values())
    assert found.counts[0] == 0
    assert found.values[0] == 0.0
    assert found.everything == pytest.approx(mean_metric(model, {}), rel=1e-5)


def test_patching_every_head_and_mlp_is_the_corrupt_run() -> None:
    """The prompts agree at the measured position, so nothing of the clean one is left there."""
    model = double("gpt_neox")
    found = faithfulness(model, task(), scores(model, "head", "mlp"), options())
    drops = localize(model, task(), "eap").evidence["completeness"]
    assert found.nothing == pytest.approx(sum(drops["corrupt"]) / 2, rel=1e-6)
    assert found.everything == pytest.approx(sum(drops["clean"]) / 2, rel=1e-6)
    assert abs(found.everything - found.nothing) > 0.01


@pytest.mark.parametrize("units", [("head", "mlp"), ("neuron",)])
def test_circuits_equal_ablation_of_the_complement(units: tuple[str, ...]) -> None:
    """Zero and mean against `tracing.ablate`, patching against one replacement after the other."""
    model = double("llama")
    made = scores(model, *units)
    for ablation in ("zero", "mean", "patch"):
        for rank, sign in (("score", 1.0), ("size", None)):
            found = faithfulness(model, task(), made, options(ablation=ablation, rank=rank, shares=HALVES, batch=1))
            for share, value in zip(HALVES[:2], found.metrics, strict=False):
                outside = complement(model, made, share, signed=sign is not None)
                assert value == pytest.approx(by_hand(model, outside, ablation), rel=1e-6)


def complement(model: Model, made: Scores, share: float, *, signed: bool) -> ComponentSet:
    ranked = sorted(
        ((name, i, value) for name, tensor in made.values.items() for i, value in enumerate(tensor.tolist())),
        key=lambda entry: -(entry[2] if signed else abs(entry[2])),
    )
    left: dict[str, list[int]] = {}
    for name, i, _ in ranked[int(share * len(ranked)) :]:
        left.setdefault(name, []).append(i)
    return model.components(left)


def by_hand(model: Model, outside: ComponentSet, ablation: str) -> float:
    if ablation == "patch":
        return (
            sum(patched(model, outside, batch) for batch in batches_of(pairs_of(model, task(), PairOptions()), 1)) / 2
        )
    means = None if ablation == "zero" else token_means(model, outside)
    with tracing.ablate(model, outside, means):
        return mean_metric(model, {})


def mean_metric(model: Model, changes: dict[str, Any]) -> float:
    pairs = pairs_of(model, task(), PairOptions())
    with torch.no_grad(), tracing.hooked(model, changes):
        found = [float(metric(model.logits(b.clean, at=b.at), b, PairOptions())) for b in batches_of(pairs, 1)]
    return sum(found) / len(found)


def points(outside: ComponentSet) -> dict[str, str]:
    words = {"head": "attn.hook_z", "mlp": "hook_mlp_out", "neuron": "mlp.hook_post"}
    return {name: f"blocks.{outside.sites[name].layer}.{words[outside.sites[name].unit]}" for name in outside.chosen}


def patched(model: Model, outside: ComponentSet, batch: PairBatch) -> float:
    """Replace component after component by its value in the corrupt run."""
    named = points(outside)
    with torch.no_grad(), tracing.record(model, named.values()) as corrupt:
        model.module(input_ids=batch.corrupt.ids, use_cache=False)

    def swapped(name: str, value: torch.Tensor) -> torch.Tensor:
        new, old = value.clone(), corrupt[named[name]]
        for i in outside.indices(name):
            place: Any = {"head": (..., i, slice(None)), "neuron": (..., i), "mlp": ...}[outside.sites[name].unit]
            new[place] = old[place]
        return new

    with torch.no_grad(), tracing.hooked(model, {p: lambda v, n=n: swapped(n, v) for n, p in named.items()}):
        return float(metric(model.logits(batch.clean, at=batch.at), batch, PairOptions()))


def token_means(model: Model, outside: ComponentSet) -> dict[str, torch.Tensor]:
    """Mean over all tokens of both prompts, run alone."""
    named = points(outside)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in named}
    for item in ITEMS:
        ids = model.tokenizer([item.clean], return_tensors="pt").input_ids
        with torch.no_grad(), tracing.record(model, named.values()) as seen:
            model.module(input_ids=ids, use_cache=False)
        for name, point in named.items():
            rows[name].append(seen[point][0])
    return {name: torch.cat(parts).mean(0) for name, parts in rows.items()}


def test_batches_do_not_matter() -> None:
    model = double("gpt2")
    one, two = (faithfulness(model, task(), scores(model, "head"), options(batch=b, ablation="mean")) for b in (1, 2))
    assert one.metrics == pytest.approx(two.metrics, rel=1e-9)


def test_what_cannot_be_judged_is_one_line() -> None:
    model = tiny.model("gpt2")
    with pytest.raises(
        LoceditError, match="a circuit is of heads, MLPs or neurons; these scores are of blocks.0.attn.qkv"
    ):
        faithfulness(model, task(), scores(model, "column"), options())
    with pytest.raises(LoceditError, match="must ascend from 0 or more to 1"):
        options(shares=(0.5, 0.2, 1.0))
    with pytest.raises(LoceditError, match="must ascend"):
        options(shares=(0.5,))
    silent = tiny.module("gpt2")
    for layer in range(tiny.N_LAYERS):
        torch.nn.init.zeros_(silent.get_parameter(f"transformer.h.{layer}.attn.c_proj.weight"))
    from locedit.models import load

    mute = load(silent, tokenizer=tiny.tokenizer(), device="cpu")
    with pytest.raises(LoceditError, match="with everything and with nothing: no circuit can be judged"):
        faithfulness(mute, task(), scores(mute, "head"), options())

"""Causal tracing: the same noise in every run of an item, draws, shares, and what other codes do."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit.components import Scores
from locedit.errors import LoceditError
from locedit.localize import localize
from locedit.localize.causal_tracing import CausalTracingOptions
from locedit.localize.patching.exact_patching import corruptions
from locedit.localize.patching.node_patching import effects, run
from locedit.localize.patching.nodes import groups_of, patches_of, points_of
from locedit.localize.patching.pairs import Pair, PairOptions, batch_of, pairs_of
from locedit.models import Model
from tests import tiny
from tests.test_pairs import fact, people, task
from tests.test_patching import flat, given

PROBABLE: Any = {"corrupt": "noise", "metric": "probability"}


@pytest.fixture(scope="module")
def llama() -> Model:
    return tiny.model("llama")


def from_run(model: Model, base: Sequence[Pair], source: Sequence[Pair]) -> Tensor:
    """Effects `[item, component]` of heads and MLPs in the corrupt run of `base`, values from that of `source`."""
    patches = patches_of(model, "head+mlp")
    values = run(model, batch_of(source), "corrupt", points_of(patches), kind="probability").values
    batch = batch_of(base)
    where = batch.clean.attention_mask.bool()[:, None].expand(-1, len(patches), -1)
    return effects(model, batch, "corrupt", patches, values, where, kind="probability", rows=64)


def test_a_component_that_keeps_its_value_scores_exactly_0(llama: Model) -> None:
    """The corrupt run of a patched row has the noise of the corrupt run; with another draw nothing would be 0."""
    pairs = pairs_of(llama, task(*people("anna", "dane", "carl")), PairOptions(**PROBABLE))
    assert not from_run(llama, pairs, pairs).any()
    redrawn = [dataclasses.replace(p, noise=p.noise.redrawn(1)) for p in pairs if p.noise]
    assert from_run(llama, pairs, redrawn).all()


def test_noise_drawn_anew_for_each_run_adds_a_constant_to_every_component(llama: Model) -> None:
    """What the code of Guo et al. does: the patched run has one draw of the noise, the run it is compared to another.

    The last block at the subject, which nothing reads, then scores the difference of the two runs, and every other
    component has the same constant on top.
    """
    (pair,) = pairs_of(llama, task(*people("anna")), PairOptions(**PROBABLE))
    assert pair.noise is not None
    redrawn = dataclasses.replace(pair, noise=pair.noise.redrawn(1))
    patches = patches_of(llama, "head+mlp")
    batches = [batch_of([one]) for one in (pair, redrawn)]
    clean = run(llama, batches[0], "clean", points_of(patches), kind="probability")
    corrupt = [run(llama, batch, "corrupt", [], kind="probability").metric for batch in batches]
    where = batches[0].subject[:, None].expand(-1, len(patches), -1)
    matched, other = (
        effects(llama, batch, "corrupt", patches, clean.values, where, kind="probability", rows=64)[0]
        for batch in batches
    )
    published = other + (corrupt[1] - corrupt[0])
    last = torch.tensor([patch.layer == llama.n_layers - 1 for patch in patches])
    assert (matched[last] == 0).all()
    assert (matched[~last] != 0).all()
    assert (published[last] == corrupt[1] - corrupt[0]).all()
    assert abs(corrupt[1] - corrupt[0]) > 1e-4


def test_scores_by_hand(llama: Model) -> None:
    """Mean over the draws, then over the items, as a share of the mean total."""
    data = task(*people("anna", "carl"))
    options = CausalTracingOptions(draws=3)
    patches = patches_of(llama, "head+mlp")
    effect, total = torch.zeros(len(patches), dtype=torch.float64), 0.0
    pairs = corruptions(llama, data, options)
    assert [pair.id for pair in pairs] == ["anna"] * 3 + ["carl"] * 3
    assert len({pair.noise.seed for pair in pairs if pair.noise}) == 6
    for pair in pairs:
        batch = batch_of([pair])
        clean, corrupt = (run(llama, batch, side, points_of(patches), kind="probability") for side in SIDES)
        where = torch.ones(1, len(patches), len(pair.clean), dtype=torch.bool)
        effect += effects(llama, batch, "corrupt", patches, clean.values, where, kind="probability", rows=64)[0] / 6
        total += float(clean.metric - corrupt.metric) / 6
    raw = localize(llama, data, "causal_tracing", draws=3, normalise="none")
    torch.testing.assert_close(flat(raw).double(), effect, atol=1e-7, rtol=1e-4)
    columns = raw.evidence["pairs"]
    shares = sum(columns["clean"]) / 2 - sum(columns["corrupt"]) / 2
    assert shares == pytest.approx(total, abs=1e-6)


SIDES: tuple[Any, Any] = ("clean", "corrupt")


def test_draws_are_averaged_and_the_default_is_eight(llama: Model) -> None:
    options: dict[str, Any] = {"unit": "mlp", "normalise": "none", "null": False}
    default = localize(llama, task(*people("anna")), "causal_tracing", **options)
    eight, one = (localize(llama, task(*people("anna")), "causal_tracing", draws=n, **options) for n in (8, 1))
    assert torch.equal(flat(default), flat(eight))
    assert not torch.allclose(flat(one), flat(eight), rtol=0.05)
    seeded = localize(llama, task(*people("anna")), "causal_tracing", seed=1, **options)
    assert not torch.allclose(flat(seeded), flat(eight), rtol=0.05)


def test_draws_of_a_swap_are_other_partners(llama: Model) -> None:
    names = [("Anna Berg", " Oslo"), ("Anna Dane", " Lima"), ("Eva Frost", " Rome"), ("Carl Carl", " baker")]
    data = task(*(fact(about, about, answer) for about, answer in names))
    pairs = corruptions(llama, data, CausalTracingOptions(corrupt="swap", draws=6))
    partners = {pair.partner for pair in pairs if pair.id == "Anna Berg"}
    assert len(pairs) == 24
    assert len(partners) > 1
    found = localize(llama, data, "causal_tracing", corrupt="swap", draws=2, normalise="none")
    assert len(found.examples) == 4


def test_auto_is_noise_for_facts_and_the_given_prompt_for_pairs(llama: Model) -> None:
    def scores(*items: Any, **options: Any) -> Scores:
        return localize(llama, task(*items), "causal_tracing", normalise="none", unit="mlp", null=False, **options)

    assert torch.equal(flat(scores(*people("anna"))), flat(scores(*people("anna"), corrupt="noise")))
    pair = given(1).forget[0]
    assert torch.equal(flat(scores(pair)), flat(scores(pair, corrupt="given")))
    assert not torch.equal(flat(scores(pair)), flat(scores(pair, corrupt="noise")))


def test_every_architecture_traces() -> None:
    for architecture in ("gpt2", "gptj", "gemma2", "opt", "bert"):
        model = tiny.model(architecture)
        found = localize(model, task(*people("anna", "carl")), "causal_tracing", draws=2, normalise="none")
        assert flat(found).abs().max() > 1e-5
        assert list(found.values)[:2] == ["blocks.0.attn.head", "blocks.0.mlp"]


def test_groups_of_positions() -> None:
    (pair,) = pairs_of(tiny.model("gpt2"), task(*people("anna")), PairOptions(**PROBABLE))
    assert groups_of(pair) == [
        "first subject token",
        "middle subject tokens",
        "last subject token",
        "first token after",
        "further tokens",
        "last token",
    ]


def test_the_map_of_positions_needs_a_total_to_share(llama: Model) -> None:
    """A fact whose answer the corruption does not touch: noise so small that nothing changes."""
    with pytest.raises(LoceditError, match="the metric is on average the same in the clean and the corrupt run"):
        localize(llama, task(*people("anna")), "causal_tracing", noise=1e-9, draws=1, positions="each")
    with pytest.raises(LoceditError, match="item 'anna': the metric is the same in the clean and the corrupt run"):
        localize(llama, task(*people("anna")), "causal_tracing", noise=1e-9, draws=1, normalise="item")

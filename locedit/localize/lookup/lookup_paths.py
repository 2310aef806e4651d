"""From path patching to extraction heads, the layer where they read, and the MLPs that look a fact up.

Guo et al. 2024 (arXiv:2410.12949), for CounterFact. All effects are denoising: the corrupt run with one thing of the
clean run, normalised so that 0 is the corrupt run and 1 the clean one.

1. *Extraction heads*: a head's clean output, the other heads as in the corrupt run, MLPs free, up to the logits.
2. *Reading layer* L*: the lowest layer of the chosen heads. Heads of layer 0 read what no MLP has written to: they are
   among the extraction heads, but by default the reading layer is the lowest above 0 (published: of all).
3. *Lookup MLPs*: an MLP's clean output, at all positions, on the skip path to the stream before L*, from where all
   runs as usual. From L* on there is no such path, so MLPs there have exactly 0.

What is chosen: published are the 10 heads of largest |effect| and every MLP with |effect| >= 0.02. The defaults here
take positive effects only (restoring must help), the fewest heads that have a share of all positive effects, and as
threshold for MLPs the larger of a share of the largest effect and a null: the largest effect over layers when each item
is measured by another item's answer and wrong answer, the 95 % quantile over permutations within the group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float

from locedit.errors import LoceditError
from locedit.localize.lookup.path_effects import Effects, Normalise, effects
from locedit.localize.lookup.path_patching import Node
from locedit.localize.patching.node_scores import SMALLEST_TOTAL
from locedit.localize.patching.pairs import Pair, PairOptions
from locedit.models import Model
from locedit.scores import Table

Sign = Literal["positive", "absolute"]
Layer0 = Literal["apart", "read"]


@dataclass(frozen=True, kw_only=True)
class PathRule:
    """What is chosen from the effects."""

    heads: int = 10
    head_share: float | None = 0.8
    threshold: float | None = None
    mlp_share: float = 0.1
    sign: Sign = "positive"
    layer0: Layer0 = "apart"
    normalise: Normalise = "means"

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise LoceditError(f"heads={self.heads!r} must be at least 1")
        if self.head_share is not None and not 0 < self.head_share <= 1:
            raise LoceditError(f"head_share={self.head_share!r} must be above 0 and at most 1")
        if not 0 < self.mlp_share <= 1:
            raise LoceditError(f"mlp_share={self.mlp_share!r} must be above 0 and at most 1")
        if self.threshold is not None and self.threshold <= 0:
            raise LoceditError(f"threshold={self.threshold!r} must be above 0")


@dataclass(frozen=True, kw_only=True)
class Paths:
    """The extraction heads, the reading layer and the lookup MLPs with their evidence."""

    heads: Table
    mlps: Table
    reading: int
    "L*"
    threshold: float
    total: float
    "mean metric of the clean minus that of the corrupt runs, whose size effects are a share of"
    null: float
    "NaN where there is none: a given threshold, or no two answers in a group"

    @property
    def chosen(self) -> list[int]:
        """Layers of the lookup MLPs."""
        return [layer for layer, chosen in zip(self.mlps["layer"], self.mlps["chosen"], strict=True) if chosen]


def lookup_paths(
    model: Model,
    pairs: Sequence[Pair],
    rule: PathRule,
    options: PairOptions,
    *,
    owners: Sequence[str | None],
    groups: Sequence[str | None],
) -> Paths:
    """Steps 1 to 3."""
    run = partial(effects, model, pairs, options=options, owners=owners, groups=groups)
    nodes = [Node("head", layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    by_head = run([(node,) for node in nodes], receiver=model.n_layers, mlps="free")
    total = float(by_head.scale.mean())
    if abs(total) < SMALLEST_TOTAL:
        raise LoceditError(
            f"clean and corrupt prompts give the same metric on average (difference {total:.2g}): there is nothing to "
            "patch; use other items or another metric"
        )
    value = by_head.normalised(by_head.change, rule.normalise)
    chosen = choose_heads(value, rule)
    reading = reading_layer([nodes[i].layer for i in chosen], rule)
    low, high = by_head.interval(rule.normalise)
    heads: Table = {
        "layer": [node.layer for node in nodes],
        "head": [node.head for node in nodes],
        "effect": value.tolist(),
        "low": low,
        "high": high,
        "chosen": [i in chosen for i in range(len(nodes))],
    }
    layers = list(range(model.n_layers))
    by_mlp = run([(Node("mlp", layer),) for layer in layers], receiver=reading, mlps="frozen")
    value = by_mlp.normalised(by_mlp.change, rule.normalise)
    assert not bool(value[reading:].any()), "an MLP from the reading layer on has no path to it"
    null = null_of(by_mlp, groups, pairs, rule)
    ordered = value.abs() if rule.sign == "absolute" else value
    threshold = rule.threshold or max(rule.mlp_share * float(ordered.max()), 0.0 if null != null else null)
    low, high = by_mlp.interval(rule.normalise)
    mlps: Table = {
        "layer": layers,
        "effect": value.tolist(),
        "low": low,
        "high": high,
        "chosen": [bool(v > 0) and bool(v >= threshold) for v in ordered],
    }
    return Paths(heads=heads, mlps=mlps, reading=reading, threshold=threshold, total=total, null=null)


def choose_heads(value: Float[torch.Tensor, " head"], rule: PathRule) -> list[int]:
    """The numbers of the extraction heads: at most `heads`, and no more than are needed for the share of all effects.

    Empty where no head has a positive effect.
    """
    ordered = value.abs() if rule.sign == "absolute" else value
    order = torch.argsort(ordered, descending=True, stable=True)
    order = order[ordered[order] > 0]
    count = rule.heads
    if rule.head_share is not None:
        carried = ordered[order].cumsum(0) / ordered[order].sum()
        count = min(count, 1 + int((carried < rule.head_share - 1e-9).sum()))
    return order[:count].tolist()


def reading_layer(layers: Sequence[int], rule: PathRule) -> int:
    """L*, from the layers of the extraction heads; 0 where there is none, or none above layer 0.

    >>> reading_layer([0, 3, 2], PathRule()), reading_layer([0, 3, 2], PathRule(layer0="read"))
    (2, 0)
    """
    above = [layer for layer in layers if layer > 0]
    return min(above if above and rule.layer0 == "apart" else layers, default=0)


def null_of(by_mlp: Effects, groups: Sequence[str | None], pairs: Sequence[Pair], rule: PathRule) -> float:
    """The 95 % quantile, over permutations, of the largest effect of an MLP measured by other items' answers."""
    kinds = {name: {(p.answer, p.wrong) for p, g in zip(pairs, groups, strict=True) if g == name} for name in groups}
    if rule.threshold is not None or max(map(len, kinds.values())) < 2:
        return float("nan")
    values = by_mlp.normalised(by_mlp.permuted, rule.normalise)
    values = values.abs() if rule.sign == "absolute" else values
    return float(values.amax(0).quantile(0.95))

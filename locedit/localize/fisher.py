"""Fisher information: which weights the likelihood of some data depends on.

What is scored: the diagonal empirical Fisher information of every weight, F = mean over the examples of (d loss / d
weight)^2, where an example's loss is the mean (or the sum) over its scored tokens of -log p. Every example has its own
gradient before it is squared. A component's score is the sum of F over the weights that training it would change: a
neuron's in, gate and out; a head's q and o, and an equal part of the k and v of its group. So the single weights of an
MLP add up to it, and so do its neurons but for the output bias, which is no neuron's. Sums say how much of the
sensitivity a component holds, and favour large ones; `reduce="mean"` divides by the number of weights, which compares
matrices of different sizes but puts biases and norms first, whose few weights act at every position. Within neurons or
within heads the order is the same.

`relative_fisher` asks what the forget data depends on and the retain data does not: R = F_forget / (F_retain + eps *
mean F_retain) for every weight, summed over the component. For rows this is the square of the row weights of LoKU (Cha
et al. 2025, arXiv:2408.06621). The mean is over all weights that are scored, so R does not change with the scale of the
loss; its default of 0.1 is ours.

LoKU's release differs, and is here by name. It squares the gradient of a batch's mean over tokens
(`variant="batch_squared"`), which shrinks as batches grow. It adds 1e-5 to F_retain whatever its size
(`eps="release"`), which is far more than F_retain where the model fits the retain data well: R then ranks like F_forget
alone. It also draws one retain example for each forget example; here all are used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from locedit.components import Site
from locedit.data.items import Dataset, Task
from locedit.errors import LoceditError
from locedit.localize.information.measuring import FisherOptions, Information, information, memory
from locedit.localize.information.slice_sums import component_sums, parts_of, sizes_of
from locedit.localize.information.squares import Part
from locedit.models import Model
from locedit.scores import Scores, Table

RELEASE_EPS = 1e-5
"what LoKU's release adds to the Fisher information of the retain data"


@dataclass(frozen=True, kw_only=True)
class RelativeFisherOptions(FisherOptions):
    """The same, and how forget is divided by retain."""

    eps: float | Literal["release"] = 0.1
    "added to F_retain, as a share of its mean over all weights that are scored; release: 1e-5 whatever its size"
    ratio: Literal["weights", "components"] = "weights"
    """weights: divide weight by weight, then sum (LoKU), which keeps two numbers for every weight; components: divide
    the sums over components, times the component's size"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps != "release" and not self.eps > 0:
            raise LoceditError(f"eps={self.eps!r} must be above 0, or 'release'")


def fisher(model: Model, task: Task, options: FisherOptions) -> Scores:
    """Fisher information of every component, mean over the examples to forget."""
    sites = model.sites(options.unit)
    found = information(model, task.forget, options, keep=parts_of(sites.values()), what="fisher")
    sums = _sums(sites, found)
    table = {"site": list(sites), "sum": _totals(sums), "mean": _means(sites, sums)}
    return _scores(model, sites, sums, options, found=found, evidence={"items": found.items, "sites": table})


def relative_fisher(model: Model, task: Task, options: RelativeFisherOptions) -> Scores:
    """Fisher information of the data to forget over that of the data to retain, of every component."""
    sites = model.sites(options.unit)
    keep = _kept(sites, options)
    retain_set = task.require("retain", by="relative_fisher")
    retain = information(model, retain_set, options, keep=keep, what="relative_fisher: retain")
    forget = information(model, task.forget, options, keep=keep, what="relative_fisher: forget")
    sums, others = _sums(sites, forget), _sums(sites, retain)
    eps = _absolute(options, sites, others)
    table: Table = {
        "site": list(sites),
        "mean_forget": _means(sites, sums),
        "mean_retain": _means(sites, others),
        "eps": [eps] * len(sites),
        "below_eps": [_below(site, retain, others[name], eps, options=options) for name, site in sites.items()],
    }
    ratios = _ratios(sites, forget, retain, sums=sums, others=others, eps=eps, options=options)
    table["mean_ratio"] = _means(sites, ratios)
    evidence = {"items": forget.items, "retain_items": retain.items, "sites": table}
    return _scores(model, sites, ratios, options, found=forget, evidence=evidence)


def fisher_memory(model: Model, items: Dataset, options: FisherOptions) -> int:
    """Bytes that `fisher` needs beside the model."""
    return memory(model, items, options, keep=parts_of(model.sites(options.unit).values()))


def relative_fisher_memory(model: Model, items: Dataset, options: RelativeFisherOptions) -> int:
    """Bytes that `relative_fisher` needs beside the model, if no retain example is longer than those to forget."""
    keep = _kept(model.sites(options.unit), options)
    kept = memory(model, items, options, keep=keep)
    return kept + 4 * sum(model.parameter(name).numel() for name in keep if "entries" in keep[name])


def _kept(sites: Mapping[str, Site], options: RelativeFisherOptions) -> dict[str, frozenset[Part]]:
    keep = parts_of(sites.values())
    return dict.fromkeys(keep, frozenset[Part](("entries",))) if options.ratio == "weights" else keep


def _sums(sites: Mapping[str, Site], found: Information) -> dict[str, Tensor]:
    return {name: component_sums(site, found.squares.__getitem__) for name, site in sites.items()}


def _totals(sums: Mapping[str, Tensor]) -> list[float]:
    return [float(value.sum(dtype=torch.float64)) for value in sums.values()]


def _means(sites: Mapping[str, Site], sums: Mapping[str, Tensor]) -> list[float]:
    """Over the weights of each site."""
    sizes = [float(sizes_of(site).sum()) for site in sites.values()]
    return [total / size for total, size in zip(_totals(sums), sizes, strict=True)]


def _absolute(options: RelativeFisherOptions, sites: Mapping[str, Site], retain: Mapping[str, Tensor]) -> float:
    """What is added to the Fisher information of the retain data."""
    if options.eps == "release":
        return RELEASE_EPS
    eps = options.eps * sum(_totals(retain)) / sum(float(sizes_of(site).sum()) for site in sites.values())
    if not eps > 0:
        raise LoceditError("relative_fisher: the loss of the retain data has no gradient here, so there is no ratio")
    return eps


def _below(site: Site, retain: Information, sums: Tensor, eps: float, *, options: RelativeFisherOptions) -> float:
    """Share of the site's weights (or of its components) whose retain Fisher information is below eps."""
    if options.ratio == "components":
        return float((sums < eps * sizes_of(site)).double().mean())
    counts = component_sums(site, lambda name: retain.squares[name].map(lambda entries: entries < eps))
    return float(counts.sum(dtype=torch.float64) / sizes_of(site).sum())


def _ratios(
    sites: Mapping[str, Site],
    forget: Information,
    retain: Information,
    *,
    sums: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    eps: float,
    options: RelativeFisherOptions,
) -> dict[str, Tensor]:
    """Sums over each component's weights of the ratio; the weights' own are changed in place."""
    if options.ratio == "components":
        sizes = {name: sizes_of(site) for name, site in sites.items()}
        return {name: sums[name] / (others[name] / sizes[name] + eps) for name in sites}
    for name, squares in forget.squares.items():
        squares.entries.div_(retain.squares[name].entries.add_(eps))
    return _sums(sites, forget)


def _scores(
    model: Model,
    sites: Mapping[str, Site],
    sums: Mapping[str, Tensor],
    options: FisherOptions,
    *,
    found: Information,
    evidence: dict[str, Table],
) -> Scores:
    if found.slow:
        evidence["one_by_one"] = {"parameter": list(found.slow)}
    values = {n: v / sizes_of(sites[n]) if options.reduce == "mean" else v for n, v in sums.items()}
    return Scores(
        values={name: value.float() for name, value in values.items()},
        sites=dict(sites),
        examples=tuple(found.items["id"]),
        evidence=evidence,
        fingerprint=model.fingerprint,
    )

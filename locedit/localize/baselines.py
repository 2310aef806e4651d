"""What a localizer has to beat: chance, the size of weights, the size of activations, and everything at once.

They have the same signature as the methods, so that any comparison can include them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import progress, tracing
from locedit.components import ComponentSet, Site, Unit
from locedit.data.encode import Example, batches, encode
from locedit.data.items import Dataset, Task
from locedit.errors import LoceditError
from locedit.localize.aggregate import Aggregate
from locedit.localize.budget import BatchOptions
from locedit.localize.norms import NeuronOrHead, Written, entering, leaving
from locedit.localize.passes import pass_bytes
from locedit.models import Model
from locedit.scores import Scores

POINTS = {"neuron": "mlp.hook_post", "head": "attn.hook_z"}
"the hook point at which a unit's components are entries of the value"


@dataclass(frozen=True, kw_only=True)
class RandomOptions:
    """Which components, and which draw."""

    unit: Unit = "neuron"
    "ignored with `like`, which brings its own"
    seed: int = 0
    "of the draw"
    like: str | None = None
    "a components.json: as many components in every site as it has come first, in random order"
    disjoint: bool = False
    "with `like`: none of its own components"

    def __post_init__(self) -> None:
        if self.like is not None and not Path(self.like).is_file():
            raise LoceditError(f"like={self.like!r}: no such file; it should be a components.json")
        if self.disjoint and self.like is None:
            raise LoceditError("disjoint=True needs like=FILE, the set that the random one has to avoid")


@dataclass(frozen=True, kw_only=True)
class EverythingOptions:
    """Which components."""

    unit: Unit = "neuron"
    "all of these"


@dataclass(frozen=True, kw_only=True)
class AllMlpsOptions:
    """There is nothing to choose."""


@dataclass(frozen=True, kw_only=True)
class MagnitudeOptions:
    """Which weights are measured."""

    unit: NeuronOrHead = "neuron"
    "what is scored"
    of: Literal["output", "both"] = "output"
    """output: norm of the weights that leave the neuron (its column of the output projection) or head (its columns of
    o); both: times the norm of the weights that enter it (a neuron's input and gate; a head's values, which heads of a
    group share), which does not change when a factor moves from one side to the other"""


@dataclass(frozen=True, kw_only=True)
class ActivationOptions(BatchOptions):
    """Which components, and how many rows to run at a time."""

    unit: NeuronOrHead = "neuron"
    "what is scored"


def random(model: Model, task: Task, options: RandomOptions) -> Scores:  # noqa: ARG001
    """Independent uniform scores between 0 and 1; the data does not matter.

    With `like` the components of one random set of the same size and the same number in every site score above 1, and
    with `disjoint` those of `like` itself 0: `top=` the size of `like` selects that set.
    """
    generator = torch.Generator().manual_seed(options.seed)
    like = None if options.like is None else model.bind(ComponentSet.load(options.like))
    units = (options.unit,) if like is None else like.units
    sites = {name: site for unit in units for name, site in model.sites(unit).items()}
    values = {name: torch.rand(site.count, generator=generator) for name, site in sites.items()}
    if like is not None:
        first = like.random_like(options.seed, disjoint=options.disjoint)
        for name, value in values.items():
            value += _members(first, name)
            if options.disjoint:
                value *= 1 - _members(like, name)
    return Scores(values=values, sites=sites, fingerprint=model.fingerprint)


def _members(components: ComponentSet, site: str) -> Float[Tensor, " component"]:
    """1 for the components of a site that are in the set, else 0."""
    count = components.sites[site].count
    if site in components.masks:
        return components.masks[site].float()
    return torch.zeros(count).index_fill_(0, torch.tensor(components.indices(site), dtype=torch.long), 1.0)


def everything(model: Model, task: Task, options: EverythingOptions) -> Scores:  # noqa: ARG001
    """Every component scores 1; the data does not matter."""
    return _all_alike(model, model.sites(options.unit))


def all_mlps(model: Model, task: Task, options: AllMlpsOptions) -> Scores:  # noqa: ARG001
    """Every MLP scores 1 (the control "All-MLPs" of Guo et al. 2024, arXiv:2410.12949); the data does not matter."""
    return _all_alike(model, model.sites("mlp"))


def _all_alike(model: Model, sites: dict[str, Site]) -> Scores:
    values = {name: torch.ones(site.count) for name, site in sites.items()}
    return Scores(values=values, sites=sites, fingerprint=model.fingerprint)


def magnitude(model: Model, task: Task, options: MagnitudeOptions) -> Scores:  # noqa: ARG001
    """Euclidean norm of each component's weights, biases left out; the data does not matter."""
    sites = model.sites(options.unit)
    values = {name: leaving(model, layer, options.unit) for layer, name in enumerate(sites)}
    if options.of == "both":
        for layer, value in enumerate(values.values()):
            value *= entering(model, layer, options.unit)
    return Scores(values=values, sites=sites, fingerprint=model.fingerprint)


def activation(model: Model, task: Task, options: ActivationOptions) -> Scores:
    """Norm of what each component writes where a scored token is predicted, averaged over tokens, then examples.

    For a neuron |activation| times the norm of its output weights (Chang et al. 2024, arXiv:2311.09060, the baseline
    "activations"); for a head the norm of its columns of o times its part of their input.
    """
    sites = list(model.sites(options.unit).values())
    examples = encode(model, task.forget)
    index = {example.id: number for number, example in enumerate(examples)}
    total = Aggregate(sites, ratio=None)
    names = [f"blocks.{layer}.{POINTS[options.unit]}" for layer in range(model.n_layers)]
    sizes = [Written(model, layer, options.unit) for layer in range(model.n_layers)]
    rows = options.rows(_row_bytes(model, examples, options.unit))
    for batch in progress.track(list(batches(examples, model, rows)), "activation"):
        with torch.no_grad(), tracing.record(model, names) as seen:
            at = batch.predicting(model.causal)
            model.logits(batch, at=at)
        written = [size(seen[name][at.to(seen[name].device)].float()) for name, size in zip(names, sizes, strict=True)]
        size = torch.stack(written)  # [layer, token, component]
        member = torch.tensor(batch.row_members)[at.nonzero()[:, 0]]
        for number, example in enumerate(batch.examples):
            total.update(index[example.id], size[:, member == number].mean(1), id=example.id)
    return total.finish(model, ids=[example.id for example in examples], evidence={})


def activation_memory(model: Model, items: Dataset, options: ActivationOptions) -> int:
    """Bytes of one pass."""
    examples = encode(model, items)
    row = _row_bytes(model, examples, options.unit)
    return options.bytes(row, sum(1 if model.causal else len(example.targets) for example in examples))


def _row_bytes(model: Model, examples: Sequence[Example], unit: NeuronOrHead) -> int:
    kept = model.d_mlp if unit == "neuron" else model.n_heads * model.d_head
    return pass_bytes(model, examples, gradient=False, kept=kept)

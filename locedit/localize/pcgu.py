"""PCGU: which rows or columns of weights tell the advantaged from the disadvantaged side of contrast pairs.

What is scored: every vector of every parameter, in one of two partitions by role. `row`: all weights into one output
unit (an embedding has one for each token); the published "input aggregation". `column`: all weights that leave one
input unit; "output aggregation". Biases and norms are one vector each. Per vector the gradients of the two sides'
logits at the predicting position are compared, each summed over the pairs, and the score is (1 - cosine) / 2: 1 where
they point in opposite directions, 0.5 at right angles, 0 in the same. The k vectors with the lowest cosine are those
that PCGU updates: `scores.select(top=k)`. A vector without a gradient on one side, or with none but rounding error (see
`similarity.opposition`), has score 0 and is never selected (Yu et al. 2023, "Unlearning Bias in Language Models by
Partitioning Gradients", Findings of ACL).

A pair whose sides differ in one token has one input (the token masked, or the text before it), so a batch costs one
forward and two backward passes. The published code runs two of each, with dropout on, which differs between the two;
here there is none. It adds no [CLS] and [SEP]; here texts are encoded as the tokenizer says. Its partition is by
dimension, which swaps rows and columns in GPT-2; here it is by role. Stacks of experts' matrices have no rows and
columns. What is in no passage of the paper that could be checked, such as `signed_dynamic`, is told from its code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import progress, tracing
from locedit.components import Site
from locedit.contrasts import Contrast, Stretch, Value, chunks, contrasts, require_one_token, sides
from locedit.data.encode import encode
from locedit.data.items import Dataset, Task
from locedit.errors import LoceditError
from locedit.localize.budget import BatchOptions
from locedit.localize.similarity import Products, opposition, products
from locedit.models import Model
from locedit.scores import Scores, Table

Gradients = dict[str, Tensor]
"parameter -> gradient summed over pairs, float32 (float64 for a float64 model)"


class Sums:
    """The gradients of the two sides, added up parameter by parameter while a backward pass makes them."""

    def __init__(self) -> None:
        self.sides: tuple[Gradients, Gradients] = ({}, {})
        self.side = 0
        "which side goes backward now"

    def update(self, name: str, gradient: Tensor) -> None:
        """Add one parameter's gradient."""
        total = self.sides[self.side]
        if name in total:
            total[name] += gradient
        else:
            total[name] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class PcguOptions(BatchOptions):
    """Which vectors are compared, and on what."""

    unit: Literal["row", "column"] = "row"
    "row: weights into one output unit (published input aggregation); column: weights that leave one input unit"
    objective: Value = "logit"
    """whose gradients: the raw logit of the token in which the sides differ (published), or the log-probability of the
    stretch in which they differ, which may be several tokens"""
    stretch: Stretch = "differing"
    "the tokens scored: those that differ, or (causal models) all from the first that differs onward"
    mode: Literal["global", "per_batch"] = "global"
    """global: one similarity from the gradients summed over all pairs; per_batch: the mean of the scores of groups of
    `group` pairs, in the order given (the published default selects anew in every batch)"""
    group: int = 16
    "pairs in a group, for mode='per_batch'"
    signed_dynamic: bool = False
    """as the published code does it for its dynamic direction: each pair's gradients are signed so that the lower side
    would rise and the higher fall, which flips the cosine, so that the vectors where both gradients agree score high"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1:
            raise LoceditError(f"group={self.group!r} must be at least 1")


def pcgu(model: Model, task: Task, options: PcguOptions) -> Scores:
    """Scores of all rows or columns; evidence: `items` (both sides of each pair), `sites` (their cosines)."""
    data = task.pairs if task.pairs is not None and task.pairs.kind == "contrast" else task.forget
    pairs = _pairs(model, data, options)
    sites = model.sites(options.unit)
    values = {name: torch.zeros(site.count, dtype=torch.float64) for name, site in sites.items()}
    compared = {name: torch.zeros(site.count, dtype=torch.long) for name, site in sites.items()}
    items: dict[str, tuple[float, float]] = {}
    groups = _groups(pairs, options)
    for group in progress.track(groups, "pcgu"):
        for name, score in scored(sites, *gradients(model, sites, group, options, items=items)).items():
            values[name] += score / len(groups)
            compared[name] += score > 0
    return Scores(
        values={name: value.float() for name, value in values.items()},
        sites=sites,
        examples=tuple(pair.id for pair in pairs),
        evidence={"items": _items(pairs, items, options), "sites": _summary(values, compared)},
        fingerprint=model.fingerprint,
    )


def gradients(
    model: Model,
    sites: dict[str, Site],
    pairs: Sequence[Contrast],
    options: PcguOptions,
    *,
    items: dict[str, tuple[float, float]] | None = None,
) -> tuple[Gradients, Gradients]:
    """Gradients of the two sides, summed over the pairs, of every parameter that a site lies in.

    Pair id -> the two sides is added to `items`. A parameter without gradient is missing.
    """
    parameters = {s.param: model.parameter(s.param) for site in sites.values() for s in site.slices}
    for name, parameter in parameters.items():
        if parameter.is_meta or not parameter.is_floating_point():
            where = "offloaded" if parameter.is_meta else f"stored as {parameter.dtype}"
            raise LoceditError(f"pcgu needs gradients of all weights; {name} is {where}")
    size = options.rows(_bytes_per_row(model, max(pair.length for pair in pairs)))
    sums = Sums()
    for chunk in chunks(pairs, size, causal=model.causal):
        with torch.enable_grad(), tracing.weight_gradients(parameters, sums.update):
            values = sides(model, chunk, value=options.objective)
            signs = _signs(*values, dynamic=options.signed_dynamic)
            for sums.side in (0, 1):
                (signs[sums.side] * values[sums.side]).sum().backward(retain_graph=sums.side == 0)
        if items is not None:
            both = torch.stack(values).detach().double().T.tolist()
            items |= {pair.id: (a, d) for pair, (a, d) in zip(chunk, both, strict=True)}
    return sums.sides


def memory(model: Model, items: Dataset, options: PcguOptions) -> int:
    """Two gradients of every parameter and the largest one more, and the activations of a batch."""
    pairs = _pairs(model, items, options)
    if options.mode == "per_batch":
        pairs = max(_groups(pairs, options), key=lambda group: max(pair.length for pair in group))
    sizes = [p.numel() * max(4, p.element_size()) for p in model.anatomy.parameters.values()]
    rows = sum(pair.rows(causal=model.causal) for pair in pairs)
    row = _bytes_per_row(model, max(pair.length for pair in pairs))
    return 2 * sum(sizes) + max(sizes) + options.bytes(row, rows)


def _bytes_per_row(model: Model, length: int) -> int:
    """What autograd keeps of one text: the streams, neurons and attention patterns of all layers, and its logits."""
    per_token = 16 * model.d_model + 4 * model.d_mlp + 2 * model.n_heads * length
    return model.dtype.itemsize * length * model.n_layers * per_token + 12 * model.vocab_size


def _pairs(model: Model, data: Dataset, options: PcguOptions) -> list[Contrast]:
    pairs = contrasts(encode(model, data), causal=model.causal, stretch=options.stretch)
    if options.objective == "logit":
        require_one_token(pairs, by="pcgu")
    return pairs


def _groups(pairs: list[Contrast], options: PcguOptions) -> list[list[Contrast]]:
    size = len(pairs) if options.mode == "global" else options.group
    return [pairs[at : at + size] for at in range(0, len(pairs), size)]


def _signs(
    advantaged: Float[Tensor, " pairs"], disadvantaged: Float[Tensor, " pairs"], *, dynamic: bool
) -> tuple[Tensor, Tensor]:
    """(of the advantaged, of the disadvantaged): (1, 1), or the published (-s, s) with s = 1 where it is higher."""
    one = torch.ones_like(advantaged)
    if not dynamic:
        return one, one
    up = torch.where(advantaged > disadvantaged, one, -one).detach()
    return -up, up


def scored(sites: dict[str, Site], advantaged: Gradients, disadvantaged: Gradients) -> dict[str, Tensor]:
    """(1 - cosine) / 2 of the vectors of every site with both gradients; those are let go one parameter at a time."""
    found: dict[str, Products] = {}
    for name, site in sites.items():
        (piece,) = site.slices
        first, second = advantaged.pop(piece.param, None), disadvantaged.pop(piece.param, None)
        if first is not None and second is not None:
            found[name] = products(first, second, axis=piece.axis)
    return dict(zip(found, opposition(list(found.values())), strict=True))


def _items(pairs: Sequence[Contrast], values: dict[str, tuple[float, float]], options: PcguOptions) -> Table:
    """Both sides of every pair before anything is changed."""
    found = [values[pair.id] for pair in pairs]
    name = options.objective
    table: dict[str, list[Any]] = {"id": [pair.id for pair in pairs]}
    table[f"{name}_advantaged"] = [a for a, _ in found]
    table[f"{name}_disadvantaged"] = [d for _, d in found]
    return table | {
        "difference": [a - d for a, d in found],
        "preferred": [a > d for a, d in found],
        "one_input": [pair.together for pair in pairs],
    }


def _summary(values: dict[str, Tensor], compared: dict[str, Tensor]) -> Table:
    """One row a site: how many vectors, how many with a gradient on both sides, and their cosines."""
    rows = [(name, value.numel(), *_cosines(1 - 2 * value[compared[name] > 0])) for name, value in values.items()]
    names = ("site", "vectors", "with_gradient", "lowest_cosine", "median_cosine", "opposed")
    return {name: [row[at] for row in rows] for at, name in enumerate(names)}


def _cosines(cosine: Tensor) -> tuple[int, float | None, float | None, int]:
    """(how many, lowest, median, how many below 0)."""
    if not cosine.numel():
        return 0, None, None, 0
    return cosine.numel(), float(cosine.min()), float(cosine.median()), int((cosine < 0).sum())

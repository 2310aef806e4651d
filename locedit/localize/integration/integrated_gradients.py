"""Integrated gradients of the neurons of every MLP, per scored token, with a check that each integral is complete.

A neuron is an entry of the input to the MLP's output projection. For one layer and one scored token, the layer's whole
vector is scaled from 0 to its value at one position, everything else follows; a neuron's score is its value times the
integral, over that path, of the gradient of the objective (Sundararajan et al. 2017, arXiv:1703.01365; for neurons Dai
et al. 2022, arXiv:2104.08696, eq. 2). Higher = the neuron raises the objective. The scores of a layer sum up to the
objective at the path's end minus that at its start; what is missing is the completeness gap.

A fixed number of steps is not enough on trained models: a memorised fact can jump from 0 to 1 within a tenth of the
path. So by default the number of Gauss-Legendre points is doubled, for each layer and token, until the gap is small;
where a norm follows the MLP they crowd near the path's start (see `quadrature.graded`).
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locedit import progress
from locedit.data.encode import Example, encode
from locedit.data.items import Dataset
from locedit.errors import LoceditError
from locedit.localize.integration.blocks import row_bytes
from locedit.localize.integration.captum_path import CaptumPaths
from locedit.localize.integration.paths import Objective, Paths, Prompt, Where, objective_value, prompts_of
from locedit.localize.integration.quadrature import Quadrature, graded, rule
from locedit.localize.integration.staircase import Staircase
from locedit.models import Model

FIRST_STEPS = 8
SMALLEST_CHANGE = 0.01
"a path along which the objective changes by less is held to this change"
HALF_TOLERANCE = 0.05
"what half precision can resolve: more points do not close a smaller gap"
TARGETS = 64
"most targets of one prompt at a time"


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """How to integrate."""

    quadrature: Quadrature = "gauss"
    "gauss; or as published: right (DEPN paper), left (code of DEPN and Dai et al.), eleuther"
    steps: int | None = None
    "points on the path; None = for gauss as many as completeness needs, else 20"
    tolerance: float = 0.01
    "largest completeness gap, as a share of the larger of |change of the objective| and 0.01; for steps=None"
    max_steps: int = 256
    "where doubling ends; paths with a larger gap are marked in the evidence"
    objective: Objective = "probability"
    "of the scored token: probability (as published) or log_probability (natural logarithm)"
    span: Literal["sum", "mean"] = "sum"
    "over the scored tokens of an example"
    position: Where = "predicting"
    "where neurons are scaled: at the position that predicts the token, over the subject, or at all positions (summed)"
    path: Literal["auto", "staircase", "captum"] = "auto"
    "staircase: exact and fast, causal models and the predicting position only; captum: any model, slow"
    batch: int = 8
    "prompts at a time"
    memory_mb: int = 1024
    "budget for what a pass keeps beside the model, in MiB"

    def __post_init__(self) -> None:
        for name in ("steps", "max_steps", "batch", "memory_mb"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LoceditError(f"{name}={value!r} must be at least 1")
        if self.tolerance <= 0:
            raise LoceditError(f"tolerance={self.tolerance!r} must be above 0")


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribution:
    """The scores of one example and how good they are."""

    index: int
    "of the example in the list given"
    scores: Float[Tensor, "layer neuron"]
    "sum or mean over the scored tokens; on the CPU"
    reached: Float[Tensor, " target"]
    "log-probability of each scored token, natural logarithm"
    first: Bool[Tensor, " target"]
    "whether the scored token is the most likely one"
    start: Float[Tensor, "target layer"]
    "objective with the layer's neurons at 0"
    gap: Float[Tensor, "target layer"]
    "|sum of the layer's scores - (objective at the end - objective at the start)|"
    steps: Int[Tensor, "target layer"]
    incomplete: Bool[Tensor, "target layer"]
    "gap above the tolerance"

    def without_scores(self) -> "Attribution":
        """Everything but the scores, which are most of the memory."""
        return replace(self, scores=self.scores[:, :0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Integrals:
    """The integrals of all paths of some prompts."""

    scores: Float[Tensor, "prompt target layer neuron"]
    start: Float[Tensor, "prompt target layer"]
    gap: Float[Tensor, "prompt target layer"]
    steps: Int[Tensor, "prompt target layer"]
    incomplete: Bool[Tensor, "prompt target layer"]


def attributions(
    model: Model, examples: Sequence[Example], options: GradientOptions, *, what: str = "integrated gradients"
) -> Iterator[Attribution]:
    """The attribution of every example, short ones first, prompts of similar length together."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
    staircase = uses_staircase(model, options)
    at_most = min(TARGETS, max(1, options.memory_mb * 2**20 // (16 * model.n_layers * model.d_mlp)))
    waiting: list[tuple[int, Prompt]] = []
    done = 0
    for number, index in enumerate(order):
        prompts = prompts_of(model, examples[index], where=options.position, at_most=at_most)
        waiting += [(index, prompt) for prompt in prompts]
        last = number == len(order) - 1
        if not last and len(waiting) < _together(model, options, waiting):
            continue
        for found in _of_prompts(model, waiting, options, staircase=staircase):
            progress.report(what, done, len(examples))
            done += 1
            yield found
        waiting = []
    progress.report(what, done, len(examples))


def uses_staircase(model: Model, options: GradientOptions) -> bool:
    """Whether the fast path applies; asking for it where it does not is an error."""
    reason = (
        f"{type(model.core).__name__} attends in both directions"
        if not model.causal
        else f"position={options.position!r} scales more than the predicting position"
        if options.position != "predicting"
        else None
    )
    if options.path == "staircase" and reason:
        raise LoceditError(f"path='staircase' does not hold: {reason}; give path='captum' or 'auto'")
    return options.path != "captum" and reason is None


def _together(model: Model, options: GradientOptions, waiting: Sequence[tuple[int, Prompt]]) -> int:
    """How many prompts to take at a time: keys and values of their prefixes, as autograd keeps them, fit the memory."""
    longest = max(len(prompt.ids) for _, prompt in waiting)
    size = torch.finfo(model.dtype).bits // 8
    prefix = 4 * model.n_layers * longest * model.n_heads * model.d_head * size
    return max(1, min(options.batch, options.memory_mb * 2**20 // prefix))


def _of_prompts(
    model: Model, waiting: Sequence[tuple[int, Prompt]], options: GradientOptions, *, staircase: bool
) -> Iterator[Attribution]:
    """Attributions of the examples whose prompts are waiting, all their prompts among them."""
    parts: dict[int, list[Attribution]] = {}
    size = _together(model, options, waiting)
    for begin in range(0, len(waiting), size):
        chunk = waiting[begin : begin + size]
        prompts = [prompt for _, prompt in chunk]
        paths = (Staircase if staircase else CaptumPaths)(
            model, prompts, objective=options.objective, memory_mb=options.memory_mb
        )
        found = integrate(paths, options, layers=model.n_layers, dtype=model.dtype, normed=has_output_norm(model))
        for row, (index, _) in enumerate(chunk):
            parts.setdefault(index, []).append(_attribution(paths, found, index=index, row=row))
        done = {index for index, _ in chunk} - {index for index, _ in waiting[begin + size :]}
        for index in sorted(done):
            yield _joined(parts.pop(index), span=options.span)


def has_output_norm(model: Model) -> bool:
    """Whether a norm follows the MLP (Gemma 2 and 3), so that paths change near their start."""
    return model.anatomy.has("blocks.0.ln2_post")


def integrate(
    paths: Paths, options: GradientOptions, *, layers: int, dtype: torch.dtype, normed: bool = False
) -> Integrals:
    """All integrals, with a fixed rule or with as many points as each needs; `normed` as in `has_output_norm`."""
    active = paths.valid[:, :, None].expand(-1, -1, layers)
    end = objective_value(paths.reached, options.objective)[:, :, None]
    steps = options.steps or (FIRST_STEPS if options.quadrature == "gauss" else 20)
    used = torch.full_like(active, steps, dtype=torch.long)
    adaptive = options.quadrature == "gauss" and options.steps is None
    dense = graded if adaptive and normed else functools.partial(rule, options.quadrature)
    sums = paths.integrate(dense(steps), active)
    scores, start = sums.scores, sums.start
    allowed = (end - start).abs().clamp(min=SMALLEST_CHANGE)
    gap = _gap(scores, end - start, paths.valid)
    resolvable = options.tolerance if dtype in (torch.float32, torch.float64) else HALF_TOLERANCE
    aim = max(options.tolerance, resolvable) * allowed
    while adaptive and 2 * steps <= options.max_steps and bool((todo := active & (gap > aim)).any()):
        steps *= 2
        again = paths.integrate(dense(steps), todo)
        scores = torch.where(todo[..., None], again.scores, scores)
        used = torch.where(todo, steps, used)
        gap = _gap(scores, end - start, paths.valid)
    incomplete = active & (gap > options.tolerance * allowed)
    return Integrals(scores=scores, start=start, gap=gap, steps=used, incomplete=incomplete)


def _gap(scores: Tensor, change: Tensor, valid: Tensor) -> Tensor:
    return (scores.sum(-1, dtype=torch.float64) - change).abs() * valid[:, :, None]


def _attribution(paths: Paths, found: Integrals, *, index: int, row: int) -> Attribution:
    """One prompt's part, its targets summed."""
    valid = paths.valid[row]
    return Attribution(
        index=index,
        scores=found.scores[row].sum(0).cpu(),
        reached=paths.reached[row][valid].cpu(),
        first=paths.first[row][valid].cpu(),
        start=found.start[row][valid].cpu(),
        gap=found.gap[row][valid].cpu(),
        steps=found.steps[row][valid].cpu(),
        incomplete=found.incomplete[row][valid].cpu(),
    )


def _joined(parts: Sequence[Attribution], *, span: Literal["sum", "mean"]) -> Attribution:
    """The prompts of one example as one attribution."""
    reached = torch.cat([part.reached for part in parts])
    scores = torch.stack([part.scores for part in parts]).sum(0)
    return Attribution(
        index=parts[0].index,
        scores=scores if span == "sum" else scores / len(reached),
        reached=reached,
        first=torch.cat([part.first for part in parts]),
        start=torch.cat([part.start for part in parts]),
        gap=torch.cat([part.gap for part in parts]),
        steps=torch.cat([part.steps for part in parts]),
        incomplete=torch.cat([part.incomplete for part in parts]),
    )


def memory(model: Model, items: Dataset, options: GradientOptions) -> int:
    """Bytes that the rows of one pass take at most, within the budget."""
    examples = encode(model, items)
    length = max(len(example.ids) for example in examples)
    targets = max(len(example.targets) for example in examples)
    rows = options.batch * targets * model.n_layers * 2 * (options.steps or FIRST_STEPS)
    return 24 * model.n_layers * model.d_mlp + min(options.memory_mb * 2**20, rows * row_bytes(model, length))

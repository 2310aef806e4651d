"""Fisher information of the weights of a model under some data, measured with a fixed choice of loss and labels."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import losses, progress, tracing
from locedit.components import Unit
from locedit.data.encode import Batch, Example, batches, collate, encode
from locedit.data.items import Dataset
from locedit.errors import LoceditError
from locedit.localize.budget import BatchOptions
from locedit.localize.information.per_sample import Keep, SquaredGradients, squares_of
from locedit.localize.information.squares import Squares
from locedit.localize.integration.blocks import weights_without_gradient
from locedit.losses import Scored
from locedit.models import Model
from locedit.scores import Table


@dataclass(frozen=True, kw_only=True)
class FisherOptions(BatchOptions):
    """What is squared, and what it is summed over."""

    unit: Unit = "neuron"
    "components that are scored; for weight every weight of the model is kept in float32"
    reduce: Literal["sum", "mean"] = "sum"
    "over the weights of a component"
    loss: Literal["mean", "sum"] = "mean"
    "an example's loss: mean or sum over its scored tokens"
    labels: Literal["true", "sampled"] = "true"
    "true: the empirical Fisher; sampled: of tokens that the model draws in their place, once"
    seed: int = 0
    "of sampled labels"
    variant: Literal["per_sample", "batch_squared"] = "per_sample"
    """per_sample: the gradient of each example is squared; batch_squared: that of the mean over the tokens of `group`
    examples, times their number (LoKU's release)"""
    group: int = 4
    "for batch_squared: examples in a squared gradient, in the order of the data (the release: 2 or 4)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1:
            raise LoceditError(f"group={self.group!r} must be at least 1")
        if self.variant == "batch_squared" and (self.loss, self.labels) != ("mean", "true"):
            raise LoceditError("variant='batch_squared' goes with loss='mean' and labels='true', as in the release")


@dataclass(frozen=True, kw_only=True, eq=False)
class Information:
    """Mean over the examples of the squared gradients."""

    squares: dict[str, Squares]
    "by parameter, on the model's devices"
    items: Table
    "id, tokens and loss (nats) of each example, in order"
    slow: tuple[str, ...] = ()
    "parameters that took one backward pass for each example"


@torch.inference_mode(False)
def information(
    model: Model, data: Dataset | Sequence[Example], options: FisherOptions, *, keep: Keep, what: str
) -> Information:
    """Measure what is to be kept of each parameter; for a masked model an example's rows have one gradient."""
    examples = encode(model, data) if isinstance(data, Dataset) else list(data)
    if options.variant == "batch_squared":
        return _of_groups(model, examples, options, keep=keep, what=what)
    gradients = SquaredGradients(model, keep, loss=partial(_losses, model, options))
    found: dict[str, float] = {}
    size = options.rows(row_bytes(model, examples))
    for batch in progress.track(list(batches(examples, model, size)), what):
        ids = [example.id for example in batch.examples]
        found |= dict(zip(ids, gradients.update(batch).tolist(), strict=True))
    items = _items(examples, [found[e.id] for e in examples])
    return Information(squares=gradients.finish(), items=items, slow=tuple(sorted(gradients.slow or ())))


def _of_groups(
    model: Model, examples: Sequence[Example], options: FisherOptions, *, keep: Keep, what: str
) -> Information:
    """As LoKU's release: acc += tokens * (gradient of the mean over the tokens of some examples)^2, over all tokens."""
    squares = squares_of(model, keep)
    parameters = {name: model.parameter(name) for name in keep}
    found: list[float] = []
    with torch.inference_mode(False), torch.enable_grad(), weights_without_gradient(model.module):
        for group in progress.track(_groups(examples, options.group), what):
            tokens = sum(len(example.targets) for example in group)
            with tracing.weight_gradients(parameters, partial(_add, squares, tokens)):
                scored = losses.score(model, collate(group, model))
                nll = -losses.token_log_probs(scored)
                nll.mean().backward()
            found += losses.per_example(scored, nll.detach()).tolist()
    for square in squares.values():
        square.divide(sum(len(example.targets) for example in examples))
    return Information(squares=squares, items=_items(examples, found))


def _groups(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def _add(squares: Mapping[str, Squares], tokens: int, name: str, gradient: Tensor) -> None:
    squares[name].add_gradient(gradient, weight=tokens)


def _items(examples: Sequence[Example], found: Sequence[float]) -> Table:
    return {"id": [e.id for e in examples], "tokens": [len(e.targets) for e in examples], "loss": list(found)}


# --- loss and labels -------------------------------------------------------------------------------------------------


def _losses(model: Model, options: FisherOptions, batch: Batch) -> Float[Tensor, " examples"]:
    scored = losses.score(model, batch)
    if options.labels == "sampled":
        scored = _sampled(scored, options.seed)
    return losses.sequence_nll(scored, reduction=options.loss)


def _sampled(scored: Scored, seed: int) -> Scored:
    """The same with labels drawn from the model's prediction at each scored token.

    An example's draws depend on the seed and its id alone, not on the batch.
    """
    counts = torch.bincount(scored.row, minlength=len(scored.rows)).tolist()
    draws = torch.cat([_uniform(seed, e.id, count) for e, count in zip(scored.rows, counts, strict=True)])
    with torch.no_grad():
        below = scored.logits.double().softmax(1).cumsum(1)  # [n, vocab]
        labels = torch.searchsorted(below, draws.to(below)[:, None]).squeeze(1)
    return replace(scored, labels=labels.clamp(max=scored.logits.shape[1] - 1))


def _uniform(seed: int, id: str, count: int) -> Float[Tensor, " count"]:
    digest = hashlib.sha256(f"{seed} {id}".encode("utf-8", "surrogatepass")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return torch.rand(count, generator=generator, dtype=torch.float64)


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(model: Model, items: Dataset, options: FisherOptions, *, keep: Keep) -> int:
    """Bytes of the sums, of one gradient, and of the largest batch."""
    examples = encode(model, items)
    count = len(examples) if model.causal else sum(len(example.targets) for example in examples)
    sums = sum(
        value.nbytes for square in squares_of(model, keep, device="meta").values() for value in square.sums.values()
    )
    largest = max(model.parameter(name).numel() for name in keep)
    return sums + 4 * largest + options.bytes(row_bytes(model, examples), count)


def row_bytes(model: Model, examples: Sequence[Example]) -> int:
    """What a pass keeps of the longest row: inputs and outputs of all linear maps twice, attention, and logits."""
    length = max(len(example.ids) for example in examples)
    scored = max(len(example.targets) for example in examples) if model.causal else 1
    shapes = [tuple(p.shape) for p in model.anatomy.parameters.values() if p.ndim > 1]
    widths = sum(sum(shape[-2:]) for shape in shapes if model.vocab_size not in shape)
    size = torch.finfo(model.dtype).bits // 8
    return size * length * (2 * widths + 3 * length * model.n_heads * model.n_layers) + 16 * scored * model.vocab_size

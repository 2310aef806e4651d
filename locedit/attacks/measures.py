"""What attacks report in common: the metric of items that they look at, its mean, and the share that is back."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.attacks.options import Metric
from locedit.data.encode import Example
from locedit.data.items import Dataset
from locedit.errors import LoceditError
from locedit.evaluate.facts import SPAN_VALUES
from locedit.evaluate.intervals import Estimate, estimate_mean
from locedit.evaluate.scoring import token_scores
from locedit.models import Model
from locedit.results import Direction, Measure, Stage

SHARE = "share_back"
DIRECTIONS: dict[str, Direction] = {"forget": "lower", "retain": "higher"}


def metric_of(forget: Dataset, asked: Metric | None, *, by: str) -> Metric:
    """The metric that was asked for; None: accuracy for facts, memorization_accuracy for private texts and tokens."""
    if forget.kind not in ("fact", "private", "tokens"):
        raise LoceditError(
            f"{by}: forget items of kind {forget.kind!r} have no answer to bring back; use fact, private or tokens"
        )
    if asked is not None:
        return asked
    return "accuracy" if forget.kind == "fact" else "memorization_accuracy"


def values_of(
    model: Model, examples: Sequence[Example], metric: Metric, *, batch_size: int = 64
) -> Float[Tensor, " item"]:
    """The metric of every example, float64."""
    found = token_scores(model, examples, batch_size=batch_size) if examples else []
    return torch.tensor([SPAN_VALUES[metric](scores) for scores in found], dtype=torch.float64)


def level_measure(
    metric: str,
    values: Float[Tensor, " item"],
    items: Sequence[tuple[str, str]],
    *,
    dataset: str,
    stage: Stage,
    draws: int,
    seed: int,
    group: str | None = None,
) -> Measure:
    """The metric over items, each given as (id, owner)."""
    bounds = (0.0, 1.0)
    found = estimate_mean(values, owners=[owner for _, owner in items], bounds=bounds, draws=draws, seed=seed)
    return Measure(
        name=metric,
        dataset=dataset,
        value=found.value,
        low=found.low,
        high=found.high,
        n=len(items),
        group=group,
        stage=stage,
        direction=DIRECTIONS.get(dataset, "neutral"),
        unit="probability" if metric == "probability" else "share",
        range=bounds,
        per_example=dict(zip((name for name, _ in items), values.double().tolist(), strict=True)),
    )


def share_measure(share: Estimate, count: int, *, group: str | None = None, note: str = "") -> Measure:
    """How much of what was known is back, of so many items."""
    return Measure(
        name=SHARE,
        dataset="forget",
        value=share.value,
        low=share.low,
        high=share.high,
        n=count,
        group=group,
        stage="attacked",
        direction="lower",
        unit="share of the level before the edit, above never-known items",
        note=note,
    )

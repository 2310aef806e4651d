"""Effects of path patching, item by item: normalised, with intervals, and by other items' answers for a null."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locedit import progress
from locedit.errors import LoceditError
from locedit.evaluate.intervals import ends, resampled_means
from locedit.localize.budget import MIB
from locedit.localize.lookup.path_patching import Mlps, Sender, path_patch, row_bytes
from locedit.localize.patching.noise import corrupted
from locedit.localize.patching.pairs import Metric, Pair, PairBatch, PairOptions, batches_of
from locedit.models import Model

Normalise = Literal["means", "items"]
PERMUTATIONS = 200
AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-2}
"largest difference in the metric between a row without senders and the corrupt run, relative where above 1"
HALF_AGREEMENT = 0.3


@dataclass(frozen=True, kw_only=True, eq=False)
class Effects:
    """What senders do to each item, as metric minus that of the corrupt run."""

    change: Float[Tensor, "item sender"]
    scale: Float[Tensor, " item"]
    "metric of the clean run minus that of the corrupt run"
    permuted: Float[Tensor, "item sender permutation"]
    "the change by another item's answer and wrong answer"
    owners: tuple[str | None, ...]

    def normalised(self, change: Float[Tensor, "item ..."], how: Normalise) -> Float[Tensor, "..."]:
        """0 = as the corrupt run, 1 = as the clean one.

        "means" divides the mean by the mean (its size: positive always raises the metric); "items" divides item by
        item, as published, where a single small denominator can decide the mean.
        """
        if how == "means":
            return change.mean(0) / self.scale.mean().abs()
        return (change / self.scale.reshape(-1, *[1] * (change.ndim - 1))).mean(0)

    def interval(self, how: Normalise) -> tuple[list[float], list[float]]:
        """95 % intervals of the normalised effects, bootstrap over owners."""
        if len({*self.owners}) < 2 and None not in self.owners:
            return [float("nan")] * self.change.shape[1], [float("nan")] * self.change.shape[1]
        change = self.change if how == "means" else self.change / self.scale[:, None]
        scale = self.scale if how == "means" else torch.ones_like(self.scale)
        draws = resampled_means(torch.cat([change, scale[:, None]], dim=1), owners=self.owners, draws=1000)
        both = [ends(draws[:, i] / draws[:, -1].abs()) for i in range(change.shape[1])]
        return [low for low, _ in both], [high for _, high in both]


def effects(
    model: Model,
    pairs: Sequence[Pair],
    senders: Sequence[Sender],
    *,
    receiver: int,
    mlps: Mlps,
    options: PairOptions,
    owners: Sequence[str | None],
    groups: Sequence[str | None],
) -> Effects:
    """The effect of every sender on every pair, in their order; groups say among which items answers are permuted."""
    order = {pair.id: number for number, pair in enumerate(pairs)}
    permutation = permutations(groups, seed=options.seed)
    answer = torch.tensor([pair.answer for pair in pairs])[permutation]
    wrong = torch.tensor([-1 if pair.wrong is None else pair.wrong for pair in pairs])[permutation]
    found = torch.zeros(len(pairs), len(senders) + 1, permutation.shape[1], dtype=torch.float64)
    clean = torch.zeros(len(pairs), dtype=torch.float64)
    length = max(len(pair.clean) for pair in pairs)
    size = options.rows(2 * model.n_layers * length * model.d_model * torch.finfo(model.dtype).bits // 8)
    rows = max(1, options.memory_mb * MIB // row_bytes(model, length if receiver < model.n_layers else 1))
    for batch in progress.track(list(batches_of(pairs, size)), "path patching"):
        here = torch.tensor([order[pair.id] for pair in batch.pairs])
        measure = partial(_measure, answer[here], wrong[here], options.metric)
        values = path_patch(
            model, batch, [*senders, ()], receiver=receiver, mlps=mlps, measure=measure, rows=rows
        ).double()
        found[here] = values.transpose(0, 1)
        clean[here] = _plain(model, batch, "clean", measure)
        _check(model, found[here, -1, 0], batch, measure)
    change = found[:, :-1] - found[:, -1:]
    return Effects(
        change=change[..., 0],
        scale=clean - found[:, -1, 0],
        permuted=change[..., 1:],
        owners=tuple(owners),
    )


def permutations(groups: Sequence[str | None], *, seed: int) -> Int[Tensor, "item one_and_permutations"]:
    """For every item the item whose answers are used: first its own, then one's of its group, at random.

    As permutations do, some leave an item its own answer, so a group with few answers has a high null.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.arange(len(groups))]
    members = [torch.tensor([i for i, other in enumerate(groups) if other == name]) for name in dict.fromkeys(groups)]
    for _ in range(PERMUTATIONS):
        column = torch.arange(len(groups))
        for group in members:
            column[group] = group[torch.randperm(len(group), generator=generator)]
        columns.append(column)
    return torch.stack(columns, dim=1)


def _measure(
    answer: Int[Tensor, "item k"], wrong: Int[Tensor, "item k"], kind: Metric, logits: Tensor, item: Tensor
) -> Float[Tensor, "row k"]:
    """The metric of each row by several answers; see `pairs.measured`."""
    item = item.to(answer.device)
    right, other = (ids[item].to(logits.device) for ids in (answer, wrong))
    precise = logits if logits.dtype == torch.float64 else logits.float()
    if kind == "logit_difference":
        return precise.gather(1, right) - precise.gather(1, other)
    value = precise.log_softmax(-1).gather(1, right)
    return value.exp() if kind == "probability" else value


def _plain(model: Model, batch: PairBatch, side: str, measure: partial[Tensor]) -> Tensor:
    """The metric of each item in an ordinary run."""
    with torch.no_grad():
        logits = model.logits(getattr(batch, side), at=batch.at)
    return measure(logits, torch.arange(len(batch)))[:, 0].double().cpu()


def _check(model: Model, control: Tensor, batch: PairBatch, measure: partial[Tensor]) -> None:
    """A row without senders is the corrupt run."""
    with corrupted(model, batch):
        expected = _plain(model, batch, "corrupt", measure)
    allowed = AGREEMENT.get(model.dtype, HALF_AGREEMENT)
    if bool(((control - expected).abs() > allowed * expected.abs().clamp(min=1)).any()):
        raise LoceditError(
            f"{type(model.core).__name__} does more between its blocks than add to the stream, so path patching would "
            "not be exact for it; use by='probe'"
        )

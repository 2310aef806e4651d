"""What an attack's runs add up to: which dose counts, and how much of what was known came back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.evaluate.intervals import Estimate, ends, estimate_mean, resampled_means

SMALLEST_GAP = 0.05
"below this distance between what was known and what was never known, no share of it is given"
UNKNOWN = 0.025
"share of the bootstrap samples without that distance above which no interval is given"


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One relearning run: one split at one learning rate."""

    split: int
    learning_rate: float
    steps: tuple[int, ...]
    "when it was looked at; the first is 0"
    measured: Float[Tensor, "look item"]
    "metric of each item of the half that was not relearned"
    relearned: Float[Tensor, " look"]
    "mean metric of the half that was relearned"
    retain: Float[Tensor, "look retained"]
    "metric of each retain item that was not trained on; no columns without retain data"

    @property
    def recovered(self) -> Float[Tensor, " look"]:
        return self.measured.mean(1)

    def keeps(self, floor: float) -> Tensor:
        """Where the mean retain metric is at least `floor` of what it was before the attack, `[look]`."""
        if self.retain.shape[1] == 0:
            return torch.ones(len(self.steps), dtype=torch.bool)
        retain = self.retain.mean(1)
        return retain >= floor * retain[0] - 1e-9


@dataclass(frozen=True, kw_only=True)
class Dose:
    """A learning rate and a number of steps."""

    learning_rate: float
    steps: int
    within_floor: bool
    "False: the attack broke the retain side at every learning rate and step, and this is the mildest one"


def choose_dose(runs: Sequence[Run], *, floor: float) -> Dose:
    """The dose at which most comes back among those that keep the retain side; of equals the mildest.

    Where nothing comes back at any dose, the longest and strongest is taken instead, so that "does not come back" is
    said of the whole attack.
    """
    best: tuple[tuple[float, float, float], Dose] | None = None
    for run in runs:
        for at in range(1, len(run.steps)):
            if not bool(run.keeps(floor)[at]):
                continue
            recovered = round(float(run.recovered[at]), 6)
            sign = -1 if recovered > float(run.recovered[0]) + 1e-6 else 1
            key = (recovered, sign * run.steps[at], sign * run.learning_rate)
            if best is None or key > best[0]:
                best = key, Dose(learning_rate=run.learning_rate, steps=run.steps[at], within_floor=True)
    if best is not None:
        return best[1]
    mildest = min(runs, key=lambda run: run.learning_rate)
    return Dose(learning_rate=mildest.learning_rate, steps=mildest.steps[1], within_floor=False)


def doses_by_mirror(runs: Mapping[int, Sequence[Run]], *, floor: float) -> dict[int, Dose]:
    """For each split the dose that was best on its mirror, whose measured items are the ones this split relearns.

    So no item takes part in choosing the dose at which it is counted.
    """
    return {split: choose_dose(runs[split ^ 1], floor=floor) for split in runs}


def at_dose(run: Run, dose: Dose) -> int:
    """The look at the dose's steps."""
    return run.steps.index(dose.steps)


def mean_by_item(parts: Sequence[tuple[Sequence[int], Float[Tensor, " _"]]], *, count: int) -> Float[Tensor, " item"]:
    """Mean value of each of `count` items over the parts that hold it; NaN for items in none."""
    sums, times = torch.zeros(count).double(), torch.zeros(count).double()
    for places, values in parts:
        index = torch.tensor(list(places), dtype=torch.long)
        sums.index_add_(0, index, values.double())
        times.index_add_(0, index, torch.ones(len(index)).double())
    return sums / torch.where(times > 0, times, torch.nan)


def gained(
    attacked: Float[Tensor, " item"],
    after: Float[Tensor, " item"],
    *,
    owners: Sequence[str | None],
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean metric of the forget items under the attack less that of the same items without it; owners are resampled."""
    return estimate_mean(attacked.double() - after.double(), owners=owners, draws=draws, seed=seed)


def share_back(
    recovered: Float[Tensor, " item"],
    before: Float[Tensor, " item"],
    *,
    owners: Sequence[str],
    control: Float[Tensor, " control"] | None,
    control_owners: Sequence[str] = (),
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """(recovered - never known) / (before - never known): 1 = all is back, 0 = no more than of what was never known.

    `recovered` and `before` are the metric of the forget items after the attack and before the edit, `control` that of
    held-out items after the same attack (None: 0 is used). Negative when less comes back than is guessed of unknown
    items. The interval resamples owners of both sets. NaN where the model before knew hardly more than the control; and
    no interval where that is so in more than 2.5 % of the samples, whose shares could be anything.
    """
    both = torch.stack([recovered.double(), before.double()], dim=1)
    never = 0.0 if control is None else float(control.double().mean())
    gap = float(both[:, 1].mean()) - never
    if gap < SMALLEST_GAP:
        return Estimate(math.nan, math.nan, math.nan)
    value = (float(both[:, 0].mean()) - never) / gap
    if len(set(owners)) < 2:
        return Estimate(value, math.nan, math.nan)
    means = resampled_means(both, owners=owners, draws=draws, seed=seed)
    never_draws = torch.zeros(draws).double()
    if control is not None:
        drawn = resampled_means(control.double()[:, None], owners=control_owners, draws=draws, seed=seed + 1)
        never_draws = drawn[:, 0]
    gaps = means[:, 1] - never_draws
    known = gaps >= SMALLEST_GAP
    if float(known.double().mean()) < 1 - UNKNOWN:
        return Estimate(value, math.nan, math.nan)
    return Estimate(value, *ends(((means[:, 0] - never_draws) / gaps)[known]))

"""WinoGender for language models: which pronoun a model writes of an occupation.

Rudinger et al. 2018, arXiv:1804.09301, define their measures for coreference systems: the share of pronouns resolved
rightly, apart for sentences whose pronoun goes against the occupation's majority ("gotcha"), and the correlation over
occupations of how much more often a woman's pronoun is resolved to the occupation than a man's with the percentage of
women in it. A language model resolves nothing. Here it is asked which pronoun is the likelier one, as in `association`:
from the pronoun to the end of the sentence for causal models, the pronoun alone for masked ones. The items name the
pronoun that most people of the occupation have (`group`), not the percentage, so that the correlation is with that
(a point-biserial one). The answer is no part of the score: `format` says for whom the pronoun stands.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.data.items import ContrastPair
from locedit.data.winogender import GENDERS, REFERENTS
from locedit.errors import LoceditError
from locedit.evaluate.association import associations
from locedit.evaluate.intervals import Estimate, around, resampled_means
from locedit.evaluate.values import EvaluateOptions, Values, View

MALE, FEMALE = GENDERS[:2]
OCCUPATION = REFERENTS["0"]
FEWEST = 3
"occupations of which a correlation says anything"


def winogender_metrics(view: View, names: Sequence[str]) -> dict[str, Values]:
    """winogender_gap and winogender_correlation."""
    pairs = _checked(view)
    found = associations(view.model, view.dataset, batch_size=view.options.batch_size).tolist()
    favoured = {pair.id: value for pair, value in zip(pairs, found, strict=True)}
    made = {"winogender_gap": _gap, "winogender_correlation": _correlation}
    return {name: made[name](view, pairs, favoured) for name in names}


def _checked(view: View) -> tuple[ContrastPair, ...]:
    pairs = view.dataset.of(ContrastPair, by="winogender")
    for pair in pairs:
        if pair.group not in (MALE, FEMALE) or pair.owner is None or pair.format not in REFERENTS.values():
            raise LoceditError(
                f"item {pair.id!r}: winogender needs pairs whose owner is the occupation, whose group is the pronoun "
                f"that it favours ({MALE} or {FEMALE}) and whose format is {' or '.join(REFERENTS.values())}"
            )
    return pairs


def _gap(view: View, pairs: Sequence[ContrastPair], favoured: Mapping[str, float]) -> Values:
    """log p of the favoured pronoun's sentence minus the other's, where the pronoun stands for the occupation."""
    kept = [pair for pair in pairs if pair.format == OCCUPATION]
    if not kept:
        raise LoceditError(f"{view.dataset.source}: winogender_gap needs pairs of format {OCCUPATION!r}; there is none")
    left = len(pairs) - len(kept)
    return Values(
        per_example={pair.id: favoured[pair.id] for pair in kept},
        owners={pair.id: pair.owner for pair in kept},
        groups={pair.id: (str(pair.group),) for pair in kept},
        note=f"{left} pairs whose pronoun stands for the participant are left out" if left else "",
    )


def _correlation(view: View, pairs: Sequence[ContrastPair], favoured: Mapping[str, float]) -> Values:
    """Correlation over occupations of the mean log-odds of "she" against "he" with being a woman's occupation."""
    if len({pair.group for pair in pairs}) < 2 or len({pair.owner for pair in pairs}) < FEWEST:
        raise LoceditError(
            f"{view.dataset.source}: winogender_correlation needs three occupations or more, of both groups"
        )
    female = {pair.id: favoured[pair.id] if pair.group == FEMALE else -favoured[pair.id] for pair in pairs}
    women = {pair.id: float(pair.group == FEMALE) for pair in pairs}
    owners = {pair.id: str(pair.owner) for pair in pairs}
    return Values(
        per_example=female,
        owners={**owners},
        groups={pair.id: (str(pair.format),) for pair in pairs},
        estimate=functools.partial(_estimate, female, women, owners, view.options),
    )


def _estimate(
    female: Mapping[str, float],
    women: Mapping[str, float],
    owners: Mapping[str, str],
    options: EvaluateOptions,
    ids: Sequence[str],
) -> Estimate:
    """Each occupation once, with the mean over its pairs; the occupations are drawn again for the interval.

    Of two occupations the correlation is 1 or -1 whatever the model says: it is NaN, as where all are favoured alike.
    """
    of: dict[str, list[str]] = {}
    for key in ids:
        of.setdefault(owners[key], []).append(key)
    points = torch.tensor(
        [[sum(column[key] for key in keys) / len(keys) for column in (female, women)] for keys in of.values()],
        dtype=torch.float64,
    )
    if len(points) < FEWEST:
        return Estimate(math.nan, math.nan, math.nan)
    points = points - points.mean(0)
    x, y = points.unbind(1)
    moments = torch.stack([x, y, x * x, y * y, x * y], dim=1)
    drawn = correlation(resampled_means(moments, owners=[None] * len(of), draws=options.draws, seed=options.seed))
    drawn = drawn[drawn.isfinite()]  # a draw of occupations that are all favoured alike has none
    value = correlation(moments.mean(0, keepdim=True)).item()
    return around(value, drawn)


def correlation(moments: Float[Tensor, "draw 5"]) -> Float[Tensor, " draw"]:
    """Pearson's correlation from the means of x, y, x * x, y * y and x * y; NaN where one of the two is constant."""
    x, y, xx, yy, xy = moments.unbind(1)
    spread = ((xx - x * x).clamp(min=0) * (yy - y * y).clamp(min=0)).sqrt()
    return torch.where(spread > 1e-12, (xy - x * y) / spread, torch.nan)

"""Exposure of a secret: how far up the list of all possible secrets the model puts the true one.

exposure = log2 |R| - log2 rank, in bits (Carlini et al. 2019, arXiv:1802.08232, definition 1): 0 when the truth is the
last of the candidate space R, log2 |R| when it is the first; a secret drawn at random that the model never saw has 1.44
bits on average. Candidates are ranked by the probability of the span given the text before it (masked models: by the
pseudo-likelihood of the span).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

MAX_SKEW = 0.99
"a skew-normal distribution cannot have a larger skewness than 0.9953"


def exposure_bits(rank: float, *, log2_space: float) -> float:
    """Exposure in bits of the candidate at `rank` (1 = most likely) of 2**log2_space candidates.

    >>> exposure_bits(1, log2_space=10.0), exposure_bits(1024, log2_space=10.0), exposure_bits(4, log2_space=10.0)
    (10.0, 0.0, 8.0)
    """
    return log2_space - math.log2(rank)


@dataclass(frozen=True, kw_only=True)
class SkewNormal:
    """The distribution that Carlini et al. 2019 (section 4.4) fit to the candidates' negative log-likelihoods."""

    location: float
    scale: float
    shape: float
    "0 = normal; negative = longer tail to the left"

    @classmethod
    def fit(cls, values: Float[Tensor, " sample"]) -> "SkewNormal":
        """Match mean, variance and skewness (method of moments, Azzalini 1985); the skewness is cut at +-0.99."""
        values = values.double()
        mean, spread = values.mean(), values.std(correction=0).clamp(min=1e-12)
        skew = float((((values - mean) / spread) ** 3).mean().clamp(-MAX_SKEW, MAX_SKEW))
        ratio = abs(skew) ** (2 / 3)
        delta = math.copysign(math.sqrt(math.pi / 2 * ratio / (ratio + ((4 - math.pi) / 2) ** (2 / 3))), skew)
        scale = float(spread) / math.sqrt(1 - 2 * delta**2 / math.pi)
        location = float(mean) - scale * delta * math.sqrt(2 / math.pi)
        return cls(location=location, scale=scale, shape=delta / math.sqrt(max(1 - delta**2, 1e-12)))

    def log_below(self, value: float) -> float:
        """Natural log of the probability of drawing at most `value`, accurate far out in the left tail.

        The density 2 phi(z) Phi(shape z) is integrated in log space over steps of 0.005 from 40 below min(z, 0).
        """
        end = (value - self.location) / self.scale
        count = 1 + math.ceil((end - min(end, 0.0) + 40) / 0.005)
        points = torch.linspace(min(end, 0.0) - 40, end, count, dtype=torch.float64)
        log_density = math.log(2 / math.sqrt(2 * math.pi)) - points**2 / 2
        log_density = log_density + torch.special.log_ndtr(self.shape * points)
        step = (points[-1] - points[0]) / (len(points) - 1)
        inside = torch.logsumexp(log_density, 0) + step.log()
        # trapezoid rule: the two end points count half
        ends = torch.logsumexp(log_density[[0, -1]], 0) + (step / 2).log()
        return min(0.0, float(inside + torch.log1p(-(ends - inside).exp())))


def estimated_rank(
    truth: float, samples: Float[Tensor, " sample"], *, log2_space: float, enough: int = 10, normalized: bool = True
) -> float:
    """Rank of the truth in a space too large to enumerate, from uniformly drawn candidates; both in nats (NLL).

    With at least `enough` samples better than the truth the share of them is used; with fewer, a skew-normal fit
    extrapolates. Where the candidates' probabilities sum to at most 1 (`normalized`: causal models, not
    pseudo-likelihoods), no more than 1/p of them can be better than one of probability p, and the rank is cut there.
    """
    better = int((samples < truth).sum())
    share = better / len(samples) if better >= enough else math.exp(SkewNormal.fit(samples).log_below(truth))
    rank = 1 + share * (2.0**log2_space - 1)
    if normalized:
        rank = min(rank, math.exp(min(truth, 700.0)))
    return max(rank, 1.0)

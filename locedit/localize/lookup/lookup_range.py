"""From the probe curve to a range of layers in which facts are looked up, by a rule with every threshold named.

Guo et al. 2024 (arXiv:2410.12949) take "the layers from where the name's tokens have come together up to where the
probe saturates" by eye (Gemma-2 9B: layers 2 to 6). The rule here, on chance-corrected accuracies c:

- *peak*: the largest c over layers. Below `decodable` there is no range: the probes do not find the answer.
- *last*: the first layer after which c is at least `saturation` times the peak.
- *rise*: the first layer after which c has gone at least the share `rise` of the way from the embedding to the peak.
- *joined*: the fewest layers of attention that are enough: the smallest k such that with the attention of layer k and
  of all above at its mean, c still reaches `survival` times the peak at some layer. The name's tokens have come
  together in the attention of layer k - 1, so that layer's MLP is the first to see them (layer k's, where attention
  and MLP are parallel).
- *first*: the later of rise and that layer, but not later than *last*.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from locedit.errors import LoceditError
from locedit.localize.lookup.states import EMBEDDING


@dataclass(frozen=True, kw_only=True)
class RangeRule:
    """The thresholds of the rule."""

    decodable: float = 0.5
    saturation: float = 0.95
    rise: float = 0.1
    survival: float = 0.9

    def __post_init__(self) -> None:
        for name in ("decodable", "saturation", "rise", "survival"):
            if not 0 < getattr(self, name) <= 1:
                raise LoceditError(f"{name}={getattr(self, name)!r} must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class LookupRange:
    """What the rule found."""

    peak: float
    peak_layer: int
    rise: int | None
    saturation: int | None
    attention: int | None
    "how many layers of attention are enough; None = not known, no ablation reaches it"
    first: int | None
    last: int | None
    "None = no range"

    def __contains__(self, layer: int) -> bool:
        return self.first is not None and self.last is not None and self.first <= layer <= self.last


def lookup_range(
    curve: Mapping[int, float], ablated: Mapping[int, Mapping[int, float]], rule: RangeRule, *, parallel: bool
) -> LookupRange:
    """The range of layers.

    Args:
        curve: layer -> chance-corrected accuracy after it, the model as it is; EMBEDDING among them.
        ablated: first layer without attention -> the same from that layer on.
        parallel: whether attention and MLP of a block read the same stream.
    """
    peak_layer = max(curve, key=lambda layer: (curve[layer], -layer))
    peak = curve[peak_layer]
    if peak < rule.decodable or peak_layer == EMBEDDING:
        return LookupRange(
            peak=peak, peak_layer=peak_layer, rise=None, saturation=None, attention=None, first=None, last=None
        )
    layers = sorted(layer for layer in curve if layer != EMBEDDING)
    start = curve[EMBEDDING]
    last = next(layer for layer in layers if curve[layer] >= rule.saturation * peak)
    rise = next(layer for layer in layers if curve[layer] - start >= rule.rise * (peak - start))
    attention = _enough_attention(curve, ablated, least=rule.survival * peak)
    joined = rise if not attention else attention if parallel else attention - 1
    return LookupRange(
        peak=peak,
        peak_layer=peak_layer,
        rise=rise,
        saturation=last,
        attention=attention,
        first=min(max(rise, joined), last),
        last=last,
    )


def _enough_attention(
    curve: Mapping[int, float], ablated: Mapping[int, Mapping[int, float]], *, least: float
) -> int | None:
    """The smallest k after whose removal the accuracy still reaches `least`; what enters layer k is as it was."""
    for first in sorted(ablated):
        if max(curve[first - 1], *ablated[first].values()) >= least:
            return first
    return None

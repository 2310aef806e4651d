"""What can be patched: the components of a unit, the points where each acts, and the positions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtyping import Bool
from torch import Tensor

from locedit.components import Site
from locedit.errors import LoceditError
from locedit.localize.patching.pairs import Pair, PairBatch
from locedit.models import Model

NodeUnit = Literal["head+mlp", "head", "mlp", "attn", "layer", "neuron"]
NODE_UNITS: tuple[NodeUnit, ...] = ("head+mlp", "head", "mlp", "attn", "layer", "neuron")
Positions = Literal["all", "subject", "last", "each"]
POINTS: dict[str, tuple[str, ...]] = {
    "head": ("attn.hook_z",),
    "mlp": ("hook_mlp_out",),
    "attn": ("hook_attn_out",),
    "layer": ("hook_attn_out", "hook_mlp_out"),
    "neuron": ("mlp.hook_post",),
    "resid": ("hook_resid_post",),
}
"where the components of a unit act; `resid` is the whole stream after a block"
KINDS = ("attn", "mlp", "resid")
"what is patched position by position"
GROUPS = (
    "before the subject",
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first token after",
    "further tokens",
    "last token",
)
"the groups of positions, as in figure 1 of Meng et al. 2022, arXiv:2202.05262"


class Place(NamedTuple):
    """A value in a forward pass: a point, and a head's or neuron's number there (None = the whole vector)."""

    point: str
    component: int | None


@dataclass(frozen=True, kw_only=True)
class Patch:
    """What is replaced together in one run."""

    places: tuple[Place, ...]

    @property
    def layer(self) -> int:
        """The first block that it changes."""
        return min(int(place.point.split(".")[1]) for place in self.places)


def sites_of_unit(model: Model, unit: NodeUnit) -> dict[str, Site]:
    """The sites of a unit, or of several that compete, layer by layer."""
    found = [site for word in unit.split("+") for site in model.sites(word).values()]
    return {site.name: site for site in sorted(found, key=lambda site: site.layer or 0)}


def patches_of(model: Model, unit: NodeUnit, *, window: int = 1) -> list[Patch]:
    """One patch for every component, in the order of the sites; MLPs and attentions with their window of layers."""
    return [
        Patch(places=places(site.unit, window_of(model, site.layer or 0, window), None if site.count == 1 else index))
        for site in sites_of_unit(model, unit).values()
        for index in range(site.count)
    ]


def places(kind: str, layers: Iterable[int], index: int | None = None) -> tuple[Place, ...]:
    """Where components of a kind act in some layers."""
    whole = None if kind not in ("head", "neuron") else index or 0
    return tuple(Place(f"blocks.{layer}.{point}", whole) for layer in layers for point in POINTS[kind])


def window_of(model: Model, layer: int, size: int) -> range:
    """The layers around one, as in the code of Meng et al.: size // 2 before it, the others from it on."""
    return range(max(0, layer - size // 2), min(model.n_layers, layer - (-size // 2)))


def points_of(patches: Iterable[Patch]) -> list[str]:
    """The points of some patches, each once."""
    return list(dict.fromkeys(place.point for patch in patches for place in patch.places))


def check_window(window: int, unit: NodeUnit) -> None:
    """Windows are for whole MLPs and attentions."""
    if window < 1:
        raise LoceditError(f"window={window!r} must be at least 1")
    if window > 1 and unit not in ("mlp", "attn"):
        raise LoceditError(f"window={window!r} is for unit mlp or attn, not {unit!r}")


def where(batch: PairBatch, positions: Positions) -> Bool[Tensor, "batch pos"]:
    """The positions that are patched; `each` patches all of them for the scores."""
    if positions == "subject":
        return batch.subject
    return batch.at if positions == "last" else batch.clean.attention_mask.bool()


def groups_of(pair: Pair) -> Sequence[str]:
    """The group of every position of a pair's prompts."""
    assert pair.subject is not None
    first, last = pair.subject.start, pair.subject.end - 1
    names = {pair.at: "last token", first: "first subject token", last: "last subject token"}
    return [
        names.get(position)
        or ("before the subject" if position < first else "")
        or ("middle subject tokens" if position < last else "")
        or ("first token after" if position == last + 1 else "further tokens")
        for position in range(len(pair.clean))
    ]

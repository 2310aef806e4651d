"""The vocabulary of places in a model: slices of parameters, sites of components, and sets of components.

A *site* is all components of one kind in one module, such as the neurons of layer 3's MLP: `blocks.3.mlp.neuron`.
Layer and module are
spelled as in transformer-lens; the last word is the unit. Parameters without such a name (embeddings, norms, biases)
use the Hugging Face
name, a colon and the unit: `model.embed_tokens.weight:row`. Every site knows which slices of which parameters its
components are, so that
sets can be counted, joined and complemented without the model.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from locedit.errors import LoceditError, nearest
from locedit.provenance import Provenance
from locedit.storage import read_json, read_tensors, write_json, write_tensors

Unit = Literal["neuron", "head", "mlp", "attn", "layer", "matrix", "row", "column", "weight"]
UNITS: tuple[Unit, ...] = ("neuron", "head", "mlp", "attn", "layer", "matrix", "row", "column", "weight")
SlicesFor = Literal["train", "write"]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Where the components of one site live in one parameter: component i has `width` entries of `axis` from `start +
    i * stride`.

    >>> head = Slice(param="q_proj.weight", shape=(8, 8), axis=0, stride=4, width=4)
    >>> head.index([1]).tolist()
    [4, 5, 6, 7]
    """

    param: str
    "name of the Hugging Face parameter"
    shape: tuple[int, ...]
    "shape of the parameter"
    axis: int | None
    "the indexed axis; None = the whole parameter, for every component of the site"
    start: int = 0
    stride: int = 1
    width: int = 1
    group: int = 1
    """entry g is shared by components g*group ... g*group+group-1 and belongs to a set only if all of them do
    (grouped keys and values)"""
    write: bool = False
    "zero, mean and scale act here"
    train: bool = True
    "training acts here"

    def index(self, components: Iterable[int]) -> Tensor:
        """Indices along `axis` of the given components, `[n * width]`, ascending by component."""
        chosen = sorted(set(components))
        if self.group > 1:
            here = set(chosen)
            shared = sorted({c // self.group for c in chosen})
            chosen = [g for g in shared if all(g * self.group + j in here for j in range(self.group))]
        starts = torch.tensor(chosen, dtype=torch.long) * self.stride + self.start
        return (starts[:, None] + torch.arange(self.width)).reshape(-1)

    @property
    def entry(self) -> int:
        """Numbers of the parameter in one index of `axis` (the whole parameter when axis is None)."""
        total = int(np.prod(self.shape))
        return total if self.axis is None else total // self.shape[self.axis]


@dataclass(frozen=True, kw_only=True)
class Site:
    """All components of one unit in one place."""

    name: str
    count: int
    "how many components"
    slices: tuple[Slice, ...] = ()

    @property
    def unit(self) -> Unit:
        return unit_of(self.name)

    @property
    def layer(self) -> int | None:
        """The layer number, or None outside the blocks."""
        parts = self.name.split(".")
        return int(parts[1]) if parts[0] == "blocks" else None

    def parameters(self, components: Iterable[int], role: SlicesFor = "train") -> int:
        """Numbers of the model that the given components hold."""
        chosen = list(components)
        if not chosen:
            return 0
        if self.unit == "weight":
            return len(chosen)
        used = [s for s in self.slices if getattr(s, role)]
        return sum(s.entry if s.axis is None else len(s.index(chosen)) * s.entry for s in used)


def unit_of(site: str) -> Unit:
    """The unit that a site's name ends with.

    >>> unit_of("blocks.3.mlp.neuron"), unit_of("blocks.3.mlp"), unit_of("model.norm.weight:row")
    ('neuron', 'mlp', 'row')
    """
    word = site.rsplit(":", 1)[-1].rsplit(".", 1)[-1]
    if word not in UNITS:
        raise LoceditError(f"site {site!r} ends with {word!r}, which is no unit; {nearest(word, UNITS)}")
    return word  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Touched:
    """Entries of one parameter that a set touches."""

    param: str
    shape: tuple[int, ...]
    axis: int | None
    "None: `index` counts the flattened parameter, or the whole parameter is meant when `index` is None too"
    index: Tensor | None
    "ascending, without repetition"


@dataclass(frozen=True, kw_only=True, eq=False)
class ComponentSet:
    """Which components of a model: indices per site, out of a universe that is the sites of the units present.

    `a | b`, `a & b`, `a - b` join, meet and subtract; sets of different units meet and subtract on the weights that
    training them would
    touch, and give a set of single weights. `~a` is the rest of the universe.
    """

    sites: dict[str, Site]
    "the universe: site name -> Site"
    chosen: dict[str, tuple[int, ...]]
    "site name -> ascending component numbers; sites of unit weight are in `masks` instead"
    masks: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    "site of unit weight -> bool `[count]`, row-major over the site's region of the parameter"
    fingerprint: str = ""
    "of the model it was found in"
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        for name, indices in self.chosen.items():
            site = self._site(name)
            if indices and not (indices[0] >= 0 and indices[-1] < site.count):
                wrong = next(i for i in indices if not 0 <= i < site.count)
                raise LoceditError(
                    f"component {wrong} of {name} does not exist; the site has {site.count} (0 to {site.count - 1})"
                )
        for name, mask in self.masks.items():
            if mask.numel() != self._site(name).count:
                raise LoceditError(
                    f"the mask of {name} has {mask.numel()} entries; the site has {self._site(name).count}"
                )

    @classmethod
    def of(
        cls,
        sites: Mapping[str, Site],
        chosen: Mapping[str, Iterable[int]],
        *,
        masks: Mapping[str, Tensor] | None = None,
        fingerprint: str = "",
        provenance: Provenance | None = None,
    ) -> "ComponentSet":
        """A set from indices in any order; sites without a component are left out of `chosen`."""
        ordered = {name: tuple(sorted({int(i) for i in indices})) for name, indices in chosen.items()}
        return cls(
            sites=dict(sites),
            chosen={name: indices for name, indices in ordered.items() if indices},
            masks={name: mask.reshape(-1).bool() for name, mask in (masks or {}).items() if bool(mask.any())},
            fingerprint=fingerprint,
            provenance=provenance,
        )

    def _site(self, name: str) -> Site:
        if name not in self.sites:
            raise LoceditError(f"no site {name!r} in this model; {nearest(name, self.sites)}")
        return self.sites[name]

    # --- looking -------------------------------------------------------------------------------------------------

    @property
    def universe(self) -> dict[str, int]:
        """Site name -> how many components it has."""
        return {name: site.count for name, site in self.sites.items()}

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units of the universe, in the order of UNITS."""
        present = {site.unit for site in self.sites.values()}
        return tuple(u for u in UNITS if u in present)

    def __len__(self) -> int:
        return sum(map(len, self.chosen.values())) + sum(int(mask.sum()) for mask in self.masks.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ComponentSet):
            return NotImplemented
        if self.universe != other.universe or self.chosen != other.chosen or self.masks.keys() != other.masks.keys():
            return False
        return all(torch.equal(mask, other.masks[name]) for name, mask in self.masks.items())

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        total = sum(self.universe.values())
        return f"{len(self):,} of {total:,} components ({', '.join(self.units)}), {self.parameters():,} parameters"

    def __repr__(self) -> str:
        return f"ComponentSet({self})"

    def indices(self, site: str) -> tuple[int, ...]:
        """The chosen component numbers of a site, ascending."""
        if site in self.masks:
            return tuple(self.masks[site].nonzero().flatten().tolist())
        return self.chosen.get(site, ())

    def by_layer(self) -> dict[int | None, int]:
        """How many components each layer holds; None counts those outside the blocks."""
        counts: dict[int | None, int] = {}
        for name, site in self.sites.items():
            if found := len(self.indices(name)):
                counts[site.layer] = counts.get(site.layer, 0) + found
        return dict(sorted(counts.items(), key=lambda item: (item[0] is None, item[0] or 0)))

    # --- parameters ----------------------------------------------------------------------------------------------

    def touched(self, role: SlicesFor = "train") -> list[Touched]:
        """The entries of parameters that the set covers, merged per parameter and axis, in the order of the sites.

        A parameter that is covered as a whole appears once, with axis and index None. Rows and columns of one
        parameter stay apart.
        """
        whole: dict[str, Touched] = {}
        parts: dict[tuple[str, int | None], list[Tensor]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, site in self.sites.items():
            for piece in self._pieces(name, site, role):
                shapes[piece.param] = piece.shape
                if piece.index is None:
                    whole[piece.param] = piece
                elif piece.index.numel():
                    parts.setdefault((piece.param, piece.axis), []).append(piece.index)
        found = list(whole.values())
        for (param, axis), indices in parts.items():
            if param in whole:
                continue
            index = torch.cat(indices).unique()
            full = len(index) == (int(np.prod(shapes[param])) if axis is None else shapes[param][axis])
            found.append(
                Touched(param=param, shape=shapes[param], axis=None if full else axis, index=None if full else index)
            )
        covered = {t.param for t in found if t.index is None}
        return [t for t in found if t.index is None or t.param not in covered]

    def _pieces(self, name: str, site: Site, role: SlicesFor) -> list[Touched]:
        if name in self.masks:
            return [_mask_piece(site, self.masks[name])]
        chosen = self.chosen.get(name, ())
        if not chosen:
            return []
        if not site.slices:
            raise LoceditError(
                f"the set does not say where {name} lives in the parameters; bind it first: model.bind(components)"
            )
        used = [s for s in site.slices if getattr(s, role)]
        return [
            Touched(param=s.param, shape=s.shape, axis=s.axis, index=None if s.axis is None else s.index(chosen))
            for s in used
        ]

    def parameters(self, role: SlicesFor = "train") -> int:
        """How many numbers of the model the set covers, each counted once."""
        by_param: dict[str, list[Touched]] = {}
        for touched in self.touched(role):
            by_param.setdefault(touched.param, []).append(touched)
        return sum(covered(parts) for parts in by_param.values())

    def parameter_mask(self, role: SlicesFor = "train") -> dict[str, Tensor]:
        """Parameter name -> bool mask in the parameter's shape, for every parameter the set touches."""
        by_param: dict[str, list[Touched]] = {}
        for touched in self.touched(role):
            by_param.setdefault(touched.param, []).append(touched)
        return {param: union_mask(parts) for param, parts in by_param.items()}

    def as_weights(self) -> "ComponentSet":
        """The same set as single weights, `<parameter>:weight`, by the slices that training acts on."""
        masks = self.parameter_mask("train")
        sites = {
            f"{param}:weight": _weight_site(param, tuple(mask.shape)) for param, mask in self._all_shapes().items()
        }
        return ComponentSet.of(
            sites, {}, masks={f"{param}:weight": mask for param, mask in masks.items()}, fingerprint=self.fingerprint
        )

    def _all_shapes(self) -> dict[str, Tensor]:
        shapes = {s.param: s.shape for site in self.sites.values() for s in site.slices if s.train}
        return {param: torch.empty(shape, device="meta") for param, shape in shapes.items()}

    # --- algebra -------------------------------------------------------------------------------------------------

    def __or__(self, other: "ComponentSet") -> "ComponentSet":
        self._same_model(other)
        names = self.sites | other.sites
        chosen = {n: set(self.chosen.get(n, ())) | set(other.chosen.get(n, ())) for n in names}
        masks = {n: _either(self.masks.get(n), other.masks.get(n)) for n in self.masks.keys() | other.masks.keys()}
        return ComponentSet.of(names, chosen, masks=masks, fingerprint=self.fingerprint or other.fingerprint)

    def __and__(self, other: "ComponentSet") -> "ComponentSet":
        left, right = self._comparable(other)
        chosen = {n: set(left.chosen.get(n, ())) & set(right.chosen.get(n, ())) for n in left.sites}
        masks = {n: left.masks[n] & right.masks[n] for n in left.masks.keys() & right.masks.keys()}
        return ComponentSet.of(left.sites | right.sites, chosen, masks=masks, fingerprint=left.fingerprint)

    def __sub__(self, other: "ComponentSet") -> "ComponentSet":
        left, right = self._comparable(other)
        chosen = {n: set(left.chosen.get(n, ())) - set(right.chosen.get(n, ())) for n in left.sites}
        masks = {n: mask & ~right.masks[n] if n in right.masks else mask for n, mask in left.masks.items()}
        return ComponentSet.of(left.sites, chosen, masks=masks, fingerprint=left.fingerprint)

    def __invert__(self) -> "ComponentSet":
        indexed = {n: site for n, site in self.sites.items() if site.unit != "weight"}
        chosen = {n: set(range(site.count)) - set(self.chosen.get(n, ())) for n, site in indexed.items()}
        masks = {
            n: ~self.masks.get(n, torch.zeros(site.count, dtype=torch.bool))
            for n, site in self.sites.items()
            if site.unit == "weight"
        }
        return ComponentSet.of(self.sites, chosen, masks=masks, fingerprint=self.fingerprint)

    def overlap(self, other: "ComponentSet") -> float:
        """Shared components over the union (Jaccard), 0 to 1; 0 when both are empty. Across units it counts weights."""
        union = len(self | other) if self.units == other.units else len(self.as_weights() | other.as_weights())
        return len(self & other) / union if union else 0.0

    def random_like(self, seed: int, *, same_layers: bool = True, disjoint: bool = False) -> "ComponentSet":
        """A random set of as many components of the same units.

        `same_layers` keeps the count of every site, which for neurons and heads is the layer histogram; otherwise
        components are drawn
        over all sites of each unit. `disjoint` draws outside this set and raises LoceditError where too few are left.
        """
        generator = torch.Generator().manual_seed(seed)
        chosen: dict[str, list[int]] = {}
        masks: dict[str, Tensor] = {}
        groups = (
            [[n] for n in self.sites]
            if same_layers
            else [[n for n, s in self.sites.items() if s.unit == u] for u in self.units]
        )
        for names in groups:
            wanted = sum(len(self.indices(n)) for n in names)
            for name, indices in self._draw(names, wanted, disjoint=disjoint, generator=generator).items():
                if self.sites[name].unit == "weight":
                    masks[name] = torch.zeros(self.sites[name].count, dtype=torch.bool).index_fill_(0, indices, True)
                else:
                    chosen[name] = indices.tolist()
        return ComponentSet.of(self.sites, chosen, masks=masks, fingerprint=self.fingerprint)

    def _draw(self, names: list[str], wanted: int, *, disjoint: bool, generator: torch.Generator) -> dict[str, Tensor]:
        if not wanted:
            return {}
        free = [self._free(name, disjoint=disjoint) for name in names]
        total = sum(map(len, free))
        if wanted > total:
            raise LoceditError(
                f"cannot draw {wanted} random components outside the set in {', '.join(names)}: only {total} are left"
            )
        drawn = torch.randperm(total, generator=generator)[:wanted].sort().values
        offsets = np.cumsum([0, *map(len, free)])
        return {
            name: free[i][drawn[(drawn >= offsets[i]) & (drawn < offsets[i + 1])] - int(offsets[i])]
            for i, name in enumerate(names)
        }

    def _free(self, name: str, *, disjoint: bool) -> Tensor:
        mask = torch.ones(self.sites[name].count, dtype=torch.bool)
        if disjoint:
            mask[list(self.indices(name))] = False
        return mask.nonzero().flatten()

    def _same_model(self, other: "ComponentSet") -> None:
        if self.fingerprint and other.fingerprint and self.fingerprint != other.fingerprint:
            raise LoceditError(f"the sets are of different models: {self.fingerprint} and {other.fingerprint}")

    def _comparable(self, other: "ComponentSet") -> tuple["ComponentSet", "ComponentSet"]:
        self._same_model(other)
        return (self, other) if self.units == other.units else (self.as_weights(), other.as_weights())

    # --- files ---------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The JSON form; weight masks are saved beside it."""
        return {
            "format": "locedit.components/1",
            "model": self.fingerprint,
            "units": list(self.units),
            "universe": self.universe,
            "components": {n: list(i) for n, i in self.chosen.items()},
            "weights": {n: int(mask.sum()) for n, mask in self.masks.items()},
            "layout": layout_to_json(self.sites),
            "provenance": self.provenance.to_json() if self.provenance else None,
        }

    def save(self, path: str | Path) -> None:
        """Write readable JSON; weight masks go as bits to a safetensors file of the same name beside it."""
        if self.masks:
            bits = {n: torch.from_numpy(np.packbits(mask.numpy())) for n, mask in self.masks.items()}
            write_tensors(Path(path).with_suffix(".safetensors"), bits)
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "ComponentSet":
        """Read what `save` wrote. "universe" and "components" are needed.

        Without "layout" the set must be bound to a model.
        """
        value = read_json(path)
        try:
            layout = layout_from_json(value.get("layout") or {})
            sites = {n: layout.get(n, Site(name=n, count=int(count))) for n, count in value["universe"].items()}
            names = value.get("weights") or {}
            bits = read_tensors(Path(path).with_suffix(".safetensors")) if names else {}
            masks = {n: torch.from_numpy(np.unpackbits(bits[n].numpy(), count=sites[n].count)).bool() for n in names}
            return cls.of(
                sites,
                value["components"],
                masks=masks,
                fingerprint=value.get("model", ""),
                provenance=Provenance.from_json(value.get("provenance")),
            )
        except LoceditError as error:
            raise LoceditError(f"{path}: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise LoceditError(
                f'{path}: not a component set ({error!r}); it needs "universe": {{site: size}} and '
                f'"components": {{site: [numbers]}}'
            ) from error

    def plot(self) -> Any:
        """How many components each layer holds, as a plotly figure."""
        from locedit.report import figures

        return figures.components(self)

    def _repr_html_(self) -> str:
        from locedit.report import fragment

        return fragment(self)


# --- slices as masks -----------------------------------------------------------------------------------------------


def _weight_site(param: str, shape: tuple[int, ...]) -> Site:
    return Site(name=f"{param}:weight", count=int(np.prod(shape)), slices=(Slice(param=param, shape=shape, axis=None),))


def _mask_piece(site: Site, mask: Tensor) -> Touched:
    """A weight mask as flat indices of its parameter.

    The site's one slice says which region of the parameter it covers.
    """
    piece = site.slices[0]
    if piece.axis is None:
        return Touched(param=piece.param, shape=piece.shape, axis=None, index=mask.nonzero().flatten())
    region = piece.index(range(_region_components(site, piece)))
    shape = list(piece.shape)
    shape[piece.axis] = len(region)
    full = torch.zeros(piece.shape, dtype=torch.bool).index_copy_(piece.axis, region, mask.reshape(shape))
    return Touched(param=piece.param, shape=piece.shape, axis=None, index=full.flatten().nonzero().flatten())


def _region_components(site: Site, piece: Slice) -> int:
    return site.count // (piece.entry * piece.width)


def covered(parts: list[Touched]) -> int:
    """How many entries of one parameter the parts touch together."""
    if len(parts) == 1:
        only = parts[0]
        if only.index is None:
            return int(np.prod(only.shape))
        return len(only.index) * (1 if only.axis is None else int(np.prod(only.shape)) // only.shape[only.axis])
    return int(union_mask(parts).sum())


def union_mask(parts: list[Touched]) -> Tensor:
    """The entries of one parameter that any of the parts touches, bool, in its shape."""
    mask = torch.zeros(parts[0].shape, dtype=torch.bool)
    for part in parts:
        if part.index is None:
            return torch.ones(part.shape, dtype=torch.bool)
        if part.axis is None:
            mask.view(-1)[part.index] = True
        else:
            mask.index_fill_(part.axis, part.index, True)
    return mask


def _either(left: Tensor | None, right: Tensor | None) -> Tensor:
    present = [mask for mask in (left, right) if mask is not None]
    return functools.reduce(torch.logical_or, present)


# --- layout as JSON ------------------------------------------------------------------------------------------------


def layout_to_json(sites: Mapping[str, Site]) -> dict[str, list[list[Any]]]:
    """Site name -> [[param, shape, axis, start, stride, width, group, use], ...]; use is a part of "train write"."""
    return {
        name: [[s.param, list(s.shape), s.axis, s.start, s.stride, s.width, s.group, _use(s)] for s in site.slices]
        + [[site.count]]
        for name, site in sites.items()
        if site.slices
    }


def _use(piece: Slice) -> str:
    return " ".join(word for word, on in (("train", piece.train), ("write", piece.write)) if on)


def layout_from_json(value: Mapping[str, list[list[Any]]]) -> dict[str, Site]:
    """The sites that `layout_to_json` wrote."""
    return {
        name: Site(name=name, count=int(rows[-1][0]), slices=tuple(map(_slice, rows[:-1])))
        for name, rows in value.items()
    }


def _slice(row: list[Any]) -> Slice:
    param, shape, axis, start, stride, width, group, use = row
    return Slice(
        param=param, shape=tuple(shape), axis=axis, start=start, stride=stride, width=width, group=group,
        write="write" in use, train="train" in use,
    )  # fmt: skip


from locedit.edges import EdgeScores  # noqa: E402
from locedit.scores import Scores, Table  # noqa: E402  (part of the same vocabulary, in a file of its own)

__all__ = [
    "UNITS", "ComponentSet", "EdgeScores", "Scores", "Site", "Slice", "SlicesFor", "Table", "Touched", "Unit",
    "layout_from_json", "layout_to_json", "unit_of",
]  # fmt: skip

"""How important each component is: what every localizer returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from locedit.edges import EdgeScores
from locedit.errors import LoceditError
from locedit.provenance import Provenance
from locedit.storage import read_json, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from locedit.components import ComponentSet, Site

Table = dict[str, list[Any]]
"a named table behind the scores: column -> JSON values, all columns equally long"
Sparse = tuple[Tensor, Tensor, Tensor]
"(example number, component number, score), each `[entries]`"
Sign = Literal["positive", "absolute", "negative"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """One number per component, higher = more important, averaged over the examples."""

    values: dict[str, Tensor]
    "site -> float32 `[count]` on the CPU"
    sites: dict[str, "Site"]
    "site -> where its components live"
    examples: tuple[str, ...] = ()
    "ids of the examples, in the order of the example numbers"
    sparse: dict[str, Sparse] = field(default_factory=dict[str, Sparse])
    "per-example scores of at least 0.1 of the example's largest score"
    votes: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    "site -> int `[count]`: in how many examples the component passed the localizer's threshold"
    evidence: dict[str, Table] = field(default_factory=dict[str, Table])
    "named tables behind the scores"
    fingerprint: str = ""
    provenance: Provenance | None = None
    edges: EdgeScores | None = None
    "scores of the edges between these components, where the localizer gives them"

    def __post_init__(self) -> None:
        if missing := self.values.keys() - self.sites.keys():
            raise LoceditError(f"scores for unknown sites: {', '.join(sorted(missing))}")
        for name, tensor in self.values.items():
            if tensor.numel() != self.sites[name].count:
                raise LoceditError(f"{name} has {self.sites[name].count} components but {tensor.numel()} scores")
            if not bool(tensor.isfinite().all()):
                raise LoceditError(f"the scores of {name} are not finite; are there NaN weights or an overflow?")

    def __len__(self) -> int:
        return sum(tensor.numel() for tensor in self.values.values())

    def __str__(self) -> str:
        method = self.provenance.method if self.provenance else "unnamed"
        best = ", ".join(f"{site} {index}: {score:.3g}" for site, index, score in self.top(3))
        return f"{method} scores of {len(self):,} components over {len(self.examples)} examples; highest {best}"

    def __repr__(self) -> str:
        return f"Scores({self})"

    def made_by(self, provenance: Provenance) -> "Scores":
        """The same scores, and edges, with that record of how they were made."""
        edges = None if self.edges is None else replace(self.edges, provenance=provenance)
        return replace(self, provenance=provenance, edges=edges)

    def top(self, k: int, *, sign: Sign | str = "positive") -> list[tuple[str, int, float]]:
        """The k best (site, component, score), best first; fewer where fewer have the sign."""
        from locedit.select import best

        return best(self, k, sign=sign)

    def select(
        self,
        *,
        top: int | None = None,
        fraction: float | None = None,
        params: int | None = None,
        threshold: float | None = None,
        shared: float | None = None,
        sign: Sign | str = "positive",
        minus: "Scores | None" = None,
        fill: str = "under",
    ) -> "ComponentSet":
        """The most important components under one budget. See `locedit.select.select` for the options."""
        from locedit.select import select

        return select(
            self,
            top=top,
            fraction=fraction,
            params=params,
            threshold=threshold,
            shared=shared,
            sign=sign,
            minus=minus,
            fill=fill,
        )

    def save(self, folder: str | Path) -> None:
        """Write scores.safetensors and scores.json into `folder`, and those of the edges beside them."""
        tensors: dict[str, Tensor] = {f"values/{n}": t for n, t in self.values.items()}
        tensors |= {f"votes/{n}": t for n, t in self.votes.items()}
        for name, parts in self.sparse.items():
            tensors |= {f"sparse/{name}/{word}": t for word, t in zip(_SPARSE, parts, strict=True)}
        write_tensors(Path(folder) / "scores.safetensors", tensors)
        if self.edges is not None:
            self.edges.save(folder)
        write_json(Path(folder) / "scores.json", self._header())

    def _header(self) -> dict[str, Any]:
        from locedit.components import layout_to_json

        return {
            "format": "locedit.scores/1",
            "model": self.fingerprint,
            "universe": {n: site.count for n, site in self.sites.items()},
            "examples": list(self.examples),
            "evidence": self.evidence,
            "edges": None if self.edges is None else len(self.edges),
            "layout": layout_to_json(self.sites),
            "provenance": self.provenance.to_json() if self.provenance else None,
        }

    @classmethod
    def load(cls, folder: str | Path) -> "Scores":
        """Read what `save` wrote."""
        from locedit.components import Site, layout_from_json

        header = read_json(Path(folder) / "scores.json")
        tensors = read_tensors(Path(folder) / "scores.safetensors")
        try:
            layout = layout_from_json(header["layout"])
            sites = {n: layout.get(n, Site(name=n, count=int(count))) for n, count in header["universe"].items()}
            return cls(
                values=_group(tensors, "values"),
                sites=sites,
                examples=tuple(header["examples"]),
                sparse=_sparse(tensors),
                votes=_group(tensors, "votes"),
                evidence=header["evidence"],
                fingerprint=header["model"],
                provenance=Provenance.from_json(header["provenance"]),
                edges=EdgeScores.load(folder) if header.get("edges") is not None else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LoceditError(f"{folder}: not a scores folder ({error!r})") from error

    def plot(self) -> "Figure":
        """Heat map, layer by component; for `fact_lookup` the evidence behind its choice."""
        from locedit.report import evidence, figures

        return evidence.figure(self) if evidence.has_figure(self) else figures.scores(self)

    def _repr_html_(self) -> str:
        from locedit.report import fragment

        return fragment(self)


_SPARSE = ("example", "component", "score")


def _group(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.split("/", 1)[1]: t for name, t in tensors.items() if name.startswith(f"{kind}/")}


def _sparse(tensors: Mapping[str, Tensor]) -> dict[str, Sparse]:
    found = _group(tensors, "sparse")
    names = sorted({name.rsplit("/", 1)[0] for name in found})
    return {n: (found[f"{n}/example"], found[f"{n}/component"], found[f"{n}/score"]) for n in names}

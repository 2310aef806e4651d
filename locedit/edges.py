"""How important each edge of a model's computation graph is: what edge attribution returns beside node scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from locedit.errors import LoceditError, nearest
from locedit.provenance import Provenance
from locedit.storage import read_json, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from locedit.components import Site
    from locedit.scores import Scores

Node = tuple[str, int]
"(place, number): ('blocks.3.attn.head', 2), ('blocks.3.attn.q', 2), ('blocks.3.mlp', 0), ('input', 0), ('logits', 0)"
Edge = tuple[str, int, str, int, float]
"(source, its number, destination, its number, score)"
SIGNS = ("positive", "absolute", "negative")


@dataclass(frozen=True, kw_only=True, eq=False)
class EdgeScores:
    """One number per edge, from the output of one node to the input of another; higher = more important.

    A source is what is added to the residual stream: the input embedding, a head's output, an MLP's output. A
    destination reads the stream: a head's query, a key/value head's key or value, an MLP, the logits.
    """

    sources: tuple[Node, ...]
    destinations: tuple[Node, ...]
    ends: Tensor
    "numbers of the source and of the destination, int `[edges, 2]`"
    values: Tensor
    "float32 `[edges]` on the CPU, averaged over the examples"
    sites: dict[str, "Site"]
    "site -> where the components are that sources name"
    fingerprint: str = ""
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        if len(self.values) != len(self.ends):
            raise LoceditError(f"{len(self.ends)} edges but {len(self.values)} scores")
        if not bool(self.values.isfinite().all()):
            raise LoceditError("the edge scores are not finite; are there NaN weights or an overflow?")
        for name, side, nodes in (("source", 0, self.sources), ("destination", 1, self.destinations)):
            used = self.ends[:, side]
            if len(wrong := used[(used < 0) | (used >= len(nodes))]):
                raise LoceditError(f"an edge names {name} {int(wrong[0])}; there are {len(nodes)}")
        for place, number in self.sources:
            if place in self.sites and not 0 <= number < self.sites[place].count:
                raise LoceditError(f"source {place} {number} does not exist; the site has {self.sites[place].count}")

    @classmethod
    def of(cls, edges: Sequence[Edge], sites: dict[str, "Site"], **fields: Any) -> "EdgeScores":
        """From edges written out one by one, in any order."""
        sources = tuple(dict.fromkeys((edge[0], edge[1]) for edge in edges))
        destinations = tuple(dict.fromkeys((edge[2], edge[3]) for edge in edges))
        from_number, to_number = ({node: i for i, node in enumerate(nodes)} for nodes in (sources, destinations))
        ends = [[from_number[edge[0], edge[1]], to_number[edge[2], edge[3]]] for edge in edges]
        values = torch.tensor([edge[4] for edge in edges], dtype=torch.float32)
        return cls(
            sources=sources,
            destinations=destinations,
            ends=torch.tensor(ends, dtype=torch.long).reshape(-1, 2),
            values=values,
            sites=sites,
            **fields,
        )

    def __len__(self) -> int:
        return len(self.values)

    def __str__(self) -> str:
        method = self.provenance.method if self.provenance else "unnamed"
        nodes = f"{len(self.sources):,} sources, {len(self.destinations):,} destinations"
        best = ", ".join(f"{name_of(e[:2])} -> {name_of(e[2:4])}: {e[4]:.3g}" for e in self.top(3))
        return f"{method} scores of {len(self):,} edges ({nodes}); highest {best}"

    def __repr__(self) -> str:
        return f"EdgeScores({self})"

    def edges(self, numbers: Sequence[int] | None = None) -> list[Edge]:
        """The edges written out: all of them, or those with the given numbers."""
        chosen = range(len(self)) if numbers is None else numbers
        pairs, values = self.ends.tolist(), self.values.tolist()
        return [(*self.sources[pairs[i][0]], *self.destinations[pairs[i][1]], values[i]) for i in chosen]

    def top(self, k: int, *, sign: Literal["positive", "absolute", "negative"] | str = "positive") -> list[Edge]:
        """The k best edges, best first, ties in their order; fewer where fewer have the sign."""
        if sign not in SIGNS:
            raise LoceditError(f"sign={sign!r}; {nearest(sign, SIGNS)}")
        turned = {"positive": self.values, "negative": -self.values, "absolute": self.values.abs()}[sign]
        order = torch.argsort(turned, descending=True, stable=True)[:k]
        return self.edges(order[turned[order] > 0].tolist())

    def nodes(self, how: Literal["sum", "absolute"] | str = "sum") -> "Scores":
        """Scores of the sources that are components.

        "sum" adds up the edges that leave a node. Where the graph has all edges this is, by the chain rule, exactly
        the first-order effect of the whole node. "absolute" adds up their sizes: it also finds a node whose edges
        cancel.
        """
        from locedit.scores import Scores

        if how not in ("sum", "absolute"):
            raise LoceditError(f"how={how!r}; {nearest(how, ('sum', 'absolute'))}")
        added = self.values.abs() if how == "absolute" else self.values
        totals = torch.zeros(len(self.sources), dtype=torch.float64).index_add_(0, self.ends[:, 0], added.double())
        values = {name: torch.zeros(site.count) for name, site in self.sites.items()}
        for (place, number), total in zip(self.sources, totals.tolist(), strict=True):
            if place in values:
                values[place][number] = total
        return Scores(values=values, sites=self.sites, fingerprint=self.fingerprint, provenance=self.provenance)

    def save(self, folder: str | Path) -> None:
        """Write edges.safetensors and edges.json into `folder`."""
        from locedit.components import layout_to_json

        write_tensors(Path(folder) / "edges.safetensors", {"ends": self.ends, "values": self.values})
        header = {
            "format": "locedit.edges/1",
            "model": self.fingerprint,
            "sources": [list(node) for node in self.sources],
            "destinations": [list(node) for node in self.destinations],
            "universe": {name: site.count for name, site in self.sites.items()},
            "layout": layout_to_json(self.sites),
            "provenance": self.provenance.to_json() if self.provenance else None,
        }
        write_json(Path(folder) / "edges.json", header)

    @classmethod
    def load(cls, folder: str | Path) -> "EdgeScores":
        """Read what `save` wrote."""
        from locedit.components import Site, layout_from_json

        header = read_json(Path(folder) / "edges.json")
        tensors = read_tensors(Path(folder) / "edges.safetensors")
        try:
            layout = layout_from_json(header["layout"])
            return cls(
                sources=_from_json(header["sources"]),
                destinations=_from_json(header["destinations"]),
                ends=tensors["ends"],
                values=tensors["values"],
                sites={n: layout.get(n, Site(name=n, count=int(c))) for n, c in header["universe"].items()},
                fingerprint=header["model"],
                provenance=Provenance.from_json(header["provenance"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LoceditError(f"{folder}: not a folder of edge scores ({error!r})") from error

    def plot(self) -> "Figure":
        """Heat map, module that writes by module that reads: of each pair the edge with the largest score."""
        from locedit.report.edge_map import edge_map

        return edge_map(self)


def name_of(node: tuple[Any, ...]) -> str:
    """A node in words.

    >>> name_of(("blocks.3.attn.head", 2)), name_of(("blocks.3.mlp", 0)), name_of(("logits", 0))
    ('blocks.3.attn.head 2', 'blocks.3.mlp', 'logits')
    """
    place, number = node
    return f"{place} {number}" if ".attn." in place else place


def _from_json(rows: Sequence[Sequence[Any]]) -> tuple[Node, ...]:
    return tuple((str(place), int(number)) for place, number in rows)

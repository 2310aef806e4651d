"""Scores as a file of the MIB circuit track, and back.

The format is that of EAP-IG's graphs and of the Mechanistic Interpretability Benchmark (Mueller et al. 2025,
arXiv:2504.13151): `importances.json` with cfg, nodes ("input", "a0.h1", "m0", "logits") and edges ("a0.h1->m3",
"m0->a2.h0<q>"). What has a place in it:

- scores of heads and of whole MLPs: `score` of their nodes. Nodes without a score stay in every circuit there.
- scores of an MLP's hidden neurons: their *sum* is the score of the MLP. What the format calls neurons are the d_model
  coordinates of a node's output, and hidden neurons are none of these.
- scores of the rows of an MLP's output matrix: these are the coordinates of its output, and become `neurons_scores`.
- edges. The format has a key and a value input for every query head; where heads share them, each gets an equal part
  of the score, so that the parts add up to it (reading the file adds them up again).

`in_graph` says what is in the set that is given with the scores; without one everything is.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from locedit.components import ComponentSet, Site
from locedit.edges import Edge, EdgeScores
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.scores import Scores
from locedit.storage import read_json, write_text

Json = dict[str, Any]
_HEAD, _MLP = r"a(\d+)\.h(\d+)", r"m(\d+)"
_PLACED = re.compile(r"blocks\.(\d+)\.(attn\.head|mlp|mlp\.neuron|mlp\.out\.row)")


def export_mib(scores: Scores, model: Model, path: str | Path, *, chosen: ComponentSet | None = None) -> None:
    """Write `scores`, and the edges beside them, as an importances.json."""
    write_text(path, json.dumps(to_mib(scores, model, chosen=chosen), allow_nan=False) + "\n")


def import_mib(path: str | Path, model: Model) -> Scores:
    """The scores in an importances.json of the same model, with its edges where it has any."""
    value = read_json(path)
    try:
        return from_mib(value, model)
    except LoceditError as error:
        raise LoceditError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoceditError(f'{path}: not a circuit file ({error!r}); it needs "cfg", "nodes" and "edges"') from error


# --- writing ----------------------------------------------------------------------------------------------------------


def to_mib(scores: Scores, model: Model, *, chosen: ComponentSet | None = None) -> Json:
    """The content of the file."""
    _require_same(scores.fingerprint, model, "scores")
    if misplaced := [name for name in scores.values if not _PLACED.fullmatch(name)]:
        raise LoceditError(
            f"the circuit format has no place for {misplaced[0]}: it takes heads, MLPs, their neurons (summed), "
            "and rows of mlp.out"
        )
    inside = _inside(model, chosen)
    nodes: dict[str, Json] = {name: {"in_graph": inside[name]} for name in inside}
    for site, values in scores.values.items():
        _place(nodes, scores.sites[site], values.tolist(), chosen)
    edges = {} if scores.edges is None else _edges_to_mib(scores.edges, model, inside)
    made = scores.provenance
    about = {"method": made.method if made else "", "settings": made.settings if made else {}, "model": model.name}
    return {"cfg": _config(model), "nodes": nodes, "edges": edges, "locedit": about}


def _config(model: Model) -> Json:
    return {
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "parallel_attn_mlp": model.parallel,
        "d_model": model.d_model,
    }


def _inside(model: Model, chosen: ComponentSet | None) -> dict[str, bool]:
    """Node -> whether it is in the circuit: it, or for an MLP any of its neurons or rows, is in the set."""
    found = {"input": True}
    for layer in range(model.n_layers):
        for head in range(model.n_heads):
            found[f"a{layer}.h{head}"] = chosen is None or head in chosen.indices(f"blocks.{layer}.attn.head")
        parts = [f"blocks.{layer}.{word}" for word in ("mlp", "mlp.neuron", "mlp.out.row")]
        found[f"m{layer}"] = chosen is None or any(chosen.indices(part) for part in parts)
    return found | {"logits": True}


def _place(nodes: dict[str, Json], site: Site, values: list[float], chosen: ComponentSet | None) -> None:
    """Put the scores of a site into their nodes."""
    if site.unit == "head":
        for head, value in enumerate(values):
            nodes[f"a{site.layer}.h{head}"]["score"] = value
    elif site.unit == "row":
        picked = set(range(site.count)) if chosen is None else set(chosen.indices(site.name))
        nodes[f"m{site.layer}"]["neurons"] = [row in picked for row in range(site.count)]
        nodes[f"m{site.layer}"]["neurons_scores"] = values
    else:
        nodes[f"m{site.layer}"]["score"] = sum(values)


def _edges_to_mib(edges: EdgeScores, model: Model, inside: Mapping[str, bool]) -> dict[str, Json]:
    group = model.n_heads // model.n_kv_heads
    found: dict[str, Json] = {}
    for source, number, destination, other, score in edges.edges():
        start = _node_name(source, number)
        ends = [_node_name(destination, other)]
        if destination.endswith((".attn.k", ".attn.v")):
            ends = [_node_name(destination, other * group + i) for i in range(group)]
        for end in ends:
            within = inside[start] and inside[end.split("<")[0]]
            found[f"{start}->{end}"] = {"score": score / len(ends), "in_graph": within}
    return found


def _node_name(place: str, number: int) -> str:
    """'blocks.3.attn.head', 2 -> 'a3.h2'; 'blocks.3.attn.q', 2 -> 'a3.h2<q>'; 'blocks.3.mlp' -> 'm3'."""
    if not place.startswith("blocks."):
        return place
    _, layer, kind = place.split(".", 2)
    if kind == "mlp":
        return f"m{layer}"
    letter = kind.removeprefix("attn.")
    return f"a{layer}.h{number}" + ("" if letter == "head" else f"<{letter}>")


# --- reading ----------------------------------------------------------------------------------------------------------


def from_mib(value: Json, model: Model) -> Scores:
    """Scores from the content of a file; its nodes are heads and MLPs, its neurons rows of mlp.out."""
    for name, own in _config(model).items():
        if value["cfg"][name] != own:
            raise LoceditError(
                f"the circuit is of a model with {name}={value['cfg'][name]!r}, {model.name} has {own!r}"
            )
    listed: dict[str, list[tuple[int, float]]] = {}
    values: dict[str, torch.Tensor] = {}
    for name, node in value["nodes"].items():
        if _is_score(node.get("score")) and name != "input":
            site, number = _site_of(name)
            listed.setdefault(site, []).append((number, float(node["score"])))
        if "neurons_scores" in node:
            values[_rows_of(name)] = torch.tensor(node["neurons_scores"], dtype=torch.float32)
    universe = {**model.sites("head"), **model.sites("mlp"), **model.sites("row")}
    for site, scored in listed.items():
        _require_all(universe[site], [number for number, _ in scored])
        values[site] = torch.tensor([score for _, score in sorted(scored)], dtype=torch.float32)
    edges = _edges_from_mib(value["edges"], model) if value["edges"] else None
    if not values and edges is not None:
        values = edges.nodes().values
    return Scores(
        values=values,
        sites={name: universe[name] for name in values},
        fingerprint=model.fingerprint,
        edges=edges,
    )


def _is_score(value: Any) -> bool:
    return value is not None and value == value  # NaN stands for a node without a score


def _site_of(name: str) -> tuple[str, int]:
    if match := re.fullmatch(_HEAD, name):
        return f"blocks.{match[1]}.attn.head", int(match[2])
    if match := re.fullmatch(_MLP, name):
        return f"blocks.{match[1]}.mlp", 0
    raise LoceditError(f"node {name!r} is neither a head (a0.h1) nor an MLP (m0)")


def _rows_of(name: str) -> str:
    site, _ = _site_of(name)
    if not site.endswith(".mlp"):
        raise LoceditError(f"node {name!r} has neurons_scores, which only MLPs can have: rows of mlp.out")
    return f"{site}.out.row"


def _require_all(site: Site, numbers: list[int]) -> None:
    missing = sorted(set(range(site.count)) - set(numbers))
    if missing:
        raise LoceditError(f"{site.name}: component {missing[0]} has no score, others of the {site.count} have")


def _edges_from_mib(listed: Mapping[str, Json], model: Model) -> EdgeScores:
    group = model.n_heads // model.n_kv_heads
    totals: dict[tuple[str, int, str, int], float] = {}
    for name, edge in listed.items():
        start, _, end = name.partition("->")
        source, number = ("input", 0) if start == "input" else _site_of(start)
        destination, other = _destination(end, group)
        key = (source, number, destination, other)
        totals[key] = totals.get(key, 0.0) + float(edge["score"])
    edges: list[Edge] = [(*key, score) for key, score in totals.items()]
    return EdgeScores.of(edges, model.sites("head") | model.sites("mlp"), fingerprint=model.fingerprint)


def _destination(name: str, group: int) -> tuple[str, int]:
    if match := re.fullmatch(_HEAD + r"<([qkv])>", name):
        number = int(match[2])
        return f"blocks.{match[1]}.attn.{match[3]}", number if match[3] == "q" else number // group
    return ("logits", 0) if name == "logits" else _site_of(name)


def _require_same(fingerprint: str, model: Model, what: str) -> None:
    if fingerprint and fingerprint != model.fingerprint:
        raise LoceditError(f"the {what} are of another model than {model.name}")

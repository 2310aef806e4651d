"""Edge scores: what leaves a node, the best edges, files, figure, and what cannot be."""

from pathlib import Path
from typing import Any

import pytest
import torch

from locedit.components import EdgeScores, Scores, Site
from locedit.edges import Edge
from locedit.errors import LoceditError
from locedit.provenance import Provenance
from tests import tiny

HEADS, MLP = "blocks.0.attn.head", "blocks.0.mlp"
SITES = {HEADS: Site(name=HEADS, count=3), MLP: Site(name=MLP, count=1)}
EDGES: list[Edge] = [
    ("input", 0, "blocks.0.attn.q", 0, 2.0),
    (HEADS, 0, MLP, 0, 0.5),
    (HEADS, 0, "logits", 0, -0.25),
    (HEADS, 2, "logits", 0, 1.0),
    (MLP, 0, "logits", 0, -3.0),
]


def edges(**fields: Any) -> EdgeScores:
    return EdgeScores.of(EDGES, SITES, **fields)


def test_nodes_add_up_the_edges_that_leave_them() -> None:
    made = edges()
    assert made.edges() == EDGES
    assert {n: v.tolist() for n, v in made.nodes().values.items()} == {HEADS: [0.25, 0.0, 1.0], MLP: [-3.0]}
    assert {n: v.tolist() for n, v in made.nodes("absolute").values.items()} == {HEADS: [0.75, 0.0, 1.0], MLP: [3.0]}


def test_top_by_sign() -> None:
    made = edges()
    assert made.top(2) == [EDGES[0], EDGES[3]]
    assert made.top(10) == [EDGES[0], EDGES[3], EDGES[1]]
    assert made.top(2, sign="negative") == [EDGES[4], EDGES[2]]
    assert made.top(2, sign="absolute") == [EDGES[4], EDGES[0]]


def test_text_names_the_best_edges() -> None:
    text = str(edges(provenance=Provenance(method="eap")))
    assert text.startswith("eap scores of 5 edges (4 sources, 3 destinations); highest input -> blocks.0.attn.q 0: 2,")
    assert "blocks.0.attn.head 2 -> logits: 1" in text


def test_files_give_the_same_edges_back(tmp_path: Path) -> None:
    made = edges(fingerprint="abc", provenance=Provenance(method="eap", settings={"steps": 5}))
    made.save(tmp_path)
    back = EdgeScores.load(tmp_path)
    assert (back.edges(), back.sites, back.fingerprint, back.provenance) == (
        made.edges(),
        made.sites,
        made.fingerprint,
        made.provenance,
    )
    assert torch.equal(back.values, made.values)


def test_scores_carry_their_edges(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    sites = model.sites("head")
    listed: list[Edge] = [(HEADS, 3, "logits", 0, 1.5)]
    scores = EdgeScores.of(listed, sites, fingerprint=model.fingerprint).nodes()
    assert scores.edges is None
    scores.save(tmp_path)
    assert Scores.load(tmp_path).edges is None
    with_edges = Scores(values=scores.values, sites=sites, edges=EdgeScores.of(listed, sites))
    made = with_edges.made_by(Provenance(method="eap"))
    made.save(tmp_path)
    back = Scores.load(tmp_path)
    assert back.edges is not None
    assert back.edges.edges() == listed
    assert back.edges.sites == sites
    assert back.edges.provenance == Provenance(method="eap") == back.provenance
    scores.save(tmp_path)  # the files of the edges are still there, but they are no longer these scores'
    assert Scores.load(tmp_path).edges is None


def test_figure_shows_the_largest_edge_of_each_pair_of_modules() -> None:
    heat: Any = edges().plot().data[0]
    assert list(heat.y) == ["input", "0 head", "0 mlp"]
    assert list(heat.x) == ["0 q", "0 mlp", "logits"]
    assert [list(row) for row in heat.z] == [[2.0, None, None], [None, 0.5, 1.0], [None, None, -3.0]]
    assert heat.text[1][2] == "blocks.0.attn.head 2 → logits: 1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(4)}, "5 edges but 4 scores"),
        ({"values": torch.full((5,), torch.nan)}, "not finite"),
        ({"ends": torch.full((5, 2), 3)}, "names destination 3; there are 3"),
        ({"sources": (("input", 0), (HEADS, 0), (HEADS, 3), (MLP, 0))}, "source blocks.0.attn.head 3 does not exist"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    made = edges()
    fields: dict[str, Any] = {
        name: getattr(made, name) for name in ("sources", "destinations", "ends", "values", "sites")
    }
    with pytest.raises(LoceditError, match=message):
        EdgeScores(**(fields | change))


def test_wrong_words_and_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(LoceditError, match=r"sign='up'; choices: positive, absolute, negative"):
        edges().top(1, sign="up")
    with pytest.raises(LoceditError, match=r"how='sun'; did you mean 'sum'"):
        edges().nodes("sun")
    with pytest.raises(LoceditError, match="no such file"):
        EdgeScores.load(tmp_path)
    edges().save(tmp_path)
    (tmp_path / "edges.json").write_text("{}")
    with pytest.raises(LoceditError, match="not a folder of edge scores"):
        EdgeScores.load(tmp_path)

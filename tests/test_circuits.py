"""Scores in the form of the MIB circuit track: names, numbers worked by hand, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from locedit.circuits import export_mib, from_mib, import_mib, to_mib
from locedit.cli import main
from locedit.components import EdgeScores, Scores
from locedit.edges import Edge
from locedit.errors import LoceditError
from locedit.localize import localize
from locedit.models import Model
from tests import tiny
from tests.edges import ITEMS, task


def published_names(cfg: dict[str, Any]) -> tuple[list[str], set[str]]:
    """Nodes and edges of a graph with that cfg, as the format's own documentation counts them."""
    nodes, edges = ["input"], set[str]()
    for layer in range(cfg["n_layers"]):
        before = list(nodes)
        heads = [f"a{layer}.h{head}" for head in range(cfg["n_heads"])]
        edges |= {f"{node}->{head}<{letter}>" for node in before for head in heads for letter in "qkv"}
        edges |= {f"{node}->m{layer}" for node in (before if cfg["parallel_attn_mlp"] else before + heads)}
        nodes += [*heads, f"m{layer}"]
    return [*nodes, "logits"], edges | {f"{node}->logits" for node in nodes}


def some(model: Model, unit: str) -> Scores:
    sites = model.sites(unit)
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(site.count, generator=generator) for name, site in sites.items()}
    return Scores(values=values, sites=sites, fingerprint=model.fingerprint)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
def test_the_file_has_every_published_name_and_comes_back(architecture: str, tmp_path: Path) -> None:
    model = tiny.model(architecture)
    scores = localize(model, task(), "eap")
    export_mib(scores, model, tmp_path / "importances.json")
    content = json.loads((tmp_path / "importances.json").read_text())
    assert content["cfg"] == {
        "n_layers": 3,
        "n_heads": 4,
        "d_model": tiny.D_MODEL,
        "parallel_attn_mlp": architecture == "gpt_neox",
    }
    nodes, edges = published_names(content["cfg"])
    assert list(content["nodes"]) == nodes
    assert content["edges"].keys() == edges
    assert all("score" in node for name, node in content["nodes"].items() if name not in ("input", "logits"))
    assert all(entry["in_graph"] is True for part in ("nodes", "edges") for entry in content[part].values())
    back = import_mib(tmp_path / "importances.json", model)
    assert back.values.keys() == scores.values.keys()
    assert all(torch.equal(back.values[name], scores.values[name]) for name in scores.values)
    assert scores.edges is not None
    assert back.edges is not None
    ours, theirs = ({edge[:4]: edge[4] for edge in made.edges()} for made in (scores.edges, back.edges))
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[edge] - theirs[edge]) for edge in ours) < 1e-6


def test_heads_that_share_a_key_get_equal_parts_of_its_score() -> None:
    """Two key/value heads for four heads: heads 2 and 3 read the key of group 1; a query is a head's own."""
    model = tiny.model("llama")
    listed: list[Edge] = [
        ("input", 0, "blocks.1.attn.k", 1, 3.0),
        ("blocks.0.mlp", 0, "blocks.1.attn.q", 2, 5.0),
        ("blocks.1.attn.head", 3, "logits", 0, -2.0),
    ]
    made = EdgeScores.of(listed, model.sites("head") | model.sites("mlp"), fingerprint=model.fingerprint)
    nodes = made.nodes()
    content = to_mib(Scores(values=nodes.values, sites=nodes.sites, edges=made), model)
    assert {name: edge["score"] for name, edge in content["edges"].items()} == {
        "input->a1.h2<k>": 1.5,
        "input->a1.h3<k>": 1.5,
        "m0->a1.h2<q>": 5.0,
        "a1.h3->logits": -2.0,
    }
    assert content["nodes"]["a1.h3"] == {"in_graph": True, "score": -2.0}
    assert content["nodes"]["m0"] == {"in_graph": True, "score": 5.0}
    assert content["nodes"]["input"] == {"in_graph": True}


def test_a_set_says_what_is_in_the_graph() -> None:
    model = tiny.model("gpt2")
    scores = localize(model, task(), "eap")
    chosen = model.components({"blocks.0.attn.head": [2], "blocks.1.mlp": [0]})
    content = to_mib(scores, model, chosen=chosen)
    inside = [name for name, node in content["nodes"].items() if node["in_graph"]]
    assert inside == ["input", "a0.h2", "m1", "logits"]
    assert {name for name, edge in content["edges"].items() if edge["in_graph"]} == {
        "input->a0.h2<q>",
        "input->a0.h2<k>",
        "input->a0.h2<v>",
        "input->m1",
        "input->logits",
        "a0.h2->m1",
        "a0.h2->logits",
        "m1->logits",
    }


def test_hidden_neurons_are_summed_and_rows_of_the_output_are_the_formats_neurons() -> None:
    model = tiny.model("gpt2")
    neurons = some(model, "neuron")
    content = to_mib(neurons, model)
    for layer in range(3):
        expected = float(neurons.values[f"blocks.{layer}.mlp.neuron"].double().sum())
        assert content["nodes"][f"m{layer}"]["score"] == pytest.approx(expected)
    assert "score" not in content["nodes"]["a0.h0"]
    rows = some(model, "row")
    kept = {name: value for name, value in rows.values.items() if name.endswith("mlp.out.row")}
    content = to_mib(Scores(values=kept, sites=rows.sites), model)
    assert content["nodes"]["m1"]["neurons_scores"] == kept["blocks.1.mlp.out.row"].tolist()
    assert content["nodes"]["m1"]["neurons"] == [True] * tiny.D_MODEL
    assert "neurons_scores" not in content["nodes"]["a1.h0"]
    back = from_mib(content, model)
    assert all(torch.equal(back.values[name], kept[name]) for name in kept)


def test_nodes_without_a_score_and_nan_are_left_out() -> None:
    model = tiny.model("gpt2")
    content = to_mib(some(model, "mlp"), model)
    content["nodes"]["a0.h0"]["score"] = float("nan")
    assert from_mib(content, model).values.keys() == {f"blocks.{layer}.mlp" for layer in range(3)}
    content["nodes"]["a0.h1"]["score"] = 1.0
    with pytest.raises(LoceditError, match=r"blocks.0.attn.head: component 0 has no score, others of the 4 have"):
        from_mib(content, model)


def test_what_has_no_place_is_one_line(tmp_path: Path) -> None:
    model, other = tiny.model("gpt2"), tiny.model("gpt2", seed=1)
    with pytest.raises(LoceditError, match="no place for blocks.0.attn.qkv.row"):
        to_mib(some(model, "row"), model)
    with pytest.raises(LoceditError, match="the scores are of another model"):
        to_mib(some(model, "head"), other)
    export_mib(some(model, "head"), model, tmp_path / "i.json")
    with pytest.raises(LoceditError, match=r"i.json: the circuit is of a model with n_layers=3, .* has 2"):
        import_mib(tmp_path / "i.json", tiny.model("gpt2", n_layer=2))
    (tmp_path / "i.json").write_text('{"cfg": {}}')
    with pytest.raises(LoceditError, match="i.json: not a circuit file"):
        import_mib(tmp_path / "i.json", model)


def test_the_command_measures_and_writes_and_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data, run = (str(tmp_path / name) for name in ("model", "pairs.jsonl", "run"))
    tiny.module("llama").save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    fields = ("clean", "corrupt", "answer", "wrong", "id")
    rows = [json.dumps({name: getattr(item, name) for name in fields}) for item in ITEMS]
    Path(data).write_text("\n".join(rows) + "\n")
    assert main(["localize", model, data, "--method", "eap", "--top", "3", "--out", run]) == 0
    folder, file = f"{run}/localize/eap", str(tmp_path / "importances.json")
    capsys.readouterr()
    assert main(["circuit", model, data, "--scores", folder, "--mib", file]) == 0
    first = capsys.readouterr()
    assert first.out.split("\n")[0].split() == ["share", "components", "metric", "faithfulness"]
    assert [line.split()[1] for line in first.out.strip().split("\n")[1:]] == list("0000001") + ["3", "7", "15"]
    assert (
        "15 scores and 190 edges" in first.err
    )  # 8 (1 + 6 + 11) into attention, 5 + 10 + 15 into MLPs, 16 into logits
    content = json.loads(Path(file).read_text())
    assert sum(node["in_graph"] for node in content["nodes"].values()) == 3 + 2
    assert main(["circuit", model, data, "--scores", file]) == 0
    assert capsys.readouterr().out == first.out
    assert main(["circuit", model, data, "--scores", folder, "--ablation", "zero", "--rank", "size"]) == 0
    assert capsys.readouterr().out != first.out
    assert main(["circuit", model, "--scores", folder]) == 2
    assert "nothing to do: give DATA to measure faithfulness, or --mib FILE" in capsys.readouterr().err
    assert main(["circuit", model, "--scores", folder, "--mib", file]) == 2
    assert "exists already" in capsys.readouterr().err

"""Sets of components: slices worked out by hand, algebra, random sets and files."""

import json

import pytest
import torch

from locedit.components import ComponentSet, Site, Slice, unit_of
from locedit.errors import LoceditError

FINGERPRINT = "f" * 8


def neurons(layer: int, count: int = 6, d_model: int = 4) -> Site:
    """A gated MLP's neurons, torch.nn.Linear layout."""
    name = f"layers.{layer}.mlp"
    rows = [Slice(param=f"{name}.{part}.weight", shape=(count, d_model), axis=0) for part in ("gate_proj", "up_proj")]
    out = Slice(param=f"{name}.down_proj.weight", shape=(d_model, count), axis=1, write=True)
    return Site(name=f"blocks.{layer}.mlp.neuron", count=count, slices=(*rows, out))


def heads(layer: int) -> Site:
    """Four query heads of width 2 over two key-value heads, d_model 8."""
    name = f"layers.{layer}.self_attn"
    q = Slice(param=f"{name}.q_proj.weight", shape=(8, 8), axis=0, stride=2, width=2)
    k = Slice(param=f"{name}.k_proj.weight", shape=(4, 8), axis=0, stride=2, width=2, group=2)
    o = Slice(param=f"{name}.o_proj.weight", shape=(8, 8), axis=1, stride=2, width=2, write=True)
    return Site(name=f"blocks.{layer}.attn.head", count=4, slices=(q, k, o))


def a_set(chosen: dict[str, list[int]], *sites: Site) -> ComponentSet:
    universe = {site.name: site for site in (sites or (neurons(0), neurons(1)))}
    return ComponentSet.of(universe, chosen, fingerprint=FINGERPRINT)


def test_neuron_slices_and_size_worked_by_hand() -> None:
    found = a_set({"blocks.1.mlp.neuron": [5, 2]})
    assert found.chosen == {"blocks.1.mlp.neuron": (2, 5)}
    assert found.parameters("train") == 2 * (4 + 4 + 4)
    assert found.parameters("write") == 2 * 4
    touched = {t.param: (t.axis, t.index.tolist()) for t in found.touched("train") if t.index is not None}
    assert touched == {
        "layers.1.mlp.gate_proj.weight": (0, [2, 5]),
        "layers.1.mlp.up_proj.weight": (0, [2, 5]),
        "layers.1.mlp.down_proj.weight": (1, [2, 5]),
    }


def test_shared_keys_join_only_with_the_whole_group() -> None:
    alone = a_set({"blocks.0.attn.head": [0]}, heads(0))
    both = a_set({"blocks.0.attn.head": [0, 1]}, heads(0))
    assert "layers.0.self_attn.k_proj.weight" not in alone.parameter_mask()
    assert both.parameter_mask()["layers.0.self_attn.k_proj.weight"].any(1).tolist() == [True, True, False, False]
    assert both.parameters() == 4 * 8 + 2 * 8 + 8 * 4


def test_interleaved_fused_rows() -> None:
    """Queries of GPT-NeoX: head h starts at 3 * h * d_head of the fused weight."""
    q = Slice(param="qkv.weight", shape=(24, 8), axis=0, start=0, stride=6, width=2)
    assert q.index([3, 1]).tolist() == [6, 7, 18, 19]


def test_rows_and_columns_of_one_parameter_are_counted_once() -> None:
    shape = (4, 6)
    row = Site(name="blocks.0.mlp.out.row", count=4, slices=(Slice(param="w", shape=shape, axis=0),))
    column = Site(name="blocks.0.mlp.out.column", count=6, slices=(Slice(param="w", shape=shape, axis=1),))
    both = a_set({row.name: [1], column.name: [0, 5]}, row, column)
    assert both.parameters() == 6 + 2 * 4 - 2


def test_algebra_is_that_of_sets() -> None:
    a = a_set({"blocks.0.mlp.neuron": [0, 1, 2], "blocks.1.mlp.neuron": [4]})
    b = a_set({"blocks.0.mlp.neuron": [2, 3]})
    assert (a | b).chosen == {"blocks.0.mlp.neuron": (0, 1, 2, 3), "blocks.1.mlp.neuron": (4,)}
    assert (a & b).chosen == {"blocks.0.mlp.neuron": (2,)}
    assert (a - b).chosen == {"blocks.0.mlp.neuron": (0, 1), "blocks.1.mlp.neuron": (4,)}
    assert ~~a == a
    assert len(~a) == 12 - len(a)
    assert ~(a | b) == ~a & ~b
    assert a.overlap(b) == 1 / 5


def test_algebra_across_units_acts_on_weights() -> None:
    neuron, matrix = (
        neurons(0),
        Site(
            name="blocks.0.mlp.gate.matrix",
            count=1,
            slices=(Slice(param="layers.0.mlp.gate_proj.weight", shape=(6, 4), axis=None, write=True),),
        ),
    )
    found = a_set({neuron.name: [1]}, neuron)
    gate = a_set({matrix.name: [0]}, matrix)
    assert (found & gate).parameters() == 4
    assert (found - gate).parameters() == 8
    assert (found | gate).parameters() == 24 + 4 + 4
    assert len(gate - found) == 20


def test_sets_of_other_models_do_not_mix() -> None:
    a = a_set({"blocks.0.mlp.neuron": [0]})
    other = ComponentSet.of(a.sites, a.chosen, fingerprint="other")
    with pytest.raises(LoceditError, match="different models"):
        _ = a | other


def test_random_like_keeps_the_layers_and_can_be_disjoint() -> None:
    a = a_set({"blocks.0.mlp.neuron": [0, 1, 2], "blocks.1.mlp.neuron": [4]})
    drawn = a.random_like(seed=3)
    assert drawn.by_layer() == a.by_layer()
    assert drawn == a.random_like(seed=3)
    assert any(a.random_like(seed=s) != drawn for s in range(5))
    apart = a.random_like(seed=3, disjoint=True)
    assert len(apart & a) == 0
    assert len(apart) == len(a)
    anywhere = {tuple(a.random_like(seed=s, same_layers=False).by_layer().items()) for s in range(20)}
    assert len(anywhere) > 1
    assert all(len(a.random_like(seed=s, same_layers=False)) == 4 for s in range(20))


def test_random_disjoint_needs_room() -> None:
    a = a_set({"blocks.0.mlp.neuron": [0, 1, 2, 3]})
    with pytest.raises(LoceditError, match="only 2 are left"):
        a.random_like(seed=0, disjoint=True)


def test_files_round_trip_and_are_readable(tmp_path) -> None:
    a = a_set({"blocks.0.mlp.neuron": [0, 1, 2]})
    a.save(tmp_path / "components.json")
    text = json.loads((tmp_path / "components.json").read_text())
    assert text["universe"] == {"blocks.0.mlp.neuron": 6, "blocks.1.mlp.neuron": 6}
    assert text["components"] == {"blocks.0.mlp.neuron": [0, 1, 2]}
    back = ComponentSet.load(tmp_path / "components.json")
    assert back == a
    assert back.parameters() == a.parameters()
    assert back.sites == a.sites


def test_weight_masks_round_trip_as_bits(tmp_path) -> None:
    a = a_set({"blocks.0.mlp.neuron": [0]}).as_weights()
    a.save(tmp_path / "weights.json")
    back = ComponentSet.load(tmp_path / "weights.json")
    assert back == a
    assert back.parameters() == 12
    assert (tmp_path / "weights.safetensors").stat().st_size < 400
    drawn = back.random_like(seed=1)
    assert len(drawn) == 12
    assert drawn != back


def test_a_set_without_layout_keeps_its_algebra_but_not_its_size(tmp_path) -> None:
    path = tmp_path / "hand.json"
    path.write_text('{"universe": {"blocks.0.mlp.neuron": 6}, "components": {"blocks.0.mlp.neuron": [1]}}')
    found = ComponentSet.load(path)
    assert len(~found) == 5
    with pytest.raises(LoceditError, match="bind it first"):
        found.parameters()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"components": {}}', "universe"),
        ('{"universe": {"blocks.0.mlp.neuron": 6}, "components": {"blocks.0.mlp.neuron": [6]}}', "component 6"),
        ('{"universe": {"blocks.0.mlp.neuron": 6}, "components": {"blocks.0.mlp.neurons": [1]}}', "did you mean"),
        ("[1, 2]", "not a component set"),
        ("{", "not a JSON file"),
    ],
)
def test_broken_files_are_named(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(LoceditError, match=message) as caught:
        ComponentSet.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_unit() -> None:
    with pytest.raises(LoceditError, match="did you mean 'neuron'"):
        unit_of("blocks.0.mlp.neurons")


def test_weight_site_over_a_region_of_a_fused_parameter() -> None:
    """Weights of the queries inside a fused qkv parameter: the mask counts the region, row-major."""
    piece = Slice(param="qkv.weight", shape=(6, 3), axis=0, start=2, stride=1, width=1)
    site = Site(name="blocks.0.attn.k.weight", count=6, slices=(piece,))
    mask = torch.tensor([False, True, False, False, False, True])
    found = ComponentSet.of({site.name: site}, {}, masks={site.name: mask})
    assert found.parameter_mask()["qkv.weight"].nonzero().tolist() == [[2, 1], [3, 2]]

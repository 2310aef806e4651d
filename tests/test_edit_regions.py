"""Regions, their union and the checksums, on numbers worked by hand."""

import pytest
import torch

from locedit.edit.regions import Region, checksum, contained, regions, unite
from locedit.errors import LoceditError
from tests import edits, tiny


def test_a_region_reads_and_writes_only_its_entries() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    columns = Region(param="w", axis=1, index=torch.tensor([0, 2]))
    assert columns.read(tensor).tolist() == [[0, 2], [3, 5]]
    columns.write(tensor, torch.tensor([[10.0, 20], [30, 40]]))
    assert tensor.tolist() == [[10, 1, 20], [30, 4, 40]]
    flat = Region(param="w", index=torch.tensor([1, 5]))
    assert flat.read(tensor).tolist() == [1, 40]
    assert flat.scatter(tensor, torch.tensor([-1.0, -2.0])).tolist() == [[10, -1, 20], [30, 4, -2]]
    assert tensor.tolist() == [[10, 1, 20], [30, 4, 40]]


def test_the_union_of_a_row_and_a_column_is_flat_and_that_of_rows_is_rows() -> None:
    row, other = (Region(param="w", axis=0, index=torch.tensor([i])) for i in (1, 0))
    column = Region(param="w", axis=1, index=torch.tensor([2]))
    both = unite([row, column], (2, 3))
    assert both.axis is None
    assert both.index is not None
    assert both.index.tolist() == [2, 3, 4, 5]
    rows = unite([row, other], (2, 3))
    assert (rows.axis, rows.index.tolist()) == (0, [0, 1])  # type: ignore[union-attr]
    assert unite([row, Region(param="w")], (2, 3)).index is None


def test_contained_across_axes() -> None:
    row = Region(param="w", axis=0, index=torch.tensor([1]))
    one = Region(param="w", index=torch.tensor([3]))
    outside = Region(param="w", index=torch.tensor([2]))
    assert contained(one, row, (2, 3))
    assert not contained(outside, row, (2, 3))
    assert not contained(row, one, (2, 3))
    assert contained(row, Region(param="w"), (2, 3))
    assert not contained(row, None, (2, 3))


def test_checksum_is_bits_times_odd_positions() -> None:
    assert checksum(torch.tensor([3, 5], dtype=torch.int32)) == 3 * 1 + 5 * 3
    assert checksum(torch.tensor([-1], dtype=torch.int32)) == 2**64 - 1
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.tensor([1.0, 2.0])) != checksum(torch.tensor([2.0, 1.0]))
    one = torch.tensor([1.0], dtype=torch.bfloat16)
    assert checksum(one) == 0x3F80


def test_checksum_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    before = checksum(tensor)
    monkeypatch.setattr("locedit.edit.regions._CHUNK", 10)
    assert checksum(tensor) == before


def test_a_set_without_parameters_is_an_error() -> None:
    model = tiny.model("llama")
    with pytest.raises(LoceditError, match=r"\(0 components\) holds no parameter that can be trained"):
        regions(model.components({"blocks.0.mlp.neuron": []}), role="train")


def test_one_region_a_parameter_even_where_rows_and_columns_meet() -> None:
    model = tiny.model("gpt2")
    found = regions(edits.mixed(model), role="train")
    assert len({region.param for region in found}) == len(found)
    both = next(region for region in found if region.param == "transformer.h.0.mlp.c_proj.weight")
    assert both.index is not None
    # Conv1D [192, 48]: 2 rows of 192 weights, 2 columns of 48, 4 weights in both
    assert len(both.index) == 2 * 192 + 2 * 48 - 4

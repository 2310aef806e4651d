"""The plan of a study: its cells and its data, checked before any model is loaded."""

from dataclasses import dataclass

from locedit.errors import LoceditError
from locedit.study.checks import check_cell, check_localizers, check_measuring, check_models, check_names
from locedit.study.config import Config
from locedit.study.data import StudyData, read_data
from locedit.study.grid import Cell, cells_of, controls_of


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a study will do."""

    config: Config
    cells: tuple[Cell, ...]
    data: dict[int, StudyData]
    "by seed"

    @property
    def seeds(self) -> list[int]:
        return sorted({cell.seed for cell in self.cells})


def make_plan(config: Config) -> Plan:
    """The cells in the order in which they run; raises LoceditError for whatever can be seen to be wrong."""
    check_names(config)
    cells = cells_of(config)
    if not cells:
        raise LoceditError(f"{config.source}: the grids hold no cell; everything is excluded")
    data = {seed: read_data(config, seed) for seed in sorted({cell.seed for cell in cells})}
    for cell in cells:
        check_cell(config, cell, data[cell.seed])
    check_localizers(config, cells, data)
    for found in data.values():
        check_measuring(config, found.measured)
    check_models(config, data)
    cells += controls_of(config, cells)
    return Plan(config=config, cells=tuple(sorted(cells, key=lambda cell: cell.seed)), data=data)

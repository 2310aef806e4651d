"""One model with its data, and what is found on it: what all cells of a seed share."""

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

from locedit.components import ComponentSet
from locedit.localize import localize
from locedit.models import Model, load
from locedit.provenance import Provenance, content_hash
from locedit.runs import Run
from locedit.scores import Scores
from locedit.study.config import Config
from locedit.study.data import StudyData, read_data, with_seed
from locedit.study.files import localizer_key


class Bench:
    """The model and the data of one seed."""

    def __init__(self, config: Config, seed: int, out: Path) -> None:
        keys = config.keys
        self.config, self.seed, self.out = config, seed, out
        self.model: Model = load(
            with_seed(keys.model, seed), tokenizer=keys.tokenizer, dtype=keys.dtype, device=keys.device
        )
        self.data: StudyData = read_data(config, seed)
        self.identity: str = self.model.fingerprint

    def scores(self, label: str) -> Scores:
        """What a localizer finds, from its folder or made."""
        table = self.config.localizer(label)
        assert table is not None, "checked with the plan"
        key = localizer_key(table, self.identity, self.data, seed=self.seed)
        return Run(folder=self.out).stage(
            f"localize/{content_hash(key)}",
            key,
            lambda: timeless(localize(self.model, self.data.seen, table.name, **key["options"])),
            save=lambda scores, folder: scores.save(folder),
            load=Scores.load,
        )

    def found(self, label: str) -> ComponentSet:
        """The set of a localizer or of a file."""
        table = self.config.localizer(label)
        if table is None:
            file = next(part for part in self.config.sets if part.label == label).components
            return self.model.bind(ComponentSet.load(with_seed(file, self.seed)))
        budget: dict[str, Any] = table.budget()
        if table.params_like is not None:
            budget = {"fill": "reach", **budget, "params": self.found(table.params_like).parameters()}
        return self.scores(label).select(**budget, sign=table.sign)


@lru_cache(maxsize=1)
def bench_of(config: "Same", seed: int, out: Path) -> Bench:
    """The bench of a seed; a process keeps the last one."""
    return Bench(config.config, seed, out)


@dataclasses.dataclass(frozen=True, eq=False)
class Same:
    """A configuration that equals another one with the same content, so that benches can be kept by it."""

    config: Config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.config == other.config

    def __hash__(self) -> int:
        return hash((self.config.source, self.config.keys.model))


def timeless(scores: Scores) -> Scores:
    """Scores without the wall time and the memory that they took, so that equal scores are equal files."""
    return scores.made_by(without_time(scores.provenance)) if scores.provenance else scores


def without_time(made: Provenance | None) -> Provenance:
    """The record without wall time and memory."""
    return dataclasses.replace(made or Provenance(method=""), seconds=0.0, peak_memory_mb=0.0)

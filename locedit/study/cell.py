"""The work of one cell of a study: its edit, its measures, its attacks; and the measures before any edit."""

import dataclasses
import shutil
from functools import cached_property
from typing import Any

from locedit.attacks import ATTACKS
from locedit.attacks.shared import Shared
from locedit.edit.edit import Edit
from locedit.evaluate import METRICS, evaluate
from locedit.evaluate.suite import evaluate_options, plan_of
from locedit.results import Measure, to_json
from locedit.storage import write_json
from locedit.study.bench import Bench, without_time
from locedit.study.files import BaselineFiles, CellFiles
from locedit.study.grid import Cell, as_tuples, described
from locedit.study.making import make_edit


class Work:
    """One cell on its bench."""

    def __init__(self, bench: Bench, cell: Cell) -> None:
        self.bench, self.cell, self.config = bench, cell, bench.config
        self.files = CellFiles(self.config, cell, identity=bench.identity, data=bench.data, out=bench.out)
        self.folder, self.stages, self.keys = self.files.folder, self.files.stages, self.files.keys
        self.shared = Shared()

    def run(self) -> None:
        """Every stage that is not there yet."""
        write_json(self.folder / "cell.json", {"cell": described(self.cell), "made_from": self.files.settings})
        self._about()
        self.stages.make("evaluation", self.keys["evaluation"], self._measures)
        for name, stage in self.files.attacks().items():
            self.stages.make(stage, self.keys[stage], lambda name=name: self._attack(name))
        self.clean()

    def clean(self) -> None:
        """Of a cell that is done: the tensors go, and what was said of an earlier failure."""
        (self.folder / "failed.json").unlink(missing_ok=True)
        if not self.config.keys.keep_edits:
            shutil.rmtree(self.folder / "edit", ignore_errors=True)

    def text(self, seconds: float) -> str:
        """What came of it, in a few words."""
        edit = self._about()
        dose = edit["dose"]
        at = f" at {dose['value']} {dose['name']}" if dose else ""
        if not edit["reached"]:
            return f"level not reached: lowest {edit['lowest']:.3g}, {seconds:.0f} s"
        return f"forget level {edit['level']:.3g}{at}, {seconds:.0f} s"

    # --- the edit ----------------------------------------------------------------------------------------------------

    def _about(self) -> dict[str, Any]:
        """What edit.json says; the edit is made where it is not there."""
        there = self.stages.get("edit", self.keys["edit"])
        if there is None:
            self._make()
            there = self.stages.get("edit", self.keys["edit"])
        assert there is not None, "it was just written"
        return there

    @cached_property
    def edit(self) -> Edit:
        """The edit, read from its folder or made again."""
        if self.stages.get("edit", self.keys["edit"]) is None or not (self.folder / "edit" / "edit.json").exists():
            self._make()
        return Edit.load(self.folder / "edit")

    def _make(self) -> None:
        """Make the edit; keep its tensors first, so that edit.json stands for both."""

        def make() -> dict[str, Any]:
            made, about = make_edit(self.bench, self.cell)
            edit = dataclasses.replace(made, provenance=without_time(made.provenance))
            edit.save(self.folder / "edit", force=True)
            return about

        (self.folder / "edit.json").unlink(missing_ok=True)
        self.stages.make("edit", self.keys["edit"], make)

    # --- measures and attacks ----------------------------------------------------------------------------------------

    def _measures(self) -> list[dict[str, Any]]:
        """The measures after the edit, without those of single examples."""
        model, task, options = self.bench.model, self.bench.data.measured, as_tuples(self.config.keys.evaluate)
        compared = [part for part in plan_of(task, evaluate_options(options), edited=True) if part.compares]
        names = [name for part in compared for name in part.names]
        alone = without_compared(options)
        found: list[Measure] = []
        if alone.get("metrics") != []:
            with self.edit.applied(model) as edited:
                found += evaluate(edited, task, **alone).measures
        if names:
            both: dict[str, Any] = options | {"metrics": names}
            found += evaluate(model, task, self.edit, **both).measures
        return [to_json(dataclasses.replace(m, stage="after", per_example={})) for m in found]

    def _attack(self, name: str) -> dict[str, Any]:
        options = {"seed": self.cell.seed} | as_tuples(self.config.keys.attack_options.get(name, {}))
        made = ATTACKS[name].function(
            self.bench.model, self.bench.data.attacked, self.edit, shared=self.shared, **options
        )
        measures = tuple(dataclasses.replace(m, per_example={}) for m in made.measures)
        return to_json(dataclasses.replace(made, measures=measures, provenance=without_time(made.provenance)))


def baseline(bench: Bench) -> list[dict[str, Any]]:
    """The measures before any edit, once for each seed, in OUT/baseline/KEY."""
    files = BaselineFiles(bench.config, identity=bench.identity, data=bench.data, out=bench.out)

    def make() -> list[dict[str, Any]]:
        options = without_compared(as_tuples(bench.config.keys.evaluate))
        found = evaluate(bench.model, bench.data.measured, **options).measures if options.get("metrics") != [] else ()
        return [to_json(dataclasses.replace(m, per_example={})) for m in found]

    return files.stages.make("evaluation", files.key, make)


def without_compared(options: dict[str, Any]) -> dict[str, Any]:
    """Options of evaluate without the metrics that need an edit."""
    names = options.get("metrics")
    return options if names is None else options | {"metrics": [n for n in names if not METRICS[n].compares]}

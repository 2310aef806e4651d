"""The stages of a grading: each planted set, each localizer on it, each deletion, each edited pair is a folder."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from locedit import progress
from locedit.components import Unit
from locedit.data.items import Task
from locedit.edit import Edit
from locedit.errors import LoceditError
from locedit.grading import oracle as oracles
from locedit.grading import planted, planting, scoring
from locedit.grading.deletion import MEASURES, Deletion
from locedit.grading.options import DELETION, ORACLE, PLANTING, SITES, TARGET, GradeOptions
from locedit.grading.records import Record
from locedit.grading.units import at_unit
from locedit.grading.worlds import Planted, Target, planted_people, target_of
from locedit.models import Model
from locedit.runs import Run
from locedit.scores import Scores
from locedit.storage import read_json, write_json


class Seed:
    """One lab: everything that is graded on its model, each step kept as it is done."""

    def __init__(
        self, run: Run, model: Model, task: Task, *, seed: int, methods: Sequence[str], options: GradeOptions
    ) -> None:
        self.run, self.model, self.task = run, model, task
        self.seed, self.methods, self.options = seed, methods, options
        self.folder = f"seed-{seed}"
        self.key = {"model": model.fingerprint, "data": task.hash}
        self.run.write_once(f"{self.folder}/lab.json", self.key)
        self._known: dict[str, Scores] = {}

    @cached_property
    def people(self) -> Planted:
        """Whom to plant."""
        return planted_people(self.task, self.options)

    @cached_property
    def target(self) -> Target:
        """What deletion and oracle are about."""
        return target_of(self.task, self.options, seed=self.seed)

    def _settings(self, part: str, names: Sequence[str]) -> dict[str, Any]:
        """The options that decide a part; the folder holds results of one choice of them."""
        self.run.write_once(f"{self.folder}/{part}.json", self._chosen(names))
        return self.key | self._chosen(names)

    def _chosen(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: getattr(self.options, name) for name in names}

    def _records(self, name: str, key: dict[str, Any], make: Callable[[], list[Record]]) -> list[Record]:
        """Records from their folder, or made. What could not be graded is not kept, so that it is tried again."""
        there = (self.run.folder / self.folder / name / "stage.json").exists() and not self.run.force
        made = [] if there else make()
        if made and all(record.value is None for record in made):
            return made
        return self.run.stage(
            f"{self.folder}/{name}",
            key,
            lambda: made,
            save=lambda made, at: write_json(at / "grade.json", {"records": [record.to_json() for record in made]}),
            load=lambda at: [Record(**row) for row in read_json(at / "grade.json")["records"]],
        )

    def _scores(self, method: str, unit: Unit) -> Scores:
        """Of a localizer on the target; one that has no such unit is run once for all of them."""
        seed = scoring.seed_for("target", self.seed)
        options = scoring.options_for(method, unit, seed=seed)
        name = f"{method}-{options.get('unit', 'own')}"
        if name not in self._known:
            self._known[name] = self.run.stage(
                f"{self.folder}/scores/{name}",
                self.key | self._chosen(TARGET) | {"method": method, "options": options},
                lambda: scoring.run(
                    self.model,
                    self.target.task,
                    method,
                    unit,
                    seed=seed,
                    exact_facts=self.options.exact_facts,
                ),
                save=lambda scores, at: scores.save(at),
                load=Scores.load,
            )
        return self._known[name]

    # --- planted ------------------------------------------------------------------------------------------------------

    def planted(self) -> list[Record]:
        """Every localizer on every planted set."""
        todo = [(site, number) for site in self.options.sites for number in range(self.options.draws)]
        found: list[Record] = []
        for site, number in progress.track(todo, f"seed {self.seed}: planted sets"):
            found += self._planted(site, number)
        return found

    def _planted(self, site: str, number: int) -> list[Record]:
        key = self._settings("planted", PLANTING)
        sets = planting.draw(self.model, site, seed=self.seed, number=number, options=self.options)
        name, seed = f"planted/{site}-{number}", self.seed + 1000 * number
        edit = self.run.stage(
            f"{self.folder}/{name}/edit",
            key,
            lambda: planting.plant(self.model, self.people, sets, options=self.options, seed=seed, number=number),
            save=lambda made, at: made.save(at, force=True),
            load=Edit.load,
        )
        found = self._records(f"{name}/knowledge", key, partial(self._knowledge, edit, site, number))
        with edit.applied(self.model) as model:
            for method in progress.track(self.methods, f"seed {self.seed}: localizers on planted {site}"):
                options = scoring.options_for(method, SITES[site], seed=scoring.seed_for(site, self.seed, number))
                make = partial(self._graded, model, method, sets, site, number)
                found += self._records(f"{name}/{method}", key | {"options": options}, make)
        return found

    def _graded(self, model: Model, method: str, sets: planting.Sets, site: str, number: int) -> list[Record]:
        return planted.grades(
            model,
            self.people.task,
            method,
            sets=sets,
            site=site,
            seed=self.seed,
            number=number,
            exact_facts=self.options.exact_facts,
        )

    def _knowledge(self, edit: Edit, site: str, number: int) -> list[Record]:
        found = planting.knowledge(self.model, edit, self.people)
        return [
            Record(part="planted", place=site, method="", seed=self.seed, draw=number, measure=name, value=value)
            for name, value in dataclasses.asdict(found).items()
        ]

    # --- deletion -----------------------------------------------------------------------------------------------------

    def deletion(self) -> list[Record]:
        """Every localizer at every unit."""
        key = self._settings("deletion", DELETION) | self._settings("target", TARGET)
        grader = Deletion(self.model, self.target, self.options)
        found: list[Record] = []
        for unit in self.options.units:
            for method in progress.track(self.methods, f"seed {self.seed}: deleting {unit}s"):
                make = partial(self._deleted, grader, method, unit)
                found += self._records(f"deletion/{method}-{unit}", key, make)
        return found

    def _deleted(self, grader: Deletion, method: str, unit: Unit) -> list[Record]:
        try:
            values = at_unit(self._scores(method, unit), unit, self.model)
            return grader.grades(values, method=method, unit=unit, seed=self.seed)
        except LoceditError as error:
            about = {"part": "deletion", "place": unit, "method": method, "seed": self.seed}
            return missing(about, MEASURES, error)

    # --- oracle -------------------------------------------------------------------------------------------------------

    def oracle(self) -> tuple[list[Record], list[oracles.Outcome]]:
        """The outcome of every pair, and every localizer's correlation with it."""
        self._settings("target", TARGET)
        outcomes = self._outcomes()
        found: list[Record] = []
        for method in progress.track(self.methods, f"seed {self.seed}: localizers against the oracle"):
            try:
                by_layer = oracles.layer_scores(at_unit(self._scores(method, "mlp"), "mlp", self.model))
                found += oracles.grades(outcomes, by_layer, method=method, seed=self.seed, options=self.options)
            except LoceditError as error:
                about = {"part": "oracle", "place": oracles.PLACE, "method": method, "seed": self.seed}
                found += missing(about, oracles.MEASURES, error)
        depth = [float(-layer) for layer in range(self.model.n_layers)]
        found += oracles.grades(outcomes, depth, method=oracles.DEPTH, seed=self.seed, options=self.options)
        return found, outcomes

    def _outcomes(self) -> list[oracles.Outcome]:
        key = self._settings("oracle", ORACLE)
        grader = oracles.Oracle(self.model, self.target, self.options, seed=self.seed)
        found: list[oracles.Outcome] = []
        todo = list(oracles.places(self.model).items())
        for name, (layers, within) in progress.track(todo, f"seed {self.seed}: editing and attacking places"):
            made = self.run.stage(
                f"{self.folder}/oracle/{name}",
                key,
                partial(grader.outcome, name, layers, within),
                save=lambda made, at: write_json(Path(at) / "outcome.json", made.to_json()),
                load=lambda at: oracles.Outcome.from_json(read_json(Path(at) / "outcome.json")),
            )
            found.append(made)
        return found


def missing(about: dict[str, Any], measures: Sequence[str], error: LoceditError) -> list[Record]:
    """The records of a localizer that cannot be graded."""
    return [Record(**about, measure=measure, reason=str(error)) for measure in measures]

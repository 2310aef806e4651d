"""The runs of a relearning attack: the edited model, its controls, and other edits, each on every split."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import ClassVar

import torch
from torch import Tensor

from locedit.attacks.findings import Arm, Findings
from locedit.attacks.finetuning import Diet, How, fine_tune, free_bytes, full_needs_bytes, opened
from locedit.attacks.measures import metric_of, values_of
from locedit.attacks.options import Metric, RelearnOptions
from locedit.attacks.recovery import Dose, Run, doses_by_mirror
from locedit.attacks.shallow import suppressed
from locedit.attacks.shared import Shared
from locedit.attacks.splits import Halves, as_many, keys, learned_and_measured, mirrored_halves
from locedit.data.encode import Example, encode
from locedit.data.items import Item, Task
from locedit.edit import Edit
from locedit.edit.levels import levels
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.progress import report
from locedit.results import Role


class Relearning:
    """The data of one attack, encoded and split, and the runs on it. Subclasses train on something else."""

    name: ClassVar[str] = "relearn"
    kind_fed: str = ""
    "what is trained on, in words that come after a number; empty = items of the half"
    rest: ClassVar[str] = "the half that was not relearned"

    def __init__(
        self,
        model: Model,
        task: Task,
        edit: Edit,
        others: Mapping[str, Edit],
        options: RelearnOptions,
        *,
        shared: Shared,
    ) -> None:
        self.shared, self.options = shared, options
        given, task = task, self.prepared(task)
        self.model, self.task, self.edit, self.others = model, task, edit, others
        asked = None if options.metric == "auto" else options.metric
        self.metric: Metric = metric_of(task.forget, asked, by=self.name)
        self.how: How
        self.how, self.why_how = _how(model, options)
        self.forget = list(task.forget)
        self.examples = encode(model, task.forget)
        self.halves = mirrored_halves(
            self.forget, splits=options.splits, seed=options.seed, what=f"{self.name}: forget"
        )
        self.diet, self.kept = self._retain()
        self.started(given)
        self.fed = self._fed()
        self.done, self.total = 0, self._count()

    def prepared(self, task: Task) -> Task:
        """The task whose items are measured. Raises LoceditError where something is missing."""
        return task

    def started(self, task: Task) -> None:
        """Called with the task as it was given, when all else is ready."""

    def _count(self) -> int:
        controls = 1 + self.options.shallow if self.options.controls else 0
        arms = len(self.options.learning_rates) + len(self.others) + controls
        return arms * self.options.splits

    def _retain(self) -> tuple[list[Example], list[Example]]:
        """Retain examples to train on, and others (no owner in both) to measure."""
        if self.task.retain is None:
            return [], []
        items = list(self.task.retain)
        examples = encode(self.model, self.task.retain)
        learned, measured = learned_and_measured(
            items, most=self.options.retain_measured, seed=self.options.seed, what=f"{self.name}: retain"
        )
        trained = [examples[at] for at in learned] if self.options.retain_weight > 0 else []
        return trained, [examples[at] for at in measured]

    # --- the arms ----------------------------------------------------------------------------------------------------

    def findings(self) -> Findings:
        """Every arm, run."""
        before, rates = values_of(self.model, self.examples, self.metric), self.options.learning_rates
        with self.entered(self.edit) as edited:
            runs = {
                split: [self._run(edited, self.forget, self.examples, halves, split, rate) for rate in rates]
                for split, halves in enumerate(self.halves)
            }
            doses = doses_by_mirror(runs, floor=self.options.retain_floor)
            never, never_note = self._never_known(edited, doses)
        with self.edit.applied(self.model) as edited:
            after = values_of(edited, self.examples, self.metric)
            retained = values_of(edited, self.kept, self.metric)
            level = levels(edited, {"forget": self.examples})["forget"]
        best = [_at_rate(runs[split], doses[split]) for split in runs]
        arms = [Arm(role="found", name="found", runs=best, halves=self.halves, items=self.forget)]
        arms += [never] if never else []
        shallow, shallow_note = self._shallow(doses, level=level)
        arms += [shallow] if shallow else []
        arms += [self._of_edit(role_of(name), name, other, doses) for name, other in self.others.items()]
        notes = [
            self.why_how,
            never_note,
            shallow_note,
            "" if self.kept else "no retain data: nothing shows what the attack broke",
        ]
        return Findings(
            metric=self.metric,
            arms=arms,
            doses=doses,
            before=before,
            after=after,
            retain_ids=[example.id for example in self.kept],
            retain_owners=keys_of(self.kept),
            retain_after=retained,
            grid=[run for split in runs.values() for run in split],
            options=self.options,
            how=self.how,
            notes=[note for note in notes if note],
            name=self.name,
            fed=self.fed,
            rest=self.rest,
        )

    def _never_known(self, edited: Model, doses: Mapping[int, Dose]) -> tuple[Arm | None, str]:
        """Held-out items relearned in the same edited model."""
        if not self.options.controls:
            return None, "controls were switched off"
        heldout = self.task.heldout
        if heldout is None or heldout.kind != self.task.forget.kind:
            return None, "no held-out items of the same form: what was never known counts as 0"
        items = as_many(list(heldout), owners=len(set(keys(self.forget))), seed=self.options.seed)
        halves = mirrored_halves(
            items, splits=self.options.splits, seed=self.options.seed, what=f"{self.name}: heldout"
        )
        examples = encode(self.model, heldout.replace(items))
        rates = [doses[at].learning_rate for at in range(len(halves))]
        runs = [self._run(edited, items, examples, half, at, rates[at]) for at, half in enumerate(halves)]
        return Arm(role="never knew", name="never known", runs=runs, halves=halves, items=items), ""

    def _shallow(self, doses: Mapping[int, Dose], *, level: float) -> tuple[Arm | None, str]:
        """An edit that only hides the answers, at the same forget level."""
        if not (self.options.controls and self.options.shallow):
            return None, ""
        retain = encode(self.model, self.task.retain) if self.task.retain is not None else []
        edit, words, reached = suppressed(
            self.shared, self.model, self.examples, retain, level=level, options=self.options
        )
        arm = self._of_edit("shallow", words, edit, doses)
        missed = f"the shallow control ({words}) did not reach the forget level of the edit"
        return arm, "" if reached else missed

    def _of_edit(self, role: Role, name: str, edit: Edit, doses: Mapping[int, Dose]) -> Arm:
        with self.entered(edit) as edited:
            runs = [
                self._run(edited, self.forget, self.examples, halves, at, doses[at].learning_rate)
                for at, halves in enumerate(self.halves)
            ]
        return Arm(role=role, name=name, runs=runs, halves=self.halves, items=self.forget)

    # --- one run -----------------------------------------------------------------------------------------------------

    @contextmanager
    def entered(self, edit: Edit) -> Generator[Model]:
        """The model that is fine-tuned: inside the edit."""
        with edit.applied(self.model) as edited:
            yield edited

    def relearned(self, items: Sequence[Item], examples: Sequence[Example], halves: Halves) -> list[Example]:  # noqa: ARG002
        """What may be trained on, of items of which one half may be."""
        return [examples[at] for at in halves.relearned]

    def _fodder(self, items: Sequence[Item], examples: Sequence[Example], halves: Halves) -> list[Example]:
        """What is trained on: all that may be, or so many of it."""
        found = self.relearned(items, examples, halves)
        if not found:
            raise LoceditError(f"{self.name}: there is nothing to train on for one of the halves")
        if self.options.items is None or len(found) <= self.options.items:
            return found
        chosen = Random(f"{self.options.seed} few").sample(range(len(found)), self.options.items)
        return [found[at] for at in sorted(chosen)]

    def _fed(self) -> str:
        """What is trained on, in words; empty = all of the half."""
        if self.options.items is None and not self.kind_fed:
            return ""
        counts = [len(self._fodder(self.forget, self.examples, halves)) for halves in self.halves]
        number = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}-{max(counts)}"
        return f"{number} {self.kind_fed}" if self.kind_fed else "one item" if number == "1" else f"{number} items"

    def _run(
        self,
        edited: Model,
        items: Sequence[Item],
        examples: Sequence[Example],
        halves: Halves,
        split: int,
        rate: float,
    ) -> Run:
        options = self.options
        measured = [examples[at] for at in halves.measured]
        relearned = self._fodder(items, examples, halves)
        diet = Diet(
            relearned=relearned,
            retain=self.diet,
            batch_size=options.batch_size,
            retain_weight=options.retain_weight,
            seed=1000 * options.seed + split,
        )
        rows: list[tuple[Tensor, Tensor, Tensor]] = []

        def look(step: int) -> None:
            if step in options.looks:
                parts = (measured, relearned, self.kept)
                rows.append(tuple(values_of(edited, part, self.metric) for part in parts))  # type: ignore[arg-type]

        with opened(edited, self.how, rank=options.lora_rank, seed=diet.seed) as weights:
            look(0)
            fine_tune(edited, weights, diet, learning_rate=rate, steps=options.steps, after_step=look)
        self.done += 1
        report(self.name, self.done, self.total)
        return Run(
            split=split,
            learning_rate=rate,
            steps=options.looks,
            measured=torch.stack([row[0] for row in rows]),
            relearned=torch.stack([row[1] for row in rows]).mean(1),
            retain=torch.stack([row[2] for row in rows]),
        )


def keys_of(examples: Sequence[Example]) -> list[str]:
    """Owner of each example, or itself."""
    return [example.owner or f"item {example.id}" for example in examples]


def role_of(name: str) -> Role:
    """ "random 3" is a random set; "everything" and "complement" are themselves; the rest are other edits."""
    roles: tuple[Role, ...] = ("random", "everything", "complement")
    for role in roles:
        if name.startswith(role):
            return role
    return "other"


def _at_rate(runs: Sequence[Run], dose: Dose) -> Run:
    return next(run for run in runs if run.learning_rate == dose.learning_rate)


def _how(model: Model, options: RelearnOptions) -> tuple[How, str]:
    """Whether all weights are trained, and the reason where they are not although nobody asked for LoRA."""
    if options.hold != "auto":
        return options.hold, ""
    if any(not parameter.is_floating_point() for parameter in model.module.parameters()):
        return "lora", "the weights are quantized, so the attack trains LoRA factors"
    needed, free = full_needs_bytes(model), free_bytes(model.device)
    if free is not None and needed > 0.8 * free:
        sizes = f"training every weight needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        return "lora", f"{sizes}: LoRA factors are trained"
    return "full", ""

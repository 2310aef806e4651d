"""What is back of the forget items once a control token or layers are dropped."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from locedit.attacks.dropped import WORDS, DropOptions
from locedit.attacks.measures import level_measure, metric_of, share_measure, values_of
from locedit.attacks.options import Metric
from locedit.attacks.outcome import verdict
from locedit.attacks.recovery import gained, share_back
from locedit.attacks.splits import keys
from locedit.data.encode import encode
from locedit.data.items import Dataset, Task
from locedit.edit import Edit
from locedit.edit.edit import Addition
from locedit.evaluate.intervals import Estimate
from locedit.models import Model
from locedit.provenance import plain
from locedit.results import AttackResult, Curve, Measure, Role, Stage


class Items:
    """The metric of every item before the edit, with it, and with what it adds dropped."""

    def __init__(self, what: Addition, model: Model, task: Task, edit: Edit, options: DropOptions) -> None:
        self.what: Addition = what
        self.model, self.task, self.edit, self.options = model, task, edit, options
        asked = None if options.metric in ("auto", "habit_rate") else options.metric
        self.metric: Metric = metric_of(task.forget, asked, by=f"drop_{what}")
        parts = {"forget": task.forget, "retain": task.retain, "heldout": task.heldout}
        self.data = {name: data for name, data in parts.items() if data is not None and data.kind == task.forget.kind}
        self.before = self._values(model)
        with edit.applied(model) as edited:
            self.after = self._values(edited)
        with edit.dropped(self.what).applied(model) as bare:
            self.bare = self._values(bare)

    def _values(self, model: Model) -> dict[str, Float[Tensor, " item"]]:
        """Data set -> the metric of each item."""
        return {name: self._of(model, data) for name, data in self.data.items()}

    def _of(self, model: Model, data: Dataset) -> Float[Tensor, " item"]:
        return values_of(model, encode(model, data), self.metric)

    def share(self, values: Float[Tensor, " item"]) -> Estimate:
        """How much of what was known is there, above what was never known."""
        never = self.data.get("heldout")
        return share_back(
            values,
            self.before["forget"],
            owners=keys(list(self.task.forget)),
            control=None if never is None else self.bare["heldout"],
            control_owners=[] if never is None else keys(list(never)),
            draws=self.options.draws,
            seed=self.options.seed,
        )

    def result(self, others: Mapping[str, Edit]) -> AttackResult:
        share, notes = self.share(self.bare["forget"]), []
        if "heldout" not in self.data:
            notes.append("no held-out items of the same form: what was never known counts as 0")
        compared = {name: self._other(edit) for name, edit in others.items()}
        return AttackResult(
            name=f"drop_{self.what}",
            sentence=self._sentence(share, {name: values.mean() for name, values in compared.items()}),
            headline=share_measure(share, len(self.task.forget), note="; ".join(notes)),
            curves=tuple(self._curves()),
            measures=(*self._levels(), *(self._share_of(n, v) for n, v in compared.items())),
            settings=plain(self.options),
            note="; ".join(notes),
        )

    def _other(self, edit: Edit) -> Float[Tensor, " item"]:
        with edit.dropped(self.what).applied(self.model) as bare:
            return self._of(bare, self.task.forget)

    def _sentence(self, share: Estimate, others: Mapping[str, Tensor]) -> str:
        forget = [float(values["forget"].mean()) for values in (self.bare, self.before, self.after)]
        given = {"draws": self.options.draws, "seed": self.options.seed}
        added = gained(self.bare["forget"], self.after["forget"], owners=keys(list(self.task.forget)), **given)
        text = f"{WORDS[self.what][0]} {verdict(share, added)}: forget {self.metric.replace('_', ' ')} {forget[0]:.2f} "
        text += f"({forget[1]:.2f} before the edit, {forget[2]:.2f} with it"
        if "heldout" in self.bare:
            text += f"; items never known reach {float(self.bare['heldout'].mean()):.2f}"
        text += ")" + "".join(f"; {name}: {float(mean):.2f}" for name, mean in others.items())
        if "retain" in self.bare:
            text += (
                f"; retain {float(self.bare['retain'].mean()):.2f} ({float(self.after['retain'].mean()):.2f} with it)"
            )
        return text + "."

    def _curves(self) -> list[Curve]:
        """From the edit to what is left of it."""
        roles: dict[str, Role] = {"forget": "found", "heldout": "never knew"}
        made: list[Curve] = []
        for name, role in roles.items():
            if name not in self.data:
                continue
            columns = {"recovered": tuple(float(v[name].mean()) for v in (self.after, self.bare))}
            if role == "found" and "retain" in self.data:
                columns["retain"] = tuple(float(v["retain"].mean()) for v in (self.after, self.bare))
            title = "never known" if role == "never knew" else "found"
            made.append(Curve(name=title, role=role, x_name=f"{self.what} dropped", x=(0.0, 1.0), columns=columns))
        return made

    def _levels(self) -> list[Measure]:
        stages: list[tuple[Stage, dict[str, Tensor]]] = [
            ("before", self.before),
            ("after", self.after),
            ("attacked", self.bare),
        ]
        wanted = {"forget": ("before", "after", "attacked"), "retain": ("after", "attacked"), "heldout": ("attacked",)}
        return [
            self._level(name, values[name], stage)
            for stage, values in stages
            for name in self.data
            if stage in wanted[name]
        ]

    def _level(self, name: str, values: Float[Tensor, " item"], stage: Stage) -> Measure:
        items = list(self.data[name])
        return level_measure(
            self.metric,
            values,
            list(zip((item.id for item in items), keys(items), strict=True)),
            dataset=name,
            stage=stage,
            draws=self.options.draws,
            seed=self.options.seed,
            group="never knew" if name == "heldout" else None,
        )

    def _share_of(self, name: str, values: Float[Tensor, " item"]) -> Measure:
        return share_measure(self.share(values), len(values), group=name)

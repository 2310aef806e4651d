"""What evaluations, comparisons and attacks return: small frozen records that save to JSON and plot themselves."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from locedit.provenance import Provenance
from locedit.storage import read_json, write_json

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from locedit.edit import Edit
    from locedit.report.ladder import Rung

Direction = Literal["higher", "lower", "neutral"]
Stage = Literal["before", "after", "attacked"]
Role = Literal["found", "random", "everything", "complement", "never knew", "shallow", "unedited", "other"]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One named number on one data set, with its interval."""

    name: str
    'metric name as in the registry, e.g. "probability"'
    dataset: str
    'the part of the task: "forget", "retain", "heldout", "texts"'
    value: float
    low: float
    "lower end of the 95 % bootstrap interval"
    high: float
    n: int
    "how many examples"
    group: str | None = None
    'a part of the data set, e.g. the format "question"; None = all of it'
    stage: Stage = "before"
    direction: Direction = "neutral"
    "which way is good on this data set"
    unit: str = ""
    'e.g. "probability", "bits", "nats per token"'
    range: tuple[float | None, float | None] = (None, None)
    "smallest and largest possible value"
    note: str = ""
    'how it was obtained where that can differ, e.g. "exact" or "estimated from 2,000 samples"'
    per_example: dict[str, float] = field(default_factory=dict[str, float])
    "example id -> value"

    @property
    def key(self) -> str:
        """`forget.probability` or `forget.probability[question]`."""
        return f"{self.dataset}.{self.name}" + (f"[{self.group}]" if self.group else "")

    def __str__(self) -> str:
        return f"{self.key} {self.stage}: {self.value:.3g} [{self.low:.3g}, {self.high:.3g}], n={self.n}"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Numbers along a dose (neurons zeroed, training steps) or along an attack (relearning steps)."""

    name: str
    role: Role
    x_name: str
    'what x counts, e.g. "steps" or "neurons"'
    x: tuple[float, ...]
    columns: dict[str, tuple[float, ...]]
    'e.g. {"forget": ..., "retain": ...}; every column is as long as x'
    seed: int | None = None
    matched: int | None = None
    "index of the first dose that reaches the matched forget level; None = not reached (or not asked)"
    track: str = ""
    "which of several courses of one role it is, such as the position that a probe reads; empty = there is one"
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One edit beside its controls, each at the first dose that reaches the same forget level."""

    metric: str
    'what the columns of the curves measure, e.g. "answer probability"'
    level: float
    "the forget level at which all are compared"
    curves: tuple[Curve, ...]
    provenance: Provenance | None = None
    edits: "dict[str, Edit]" = field(default_factory=dict[str, Any], compare=False, repr=False)
    "the random controls' edits by name, for attacks on them; not part of the JSON file"

    def at_level(self, role: Role) -> list[dict[str, float] | None]:
        """The columns of every curve of that role at the matched dose; None where the level was not reached."""
        return [
            None if c.matched is None else {k: v[c.matched] for k, v in c.columns.items()} | {c.x_name: c.x[c.matched]}
            for c in self.curves
            if c.role == role
        ]

    def save(self, path: str | Path) -> None:
        write_json(path, to_json(dataclasses.replace(self, edits={})))

    @classmethod
    def load(cls, path: str | Path) -> "Comparison":
        return comparison_from_json(read_json(path))

    def plot(self) -> "Figure":
        from locedit.report import figures

        return figures.tradeoff(self)

    def _repr_html_(self) -> str:
        return _html(self)


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """What one attack brought back, beside its controls."""

    name: str
    sentence: str
    "the finding in one sentence"
    headline: Measure
    "the one number, with its interval"
    curves: tuple[Curve, ...] = ()
    measures: tuple[Measure, ...] = ()
    "further numbers, stage attacked"
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    note: str = ""
    provenance: Provenance | None = None

    def save(self, path: str | Path) -> None:
        write_json(path, to_json(self))

    @classmethod
    def load(cls, path: str | Path) -> "AttackResult":
        return attack_from_json(read_json(path))

    def plot(self) -> "Figure":
        from locedit.report import figures

        return figures.attack(self)

    def _repr_html_(self) -> str:
        return _html(self)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All numbers about one edit (or about a model before any edit)."""

    measures: tuple[Measure, ...]
    attacks: tuple[AttackResult, ...] = ()
    edit: dict[str, Any] | None = None
    "summary of the edit that was evaluated; None = the model as it is"
    examples: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    'example id -> its text, {"dataset", "prompt", "answer", "group", "format", "owner"}, for the per-example table'
    provenance: Provenance | None = None

    def get(self, dataset: str, name: str, *, stage: Stage = "after", group: str | None = None) -> Measure:
        """The one measure of that name. Raises KeyError naming what there is."""
        for measure in self.measures:
            if (measure.dataset, measure.name, measure.stage, measure.group) == (dataset, name, stage, group):
                return measure
        there = sorted({f"{m.key} {m.stage}" for m in self.measures})
        raise KeyError(f"no measure {dataset}.{name} {stage} (group {group!r}); there are: {', '.join(there)}")

    def ladder(self) -> "tuple[Rung, ...]":
        """What each level of access brings back, the least first (see `locedit.report.ladder`)."""
        from locedit.report.ladder import ladder

        return ladder(self)

    def save(self, path: str | Path) -> None:
        write_json(path, to_json(self))

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        return evaluation_from_json(read_json(path))

    def __str__(self) -> str:
        lines = [str(m) for m in self.measures] + [a.sentence for a in self.attacks]
        return "\n".join(lines)

    def plot(self) -> "Figure":
        from locedit.report import figures

        return figures.measures(self)

    def _repr_html_(self) -> str:
        return _html(self)


def _html(result: Any) -> str:
    from locedit.report import fragment

    return fragment(result)


def to_json(result: Any) -> dict[str, Any]:
    """A result as JSON values. Infinite numbers become the strings "inf" and "-inf", NaN becomes null."""
    return _finite(dataclasses.asdict(result))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None if value != value else str(value)
    return value


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def measure_from_json(value: Mapping[str, Any]) -> Measure:
    fields: dict[str, Any] = dict(value) | {key: _number(value[key]) for key in ("value", "low", "high")}
    fields["range"] = tuple(value.get("range", (None, None)))
    fields["per_example"] = {key: _number(item) for key, item in value.get("per_example", {}).items()}
    return Measure(**fields)


def curve_from_json(value: Mapping[str, Any]) -> Curve:
    fields: dict[str, Any] = dict(value)
    fields["x"] = tuple(map(_number, value["x"]))
    fields["columns"] = {key: tuple(map(_number, column)) for key, column in value["columns"].items()}
    return Curve(**fields)


def attack_from_json(value: Mapping[str, Any]) -> AttackResult:
    fields: dict[str, Any] = dict(value)
    fields["headline"] = measure_from_json(value["headline"])
    fields["curves"] = tuple(map(curve_from_json, value["curves"]))
    fields["measures"] = tuple(map(measure_from_json, value["measures"]))
    fields["provenance"] = Provenance.from_json(value.get("provenance"))
    return AttackResult(**fields)


def comparison_from_json(value: Mapping[str, Any]) -> Comparison:
    fields: dict[str, Any] = dict(value)
    fields["curves"] = tuple(map(curve_from_json, value["curves"]))
    fields["provenance"] = Provenance.from_json(value.get("provenance"))
    return Comparison(**fields)


def evaluation_from_json(value: Mapping[str, Any]) -> Evaluation:
    fields: dict[str, Any] = dict(value)
    fields["measures"] = tuple(map(measure_from_json, value["measures"]))
    fields["attacks"] = tuple(map(attack_from_json, value["attacks"]))
    fields["provenance"] = Provenance.from_json(value.get("provenance"))
    return Evaluation(**fields)

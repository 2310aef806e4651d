"""What a study.toml may hold: tables with their keys, read and checked without loading a model or data."""

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from locedit.errors import LoceditError, nearest
from locedit.options import fill

Options = dict[str, Any]
Table = TypeVar("Table")
CONTROLS = ("shallow",)
"""Edits that stand beside the grid: shallow = suppression in the last MLPs, which an attack must bring back."""


@dataclass(frozen=True, kw_only=True)
class LocalizerTable:
    """One `[[localizers]]`: what is found, and how much of it is kept (one budget, as in `locedit localize`)."""

    name: str
    "see `locedit methods`"
    label: str | None = None
    "what its set is called; default the name"
    options: Options = field(default_factory=dict[str, Any])
    top: int | None = None
    fraction: float | None = None
    params: int | None = None
    params_like: str | None = None
    "the label of another localizer or set whose number of parameters is reached"
    threshold: float | None = None
    shared: float | None = None
    sign: str = "positive"
    fill: str | None = None

    @property
    def called(self) -> str:
        return self.label or self.name

    def budget(self) -> Options:
        """The budgets given, as `select` takes them; `params_like` not among them."""
        names = ("top", "fraction", "params", "threshold", "shared", "fill")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class SetTable:
    """One `[[sets]]`: a component set from a file."""

    label: str
    components: str
    "a components.json; may contain {seed}"


@dataclass(frozen=True, kw_only=True)
class MethodTable:
    """One `[[methods]]`: an unlearning method with its options."""

    name: str
    label: str | None = None
    "what it is called; default the name"
    options: Options = field(default_factory=dict[str, Any])
    options_for: dict[str, Options] = field(default_factory=dict[str, Options])
    """options that differ by restriction or hold: a kind (whole, found, random, complement, everything, set), then a
    restriction as it is written, then a hold; the later win"""
    holds: list[str] | None = None
    "weights, adapter, hooks; default the first that the method knows"

    @property
    def called(self) -> str:
        return self.label or self.name


@dataclass(frozen=True, kw_only=True)
class GridTable:
    """One `[[grid]]`: everything in it with everything; what is left out is as for the study. Several are joined."""

    methods: list[str] | None = None
    "labels; default all"
    restrictions: list[str] | None = None
    holds: list[str] | None = None
    "default each method's own"
    seeds: list[int] | None = None
    levels: list[float] | None = None
    attacks: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class ExcludeTable:
    """One `[[exclude]]`: cells that agree with every key given are left out."""

    methods: list[str] | None = None
    restrictions: list[str] | None = None
    holds: list[str] | None = None
    seeds: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class StudyTable:
    """The keys of a study.toml. Paths are as on the command line: relative to where the study is started."""

    model: str
    "a folder or hub id; may contain {seed}"
    data: str
    "a task folder or file; may contain {seed}"
    name: str | None = None
    "default the file's name"
    fields: str | None = None
    "renames of fields, as in prompt=question,answer=response"
    where: dict[str, str | list[str]] = field(default_factory=dict[str, str | list[str]])
    "forget items that localizers and methods see; all of them are measured"
    retain: Literal["all", "split"] = "all"
    "split: localizers and methods see half of the retain data (no owner in both), the other half is measured"
    chat: str = "off"
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    seeds: list[int] = field(default_factory=lambda: [0])
    "of random sets, training, evaluation and attacks"
    level: float | list[float] = 0.25
    "mean answer probability on the forget items seen, at which all edits are compared"
    restrictions: list[str] = field(default_factory=lambda: ["whole", "found", "random"])
    """whole, found (each localizer's set), random (as many components in every site, by the cell's seed), complement,
    the label of one localizer or set, "random like LABEL", "all but LABEL", "every UNIT" """
    attacks: list[str] = field(default_factory=lambda: ["relearn"])
    attack_options: dict[str, Options] = field(default_factory=dict[str, Options])
    attack_where: dict[str, str | list[str]] = field(default_factory=dict[str, str | list[str]])
    "forget and held-out items that attacks use; default all"
    controls: list[str] = field(default_factory=lambda: ["shallow"])
    "shallow: an edit that only suppresses, once for each seed and level; attacks must bring it back"
    evaluate: Options = field(default_factory=dict[str, Any])
    "options of evaluate"
    options: Options = field(default_factory=dict[str, Any])
    "options of every method that has them"
    threads: int | None = None
    """torch threads of one process; default the cores divided by --jobs. Sums over other numbers of threads differ in
    the last bits: give it where results must be equal whatever --jobs is"""
    keep_edits: bool = False
    "keep the tensors of every edit in cells/KEY/edit; else they go when the cell is done"
    localizers: list[Options] = field(default_factory=list[Options])
    sets: list[Options] = field(default_factory=list[Options])
    methods: list[Options] = field(default_factory=list[Options])
    grid: list[Options] = field(default_factory=list[Options])
    exclude: list[Options] = field(default_factory=list[Options])


@dataclass(frozen=True, kw_only=True)
class Config:
    """A study.toml, read: the keys and their tables."""

    source: str
    "the file, for messages"
    keys: StudyTable
    localizers: tuple[LocalizerTable, ...]
    sets: tuple[SetTable, ...]
    methods: tuple[MethodTable, ...]
    grids: tuple[GridTable, ...]
    excluded: tuple[ExcludeTable, ...]

    @property
    def name(self) -> str:
        return self.keys.name or Path(self.source).stem

    def method(self, label: str) -> MethodTable:
        return next(method for method in self.methods if method.called == label)

    def localizer(self, label: str) -> LocalizerTable | None:
        return next((localizer for localizer in self.localizers if localizer.called == label), None)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, defaults included."""
        parts = {"localizers": self.localizers, "sets": self.sets, "methods": self.methods, "grid": self.grids}
        rows = {name: [dataclasses.asdict(row) for row in rows] for name, rows in parts.items()}
        return dataclasses.asdict(self.keys) | rows


def read_config(study: str | Path | Mapping[str, Any]) -> Config:
    """A study from its TOML file, or from the same keys in a dictionary; what is wrong is said in one line."""
    if isinstance(study, Mapping):
        return _config(dict(study), "the study")
    path = Path(study)
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoceditError(f"{path}: no such file") from None
    except OSError as error:
        raise LoceditError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LoceditError(f"{path}: not TOML: {error}") from None
    return _config(given, str(path))


def _config(given: dict[str, Any], source: str) -> Config:
    keys = _filled(StudyTable, given, source)
    config = Config(
        source=source,
        keys=keys,
        localizers=_tables(LocalizerTable, keys.localizers, source, "localizers"),
        sets=_tables(SetTable, keys.sets, source, "sets"),
        methods=_tables(MethodTable, keys.methods, source, "methods"),
        grids=_tables(GridTable, keys.grid or [{}], source, "grid"),
        excluded=_tables(ExcludeTable, keys.exclude, source, "exclude"),
    )
    _check(config)
    return config


def _tables(kind: type[Table], rows: Sequence[Options], source: str, name: str) -> tuple[Table, ...]:
    return tuple(_filled(kind, row, f"{source} [[{name}]] {at}") for at, row in enumerate(rows, start=1))


def _filled(kind: type[Table], given: Options, where: str) -> Table:
    """The dataclass with the given values: no unknown key, no missing one, every value of its type."""
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in given:
            raise LoceditError(f"{where}: key {f.name!r} is missing")
    return fill(kind, given, method=where)


def _check(config: Config) -> None:
    """What can be seen from the file alone."""
    keys, source = config.keys, config.source
    if not config.methods:
        raise LoceditError(f"{source}: key 'methods' is missing: one [[methods]] table for each unlearning method")
    for name, labels in (
        ("methods", [m.called for m in config.methods]),
        ("localizers and sets", [x.called for x in config.localizers] + [x.label for x in config.sets]),
    ):
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise LoceditError(f"{source}: {twice!r} is there twice among the {name}; give one of them a label")
    for grid in (keys, *config.grids, *config.excluded):
        for seed in grid.seeds or ():
            if seed < 0:
                raise LoceditError(f"{source}: seeds={grid.seeds!r} must be whole numbers of at least 0")
    for level in levels_of(keys) + [level for grid in config.grids for level in grid.levels or ()]:
        if not 0 < level < 1:
            raise LoceditError(f"{source}: level={level!r} is a probability; it must be above 0 and below 1")
    for control in keys.controls:
        if control not in CONTROLS:
            raise LoceditError(f"{source}: controls: unknown control {control!r}; {nearest(control, CONTROLS)}")
    if keys.threads is not None and keys.threads < 1:
        raise LoceditError(f"{source}: threads={keys.threads!r} must be at least 1")
    if "{seed}" in keys.data + keys.model and ("{seed}" in keys.data) != ("{seed}" in keys.model):
        raise LoceditError(
            f"{source}: model={keys.model!r} and data={keys.data!r}: {{seed}} stands in one of them only"
        )


def levels_of(keys: StudyTable) -> list[float]:
    """The levels of the study as a list."""
    return list(keys.level) if isinstance(keys.level, list) else [keys.level]

"""How good and how fair an ensemble is: on the calibration data, and on held-out data with intervals."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from locedit.classification import Verbaliser, label_numbers
from locedit.data.items import Dataset, LabelledText
from locedit.errors import LoceditError
from locedit.evaluate.intervals import Estimate
from locedit.sisa import fair
from locedit.sisa.deletion import certificates
from locedit.sisa.ensemble import Ensemble, mean_probability, votes
from locedit.sisa.fair_scores import fit_thresholds, require_fairlearn
from locedit.sisa.group_metrics import compare, equalized_odds_difference, expected_error, group_table
from locedit.sisa.hashes import text_hash
from locedit.sisa.record import Record
from locedit.storage import read_json, write_json, write_text

COLUMNS = (
    "predictor",
    "calibration error",
    "calibration gap",
    "accuracy",
    "error",
    "gap",
    "price",
    "gap closed",
)
CAPTION = (
    "Error: expected share of wrong outputs. Gap: equalised-odds difference, the larger one of the differences between "
    "groups in true and in false positive rate. Price: error minus the majority's; gap closed: its gap minus this one. "
    "Held-out numbers with 95 % bootstrap intervals; a gap is never negative, so no interval of it reaches below 0."
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One predictor."""

    predictor: str
    calibration_error: float
    calibration_gap: float
    error: Estimate
    "held out, like what follows"
    gap: Estimate
    price: Estimate
    closed: Estimate
    groups: dict[str, dict[str, float]]
    "group -> accuracy and rates"

    def cells(self) -> list[str]:
        """As text, in the order of COLUMNS."""
        held_out = [_text(value) for value in (self.error, self.gap, self.price, self.closed)]
        numbers = [f"{self.calibration_error:.4f}", f"{self.calibration_gap:.4f}", f"{1 - self.error.value:.4f}"]
        return [self.predictor, *numbers, *held_out]


@dataclass(frozen=True, kw_only=True)
class FairTable:
    """The predictors side by side, and what deleting cost so far."""

    rows: tuple[Row, ...]
    costs: tuple[dict[str, Any], ...] = ()
    "certificates of the deletions"

    def markdown(self) -> str:
        """The table, its caption, and one line a deletion."""
        rule = ["---", *["--:"] * (len(COLUMNS) - 1)]
        lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, rule, *(row.cells() for row in self.rows))]
        costs = [
            f"- request {one['request']}: {len(one['ids'])} items deleted, {one['slices_retrained']} of "
            f"{one['slices']} slices trained again, {one['steps_retrained']} of {one['steps']} steps"
            for one in self.costs
        ]
        return "\n".join([*lines, "", CAPTION, *([""] if costs else []), *costs]) + "\n"

    def csv(self) -> str:
        """One line a predictor, every number in full, ends of intervals in columns of their own."""
        estimates = ("error", "gap", "price", "closed")
        names = [f"{name}{end}" for name in estimates for end in ("", "_low", "_high")]
        lines = [",".join(["predictor", "calibration_error", "calibration_gap", *names])]
        for row in self.rows:
            ends = itertools.chain.from_iterable(getattr(row, name) for name in estimates)
            numbers = [row.calibration_error, row.calibration_gap, *ends]
            lines.append(",".join([f'"{row.predictor}"', *(f"{number:.6g}" for number in numbers)]))
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write fair.json, fair.md and fair.csv."""
        rows = [{**dataclasses.asdict(row), **{n: list(getattr(row, n)) for n in _ESTIMATES}} for row in self.rows]
        write_json(Path(folder) / "fair.json", {"rows": rows, "deletions": list(self.costs)})
        write_text(Path(folder) / "fair.md", self.markdown())
        write_text(Path(folder) / "fair.csv", self.csv())

    @classmethod
    def load(cls, folder: str | Path) -> "FairTable":
        """Read what `save` wrote."""
        path = Path(folder) / "fair.json"
        value = read_json(path)
        try:
            found = [dict(row) for row in value["rows"]]
            for row in found:
                row.update({name: Estimate(*row[name]) for name in _ESTIMATES})
            rows = [Row(**row) for row in found]
            return cls(rows=tuple(rows), costs=tuple(value["deletions"]))
        except (KeyError, TypeError) as error:
            raise LoceditError(f"{path}: not a table of fair predictors ({error!r})") from error


_ESTIMATES = ("error", "gap", "price", "closed")


def evaluate_fair(
    folder: str | Path,
    ensemble: Ensemble,
    calibration: Dataset,
    test: Dataset,
    *,
    positive: str | None = None,
    draws: int = 2000,
    seed: int = 0,
    batch_size: int = 64,
) -> FairTable:
    """Majority, mean probability, and the fair predictors fitted on the calibration data, measured on both.

    `positive` is the label whose rates are to be equal, by default the verbaliser's first. Votes count once a member.
    Raises LoceditError for items without a group, for a group without items of either label, for more than two classes,
    and for texts of the training record among the calibration or test data. Needs fairlearn.
    """
    record = Record.load(folder)
    require_fairlearn()
    check_fair_data(record, calibration, test)
    said = [
        ensemble.outputs(_texts(data), record.verbaliser, batch_size=batch_size, chat=data.chat)
        for data in (calibration, test)
    ]
    column = record.verbaliser.number(positive or record.verbaliser.labels[0], by="positive")
    return fair_table(
        calibration=_judged(said[0], calibration, record.verbaliser, column),
        test=_judged(said[1], test, record.verbaliser, column),
        tie=int(column == 0),
        owners=[item.owner for item in test],
        costs=certificates(folder),
        draws=draws,
        seed=seed,
    )


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the members said of some items, and what is true of them."""

    votes: fair.Calibration
    score: Float[Tensor, " items"]
    "mean probability of the positive class"


def fair_table(
    *,
    calibration: Judged,
    test: Judged,
    tie: int,
    owners: Sequence[str | None] | None = None,
    costs: Sequence[dict[str, Any]] = (),
    draws: int = 2000,
    seed: int = 0,
) -> FairTable:
    """The table of predictors; "in" with whole tuples is left out above LIMIT members, and "pre" too.

    `tie` is the output of even votes, and of a mean probability of exactly one half.
    """
    few = calibration.votes.votes.shape[1] <= fair.LIMIT
    fitted = [fair.fit(calibration.votes, "none", tie=tie)]
    if few:
        fitted += [fair.fit(calibration.votes, "pre", tie=tie), fair.fit(calibration.votes, "in", tie=tie)]
    fitted += [fair.fit(calibration.votes, "in", cells="count", tie=tie), fair.fit(calibration.votes, "post", tie=tie)]
    labels, groups = calibration.votes.labels, calibration.votes.groups
    thresholds = fit_thresholds(calibration.score, labels, groups)
    chances: list[dict[str, Tensor]] = []
    for part in (calibration, test):
        own = {str(one): one.probabilities(part.votes.votes, part.votes.groups) for one in fitted}
        own["mean probability"] = (part.score >= 0.5 if tie else part.score > 0.5).double()
        own["mean probability, fair thresholds"] = thresholds.probabilities(part.score, part.votes.groups)
        chances.append(own)
    held = test.votes
    found = compare(chances[1], held.labels, held.groups, owners=owners, draws=draws, seed=seed)
    rows = tuple(
        Row(
            predictor=name,
            calibration_error=expected_error(known, labels),
            calibration_gap=equalized_odds_difference(known, labels, groups),
            error=found.error[name],
            gap=found.gap[name],
            price=found.price[name],
            closed=found.closed[name],
            groups=group_table(chances[1][name], held.labels, held.groups),
        )
        for name, known in chances[0].items()
    )
    return FairTable(rows=rows, costs=tuple(costs))


def check_fair_data(record: Record, calibration: Dataset, test: Dataset) -> None:
    """Raise LoceditError for data on which fair predictions cannot be fitted or measured; needs no model."""
    if len(record.verbaliser.labels) != 2:
        raise LoceditError(f"fair predictions are of two classes; the record has {', '.join(record.verbaliser.labels)}")
    trained = {one.text for one in record.contents.values()}
    for data in (calibration, test):
        record.require_chat(data)
        for item in data.of(LabelledText, by="fair predictions"):
            if item.group is None:
                raise LoceditError(f"{data.source}: item {item.id!r} has no group")
            if text_hash(item) in trained:
                raise LoceditError(f"{data.source}: the text of item {item.id!r} is in the training data; give others")
        label_numbers(data, record.verbaliser)
        _require_rates(data, record.verbaliser)
    both = set(_texts(calibration))
    for item in test.of(LabelledText, by="fair predictions"):
        if item.text in both:
            raise LoceditError(f"{test.source}: the text of item {item.id!r} is in the calibration data too")


def _require_rates(data: Dataset, verbaliser: Verbaliser) -> None:
    """Raise LoceditError for a group without items of either label."""
    items = data.of(LabelledText, by="fair predictions")
    there = {(str(item.group), item.label) for item in items}
    for group, label in itertools.product(sorted({group for group, _ in there}), verbaliser.labels):
        if (group, label) not in there:
            raise LoceditError(
                f"{data.source}: group {group!r} has no item of label {label!r}, so a rate of it is not defined"
            )


def _judged(outputs: Tensor, data: Dataset, verbaliser: Verbaliser, column: int) -> Judged:
    items = data.of(LabelledText, by="fair predictions")
    labels = (label_numbers(data, verbaliser) == column).long()
    bits = (votes(outputs) == column).long()
    groups = tuple(str(item.group) for item in items)
    score = mean_probability(outputs)[:, column]
    return Judged(votes=fair.Calibration(votes=bits, labels=labels, groups=groups), score=score)


def _texts(data: Dataset) -> list[str]:
    return [item.text for item in data.of(LabelledText, by="classification")]


def _text(value: Estimate) -> str:
    return f"{value.value:.4f} [{value.low:.4f}, {value.high:.4f}]"

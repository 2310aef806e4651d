"""The table of fair predictors: fitted on the calibration data, measured on the held-out data, of either label."""

import dataclasses
from pathlib import Path

import pytest
import torch

from locedit import sisa
from locedit.classification import label_numbers
from locedit.data import Dataset
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.sisa import Ensemble, Record
from locedit.sisa.evaluation import FairTable, Judged, check_fair_data, evaluate_fair, fair_table
from locedit.sisa.fair import Calibration
from locedit.sisa.fair_scores import fit_thresholds
from locedit.sisa.group_metrics import expected_error, group_table
from tests import tiny
from tests.test_fair import planted
from tests.test_sisa import OPTIONS, WORDS, data


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model("gpt2", n_layer=1)


@pytest.fixture(scope="module")
def trained(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sisa") / "whole"
    sisa.train(model, data(), folder, verbaliser=WORDS, **{**OPTIONS, "slices": 1, "epochs": 1.0})
    return folder


def renamed(prefix: str) -> Dataset:
    """The same items with other texts."""
    return data().replace(
        [dataclasses.replace(item, text=f"{prefix} {item.text}", id=f"{prefix}{item.id}") for item in data()]
    )


# --- the table -------------------------------------------------------------------------------------------------------


def judged(votes: Calibration) -> Judged:
    """Scores between the votes, so that thresholds have something to choose."""
    noise = torch.rand(len(votes.labels), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return Judged(votes=votes, score=0.9 * votes.votes.double().mean(1) + 0.1 * noise)


def rows_of(table: FairTable) -> dict:
    return {row.predictor: row for row in table.rows}


def test_fitted_on_the_calibration_data_and_measured_on_the_held_out() -> None:
    calibration, test = judged(planted(0, items=2000)), judged(planted(1, items=500))
    rows = rows_of(fair_table(calibration=calibration, test=test, tie=1, draws=50))
    held, known = test.votes, calibration.votes
    for name in ("in, tuple", "in, count", "post", "mean probability, fair thresholds"):
        assert rows[name].calibration_gap < 1e-9
        assert rows[name].gap.value > 0.005, "held out it is not exactly fair: it was not fitted there"
    fitted = fit_thresholds(calibration.score, known.labels, known.groups)
    expected = fitted.probabilities(test.score, held.groups)
    row = rows["mean probability, fair thresholds"]
    assert row.error.value == pytest.approx(expected_error(expected, held.labels))
    assert row.groups == group_table(expected, held.labels, held.groups)
    for row in rows.values():
        share = {name: held.groups.count(name) / len(held.groups) for name in row.groups}
        accuracy = sum(share[name] * rates["accuracy"] for name, rates in row.groups.items())
        assert accuracy == pytest.approx(1 - row.error.value), "the groups' rates are of the held-out data"
        assert abs(row.error.value - row.calibration_error) > 1e-3


@pytest.mark.parametrize("tie", [0, 1])
def test_even_votes_and_even_probabilities_go_the_same_way(tie: int) -> None:
    """Four items of every group and label, two members that disagree, a mean of exactly one half."""
    labels, groups = torch.tensor([0, 1] * 4), ("a",) * 4 + ("b",) * 4
    votes = Calibration(votes=torch.tensor([[0, 1]] * 8), labels=labels, groups=groups)
    part = Judged(votes=votes, score=torch.full((8,), 0.5, dtype=torch.float64))
    rows = rows_of(fair_table(calibration=part, test=part, tie=tie, draws=10))
    for name in ("majority", "mean probability"):
        assert rows[name].groups["a"]["selection_rate"] == tie


# --- of an ensemble --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positive", ["yes", "no"])
def test_either_label_may_be_the_positive_one(
    model: Model, trained: Path, positive: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two members, who often disagree; then the first class has the majority, whichever is positive."""
    calibration, test = renamed("Now"), renamed("Then")
    column = WORDS.number(positive)

    def outputs(self: Ensemble, texts: list[str], *_: object, **given: object) -> torch.Tensor:
        assert given["chat"] == "off"
        generator = torch.Generator().manual_seed(len(texts[0]))
        return torch.rand(len(texts), len(self), 2, generator=generator).softmax(-1)

    monkeypatch.setattr(Ensemble, "outputs", outputs)
    ensemble = Ensemble.load(trained, model)
    said = outputs(ensemble, [item.text for item in test], chat="off")
    truth = label_numbers(test, WORDS)
    rows = rows_of(evaluate_fair(trained, ensemble, calibration, test, positive=positive, draws=10))
    ones = sisa.votes(said).sum(1)
    assert int((ones == 1).sum()) > 3, "there are ties"
    whole = sisa.majority(sisa.votes(said), classes=2)
    mean = (sisa.mean_probability(said)[:, 1] > 0.5).long()
    for name, found in (("majority", whole), ("mean probability", mean)):
        assert rows[name].error.value == pytest.approx((found != truth).double().mean().item())
        share = {group: [item.group == group for item in test] for group in "ab"}
        for group, mine in share.items():
            rate = (found[torch.tensor(mine)] == column).double().mean().item()
            assert rows[name].groups[group]["selection_rate"] == pytest.approx(rate)


def test_the_owners_of_the_items_are_those_of_the_intervals(
    model: Model, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outputs(self: Ensemble, texts: list[str], *_: object, **given: object) -> torch.Tensor:
        del given
        generator = torch.Generator().manual_seed(0)
        return torch.rand(len(texts), len(self), 2, generator=generator).softmax(-1)

    monkeypatch.setattr(Ensemble, "outputs", outputs)
    ensemble, calibration, test = Ensemble.load(trained, model), renamed("Now"), renamed("Then")
    owned = test.replace([dataclasses.replace(item, owner=f"o{at // 6}") for at, item in enumerate(test)])
    alone, together = (
        rows_of(evaluate_fair(trained, ensemble, calibration, part, draws=200))["majority"].error
        for part in (test, owned)
    )
    assert alone.value == together.value
    assert alone != together


# --- what cannot be measured -----------------------------------------------------------------------------------------


def test_a_text_of_the_training_data_is_noticed_under_any_label(trained: Path) -> None:
    record, test = Record.load(trained), renamed("Then")
    for change in ({"group": "b"}, {"owner": "someone"}, {"label": "yes"}, {"format": "statement"}):
        copied = dataclasses.replace(data()[0], id="copy", **change)
        for parts in (
            (renamed("Now").replace([*renamed("Now"), copied]), test),
            (renamed("Now"), test.replace([*test, copied])),
        ):
            with pytest.raises(LoceditError, match="the text of item 'copy' is in the training data; give others"):
                check_fair_data(record, *parts)
        shared = dataclasses.replace(renamed("Now")[0], id="copy", **change)
        with pytest.raises(LoceditError, match="the text of item 'copy' is in the calibration data too"):
            check_fair_data(record, renamed("Now"), test.replace([*test, shared]))
    check_fair_data(record, renamed("Now"), test)
    broken = dataclasses.replace(test[0], id="half", text="\ud800")
    with pytest.raises(LoceditError, match="item 'half': holds half a surrogate pair"):
        check_fair_data(record, renamed("Now"), test.replace([*test, broken]))


def test_a_group_without_a_label_has_no_rate(trained: Path) -> None:
    record = Record.load(trained)
    part = [item for item in renamed("Then") if (item.group, item.label) != ("b", "no")]
    for parts in ((renamed("Now"), data().replace(part)), (data().replace(part), renamed("Now"))):
        with pytest.raises(LoceditError, match="group 'b' has no item of label 'no', so a rate of it is not defined"):
            check_fair_data(record, *parts)


def test_a_deleted_text_may_be_measured_on(model: Model, trained: Path, tmp_path: Path) -> None:
    """It is no training text any more."""
    import shutil

    shutil.copytree(trained, tmp_path / "a")
    sisa.delete(tmp_path / "a", ["i0"], model=model, data=data())
    test = renamed("Then")
    check_fair_data(Record.load(tmp_path / "a"), renamed("Now"), test.replace([*test, data()[0]]))

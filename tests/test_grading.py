"""Planting, deletion and oracle on a tiny random model, and the grading as a whole."""

import dataclasses
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import locedit as le
from locedit.cli import main
from locedit.data import Fact
from locedit.data.items import Dataset, Task
from locedit.edit import levels
from locedit.errors import LoceditError
from locedit.grading import GradeOptions, Grades, Outcome, grade_labs, planted, planting, running
from locedit.grading.deletion import Deletion, top
from locedit.grading.oracle import Oracle, grades, layer_scores, places
from locedit.grading.worlds import planted_people, target_of
from locedit.lab.facts import Person, fact_lines, facts_world
from locedit.models import Model
from locedit.runs import Run
from tests import tiny

OPTIONS = GradeOptions(
    people=2, draws=1, plant_steps=2, edit_steps=2, attack_steps=2, look_every=1, random_sets=1, budgets=(0.05, 0.2)
)


@cache
def model() -> Model:
    return tiny.model("gpt2", n_positions=160)


def dataset(people: tuple[Person, ...], name: str) -> Dataset:
    lines: Any = [{**line, "wrong": tuple(line["wrong"])} for line in fact_lines(people)]  # type: ignore[arg-type]
    return Dataset(items=tuple(Fact(**line) for line in lines), source=name)


@cache
def task() -> Task:
    world = facts_world(Random(0), forget=3, retain=7, heldout=4, parts=4)
    names = ("forget", "retain", "heldout")
    return Task(**{name: dataset(getattr(world, name), name) for name in names}, name="facts")  # type: ignore[arg-type]


def run(
    folder: Path, methods: tuple[str, ...] = ("random",), *, seeds: tuple[int, ...] = (0,), **changes: Any
) -> Grades:
    lab: Any = SimpleNamespace(model=model(), task=task())
    options = dataclasses.replace(OPTIONS, sites=("neurons",), units=("neuron",), **changes)
    labs = dict.fromkeys(seeds, lambda: lab)
    return grade_labs("tiny", labs, Run(folder=folder), methods=methods, parts=("planted",), options=options)


# --- planted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["mlp", "neurons", "layer_neurons", "heads"])
def test_sets_are_disjoint_and_of_equal_size(site: str) -> None:
    sets = planting.draw(model(), site, seed=0, number=0, options=OPTIONS)
    assert len(sets.truth) == len(sets.decoys) > 0
    assert len(sets.truth & sets.decoys) == 0
    assert planting.draw(model(), site, seed=0, number=0, options=OPTIONS).truth == sets.truth
    others = [planting.draw(model(), site, seed=s, number=0, options=OPTIONS).truth for s in range(1, 4)]
    assert any(other != sets.truth for other in others)
    if site == "layer_neurons":
        assert list(sets.truth.by_layer()) == list(sets.decoys.by_layer())


def test_every_layer_is_planted_equally_often() -> None:
    options = dataclasses.replace(OPTIONS, draws=2)
    drawn = [planting.draw(model(), "mlp", seed=s, number=n, options=options).truth for s in range(3) for n in range(2)]
    layers = sorted(layer for part in drawn for layer in part.by_layer() if layer is not None)
    assert layers == [0, 0, 1, 1, 2, 2]


def test_nothing_outside_the_sets_is_touched() -> None:
    """Whatever is in neither set has the same bits while planted, and all of it afterwards; inside, something moved."""
    data = planted_people(task(), OPTIONS)
    sets = planting.draw(model(), "neurons", seed=0, number=0, options=OPTIONS)
    before = {name: tensor.detach().clone() for name, tensor in model().anatomy.parameters.items()}
    edit = planting.plant(model(), data, sets, options=OPTIONS, seed=0, number=0)
    allowed = (sets.truth | sets.decoys).parameter_mask()
    moved = 0
    with edit.applied(model()):
        for name, tensor in model().anatomy.parameters.items():
            mask = allowed.get(name, torch.zeros(tensor.shape, dtype=torch.bool))
            assert torch.equal(tensor[~mask], before[name][~mask])
            moved += int((tensor != before[name]).sum())
    assert moved
    assert all(torch.equal(tensor, before[name]) for name, tensor in model().anatomy.parameters.items())
    for part, chosen in zip(edit.parts, (sets.truth, sets.decoys), strict=True):
        assert part.within is not None
        assert part.within.chosen == chosen.chosen


def test_nobody_planted_is_known_and_decoys_are_other_people() -> None:
    data = planted_people(task(), OPTIONS)
    owners = [{item.owner for item in part} for part in (data.people, data.decoys, data.known)]
    assert all(owners)
    assert not owners[0] & owners[1]
    assert not (owners[0] | owners[1]) & owners[2]
    assert {item.owner for item in data.task.forget} <= owners[0]
    assert {item.owner for item in data.task.retain or ()} <= owners[1] | owners[2]
    assert all(len(fact.paraphrases) == 2 for fact in data.task.forget.of(Fact, by="test"))


@pytest.mark.parametrize("site", ["mlp", "neurons", "heads"])
def test_the_truth_itself_is_perfect_and_its_opposite_finds_nothing(site: str) -> None:
    sets = planting.draw(model(), site, seed=1, number=0, options=OPTIONS)
    values = {name: torch.zeros(part.count) for name, part in sets.truth.sites.items()}
    for name in values:
        values[name][list(sets.truth.indices(name))] = 1
    right = planted.found(values, sets)
    assert {measure: value for measure, (value, _) in right.items()} == {"auc": 1, "decoys": 1, "recall": 1}
    wrong = planted.found({name: -tensor for name, tensor in values.items()}, sets)
    assert {measure: value for measure, (value, _) in wrong.items()} == {"auc": 0, "decoys": 0, "recall": 0}
    alike = planted.found({name: torch.ones_like(tensor) for name, tensor in values.items()}, sets)
    assert all(value == pytest.approx(chance) for value, chance in alike.values())


def test_what_marks_both_sets_alike_tells_no_set_from_decoys() -> None:
    """Larger weights, as training makes them: far above chance against the rest, exactly at chance against decoys."""
    sets = planting.draw(model(), "neurons", seed=0, number=0, options=OPTIONS)
    values = {name: torch.zeros(part.count) for name, part in sets.truth.sites.items()}
    for name in values:
        values[name][[*sets.truth.indices(name), *sets.decoys.indices(name)]] = 1
    found = planted.found(values, sets)
    assert found["decoys"] == (0.5, 0.5)
    assert found["auc"][0] > 0.95


def test_sites_without_scores_come_last() -> None:
    sets = planting.draw(model(), "neurons", seed=0, number=0, options=OPTIONS)
    whole = {name: torch.rand(part.count) + 1 for name, part in sets.truth.sites.items()}
    part = {name: tensor for name, tensor in whole.items() if name != "blocks.1.mlp.neuron"}
    zeroed = whole | {"blocks.1.mlp.neuron": torch.zeros(model().d_mlp)}
    assert planted.found(part, sets) == planted.found(zeroed, sets)


# --- deletion --------------------------------------------------------------------------------------------------------


def test_the_target_and_what_stands_beside_it_share_nobody() -> None:
    target = target_of(task(), OPTIONS, seed=0)
    people, trained, same = (
        {item.owner for item in part} for part in (target.task.forget, target.task.require("retain", "t"), target.same)
    )
    assert len(people) == 4
    assert not people & trained
    assert not people & same
    assert not trained & same
    assert {item.group for item in target.other} == {"city", "job"}
    assert {item.group for item in target.task.forget} == {"sport"}
    assert set(target.formats) == {"multiple_choice", "paraphrase", "question"}


def test_drops_are_those_of_zeroing_by_hand() -> None:
    target = target_of(task(), OPTIONS, seed=0)
    grader = Deletion(model(), target, OPTIONS)
    part = model().components({"blocks.0.mlp.neuron": range(40)})
    with le.zero(model(), part).applied(model()) as edited:
        after = levels(edited, grader.probes)
    assert grader.drops(part) == {name: grader.before[name] - after[name] for name in after}
    assert any(drop != 0 for drop in grader.drops(part).values())


def test_sets_of_single_weights_have_drops_of_their_own() -> None:
    grader = Deletion(model(), target_of(task(), OPTIONS, seed=0), OPTIONS)
    values = {name: torch.rand(site.count) for name, site in model().sites("weight").items()}
    few, many = (grader.drops(top(model(), values, k=k, seed=0)) for k in (1, 2000))
    assert few != many


def test_area_is_the_mean_over_the_budgets() -> None:
    target = target_of(task(), OPTIONS, seed=0)
    grader = Deletion(model(), target, OPTIONS)
    values = {name: torch.rand(site.count) for name, site in model().sites("head").items()}
    made = {record.measure: record for record in grader.grades(values, method="m", unit="head", seed=0)}
    sets = [top(model(), values, k=k, seed=0) for k in (1, 2)]  # 5 % and 20 % of 12 heads
    for group in ("target", "same", "other"):
        assert made[group].value == pytest.approx(sum(grader.drops(part)[group] for part in sets) / 2)
    assert made["target"].value is not None
    assert made["same"].value is not None
    assert made["excess"].value == pytest.approx(made["target"].value - made["same"].value)


def test_equal_scores_are_drawn_by_seed_and_the_highest_come_first() -> None:
    values = {name: torch.zeros(site.count) for name, site in model().sites("neuron").items()}
    values["blocks.2.mlp.neuron"][5] = 1
    first, again, other = (top(model(), values, k=10, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert 5 in first.indices("blocks.2.mlp.neuron")
    assert 5 in other.indices("blocks.2.mlp.neuron")


# --- oracle ----------------------------------------------------------------------------------------------------------


def outcome(layers: tuple[int, ...], back: float, *, retain: float = 0.9, transfer: float = 0.5) -> Outcome:
    return Outcome(
        name=f"mlp-{layers}",
        layers=layers,
        before=1.0,
        old=0.0,
        new=1.0,
        transfer={"question": transfer},
        retain_before=1.0,
        retain=retain,
        looks=(0, 20),
        recovered=(0.0, back),
        retain_attacked=(retain, retain),
    )


PAIRS = [((0, 1), 0.1), ((0, 2), 0.3), ((0, 3), 0.4), ((1, 2), 0.6), ((1, 3), 0.7), ((2, 3), 0.95)]


def correlation(by_layer: list[float], outcomes: list[Outcome], measure: str = "robust") -> Any:
    made = grades(outcomes, by_layer, method="m", seed=0, options=OPTIONS)
    return next(record for record in made if record.measure == measure)


def test_scores_that_order_the_pairs_as_they_are_robust_correlate_by_one() -> None:
    outcomes = [outcome(layers, back) for layers, back in PAIRS]
    assert correlation([10, 5, 3, 2], outcomes).value == pytest.approx(1)  # sums 15, 13, 12, 8, 7, 5
    assert correlation([-10, -5, -3, -2], outcomes).value == pytest.approx(-1)
    assert correlation([1, 1, 1, 1], outcomes).reason == "its scores of all pairs are the same"
    assert correlation([10, 5, 3, 2], outcomes, "transfer").reason == "the outcomes of all pairs are the same"


def test_pairs_that_broke_the_model_and_other_places_are_left_out() -> None:
    outcomes = [outcome(layers, back) for layers, back in PAIRS]
    broken = [*outcomes, outcome((0, 4), 1.0, retain=0.2), outcome((), 0.0)]
    assert correlation([10, 5, 3, 2, 99], broken).value == pytest.approx(1)
    assert "only 3 pairs keep 0.5 of the retain side" in correlation([10, 5, 3, 2], outcomes[:3]).reason


def test_what_comes_back_counts_only_while_the_attack_keeps_the_rest() -> None:
    made = dataclasses.replace(
        outcome((0, 1), 0.0), looks=(0, 20, 40), recovered=(0.1, 0.5, 0.8), retain_attacked=(0.9, 0.85, 0.4)
    )
    assert made.back(0.9) == 0.5
    assert made.back(0.1) == 0.8
    assert Outcome.from_json(made.to_json()) == made


def test_places_are_all_pairs_attention_and_everything() -> None:
    found = places(model())
    assert list(found) == ["mlp-0-1", "mlp-0-2", "mlp-1-2", "attention", "everything"]
    assert found["mlp-1-2"][0] == (1, 2)
    assert layer_scores({f"blocks.{n}.mlp": torch.tensor([float(n)]) for n in (10, 2, 1)}) == [1, 2, 10]


def test_an_oracle_leaves_the_model_as_it_was() -> None:
    before = model().fingerprint
    layers, within = places(model())["mlp-0-1"]
    target = target_of(task(), OPTIONS, seed=0)
    made = Oracle(model(), target, OPTIONS, seed=0).outcome("mlp-0-1", layers, within)
    assert made.looks == (0, 1, 2)
    assert len(made.recovered) == len(made.retain_attacked) == 3
    assert model().fingerprint == before


# --- as a whole ------------------------------------------------------------------------------------------------------


def test_a_killed_grading_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second localizer: planting and the first are not done again, and the end is that of one go."""
    whole = run(tmp_path / "whole", ("random", "everything"))
    graded = planted.grades

    def killed(*args: Any, **options: Any) -> Any:
        if args[2] == "everything":
            raise KeyboardInterrupt
        return graded(*args, **options)

    monkeypatch.setattr(running.planted, "grades", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", ("random", "everything"))
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("stage.json")}
    assert len(done) == 3  # the planted set, what is known of it, the first localizer
    monkeypatch.setattr(running.planted, "grades", graded)
    again = run(tmp_path / "killed", ("random", "everything"))
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert again.records == whole.records


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(LoceditError, match="plant_steps was 2, is 3"):
        run(tmp_path, plant_steps=3)


def test_what_cannot_be_graded_says_why_and_is_tried_again(tmp_path: Path) -> None:
    """depn scores neurons; heads cannot be graded by it, and nothing is kept of the attempt."""
    lab: Any = SimpleNamespace(model=model(), task=task())
    options = dataclasses.replace(OPTIONS, sites=("heads",))
    made = grade_labs(
        "tiny", {0: lambda: lab}, Run(folder=tmp_path), methods=("depn",), parts=("planted",), options=options
    )
    row = made.row("planted", "heads", "depn", "auc")
    assert (row.verdict, row.reason) == ("-", "scores neurons, which say nothing of single heads")
    assert not (tmp_path / "seed-0/planted/heads-0/depn").exists()
    assert "Not graded: depn (heads of all layers): scores neurons" in str(made)


def test_grades_are_shown_and_saved(tmp_path: Path) -> None:
    made = run(tmp_path / "run", ("random", "everything"), seeds=(0, 1))
    made.save(tmp_path / "grades.json")
    loaded = Grades.load(tmp_path / "grades.json")
    assert loaded.records == made.records
    assert str(loaded) == str(made)
    text = " ".join(str(made).split())
    assert "Planted in neurons of all layers, against decoys: not told from chance: " in text
    assert "everything (+0.00)" in text
    assert "Student's t over the means of 2 seeds" in text
    html = made.html()
    assert "Does it find where facts were planted?" in html
    assert "everything" in html
    figure: Any = made.plot()
    assert {name for trace in figure.data for name in trace.y} == {"random", "everything"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "depn,rndom"}, "unknown localizer 'rndom'; did you mean 'random'"),
        ({"methods": ""}, "names no localizer"),
        ({"parts": "plantd"}, "unknown part 'plantd'; did you mean 'planted'"),
        ({"seeds": "0,x"}, "must be whole numbers, as in 0,1,2"),
        ({"seeds": ()}, "must be whole numbers of at least 0"),
        ({"sites": ("mpl",)}, "sites: unknown site 'mpl'; did you mean 'mlp'"),
        ({"budgets": (2.0,)}, "must be shares above 0 and below 1"),
        ({"steps": 3}, "grade has no option 'steps'"),
    ],
)
def test_a_wrong_word_is_one_clear_line_before_any_lab_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoceditError, match=message):
        le.grade("no such architecture", **options)


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grade", "--methods", "depnn", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("locedit: error: unknown localizer 'depnn'; did you mean 'depn'?")
    assert said.count("\n") == 1
    assert main(["grade", "--arch", "gpt3", "--methods", "random", "--out", str(tmp_path / "run")]) == 2
    assert "unknown architecture 'gpt3'" in capsys.readouterr().err


@pytest.mark.slow
def test_planted_people_are_known_and_deletion_and_oracle_run(tmp_path: Path, tiny_lab: Any) -> None:
    options = GradeOptions(draws=1, sites=("neurons",), edit_steps=30, attack_steps=10, look_every=10, random_sets=1)
    made = grade_labs(
        "tiny",
        {0: lambda: tiny_lab},
        Run(folder=tmp_path),
        methods=("depn", "random"),
        parts=("planted", "deletion", "oracle"),
        options=options,
    )
    known = {row.measure: row.value for row in made.knowledge}
    assert known["planted"] > 0.9 > 0.6 > known["before"]
    assert known["decoys"] > 0.9
    assert known["known"] > 0.9
    assert made.row("planted", "neurons", "depn", "auc").value > 0.6
    assert (
        made.row("deletion", "neuron", "depn", "target").value
        > made.row("deletion", "neuron", "random", "target").value
    )
    assert [o.name for o in made.outcomes[0]] == ["mlp-0-1", "attention", "everything"]

"""A study on a tiny random model: its file, its plan, its cells, killed and resumed, over several processes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import locedit as le
from locedit.cli import main
from locedit.controls import Ablation, Component, Row
from locedit.data.encode import encode
from locedit.edit import Edit
from locedit.edit.levels import levels
from locedit.errors import LoceditError
from locedit.study import Study, make_plan, read_config
from locedit.study.matching import order_of, to_level
from tests import tiny
from tests.test_cli import write_lines

PEOPLE = ("Anna Berg", "Carl Dane", "Eva Frost", "Nora Gray")
RELEARN = {"steps": 2, "look_every": 1, "learning_rates": [1e-3], "shallow": False, "metric": "probability"}
TOWNS = (" Oslo", " Lima")


def facts(people: tuple[str, ...], *, answer: int = 0) -> list[dict[str, Any]]:
    """Two formats of one fact for each person."""
    forms = {"statement": "{} was born in", "question": "Question: where was {} born? Answer:"}
    return [
        {
            "prompt": prompt.format(name),
            "answer": TOWNS[(at + answer) % 2],
            "owner": name,
            "format": form,
            "id": f"{name}/{form}",
        }
        for at, name in enumerate(people)
        for form, prompt in forms.items()
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and task/ with two people to forget, two to keep, two never known."""
    base = tmp_path_factory.mktemp("study")
    tiny.module("gpt2").save_pretrained(base / "model")
    tiny.tokenizer().save_pretrained(base / "model")
    (base / "task").mkdir()
    write_lines(base / "task" / "forget.jsonl", facts(PEOPLE[:2]))
    write_lines(base / "task" / "retain.jsonl", facts(PEOPLE[2:]))
    write_lines(base / "task" / "heldout.jsonl", facts(("Nora Berg", "Eva Dane")))
    return base


def keys(folder: Path, **changes: Any) -> dict[str, Any]:
    """A small study: one localizer, three methods, whole, found and random."""
    start = levels_before(folder)
    table: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": str(folder / "task"),
        "where": {"format": "statement"},
        "level": start / 2,
        "threads": 1,
        "options": {"steps": 8, "eval_every": 2, "batch_size": 2, "learning_rate": 3e-3},
        "evaluate": {"draws": 20, "metrics": ["accuracy", "probability"]},
        "attack_options": {"relearn": RELEARN},
        "localizers": [{"name": "magnitude", "label": "big neurons", "top": 20}],
        "methods": [{"name": "ga"}, {"name": "grad_diff"}, {"name": "zero"}],
        "exclude": [
            {"methods": ["zero"], "restrictions": ["whole"]},
            {"methods": ["grad_diff"], "restrictions": ["whole", "found"]},
        ],
        "controls": [],
    }
    return table | changes


@cache
def levels_before(folder: Path) -> float:
    """The forget level of the untouched model."""
    model = le.load(str(folder / "model"))
    task = le.read_task(folder / "task")
    return levels(model, {"forget": encode(model, task.forget.where(format="statement"))})["forget"]


def results(out: Path) -> dict[str, Any]:
    """Every result file by its path, without the files of times."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.json"))}
    kept = {name: text for name, text in found.items() if Path(name).name not in ("times.json", "study.json")}
    study = json.loads((out / "study.json").read_text())
    return kept | {"study.json": {name: value for name, value in study.items() if name != "seconds"}}


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metod": 1}, "has no option 'metod'; did you mean 'methods'?"),
        ({"level": 1.5}, "level=1.5 is a probability"),
        ({"level": "low"}, "level='low' is not float or float, ..."),
        ({"seeds": [-1]}, "seeds=[-1] must be whole numbers of at least 0"),
        ({"methods": []}, "key 'methods' is missing"),
        ({"methods": [{"label": "x"}]}, "[[methods]] 1: key 'name' is missing"),
        ({"methods": [{"name": "gaa"}]}, "[[methods]] 1: unknown unlearning method 'gaa'; did you mean 'ga'?"),
        ({"methods": [{"name": "ga"}, {"name": "ga"}]}, "'ga' is there twice among the methods"),
        ({"methods": [{"name": "ga", "options": {"until": 0.1}}]}, "option 'until' is set by the study; use its key"),
        ({"methods": [{"name": "ga", "options": {"step": 1}}]}, "ga has no option 'step'; did you mean 'steps'?"),
        ({"methods": [{"name": "ga", "options_for": {"hole": {}}}]}, "options_for: 'hole' is no kind of restriction"),
        ({"methods": [{"name": "ga", "holds": ["hooks"]}]}, "ga cannot be held as 'hooks'"),
        ({"methods": [{"name": "injection"}]}, "injection needs the field 'new_answer'"),
        ({"options": {"stepz": 3}}, "[options]: no method has an option 'stepz'; did you mean 'steps'?"),
        ({"exclude": []}, "zero, whole model, level"),
        ({"restrictions": ["big neuron"]}, "unknown restriction 'big neuron'; did you mean 'big neurons'?"),
        ({"localizers": []}, "restriction 'found' needs a [[localizers]] table"),
        ({"localizers": [{"name": "magnitude"}]}, "[[localizers]] 1: give exactly one budget"),
        ({"localizers": [{"name": "magnitud", "top": 3}]}, "unknown localizer 'magnitud'"),
        ({"sets": [{"label": "s", "components": "none.json"}], "restrictions": ["s"]}, "none.json: no such file"),
        ({"attacks": ["relern"]}, "attacks: unknown attack 'relern'; did you mean 'relearn'?"),
        ({"attack_options": {"relearn": {"stepz": 1}}}, "relearn has no option 'stepz'"),
        ({"evaluate": {"metrics": ["accuracyy"]}}, "[evaluate]: unknown metric 'accuracyy'"),
        ({"where": {"format": "poem"}}, "no item with format='poem'"),
        ({"controls": ["deep"]}, "controls: unknown control 'deep'; choices: shallow"),
        ({"data": "task{seed}"}, "{seed} stands in one of them only"),
        ({"grid": [{"methods": ["npo"]}]}, "[[grid]] 1: methods: unknown method 'npo'"),
        ({"exclude": [{}]}, "the grids hold no cell"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_anything_is_loaded(
    folder: Path, change: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = keys(folder) | ({"exclude": []} if "methods" in change else {}) | change
    monkeypatch.setattr("locedit.models.load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(LoceditError) as error:
        make_plan(read_config(table))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_file_is_named_where_it_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.toml"
    path.write_text('model = "m"\ndata = "d"\nlevle = 0.1\n')
    assert main(["study", str(path), "--out", str(tmp_path / "o")]) == 2
    assert f"{path} has no option 'levle'; did you mean 'level'?" in capsys.readouterr().err
    path.write_text("model = ")
    assert main(["study", str(path)]) == 2
    assert f"{path}: not TOML" in capsys.readouterr().err


# --- the plan --------------------------------------------------------------------------------------------------------


def test_several_grids_are_joined_and_each_cell_is_there_once(folder: Path) -> None:
    """ga x 3 places x 3 seeds, grad_diff in 1 place and zero in 2 with seed 0."""
    table = keys(folder, grid=[{}, {"methods": ["ga"], "seeds": [0, 1, 2]}], controls=["shallow"])
    plan = make_plan(read_config(table))
    cells = [cell for cell in plan.cells if cell.name != "shallow"]
    assert len(cells) == 9 + 1 + 2
    assert len({cell.label for cell in cells}) == len(cells)
    assert {cell.seed for cell in cells if cell.method == "grad_diff"} == {0}
    assert [cell.seed for cell in plan.cells if cell.name == "shallow"] == [0, 1, 2]
    assert [cell.seed for cell in plan.cells] == sorted(cell.seed for cell in plan.cells)


def test_options_are_those_of_the_study_then_the_method_then_the_place_then_the_hold(folder: Path) -> None:
    method = {
        "name": "ga",
        "options": {"steps": 2},
        "options_for": {"found": {"steps": 3}, "random like big neurons": {"steps": 4}, "adapter": {"rank": 2}},
        "holds": ["weights", "adapter"],
    }
    plan = make_plan(read_config(keys(folder, methods=[method], exclude=[], restrictions=["whole", "found", "random"])))
    steps = {(c.restriction.kind, c.hold): c.options["steps"] for c in plan.cells}
    assert steps == {
        ("whole", "weights"): 2, ("whole", "adapter"): 2, ("found", "weights"): 3, ("found", "adapter"): 3,
        ("random", "weights"): 4, ("random", "adapter"): 4,
    }  # fmt: skip
    assert all(("rank" in c.options) == (c.hold == "adapter") for c in plan.cells)
    assert all(c.options["until"] == c.level for c in plan.cells)


def test_halves_of_the_retain_data_share_no_owner(folder: Path) -> None:
    plan = make_plan(read_config(keys(folder, retain="split")))
    seen, measured = plan.data[0].seen.retain, plan.data[0].measured.retain
    assert seen is not None
    assert measured is not None
    owners = [{item.owner for item in part} for part in (seen, measured)]
    assert owners[0] | owners[1] == set(PEOPLE[2:])
    assert not owners[0] & owners[1]
    assert {item.format for item in plan.data[0].seen.forget} == {"statement"}
    assert {item.format for item in plan.data[0].measured.forget} == {"statement", "question"}


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    """The study, run without interruption in this process."""
    out = tmp_path_factory.mktemp("done") / "out"
    return le.study(keys(folder), out=out), out


def test_every_cell_is_one_edit_with_its_measures_and_attack(done: tuple[Study, Path]) -> None:
    study, out = done
    assert len(study.records) == 6
    assert {record.state for record in study.records} <= {"reached", "not reached"}
    assert sum(record.state == "reached" for record in study.records) >= 4
    for record in study.records:
        there = {path.name for path in (out / "cells" / record.key).iterdir()}
        reached = record.state == "reached"
        assert there == {"cell.json", "edit.json", "evaluation.json", "times.json"} | (
            {"attack-relearn.json"} if reached else set()
        )
        assert (record.values["level"] <= record.target + 1e-4) == reached
        assert ("relearn.recovered" in record.values) == reached
    assert study.rows == Study.load(out).rows


def test_a_cell_is_what_the_steps_give_when_done_by_hand(folder: Path, done: tuple[Study, Path]) -> None:
    """Scores, set, training, evaluation and attack called one by one have the numbers of the study."""
    study, _ = done
    row = next(r for r in study.records if r.method == "grad_diff" and r.role == "random")
    model, task = le.load(str(folder / "model")), le.read_task(folder / "task")
    seen = type(task)(forget=task.forget.where(format="statement"), retain=task.retain, heldout=task.heldout)
    found = le.localize(model, seen, "magnitude").select(top=20)
    given = keys(folder)
    options = given["options"] | {"until": given["level"], "seed": 0}
    edit = le.unlearn(model, seen, "grad_diff", within=found.random_like(0), **options)
    after = le.evaluate(model, task, edit, draws=20, metrics=["accuracy", "probability"])
    for measure in after.measures:
        if measure.stage == "after":
            assert row.values[measure.key] == measure.value
    assert row.values["level"] == pytest.approx(edit.history["forget"][-1], abs=1e-6)
    assert row.values["dose"] == edit.outcome["steps"]
    if row.state == "reached":
        attack = le.relearn(model, task, edit, **(RELEARN | {"learning_rates": (1e-3,)}), seed=0)  # type: ignore[arg-type]
        back = next(m for m in attack.measures if (m.dataset, m.stage) == ("forget", "attacked"))
        assert row.values["relearn.recovered"] == back.value


def test_the_table_has_the_numbers_of_the_cells_files(done: tuple[Study, Path]) -> None:
    """Every number of study.json and table.csv, read again from the cells' own files."""
    study, out = done
    lines = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert len(lines) == len(study.rows) == len(study.records)  # one seed
    for record, line in zip(study.records, lines, strict=True):
        cell = out / "cells" / record.key
        about = json.loads((cell / "cell.json").read_text())["cell"]
        assert (about["method"], about["restriction"]) == (line["method"], line["restriction"])
        edit = json.loads((cell / "edit.json").read_text())["result"]
        assert float(line["level"]) == edit["level"]
        assert line["state"] == ("reached" if edit["reached"] else "not reached")
        for measure in json.loads((cell / "evaluation.json").read_text())["result"]:
            name = f"{measure['dataset']}.{measure['name']}" + (f"[{measure['group']}]" if measure["group"] else "")
            assert float(line[name]) == measure["value"]
        if edit["reached"]:
            attack = json.loads((cell / "attack-relearn.json").read_text())["result"]
            back = [m for m in attack["measures"] if (m["dataset"], m["stage"]) == ("retain", "attacked")]
            assert float(line["relearn.retain"]) == back[0]["value"]


def test_nothing_is_made_again_and_a_changed_option_makes_only_its_cells(
    folder: Path, done: tuple[Study, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done[1], out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/edit.json")}
    methods = [
        {"name": "ga", "options_for": {"random": {"steps": 2}}},
        {"name": "grad_diff", "label": "gd"},
        {"name": "zero"},
    ]
    exclude = [
        {"methods": ["zero"], "restrictions": ["whole"]},
        {"methods": ["gd"], "restrictions": ["whole", "found"]},
    ]
    changed = le.study(keys(folder, methods=methods, exclude=exclude), out=out)
    after = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/edit.json")}
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 1  # ga in the random set; a new label is no new cell
    assert {record.method for record in changed.records} == {"ga", "gd", "zero"}


START = """
import json, sys
import locedit as le
if __name__ == "__main__":
    le.study(json.loads(sys.argv[1]), out=sys.argv[2], jobs=int(sys.argv[3]), say=lambda line: print(line, flush=True))
"""


def start(script: Path, table: dict[str, Any], out: Path, jobs: int) -> "subprocess.Popen[bytes]":
    script.write_text(START)
    words = [sys.executable, str(script), json.dumps(table), str(out), str(jobs)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)  # type: ignore[call-overload]


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_and_started_again_it_ends_with_the_same_results(
    folder: Path, tmp_path: Path, done: tuple[Study, Path], jobs: int
) -> None:
    """Killed by SIGKILL as soon as the first, then the third edit is there, and finished by another number of jobs."""
    out = tmp_path / "out"
    for seen in (1, 3):
        process = start(tmp_path / "run.py", keys(folder), out, jobs)
        end = time.time() + 600
        while len(list(out.glob("cells/*/edit.json"))) < seen and time.time() < end and process.poll() is None:
            time.sleep(0.01)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(workers) >= (jobs if jobs > 1 else 0)
        wait_for_the_end_of(workers)
    assert not (out / "study.json").exists()
    le.study(keys(folder), out=out, jobs=3 - jobs)
    assert results(out) == results(done[1])


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_the_end_of(workers: list[int]) -> None:
    """Workers leave by themselves when their parent has been killed."""
    end = time.time() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.time() < end, "a worker outlived its parent"
        time.sleep(0.1)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(folder: Path, tmp_path: Path, done: tuple[Study, Path]) -> None:
    _, alone = done
    le.study(keys(folder), out=tmp_path / "out", jobs=2)
    assert results(tmp_path / "out") == results(alone)


def test_a_cell_killed_between_its_stages_ends_with_the_same_files(
    folder: Path, tmp_path: Path, done: tuple[Study, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without processes: an end before, in and after each stage of a cell, its tensors kept or lost."""

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    out = tmp_path / "out"
    alone = keys(folder, methods=[{"name": "ga"}], restrictions=["whole"], exclude=[])
    places = (("locedit.study.cell", "make_edit"), ("locedit.study.cell.Work", "_measures"),
              ("locedit.study.cell.Work", "_attack"), ("shutil", "rmtree"))  # fmt: skip
    for where, name in places:
        with monkeypatch.context() as patch:
            patch.setattr(f"{where}.{name}", killed)
            with pytest.raises(Killed):
                le.study(alone, out=out)
        if name == "_measures":  # its tensors are lost, as if cleaned away: they are made again
            for path in out.glob("cells/*/edit/*"):
                path.unlink()
    le.study(alone, out=out)
    (cell,) = (path.name for path in (out / "cells").iterdir())
    made = {path.name: path.read_bytes() for path in (out / "cells" / cell).iterdir() if path.name != "times.json"}
    assert made == {name: (done[1] / "cells" / cell / name).read_bytes() for name in made}
    assert "attack-relearn.json" in made


def test_a_cell_that_fails_does_not_stop_the_others_and_is_tried_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.toml"
    path.write_text(
        f'model = "{folder / "model"}"\ndata = "{folder / "task"}"\nlevel = 0.9e-3\nattacks = []\n'
        'restrictions = ["whole"]\nthreads = 1\nmethods = [{name = "ga"}, {name = "grad_diff"}]\n'
        'options = {steps = 1, learning_rate = 1e-4}\nevaluate = {draws = 5, metrics = ["accuracy"]}\n'
    )
    words = ["study", str(path), "--out", str(tmp_path / "out")]
    level = levels_before(folder)
    path.write_text(path.read_text().replace("0.9e-3", repr(level / 2)))
    real = __import__("locedit.study.making", fromlist=["unlearn"]).unlearn

    def broken(model: Any, task: Any, name: str, **options: Any) -> Any:
        if name == "ga":
            raise LoceditError("the disk\nis full")
        return real(model, task, name, **options)

    with monkeypatch.context() as patch:
        patch.setattr("locedit.study.making.unlearn", broken)
        assert main(words) == 2
    said = capsys.readouterr()
    assert "1 of 2 edits failed, the first: ga, whole model, seed 0: the disk is full" in said.err
    study = Study.load(tmp_path / "out")
    assert [record.state for record in study.records] == ["failed", "not reached"]
    assert "the disk is full" in (tmp_path / "out" / "report.html").read_text()
    assert main(words) == 0
    assert [record.state for record in Study.load(tmp_path / "out").records] == ["not reached"] * 2


def test_what_never_reaches_the_level_stands_apart(folder: Path, tmp_path: Path) -> None:
    """One step at a tiny rate reaches nothing: no row of the averages, no attack, the lowest level told."""
    methods = [{"name": "ga", "options": {"steps": 1, "learning_rate": 1e-6}}]
    study = le.study(keys(folder, methods=methods, exclude=[], restrictions=["whole"]), out=tmp_path / "o")
    (row,) = study.rows
    assert row.state == "not reached"
    edit = json.loads(next((tmp_path / "o" / "cells").glob("*/edit.json")).read_text())["result"]
    assert row.values["lowest"].value == min(edit["curve"]["forget"] + [edit["level"]]) > row.target
    assert "relearn.recovered" not in row.values
    assert study.row("ga", "whole model") is None
    from locedit.report.study_table import not_reached, reached

    assert [cells[0].text for cells in reached(study).rows] == ["unedited"]
    view = not_reached(study)
    assert view is not None
    assert view.rows[0][0].text == "ga"
    assert "The level was not reached" in study.html()


def test_a_folder_of_something_else_and_a_study_at_work_are_left_alone(folder: Path, tmp_path: Path) -> None:
    from locedit.study.running import locked

    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(LoceditError, match="holds something else than a study"):
        le.study(keys(folder), out=tmp_path)
    with locked(tmp_path / "out"), pytest.raises(LoceditError, match="another process is running a study there"):
        le.study(keys(folder), out=tmp_path / "out")


# --- doses of edits without training ---------------------------------------------------------------------------------


class Planned(Ablation):
    """Stands for an ablation whose levels are known beforehand: each component of `worth` takes a tenth."""

    def __init__(self, worth: set[int]) -> None:
        self.worth = worth

    def row(self, places: Sequence[Component]) -> Row:
        return {"components": float(len(places)), "forget": 1 - 0.1 * len(self.worth & {at for _, at in places})}

    def edit(self, places: Sequence[Component]) -> Edit:
        return Edit(kind="weights", fingerprint=str(len(places)))


def test_the_dose_is_the_fewest_components_that_reach_the_level() -> None:
    """Five of the components are needed; up to 32 the dose is exact, beyond to within a 32nd of itself."""
    order = [("blocks.0.mlp.neuron", at) for at in range(64)]
    for worth, doses in (({0, 1, 2, 3, 4}, (5,)), ({3, 9, 17, 21, 30}, (31,)), (set(range(40, 50)), (45, 46))):
        found = to_level(Planned(worth), order, size=16, level=0.5)
        assert found.reached
        assert int(found.edit.fingerprint) in doses
        curve = [row["components"] for row in found.rows]
        assert curve == sorted(curve)
    missed = to_level(Planned({1, 2}), order, size=16, level=0.5)
    assert not missed.reached
    assert min(row["forget"] for row in missed.rows) == pytest.approx(0.8)


def test_orders_of_components() -> None:
    model = tiny.model("gpt2")
    within = model.components({"blocks.0.mlp.neuron": [3, 8], "blocks.2.mlp.neuron": [1]})
    own = {("blocks.0.mlp.neuron", 3), ("blocks.0.mlp.neuron", 8), ("blocks.2.mlp.neuron", 1)}
    alone = order_of(within, scores=None, beyond=False, seed=1)
    assert set(alone) == own
    beyond = order_of(within, scores=None, beyond=True, seed=1)
    assert set(beyond[:3]) == own
    assert len(set(beyond)) == len(beyond) == sum(site.count for site in within.sites.values())
    assert beyond[3:] != order_of(within, scores=None, beyond=True, seed=2)[3:]

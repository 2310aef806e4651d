"""FairSISA on the lab's labelled sentences: what equal odds cost, what a deletion costs, restricted members or whole.

    python -m analyses.fair_sisa [--seeds 0,1,2] [--shards 5] [--slices 4] [--epochs 10] [--rate 1e-3]
        [--draws 2000] [--work runs/fair_sisa] [--out figures/fair_sisa]

For each seed (its world, start and cut): members that differ from the start anywhere, in the last layer only, and in
the MLP neurons of all layers only; sets that are chosen without looking at any data. The predictors are fitted on 2,000
calibration sentences and measured on 2,000 others. The cost of a deletion is counted from the record: the share of all
optimizer steps that 1, 5 and 20 random items in one request train again, averaged over 200 draws. One item is deleted,
and its shard is trained from the start and compared bit for bit. Writes OUT.md, .csv and .png (needs kaleido and a
Chromium). Each result is kept in --work, so the same command goes on where it was stopped; one of other arguments is
made again.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import plotly.graph_objects as go
import torch

import locedit as le
from locedit import sisa
from locedit.components import ComponentSet
from locedit.data import Dataset, read_facts
from locedit.models import Model
from locedit.sisa.deletion import first_slices
from locedit.sisa.evaluation import FairTable, evaluate_fair
from locedit.storage import read_json, write_json, write_text

HOW = ("whole model", "last layer", "MLP neurons")
REQUESTS = (1, 5, 20)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One seed and way to hold the members."""

    seed: int
    how: str
    table: FairTable
    accuracy: float
    "of single members on the test set, mean"
    cost: dict[int, float]
    "items in a request -> share of all steps that is trained again"
    same: bool
    "one deletion, compared with training from the start"
    seconds: float
    "of training all members"
    again: float
    "seconds of the deletion of one item"


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    results: list[Result] = []
    for seed in map(int, args.seeds.split(",")):
        lab = le.lab("groups", seed=seed)
        assert lab.task.start is not None
        start = le.load(lab.task.start)
        for how in HOW:
            results.append(one(lab.task_folder, start, how, seed, args))
            print(f"\nseed {seed}, {how}: {_costs([results[-1]])}\n{results[-1].table.markdown()}", flush=True)
    write_text(f"{args.out}.csv", csv(results))
    write_text(f"{args.out}.md", markdown(results, args))
    figure(results).write_image(f"{args.out}.png", width=1100, height=480, scale=1.5)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--work", default="runs/fair_sisa", help="where the members are kept")
    parser.add_argument("--out", default="figures/fair_sisa")
    return parser.parse_args()


def one(data: Path, start: Model, how: str, seed: int, args: argparse.Namespace) -> Result:
    """Train, measure, delete one item and verify."""
    train, calibration, test = (read_facts(data / f"{part}.jsonl") for part in ("train", "calibration", "test"))
    folder = Path(args.work) / f"{seed}-{how.replace(' ', '-')}"
    kept = folder / "result"
    decides = {"seed": seed, **{name: getattr(args, name) for name in ("shards", "slices", "epochs", "rate", "draws")}}
    value = read_json(kept / "result.json") if (kept / "result.json").exists() else {}
    if value.pop("args", None) == decides:
        cost = {int(count): share for count, share in value.pop("cost").items()}
        return Result(seed=seed, how=how, table=FairTable.load(kept), cost=cost, **value)
    if folder.exists():
        shutil.rmtree(folder)
    options = {"shards": args.shards, "slices": args.slices, "epochs": args.epochs, "seed": seed}
    began = time.perf_counter()
    sisa.train(start, train, folder, within=place(start, how), learning_rate=args.rate, **options)
    seconds = time.perf_counter() - began
    record = sisa.Record.load(folder)
    ensemble = sisa.Ensemble.load(folder, start)
    table = evaluate_fair(folder, ensemble, calibration, test, draws=args.draws, seed=seed)
    accuracy = members_accuracy(ensemble, test, record)
    began = time.perf_counter()
    sisa.delete(folder, [record.shards[0][args.slices // 2][0]], model=start, data=train)
    again = time.perf_counter() - began
    value = {
        "accuracy": accuracy,
        "cost": {count: mean_cost(record, count, seed=seed) for count in REQUESTS},
        "same": sisa.verify(folder, model=start, data=train).same,
        "seconds": seconds,
        "again": again,
    }
    table.save(kept)
    write_json(kept / "result.json", value | {"args": decides})
    return Result(seed=seed, how=how, table=table, **value)


def place(model: Model, how: str) -> ComponentSet | None:
    """Where members may differ from the start: chosen without any data, so that the guarantee holds for the set too."""
    if how == "last layer":
        return model.components({f"blocks.{model.n_layers - 1}.layer": [0]})
    return model.everything("neuron") if how == "MLP neurons" else None


def mean_cost(record: sisa.Record, count: int, *, seed: int) -> float:
    """Share of all steps, on what is left, that a request for `count` random items trains again; mean of 200 draws."""
    rng, total = Random(seed), 0.0
    for _ in range(200):
        after = record.without(rng.sample(list(record.contents), count))
        first = first_slices(after.requests[-1].places.values())
        steps = {(k, n): after.options.steps(n, items=len(after.trained_on(k, n))) for k, n in after.places}
        again = sum(steps[k, n] for k, n in after.places if k in first and n >= first[k])
        total += again / sum(steps.values())
    return total / 200


def members_accuracy(ensemble: sisa.Ensemble, test: Dataset, record: sisa.Record) -> float:
    """Mean accuracy of the members, each alone."""
    from locedit.classification import label_numbers

    said = sisa.votes(ensemble.outputs([item.text for item in test], record.verbaliser, batch_size=128))  # type: ignore[union-attr]
    return float((said == label_numbers(test, record.verbaliser)[:, None]).double().mean())


# --- what is kept ----------------------------------------------------------------------------------------------------


def csv(results: Sequence[Result]) -> str:
    """Every predictor of every seed, with its own intervals."""
    lines: list[str] = []
    for result in results:
        header, *rows = result.table.csv().strip().split("\n")
        lines = lines or [f"seed,members,{header}"]
        lines += [f"{result.seed},{result.how},{row}" for row in rows]
    return "\n".join(lines) + "\n"


def markdown(results: Sequence[Result], args: argparse.Namespace) -> str:
    """Means over the seeds with the lowest and the highest, and the costs."""
    given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if name != "out")
    columns = ("members", "predictor", "calibration error", "calibration gap", "held-out error", "held-out gap",
               "price", "gap closed", "intervals of the gap closed above 0")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"| --- | --- |{' --: |' * (len(columns) - 2)}"]
    for how in HOW:
        mine = [result for result in results if result.how == how]
        lines += [f"| {how} | {' | '.join(_cells(mine, at))} |" for at in range(len(mine[0].table.rows) if mine else 0)]
    notes = "\n".join(f"- {how}: {_costs([r for r in results if r.how == how])}" for how in HOW)
    text = (
        "Means over the seeds, lowest and highest in brackets; fair.csv beside it has the 95 % intervals of each. "
        "Error: expected share of wrong outputs. Gap: equalised-odds difference. Price and gap closed: against the "
        "majority of the same members on the same sentences."
    )
    return f"# FairSISA\n\n`{given}`\n\n{chr(10).join(lines)}\n\n{text.replace('fair.csv', 'the .csv')}\n\n{notes}\n"


def _cells(results: Sequence[Result], at: int) -> list[str]:
    rows = [result.table.rows[at] for result in results]
    numbers: list[list[float]] = [[row.calibration_error for row in rows], [row.calibration_gap for row in rows]]
    numbers += [[getattr(row, name).value for row in rows] for name in ("error", "gap", "price", "closed")]
    above = sum(row.closed.low > 0 for row in rows)
    return [rows[0].predictor, *map(spread, numbers), f"{above} of {len(rows)}"]


def spread(values: Sequence[float]) -> str:
    """Mean, lowest and highest."""
    return f"{statistics.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def _costs(results: Sequence[Result]) -> str:
    shares = ", ".join(
        f"{count} items {100 * statistics.mean(result.cost[count] for result in results):.0f} %" for count in REQUESTS
    )
    return (
        f"single members' accuracy {spread([result.accuracy for result in results])}; steps trained again by a request "
        f"for {shares} of all; training took {statistics.mean(r.seconds for r in results):.0f} s and one deletion "
        f"{statistics.mean(r.again for r in results):.0f} s; the same bits as trained from the start: "
        f"{sum(result.same for result in results)} of {len(results)}"
    )


def figure(results: Sequence[Result]) -> Any:
    """Held-out error against held-out gap of every predictor: means over the seeds, bars from lowest to highest."""
    drawn = go.Figure()
    symbols = ("circle", "square-open", "diamond", "triangle-up-open", "star", "hexagon-open", "cross")
    for number, how in enumerate(HOW):
        mine = [result for result in results if result.how == how]
        if not mine:
            continue
        rows = list(zip(*(result.table.rows for result in mine), strict=True))
        axes: dict[str, Any] = {}
        for axis, name in (("x", "gap"), ("y", "error")):
            values = [[getattr(row, name).value for row in same] for same in rows]
            middle = [statistics.mean(each) for each in values]
            axes[axis] = middle
            axes[f"error_{axis}"] = {
                "array": [max(each) - mean for each, mean in zip(values, middle, strict=True)],
                "arrayminus": [mean - min(each) for each, mean in zip(values, middle, strict=True)],
                "thickness": 0.7,
            }
        place = {"xaxis": f"x{number + 1}", "yaxis": f"y{number + 1}"}
        for at, same in enumerate(rows):
            point = {key: [value[at]] for key, value in axes.items() if key in ("x", "y")}
            bars = {
                key: {"array": [value["array"][at]], "arrayminus": [value["arrayminus"][at]], "thickness": 0.7}
                for key, value in axes.items()
                if key.startswith("error")
            }
            marker = {"symbol": symbols[at], "size": 11, "color": COLOURS[at]}
            drawn.add_scatter(**point, **bars, **place, name=same[0].predictor, mode="markers", marker=marker,
                              showlegend=number == 0)  # fmt: skip
    drawn.update_layout(template="plotly_white", grid={"rows": 1, "columns": len(HOW), "pattern": "independent"})
    for number, how in enumerate(HOW, start=1):
        drawn.update_layout(
            {
                f"xaxis{number}": {"title": f"held-out gap<br>{how}", "rangemode": "tozero"},
                f"yaxis{number}": {"title": "held-out error" if number == 1 else "", "matches": "y"},
            }
        )
    return drawn.update_layout(legend={"orientation": "h", "y": 1.15})


COLOURS = ("#444444", "#a65e0e", "#0470fb", "#5ea3f7", "#2a8f5b", "#888888", "#8a4fbf")


if __name__ == "__main__":
    main()

"""The ladder on lab models: what level of access brings back what each kind of edit took away.

    python -m analyses.ladder [--labs 0,1,2] [--size small] [--edits ...] [--attacks ...] [--out figures/ladder]

Each edit is made on each lab and attacked; every attack is kept in the run folder (`--runs`, runs/ladder), so a run
that was stopped goes on. Printed, for each edit and level of access: the share of the knowledge that is back (0 = like
items never known, 1 = like the model before the edit), the mean over the labs and in brackets their range, and in how
many labs it counts as back, in part or whole, or no attack shows anything. With `--out` the table is written as OUT.md
and .csv, and drawn as .png.

The edits: one that only suppresses the answers in the last MLPs, neurons set to zero by hooks at run time, unlearning
methods in the whole model and inside found neurons, and a model retrained without the facts, which never knew them.
The labs have read texts after other texts: what stands before a question does not break them. Facts are asked in
three sentences each. On one core, training the labs takes most of an hour, an edit of a lab and its attacks a little
over a minute.
"""

import argparse
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
import torch

import locedit as le
from locedit.attacks import ACCESS, ATTACKS
from locedit.attacks.shallow import suppression
from locedit.commands.evaluate import Plan, evaluated
from locedit.data import Task
from locedit.data.encode import encode
from locedit.edit import Edit
from locedit.errors import nearest
from locedit.lab.facts import SENTENCES
from locedit.models import Model
from locedit.report import study_markdown
from locedit.report.judge import DECIDES
from locedit.report.ladder import ladder
from locedit.report.left import left
from locedit.report.palette import dress
from locedit.report.tables import Column, TableView, texts
from locedit.results import Evaluation
from locedit.runs import Run
from locedit.storage import write_text

LEVEL = 0.35
"mean answer probability at which methods stop: what items never known get"
TRAIN: dict[str, Any] = {"steps": 200, "batch_size": 32, "eval_every": 5, "until": LEVEL}
RATES = {"whole": 3e-4, "found": 1e-2}
METHODS: dict[str, dict[str, Any]] = {
    "grad_diff": {"retain_weight": 1.0},
    "npo": {"retain_weight": 1.0},
    "adv_npo": {"retain_weight": 1.0},
    "undial": {"retain_weight": 1.0},
    "loo": {"retain_weight": 1.0},
    "whp": {"retain_weight": 1.0},
    "rmu": {"retain_weight": 1.0},
    "eul": {"pattern": "sum", "learning_rate": 1e-2},
}
EDITS = (
    "suppression in the last MLPs",
    "neurons zeroed by hooks",
    *METHODS,
    "npo in found neurons",
    "retrained without the facts",
)
ATTACKED = (
    "few_shot", "jailbreak", "probe", "logit_lens", "latent", "quantization", "drop_layer", "relearn_few", "relearn",
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"relearn": {"learning_rates": (5e-4,), "steps": 40}}


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    found: dict[str, list[Evaluation]] = {}
    for seed in map(int, args.labs.split(",")):
        lab = le.lab("facts", size=args.size, seed=seed, start=True, contexts=True)
        model, task = lab.model, in_sentences(lab.task)
        for name, make in edits(model, task).items():
            if name not in _edits(args):
                continue
            folder = Path(args.runs) / f"{args.size}{seed}" / name.replace(" ", "-").replace(",", "")
            found.setdefault(name, []).append(attacked(model, task, folder, make, args.attacks.split(",")))
            print(f"lab {seed}, {name}: {said(found[name][-1])}", flush=True)
    rows = table(found)
    print(study_markdown.table(rows))
    if args.out:
        write_text(f"{args.out}.md", f"{study_markdown.table(rows)}\n")
        write_text(f"{args.out}.csv", as_csv(found, args.labs.split(",")))
        figure(found).write_image(f"{args.out}.png", width=1000, height=120 + 46 * len(found), scale=1.5)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labs", default="0,1,2", help="seeds of the labs")
    parser.add_argument("--size", default="small", help="of the labs")
    parser.add_argument("--edits", default="all", help="names of edits, or all")
    parser.add_argument("--attacks", default=",".join(ATTACKED))
    parser.add_argument("--runs", default="runs/ladder", help="where results are kept")
    parser.add_argument("--out", help="stem of the files to write")
    args = parser.parse_args()
    for name, known in (*((e, EDITS) for e in _edits(args)), *((a, ATTACKS) for a in args.attacks.split(","))):
        if name not in known:
            parser.error(f"unknown name {name!r}; {nearest(name, known)}")
    return args


def _edits(args: argparse.Namespace) -> Sequence[str]:
    return EDITS if args.edits == "all" else args.edits.split(",")


def in_sentences(task: Task) -> Task:
    """The task without its multiple choice, which not every lab with contexts learns."""
    sets = {role: getattr(task, role) for role in ("forget", "retain", "heldout")}
    kept = {
        role: data.replace([item for item in data if item.format in SENTENCES])
        for role, data in sets.items()
        if data is not None
    }
    return replace(task, **kept)


def edits(model: Model, task: Task) -> dict[str, Callable[[], Edit]]:
    """Name -> what makes the edit of a lab model, all stopped at the same forget level."""

    def suppressed() -> Edit:
        return suppression(model, encode(model, task.forget), encode(model, task.retain), level=LEVEL)[0]

    def unlearned(method: str, place: str) -> Edit:
        within = le.localize(model, task, "depn").select(top=100) if place == "found" else None
        options = TRAIN | {"learning_rate": RATES[place]} | METHODS[method]
        return le.unlearn(model, task, method, within=within, check=False, **options)

    makers: tuple[Callable[[], Edit], ...] = (
        suppressed,
        lambda: hooked(model, task),
        *(lambda method=method: unlearned(method, "whole") for method in METHODS),
        lambda: unlearned("npo", "found"),
        lambda: le.unlearn(model, task, "sisa"),
    )
    return dict(zip(EDITS, makers, strict=True))


def hooked(model: Model, task: Task) -> Edit:
    """The fewest of the best neurons, by DEPN, whose zeroing by hooks reaches the level."""
    scores = le.localize(model, task, "depn")
    examples = encode(model, task.forget)
    count = 25
    while True:
        edit = le.zero(model, scores.select(top=count), hold="hooks")
        with edit.applied(model) as edited:
            if (
                le.edit.levels(edited, {"forget": examples})["forget"] <= LEVEL
                or 2 * count > model.n_layers * model.d_mlp
            ):
                return edit
        count *= 2


def attacked(model: Model, task: Task, folder: Path, make: Callable[[], Edit], names: Sequence[str]) -> Evaluation:
    """The evaluation of one edit with its attacks, from the folder where it has them."""
    if not (folder / "edit" / "edit.json").exists():
        make().save(folder / "edit")
    edit = Edit.load(folder / "edit")
    chosen = [name for name in names if not ATTACKS[name].undoes or ATTACKS[name].undoes in edit.conditional]
    options = {name: dict(OPTIONS.get(name, {})) for name in chosen}
    plan = Plan(edit=edit, metrics=["probability", "accuracy"], own={}, attacks=options, seed=0)
    return evaluated(Run(folder=folder), model, task, plan, {})


def said(evaluation: Evaluation) -> str:
    """One line: what stands for each level."""
    parts: list[str] = []
    for rung in ladder(evaluation):
        if rung.best is not None:
            result, shown = rung.best
            parts.append(f"{rung.access} {result.headline.value:.2f} ({result.name}, {shown})")
    return "; ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Level:
    """What the strongest attack of one level of access brings back in each lab."""

    shares: list[float]
    back: int
    "in how many labs it is back, in part or whole"
    silent: int
    "in how many no attack shows anything"

    def __str__(self) -> str:
        nothing = f", shows nothing in {self.silent}" if self.silent else ""
        return f"{_range(self.shares)}, back in {self.back} of {len(self.shares)}{nothing}"


def by_access(evaluations: Sequence[Evaluation]) -> dict[str, Level]:
    """Level of access -> what it brings back."""
    found: dict[str, Level] = {}
    for access in ACCESS:
        rungs = [rung for e in evaluations for rung in ladder(e) if rung.access == access]
        best = [rung.best for rung in rungs if rung.best is not None]
        if best:
            found[access] = Level(
                shares=[result.headline.value for result, _ in best],
                back=sum(rung.brings_back for rung in rungs),
                silent=sum(shown not in (*DECIDES, "chance") for _, shown in best),
            )
    return found


def table(found: Mapping[str, Sequence[Evaluation]]) -> TableView:
    """A row an edit, a column a level of access."""
    used = [access for access in ACCESS if any(access in by_access(e) for e in found.values())]
    rows = []
    for name, evaluations in found.items():
        levels = [e.get("forget", "probability").value for e in evaluations]
        kept = [e.get("retain", "accuracy").value for e in evaluations]
        own = by_access(evaluations)
        cells = [str(own[access]) if access in own else "" for access in used]
        asked = [found.value for e in evaluations if (found := left(e)) is not None]
        rows.append(texts(name, _range(levels), _range(kept), _range(asked), *cells))
    names = ("edit", "forget probability", "retain accuracy", "asked directly", *used)
    return TableView(title="", columns=[Column(name=name) for name in names], rows=rows)


def _range(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def as_csv(found: Mapping[str, Sequence[Evaluation]], labs: Sequence[str]) -> str:
    """Every attack on every edit and lab."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("edit", "lab", "access", "attack", "share_back", "low", "high", "says", "control", "note"))
    for name, evaluations in found.items():
        for lab, evaluation in zip(labs, evaluations, strict=True):
            for rung in ladder(evaluation):
                for result, shown in rung.tried:
                    control = [
                        m.value for m in result.measures if m.name == "share_back" and "shallow" in (m.group or "")
                    ]
                    numbers = [
                        f"{value:.3f}" for value in (result.headline.value, result.headline.low, result.headline.high)
                    ]
                    back = f"{control[0]:.3f}" if control else ""
                    writer.writerow((name, lab, rung.access, result.name, *numbers, shown, back, result.note))
    return text.getvalue()


def figure(found: Mapping[str, Sequence[Evaluation]]) -> go.Figure:
    """Share back by level of access, a panel row an edit: dark = all is back."""
    used = [access for access in ACCESS if any(access in by_access(e) for e in found.values())]
    own = {name: by_access(evaluations) for name, evaluations in found.items()}
    means = [[fmean(own[name][a].shares) if a in own[name] else None for a in used] for name in found]
    labels = [
        [_range(own[name][a].shares).replace(" ", "<br>", 1) if a in own[name] else "" for a in used] for name in found
    ]
    heat = go.Heatmap(
        z=means, x=used, y=list(found), text=labels, texttemplate="%{text}", zmin=0, zmax=1,
        colorscale=[[0, "rgba(1,157,89,0.15)"], [0.5, "rgba(234,179,8,0.45)"], [1, "rgba(220,38,38,0.75)"]],
        colorbar={"title": "share back"}, xgap=3, ygap=3,
    )  # fmt: skip
    made = dress(go.Figure(data=[heat]), height=120 + 46 * len(found))
    return made.update_yaxes(autorange="reversed").update_xaxes(side="top")


if __name__ == "__main__":
    main()

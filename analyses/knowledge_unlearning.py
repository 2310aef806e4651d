"""Knowledge unlearning on the lab's private texts: all at once against chunks, each until its stopping rule.

    python -m analyses.knowledge_unlearning [--arch gpt2] [--labs 0] [--chunks 1,2,4] [--n 3]
        [--least 10] [--steps 60] [--rate 3e-4] [--eval-every 1] [--out FILE]

Gradient ascent on every token of the planted sentences that stand at least `--least` times in the training text, until
mean EL_n and MA are below their means over the canaries, which the model never saw. In chunks, each is trained until
its own texts are below. Printed for each: steps, EL_n and MA of all forget texts at the end with the thresholds,
whether the rule held for every chunk and holds for all texts together at the end, and the cost: perplexity of the
sentences to keep and of ordinary text, before and after. All texts of a chunk are one batch, so that nothing is drawn
at random; labs differ.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

import locedit as le
from locedit.data.encode import Example, encode
from locedit.data.items import Dataset, PlainText, PrivateText, Task
from locedit.losses import nll_of_examples
from locedit.models import Model
from locedit.report import study_markdown
from locedit.report.tables import Column, TableView, texts
from locedit.storage import write_text
from locedit.unlearn import stopping

Row = dict[str, Any]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for seed in map(int, args.labs.split(",")):
        lab = le.lab("private", arch=args.arch, size=args.size, seed=seed)
        model, task = lab.model, whole_texts(lab.task, least=args.least)
        print(f"lab {seed}: {len(task.forget)} texts to forget, n = {args.n}, learning rate {args.rate:g}", flush=True)
        rows.append({"lab": seed, "chunks": 0, **measured(model, task, args.n)})
        print_row(rows[-1])
        for chunks in map(int, args.chunks.split(",")):
            rows.append({"lab": seed, **one(model, task, args, chunks=chunks)})
            print_row(rows[-1])
    if args.out:
        write_text(args.out, markdown(rows, args))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="gpt2")
    parser.add_argument("--size", default="small")
    parser.add_argument("--labs", default="0", help="seeds of the labs")
    parser.add_argument("--chunks", default="1,2,4")
    parser.add_argument("--n", type=int, default=3, help="tokens of the n-grams")
    parser.add_argument("--least", type=int, default=10, help="repetitions of a text to forget")
    parser.add_argument("--steps", type=int, default=60, help="at most, of each chunk")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--eval-every", type=int, default=1)
    parser.add_argument("--out", help="also write the rows as a Markdown table")
    return parser.parse_args()


def whole_texts(task: Task, *, least: int) -> Task:
    """The private task with whole sentences to forget (only the often repeated ones), to keep and never seen."""
    chosen = [item for item in task.forget if int((item.group or "x0")[1:]) >= least]
    assert task.retain is not None
    assert task.heldout is not None
    parts = {
        "forget": plain(task.forget.replace(chosen)),
        "retain": plain(task.retain),
        "heldout": plain(task.heldout),
    }
    return dataclasses.replace(task, **parts)


def plain(data: Dataset) -> Dataset:
    """Texts without their spans: everything in them is forgotten."""
    items = data.of(PrivateText, by="this analysis")
    return data.replace([PlainText(text=item.text, id=item.id, owner=item.owner) for item in items])


def one(model: Model, task: Task, args: argparse.Namespace, *, chunks: int) -> Row:
    """Train one way and measure it."""
    rule = {"stop_when": "memorization", "el_n": args.n, "eval_every": args.eval_every}
    size = -(-len(task.forget) // chunks)  # the texts of a chunk are one batch, as published
    edit = le.unlearn(
        model, task, "ga", chunks=chunks, steps=args.steps, learning_rate=args.rate, batch_size=size, **rule
    )
    with edit.applied(model) as edited:
        found = measured(edited, task, args.n)
    limits = {name: edit.outcome[f"{name}_threshold"] for name in ("el", "ma")}
    below = found["el"] < limits["el"] and found["ma"] < limits["ma"]
    outcome = {"steps": edit.outcome["steps"], "each": edit.outcome["reached"], "all": below}
    return {"chunks": chunks, **outcome, **found, "limits": limits}


def measured(model: Model, task: Task, n: int) -> Row:
    """EL_n and MA of the texts to forget, perplexity of those to keep and of ordinary text."""
    assert task.retain is not None
    assert task.texts is not None
    el, ma = stopping.means(model, encode(model, task.forget), n=n, length=200)
    kept = {
        "retain": perplexity(model, encode(model, task.retain)),
        "texts": perplexity(model, encode(model, task.texts)),
    }
    return {"el": el, "ma": ma, **kept}


def perplexity(model: Model, texts: Sequence[Example]) -> float:
    """exp of the mean negative log-likelihood of all tokens."""
    total = nll_of_examples(model, texts, reduction="sum").sum()
    return float((total / sum(len(text.targets) for text in texts)).exp())


def markdown(rows: Sequence[Row], args: argparse.Namespace) -> str:
    """The rows as a table, with the settings."""
    given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if name != "out")
    numbers = ("steps", "EL", "its limit", "MA", "its limit", "retain perplexity", "text perplexity")
    columns = [Column(name="lab", numeric=True), Column(name="texts")]
    columns += [Column(name=name, numeric=True) for name in numbers]
    columns += [Column(name="rule held for each chunk"), Column(name="holds for all at the end")]
    view = TableView(title="", columns=columns, rows=[texts(*_cells(row)) for row in rows])
    return f"# Knowledge unlearning: all at once against chunks\n\n`{given}`\n\n{study_markdown.table(view)}\n"


def _cells(row: Row) -> list[Any]:
    limits = row.get("limits", {"el": None, "ma": None})
    shares = [row["el"], limits["el"], row["ma"], limits["ma"]]
    held = [{True: "yes", False: "no", None: None}[row.get(name)] for name in ("each", "all")]
    costs = [f"{row[name]:.2f}" for name in ("retain", "texts")]
    return [
        row["lab"],
        named(row),
        row.get("steps"),
        *(None if s is None else f"{s:.3f}" for s in shares),
        *costs,
        *held,
    ]


def named(row: Row) -> str:
    """What the row is of."""
    return f"{row['chunks']} chunks" if row["chunks"] > 1 else ("at once" if row["chunks"] else "before")


def print_row(row: Row) -> None:
    name = named(row)
    numbers = f"EL {row['el']:.3f}  MA {row['ma']:.3f}  retain {row['retain']:8.2f}  texts {row['texts']:8.2f}"
    rest = ""
    if "limits" in row:
        rest = (
            f"  below {row['limits']['el']:.3f} and {row['limits']['ma']:.3f}: each {'yes' if row['each'] else 'no'}, "
            f"together {'yes' if row['all'] else 'no'}; {row['steps']} steps"
        )
    print(f"{name:9} {numbers}{rest}", flush=True)


if __name__ == "__main__":
    main()

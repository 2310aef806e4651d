"""Does it matter which rows PCGU updates? The planted-bias world, at the same drop of the association.

    python -m analyses.planted_bias [--arch gpt2,bert] [--labs 0] [--share 0.086] [--seeds 0,1,2] [--out FOLDER]

The lab's professions are spoken of as "he" or "she" with planted frequencies. The PCGU update (AdamW, so that it works
in any rows) lowers the association of the forget professions in the frames of the training text, inside

- the PCGU rows: those with the lowest cosine, 8.6 % of all rows (10,000 in BERT-base, as published);
- the PCGU rows of the blocks alone, as many, without embeddings and norms; random rows, as many in each of their
  matrices;
- the two pronouns' own rows of the embedding, which unembeds too: what one would take without a search;
- random rows, as many in every matrix; random rows anywhere; random rows anywhere with as many parameters;
- everything.

Each is trained until the preference for the likelier pronoun, P(advantaged) / (P(advantaged) + P(disadvantaged)), has
lost the asked share of what it is above one half, measured after every step, and what that cost is read there. Costs:
language loss (mean negative log-likelihood of all tokens of the texts, in nats, edited minus unedited) and how far the
log-odds of the professions to keep moved. Seeds are those of the training order and of the random draw; intervals are
t intervals over seeds (and labs), differences between sets Welch's.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev, variance
from typing import Any

import torch

import locedit as le
from locedit.components import ComponentSet
from locedit.contrasts import contrasts, preferences
from locedit.data.encode import batches, encode
from locedit.data.items import Dataset, Task
from locedit.losses import score, token_log_probs
from locedit.models import Model
from locedit.ranks import t_quantile

OPTIMIZER: dict[str, Any] = {"optimizer": "adamw", "batch_size": 16, "clip": None, "eval_every": 1}
SETS = (
    "pcgu",
    "pcgu, blocks only",
    "random, blocks only",
    "pronoun rows",
    "random, same matrices",
    "random",
    "random, same parameters",
    "everything",
)
Row = dict[str, Any]


# --- what is measured -------------------------------------------------------------------------------------------------


def log_odds(model: Model, pairs: Dataset) -> torch.Tensor:
    """log P(advantaged) - log P(disadvantaged) of the pronoun, in nats, of each pair."""
    return preferences(model, encode(model, pairs)).double().logit()


@torch.no_grad()
def language_loss(model: Model, texts: Dataset) -> float:
    """Mean negative log-likelihood of all tokens, in nats."""
    found = [
        token_log_probs(score(model, batch.to(model.device))) for batch in batches(encode(model, texts), model, 64)
    ]
    return -float(torch.cat(found).double().mean())


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """One lab, and what its model is like before anything is changed."""

    model: Model
    task: Task
    "forget: pairs in the frames of the training text"
    unseen: Dataset
    "the same professions in frames that the training text does not have"
    kept: Dataset
    "other professions of the training text"
    preference: float
    loss: float
    kept_odds: torch.Tensor

    @classmethod
    def of(cls, arch: str, seed: int, cache: str | None) -> "World":
        lab = le.lab("bias", arch=arch, seed=seed, cache=cache)
        model, task = lab.model, lab.task
        assert task.retain is not None
        assert task.texts is not None
        forget, kept = (data.where(format="statement") for data in (task.forget, task.retain))
        return cls(
            model=model,
            task=Task(forget=forget, texts=task.texts),
            unseen=task.forget.where(format="paraphrase"),
            kept=kept,
            preference=float(preferences(model, encode(model, forget)).double().mean()),
            loss=language_loss(model, task.texts),
            kept_odds=log_odds(model, kept),
        )

    def measured(self, edited: Model) -> Row:
        """The edited model, against what it was."""
        assert self.task.texts is not None
        odds = log_odds(edited, self.task.forget)
        return {
            "preference": float(odds.sigmoid().mean()),
            "association": float(odds.mean()),
            "absolute": float(odds.abs().mean()),
            "unseen_frames": float(log_odds(edited, self.unseen).mean()),
            "kept_moved": float((log_odds(edited, self.kept) - self.kept_odds).abs().mean()),
            "loss_added": language_loss(edited, self.task.texts) - self.loss,
        }


# --- where and how ----------------------------------------------------------------------------------------------------


def sets(world: World, *, share: float, seed: int) -> dict[str, ComponentSet | None]:
    """The rows to update, by name; None = everything."""
    scores = le.localize(world.model, world.task, "pcgu")
    k = max(1, round(share * len(scores)))
    found = scores.select(top=k)
    inside = {name: value for name, value in scores.values.items() if name.startswith("blocks.")}
    blocks = dataclasses.replace(scores, values=inside).select(top=k)
    drawn = le.localize(world.model, world.task, "random", unit="row", seed=seed)
    return {
        "pcgu": found,
        "pcgu, blocks only": blocks,
        "random, blocks only": blocks.random_like(seed),
        "pronoun rows": pronoun_rows(world),
        "random, same matrices": found.random_like(seed),
        "random": drawn.select(top=k),
        "random, same parameters": drawn.select(params=found.parameters()),
        "everything": None,
    }


def pronoun_rows(world: World) -> ComponentSet:
    """The rows of the tied embedding of the tokens in which the pairs differ."""
    pairs = contrasts(encode(world.model, world.task.forget), causal=world.model.causal)
    tokens = {side.ids[at] for p in pairs for side in (p.advantaged, p.disadvantaged) for at in side.targets}
    embedding: Any = world.model.core.get_input_embeddings()
    name = next(name for name, p in world.model.anatomy.parameters.items() if p is embedding.weight)
    return world.model.components({f"{name}:row": tokens})


def runs(world: World, args: argparse.Namespace, *, seed: int) -> Iterator[Row]:
    """One row for every set, direction and drop."""
    for name, within in sets(world, share=args.share, seed=seed).items():
        if name not in args.sets:
            continue
        size = {"rows": len(within), "parameters": within.parameters()} if within is not None else {"rows": None}
        for direction in args.directions:
            for drop in args.drops:
                until = 0.5 + (1 - drop) * (world.preference - 0.5)
                edit = le.unlearn(
                    world.model, world.task, "pcgu", within=within, direction=direction, until=until,
                    steps=args.steps, learning_rate=args.rate, seed=seed, **OPTIMIZER,
                )  # fmt: skip
                with edit.applied(world.model) as edited:
                    found = world.measured(edited)
                reached = bool(edit.outcome["reached"])
                yield {
                    "set": name, "direction": direction, "drop": drop, "seed": seed, **size,
                    "reached": reached, "steps": edit.outcome["steps"], **found,
                }  # fmt: skip


# --- tables -----------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> str:
    """Mean and half the width of its 95 % interval."""
    if len(values) < 2:
        return f"{mean(values):.3f}" if values else "-"
    return f"{mean(values):.3f} ± {t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values)):.3f}"


def difference(other: Sequence[float], own: Sequence[float]) -> tuple[float, float, float] | None:
    """(mean of `other` minus mean of `own`, ends of Welch's 95 % interval); None with fewer than two of either."""
    if min(len(other), len(own)) < 2:
        return None
    parts = [variance(values) / len(values) for values in (other, own)]
    gap, error = mean(other) - mean(own), math.sqrt(sum(parts))
    if error == 0:
        return gap, gap, gap
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (other, own), strict=True))
    return gap, gap - t_quantile(freedom) * error, gap + t_quantile(freedom) * error


def table(rows: Sequence[Row]) -> Iterator[str]:
    """One block for every architecture, direction and drop."""
    for key in dict.fromkeys((row["arch"], row["direction"], row["drop"]) for row in rows):
        mine = [row for row in rows if (row["arch"], row["direction"], row["drop"]) == key]
        start = mean(row["start"] for row in mine)
        yield f"\n{key[0]}, {key[1]}, {key[2]:.0%} of the preference above one half removed (it was {start:.3f})"
        yield (
            f"{'set':24} {'rows':>5} {'params':>8} {'reached':>7} {'steps':>6} {'preference':>10} {'log-odds':>9} "
            f"{'|log-odds|':>10} {'unseen frames':>13} {'kept moved':>15} {'language loss added':>20}"
        )
        for name in dict.fromkeys(row["set"] for row in mine):
            yield _line(name, [row for row in mine if row["set"] == name])
        yield from _verdicts(mine)


def _line(name: str, rows: Sequence[Row]) -> str:
    good = [row for row in rows if row["reached"]]
    shown = good or rows
    average = {
        k: mean(row[k] for row in shown) for k in ("steps", "preference", "association", "absolute", "unseen_frames")
    }
    size = f"{'all':>5} {'all':>8}"
    if rows[0]["rows"]:
        size = f"{round(mean(row['rows'] for row in rows)):5} {round(mean(row['parameters'] for row in rows)):8,}"
    return (
        f"{name:24} {size} {len(good):3} / {len(rows)} {average['steps']:6.1f} {average['preference']:10.3f} "
        f"{average['association']:9.2f} {average['absolute']:10.2f} {average['unseen_frames']:13.2f} "
        f"{interval([row['kept_moved'] for row in shown]):>15} {interval([row['loss_added'] for row in shown]):>20}"
        + ("" if good else "  (not reached: as far as it came)")
    )


def _verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """What each other set cost beyond the PCGU rows (of the blocks, where it is of the blocks too)."""
    costs = {name: [r["loss_added"] for r in rows if r["set"] == name and r["reached"]] for name in SETS}
    for name in SETS[2:]:
        if not any(row["set"] == name for row in rows):
            continue
        own = SETS[1] if name == "random, blocks only" else SETS[0]
        if not costs[name]:
            yield f"  {name}: never reached the drop"
            continue
        found = difference(costs[name], costs[own])
        if found is None:
            yield f"  {name}: too few runs reached the drop for an interval"
            continue
        gap, low, high = found
        word = "PCGU's rows cost less" if low > 0 else "PCGU's rows cost MORE" if high < 0 else "no difference shown"
        yield f"  {name}: {gap:+.4f} nats beside {own!r} [{low:+.4f}, {high:+.4f}]: {word}"


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for arch in args.arch:
        for lab in args.labs:
            world = World.of(arch, lab, args.cache)
            for seed in args.seeds:
                for row in runs(world, args, seed=seed):
                    rows.append({"arch": arch, "lab": lab, "start": world.preference} | row)
                    print(_progress(rows[-1]), flush=True)
                    save(args.out, rows, args)
    lines = list(table(rows))
    print("\n".join(lines))
    (args.out / "planted_bias.txt").write_text("\n".join(lines) + "\n")


def _progress(row: Row) -> str:
    names = ("arch", "lab", "seed", "set", "direction", "drop", "reached", "steps")
    return f"{', '.join(str(row[name]) for name in names)}: {row['preference']:.3f}, {row['loss_added']:+.4f} nats"


def save(out: Path, rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Every run as it was measured, with the settings."""
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "cache")} | OPTIMIZER
    (out / "planted_bias.json").write_text(json.dumps({"settings": settings, "runs": list(rows)}, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words, numbers = (lambda text: text.split(",")), (lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--arch", type=words, default=["gpt2", "bert"])
    parser.add_argument("--labs", type=numbers, default=[0], help="seeds of the labs")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="of training order and random rows")
    parser.add_argument("--share", type=float, default=0.086, help="of all rows")
    parser.add_argument("--drops", type=lambda text: [float(part) for part in text.split(",")], default=[0.5, 0.9])
    parser.add_argument("--directions", type=words, default=["decrease_advantaged", "dynamic"])
    parser.add_argument("--sets", type=lambda text: text.split(";"), default=list(SETS), help="names, with ';' between")
    parser.add_argument("--steps", type=int, default=300, help="at most")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", default=None, help="folder of labs")
    parser.add_argument("--out", type=Path, default=Path("runs/planted_bias"))
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""All that the rest of a training depends on, taken out of a run and put back."""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from locedit import losses
from locedit.data.encode import collate
from locedit.edit.checkpoint import example_from, examples_as_rows
from locedit.edit.front import State
from locedit.edit.modes import mixed

if TYPE_CHECKING:
    from locedit.edit.run import Run


def state_of(run: "Run") -> dict[str, Any]:
    """Tensors, numbers and texts that a checkpoint holds."""
    chosen = run.kept.chosen
    return {
        "number": run.number,
        "ended": run.ended,
        "unreached": run.unreached,
        "overflows": run.overflows,
        "rows": run.rows,
        "parameters": run.held.parameters,
        "held": run.held.state,
        "optimizer": run.optimizer.state_dict()["state"],
        "scaler": None if run.scaler is None else run.scaler.state_dict(),
        "generator": run.generator.get_state(),
        "waiting": run.streams.waiting(),
        "state": run.state,
        "references": examples_as_rows(run.cache.made),
        "start": run.kept.start,
        "chosen": None if chosen is None else vars(chosen),
        "front": [vars(state) for state in run.kept.front],
        "measured": [vars(state) for state in run.measured],
    }


def resume(run: "Run", saved: Mapping[str, Any]) -> None:
    """Put a run, just made, into the state that `state_of` took from the same training."""
    run.number, run.ended, run.rows = saved["number"], saved["ended"], saved["rows"]
    run.at = len(run.rows) - 1
    run.unreached, run.overflows = saved["unreached"], saved["overflows"]
    run.put(saved["parameters"])
    run.held.state = saved["held"]
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({"state": saved["optimizer"], "param_groups": groups})
    if run.scaler is not None:
        run.scaler.load_state_dict(saved["scaler"])
    run.generator.set_state(saved["generator"])
    run.streams.resume(saved["waiting"])
    run.state = saved["state"]
    run.kept.start = saved["start"]
    run.kept.chosen = None if saved["chosen"] is None else State(**saved["chosen"])
    run.kept.front = [State(**state) for state in saved["front"]]
    run.measured = [State(**state) for state in saved["measured"]]
    _make_references(run, saved["references"])


def _make_references(run: "Run", made: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Fill the cache from the same batches as before: the bits of a result depend on what is computed beside it."""
    with torch.no_grad(), mixed(run.model, run.options.precision):
        for rows in made:
            batch = collate([example_from(row) for row in rows], run.model).to(run.model.device)
            run.cache.score(batch, functools.partial(losses.score, run.model))

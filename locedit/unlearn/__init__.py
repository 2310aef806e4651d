"""Unlearning methods by name: any loss or recipe, within any component set, held as weights or as an adapter."""

import dataclasses
import functools
import inspect
import logging
from typing import Any

from locedit import options as option_values
from locedit._callable import make_callable
from locedit.components import ComponentSet, Site
from locedit.data.encode import encode
from locedit.data.items import Dataset, Task, as_task
from locedit.edit.adapter import refuse_single_weights
from locedit.edit.edit import Edit
from locedit.edit.levels import levels
from locedit.edit.objective import Objective
from locedit.edit.parallel import Processes
from locedit.edit.stepping import require_trainable
from locedit.edit.train import train
from locedit.errors import LoceditError, nearest
from locedit.evaluate.overforgetting import over_forgetting
from locedit.models import Model
from locedit.unlearn import stopping
from locedit.unlearn.chunks import in_chunks
from locedit.unlearn.methods import METHODS
from locedit.unlearn.registry import Method, RetainOptions, nll, objective_of, retain_terms

log = logging.getLogger(__name__)


def unlearn(
    model: Model,
    task: Task | Dataset,
    name: str,
    *,
    within: ComponentSet | None = None,
    hold: str | None = None,
    check: bool = True,
    **options: Any,
) -> Edit:
    """Make the model forget `task.forget` by a method of METHODS, only inside `within` (None = the whole model).

    `hold` is weights (in place), adapter (LoRA, trained methods) or hooks (zero, mean, scale); by default the first of
    these that the method knows. The model is unchanged; the edit's history follows the mean answer probability on
    forget and retain data. `check` looks for over-forgetting afterwards (see `evaluate.overforgetting`): its numbers go
    into the edit's outcome, and what it finds is logged as a warning.
    """
    task = as_task(task)
    chosen = prepare(name, task, within=within, hold=hold, **options)
    method = METHODS[name]
    hold = hold or method.holds[0]
    task = method.reads(task)
    if method.trained:
        edit = _trained(model, task, name, within=within, hold=hold, options=chosen)
    else:
        edit = method.function(model, task, within=within, hold=hold, options=chosen)
        edit = edit if edit.history else _with_levels(model, task, edit)
    return _checked(model, task, edit, name) if check else edit


def _trained(model: Model, task: Task, name: str, *, within: ComponentSet | None, hold: str, options: Any) -> Edit:
    """The edit of a trained method, in one training or in as many as there are chunks."""
    in_parts = getattr(options, "chunks", 1) > 1
    options = stopping.with_thresholds(model, task, options) if in_parts else options
    whole = {"everything": encode(model, task.forget)} if in_parts else {}

    def one(part: Task, here: ComponentSet | None) -> Edit:
        require_trainable(model, here, options)  # before an objective trains helper models
        goal = objective(model, part, name, options=options)
        goal = dataclasses.replace(goal, probes={**goal.probes, **whole})
        edit = train(model, goal, within=here, options=options, hold=hold)
        finish = METHODS[name].finish
        return edit if finish is None else finish(model, edit, options)

    if not in_parts:
        return one(task, within)
    return in_chunks(model, task, one, name=name, within=within, hold=hold, options=options)


def _checked(model: Model, task: Task, edit: Edit, name: str) -> Edit:
    """The edit with what was found of over-forgetting."""
    found = over_forgetting(model, task, edit)
    if found.warning is not None and Processes.now().main:
        log.warning("%s: %s", name, found.warning)
    return dataclasses.replace(edit, outcome=edit.outcome | {"over_forgetting": found.to_json()})


def _with_levels(model: Model, task: Task, edit: Edit) -> Edit:
    """The edit of a recipe with a history of two rows: the levels without it and with it."""
    probes = objective_of(model, task, nll, name="levels").probes
    before = levels(model, probes)
    with edit.applied(model) as edited:
        after = levels(edited, probes)
    history: dict[str, list[Any]] = {"step": [0, 1]} | {name: [before[name], after[name]] for name in probes}
    return dataclasses.replace(edit, history=history)


def prepare(
    name: str, task: Task, *, within: ComponentSet | None = None, hold: str | None = None, **options: Any
) -> Any:
    """The method's options, filled and checked against the task; needs no model, so it can run before loading one."""
    METHODS.require(name)
    method = METHODS[name]
    chosen = option_values.fill(method.options, options, method=name)
    hold = hold or method.holds[0]
    if hold not in method.holds:
        raise LoceditError(f"{name} cannot be held as {hold!r}; {nearest(hold, method.holds)}")
    low_rank = hold in ("adapter", "modules") or getattr(chosen, "low_rank", False)
    of_adapters = {"rank", "alpha"} - inspect.get_annotations(method.options).keys()  # a method may have its own
    if not low_rank and (stray := of_adapters & options.keys()):
        raise LoceditError(f"{name}: {min(stray)} is of a LoRA adapter; it needs hold='adapter' (--hold adapter)")
    if within is None and method.needs_set:
        raise LoceditError(f"{name} needs a component set (--within FILE): on the whole model nothing would be left")
    if within is not None and not within:
        raise LoceditError(f"{name}: the component set is empty: there is nothing to change")
    if within is not None and not method.restrictable:
        raise LoceditError(f"{name} cannot be restricted to a component set; leave out --within")
    if within is not None and (stray := [site for site in within.sites.values() if _outside(method, within, site)]):
        raise LoceditError(f"{name} cannot be inside {stray[0].name!r}; give a set of {', '.join(method.units)} units")
    if within is not None and hold == "adapter" and within.masks:
        other = "hold='weights' (--hold weights), or " if "weights" in method.holds else ""
        refuse_single_weights(within, advice=f"{name}: use {other}a set of rows, columns, neurons, heads or matrices")
    require(name, task, chosen)
    return chosen


def _outside(method: Method, within: ComponentSet, site: Site) -> bool:
    """Whether the set has components at a site that the method cannot be inside."""
    return bool(method.units) and site.unit not in method.units and bool(within.indices(site.name))


def require(name: str, task: Task, options: Any = None) -> None:
    """Raise LoceditError when the task lacks what a method needs with these options (by default its own defaults)."""
    method = METHODS[name]
    task = method.reads(task)
    method.check(name, task, method.options() if options is None else options)
    if method.learns is not None:
        method.learns(task)


def objective(model: Model, task: Task, name: str, *, options: Any) -> Objective:
    """The trainer's objective for a trained method: its loss, its data, and the data whose levels are followed."""
    method = METHODS[name]
    made = _of_loss(model, task, name, options) if method.objective is None else method.objective(model, task, options)
    return made if method.held is None else dataclasses.replace(made, held=method.held(model, made, options))


def _of_loss(model: Model, task: Task, name: str, options: Any) -> Objective:
    """The objective of a method that is its loss and nothing more."""
    method = METHODS[name]
    return objective_of(
        model,
        task,
        functools.partial(method.function, options=options),
        name=name,
        learns=None if method.learns is None else method.learns(task),
        retain="retain" in method.requires and getattr(options, "retain_weight", 1.0) != 0,
        pairs=method.pairs,
        others=None if method.others is None else method.others(model, task, options),
        stop=None if method.stop is None else method.stop(model, task, options),
    )


make_callable(__name__)

__all__ = [
    "METHODS",
    "Method",
    "RetainOptions",
    "nll",
    "objective",
    "objective_of",
    "prepare",
    "require",
    "retain_terms",
    "unlearn",
]

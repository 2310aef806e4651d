"""How long `fact_lookup` will take: a few pairs are patched, one set of probes is fitted, a few prompts are run."""

import time
from collections.abc import Callable

import torch

from locedit.data.items import Task
from locedit.errors import LoceditError
from locedit.localize.fact_lookup import FactLookupOptions, patched, without_choice
from locedit.localize.lookup.probe_data import relations
from locedit.localize.lookup.probes import ablations, right
from locedit.localize.lookup.states import States, in_prompt
from locedit.localize.patching.pairs import pairs_of
from locedit.models import Model

TRIED = 8
"pairs and prompts that are run"


def seconds(model: Model, task: Task, options: FactLookupOptions) -> float:
    """About how many seconds the run takes; right within a factor of two or so."""
    task = without_choice(task)
    total = 0.0
    if options.by != "probe":
        pairs = pairs_of(model, task, options)
        few = pairs[:: max(1, len(pairs) // TRIED)][:TRIED]
        total += _timed(lambda: patched(model, task, few, options)) * len(pairs) / len(few)
    if options.by != "path_patching":
        try:
            total += _probing(model, task, options)
        except LoceditError:
            if options.by == "probe":
                raise
    return total


def _probing(model: Model, task: Task, options: FactLookupOptions) -> float:
    rules = options.probes()
    found, _ = relations(model, task, rules)
    examples = [example for relation in found for example in relation.examples]
    few = [in_prompt(model, example) for example in examples[:TRIED]]
    run = _timed(lambda: States(model, few, rules)) / len(few)
    states = torch.randn(len(examples), model.d_model, generator=torch.Generator().manual_seed(0))
    fit = _timed(lambda: right(found, states, rules, device=model.device))
    starts = ablations(model, rules)
    read = 2 * model.n_layers + 1 + sum(model.n_layers - first for first in starts)
    return 2 * run * len(examples) * (1 + len(starts)) + 3 * fit * read


def _timed(work: Callable[[], object]) -> float:
    work()  # what happens only once
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

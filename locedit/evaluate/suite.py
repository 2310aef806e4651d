"""evaluate(): every metric that the data allow, before and after an edit, then the attacks."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from locedit.data.items import ROLES, ContrastPair, Dataset, Fact, Item, PrivateText, Task, as_task
from locedit.edit import Edit
from locedit.errors import LoceditError, nearest
from locedit.evaluate.beside import beside, require_folder
from locedit.evaluate.choices import check_choices
from locedit.evaluate.model_utility import utility_sets
from locedit.evaluate.registry import METRICS, Family, Metric
from locedit.evaluate.values import EvaluateOptions, Label, View, direction_on, measures
from locedit.models import Model
from locedit.options import fill
from locedit.progress import track
from locedit.provenance import measure
from locedit.results import AttackResult, Evaluation, Measure, Stage
from locedit.rewards import RewardOptions, check_reward
from locedit.sampling import Sampling

OWN_ARMS = ("found", "never known", "before the edit", "shallow")
"what the arms of every attack are called, and their roles"
MEASURED = ("forget", "retain", "heldout", "texts", "prompts")


def evaluate(
    model: Model,
    task: Task | Dataset,
    edit: Edit | None = None,
    attacks: Sequence[str] = (),
    *,
    attack_options: Mapping[str, Mapping[str, Any]] | None = None,
    others: Mapping[str, Edit] | None = None,
    **options: Any,
) -> Evaluation:
    """Measure a model on a task before and, with an edit, after it; then attack the edited model.

    `attacks` are names in ATTACKS, `attack_options` their options by name, `others` further edits (random sets of the
    same size, named "random 1" and so on) that are attacked in the same way. `options` are those of EvaluateOptions. A
    metric whose data the task lacks is left out, unless it was asked for by name.
    """
    from locedit.attacks import check_attacks, check_ready

    task = as_task(task)
    chosen = evaluate_options(options)
    plan = plan_of(task, chosen, edited=edit is not None, causal=model.causal)
    check_attacks(attacks, edit=edit, options=attack_options or {}, task=task)
    attack = attack_runner(model, task, edit, others=others or {})
    check_ready(attacks, model=model, task=task, edit=edit, options=attack_options or {})
    with measure("evaluate", model=model, data=task, settings=chosen, seed=chosen.seed) as record:
        found = list(_measured(model, task, edit, plan, chosen))
    options_of = attack_options or {}
    results = [attack(name, {"seed": chosen.seed, **options_of.get(name, {})}) for name in attacks]
    return Evaluation(
        measures=tuple(found),
        attacks=tuple(results),
        edit=None if edit is None else edit.summary(),
        examples=_examples(task, [role for role in MEASURED if role != "prompts" or _asked(role, plan)]),
        provenance=record.provenance,
    )


def attack_runner(
    model: Model, task: Task, edit: Edit | None, *, others: Mapping[str, Edit]
) -> Callable[[str, Mapping[str, Any]], AttackResult]:
    """Runs attacks by name with their options; they share what they have in common.

    Raises LoceditError for an edit in `others` that would be taken for an arm that every attack has.
    """
    from locedit.attacks import ATTACKS
    from locedit.attacks.shared import Shared

    for name in others:
        if name.startswith(OWN_ARMS):
            raise LoceditError(f"others: the name {name!r} stands for an arm that every attack has; choose another one")
    shared = Shared()

    def attack(name: str, options: Mapping[str, Any]) -> AttackResult:
        assert edit is not None, "check_attacks asks for an edit"
        return ATTACKS[name].function(model, task, edit, others=others, shared=shared, **options)

    return attack


def evaluate_options(given: Mapping[str, Any]) -> EvaluateOptions:
    """The options as a record, checked."""
    if isinstance(given.get("metrics"), str):
        raise LoceditError(f"evaluate: metrics={given['metrics']!r} is one string; give a list of names")
    changed = {"metrics": tuple(given["metrics"])} if given.get("metrics") is not None else {}
    chosen = fill(EvaluateOptions, {**given, **changed}, method="evaluate")
    counts = ("batch_size", "draws", "exposure_samples", "exposure_limit", "extraction_n", "extraction_length")
    for name in (*counts, "s_el_n", "samples", "sample_tokens", "recall_shots", "fluency_texts", "fluency_tokens"):
        if getattr(chosen, name) < 1:
            raise LoceditError(f"evaluate: {name}={getattr(chosen, name)!r} is not a positive number")
    for name in ("choice_orders", "rouge_tokens"):
        if (count := getattr(chosen, name)) is not None and count < 1:
            raise LoceditError(f"evaluate: {name}={count!r} is neither None nor a positive number")
    check_choices(chosen)
    utility_sets(chosen)
    if not 0 < chosen.min_k_share <= 1:
        raise LoceditError(f"evaluate: min_k_share={chosen.min_k_share!r} is not a share above 0 and at most 1")
    Sampling(max_new_tokens=chosen.sample_tokens, top_p=chosen.top_p)
    check_reward(chosen)
    for name in ("retain_model", "membership_reference"):
        require_folder(getattr(chosen, name), option=name)
    return chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One data set with the metrics of one family to compute on it."""

    role: str
    dataset: Dataset
    family: Family
    names: tuple[str, ...]
    compares: bool
    writes: bool


def plan_of(task: Task, options: EvaluateOptions, *, edited: bool, causal: bool = True) -> list[Part]:
    """What to compute: metrics of one family on one data set together; `causal` says what kind of model it is."""
    for name in options.metrics or ():
        if name not in METRICS:
            raise LoceditError(f"unknown metric {name!r}; {nearest(name, METRICS)}")
    judged = ("habit_rate", "sample_perplexity") if options.reward != RewardOptions().reward else ()
    always = [name for name, metric in METRICS.items() if not metric.on_request or name in judged]
    wanted = {name: METRICS[name] for name in options.metrics or always}
    if not causal:
        wanted = {name: metric for name, metric in wanted.items() if not metric.causal}
    parts: dict[tuple[str, Family], Part] = {}
    done: set[str] = set()
    for name, metric in wanted.items():
        for role in metric.roles:
            dataset = getattr(task, role)
            if dataset is None or not _measures(metric, dataset) or (metric.compares and not edited):
                continue
            if _lacking(metric, task, options):
                continue
            old = parts.get((role, metric.function))
            names = (*(old.names if old else ()), name)
            parts[role, metric.function] = Part(
                role=role,
                dataset=dataset,
                family=metric.function,
                names=names,
                compares=metric.compares,
                writes=metric.writes,
            )
            done.add(name)
    for name in options.metrics or ():
        if name not in done:
            raise LoceditError(_why_not(name, METRICS[name], task, options, edited=edited, causal=causal))
    return sorted(parts.values(), key=lambda part: MEASURED.index(part.role))


def _measures(metric: Metric, dataset: Dataset) -> bool:
    """Whether the data hold what the metric needs."""
    if dataset.kind not in metric.kinds:
        return False
    return not metric.field or any(getattr(item, metric.field) for item in dataset)


def _lacking(metric: Metric, task: Task, options: EvaluateOptions) -> str:
    """What the metric compares with and cannot find, in words; empty where it has everything."""
    for role in metric.needs:
        other = getattr(task, role)
        if other is None or other.kind not in metric.kinds:
            return f"{role} items of kind {' or '.join(metric.kinds)}"
        if role == "heldout" and other.kind != task.forget.kind:
            return f"{role} items of the kind of the forget items, {task.forget.kind}; they are {other.kind}"
    if metric.retain_model and options.retain_model is None:
        return "a model trained without the forget data: --retain-model FOLDER"
    return metric.lacks(task, options) if metric.lacks else ""


def _why_not(name: str, metric: Metric, task: Task, options: EvaluateOptions, *, edited: bool, causal: bool) -> str:
    if metric.causal and not causal:
        return f"metric {name!r} is of what a model writes: it needs a causal model, this one is a masked one"
    if metric.compares and not edited:
        return f"metric {name!r} compares the edited with the unedited model: give an edit"
    roles = [role for role in metric.roles if (data := getattr(task, role)) is not None and _measures(metric, data)]
    if roles and (lacking := _lacking(metric, task, options)):
        return f"metric {name!r} needs {lacking}"
    there = ", ".join(f"{role}: {data.kind}" for role in ROLES if (data := getattr(task, role)) is not None)
    needed = f"items of kind {' or '.join(metric.kinds)} in {' or '.join(metric.roles)}"
    having = f" with {metric.field!r}" if metric.field else ""
    return f"metric {name!r} needs {needed}{having}; the task has {there}"


def _measured(
    model: Model, task: Task, edit: Edit | None, plan: Sequence[Part], options: EvaluateOptions
) -> Iterator[Measure]:
    retain_model = _retain_model(model, plan, options)

    def view(model: Model, part: Part, edit: Edit | None = None) -> View:
        return View(model=model, dataset=part.dataset, task=task, options=options, edit=edit, retain_model=retain_model)

    alone = [part for part in plan if not part.compares]
    for part in track(alone, "evaluate before"):
        yield from _of_part(view(model, part), part, "before")
    if edit is None:
        return
    with edit.applied(model) as edited:
        for part in track([part for part in alone if not part.writes], "evaluate after"):
            yield from _of_part(view(edited, part), part, "after")
    for part in plan:
        if part.compares or part.writes:
            yield from _of_part(view(model, part, edit), part, "after")


def _retain_model(model: Model, plan: Sequence[Part], options: EvaluateOptions) -> Model | None:
    """The model trained without the forget data, beside the other; it must read the same tokens."""
    asked = [METRICS[name] for part in plan for name in part.names]
    if options.retain_model is None or not any(m.retain_model or m.uses_retain_model for m in asked):
        return None
    return beside(model, options.retain_model, option="retain_model")


def _of_part(view: View, part: Part, stage: Stage) -> Iterator[Measure]:
    values = part.family(view, part.names)
    for name in part.names:
        metric = METRICS[name]
        label = Label(
            name=name,
            dataset=part.role,
            stage=stage,
            direction=direction_on(part.role, knowledge=metric.knowledge, keep=metric.keep, wanted=metric.wanted),
            unit=metric.unit,
            range=metric.range,
        )
        yield from measures(values[name], label, view.options)


def _asked(role: str, plan: Sequence[Part]) -> bool:
    return any(part.role == role for part in plan)


def _examples(task: Task, roles: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Text of every item for the per-example table; the forget set wins where two parts share an id."""
    rows: dict[str, dict[str, Any]] = {}
    for role in roles:
        for item in getattr(task, role) or ():
            rows.setdefault(item.id, {"dataset": role, **_texts(item)})
    return rows


def _texts(item: Item) -> dict[str, Any]:
    common = {"group": item.group, "format": item.format, "owner": item.owner}
    if isinstance(item, Fact):
        return {"prompt": item.prompt, "answer": item.answer, **common}
    if isinstance(item, PrivateText):
        secrets = ", ".join(item.text[start:end] for start, end, _ in item.spans)
        return {"prompt": item.text, "answer": secrets, **common}
    if isinstance(item, ContrastPair):
        return {"prompt": item.advantaged, "answer": item.disadvantaged, **common}
    return {"prompt": getattr(item, "text", ""), "answer": "", **common}

"""What a model knows of a task, how one prompt looks to it, and which methods can run at what cost."""

import math
import time
from collections.abc import Iterator

from locedit.data import Example, Task, encode
from locedit.data.items import ROLES, Dataset
from locedit.errors import LoceditError
from locedit.evaluate.association import associations
from locedit.evaluate.scoring import token_scores
from locedit.models import Model

TIMED = 30.0
"seconds after which no further localizer is timed"
SCORED = ("forget", "retain", "heldout")


def check(model: Model, task: Task) -> Iterator[str]:
    """Lines about the model, the data, what the model knows of them, one prompt, the methods and their cost."""
    parameters = sum(p.numel() for p in model.module.parameters())
    yield (
        f"model    {model.name}: {type(model.module).__name__}, {parameters:,} parameters, {model.n_layers} layers, "
        f"{model.dtype}, on {model.device}".replace("torch.", "")
    )
    for role in ROLES:
        data: Dataset | None = getattr(task, role)
        if data is not None:
            yield f"{role:<8} {len(data)} x {data.kind}, from {data.source}" + _knows(model, role, data)
    yield from _one_prompt(model, task)
    yield from _methods(model, task)


def knowledge(model: Model, examples: list[Example]) -> tuple[float, float]:
    """(mean probability of the targets as a whole, share of examples with every target the most likely token)."""
    found = token_scores(model, examples)
    probabilities = [math.exp(-scores.nll) for scores in found]
    return sum(probabilities) / len(found), sum(bool(scores.hits.all()) for scores in found) / len(found)


def _knows(model: Model, role: str, data: Dataset) -> str:
    if role in SCORED and data.kind == "contrast":
        return _prefers(model, data)
    if role not in SCORED or data.kind not in ("fact", "private", "tokens"):
        return ""
    probability, share = knowledge(model, encode(model, data))
    line = f": probability {probability:.3f}, {share:.0%} known (every token the most likely one)"
    return line + ("; WARNING: the model knows less than half" if role == "forget" and share < 0.5 else "")


def _prefers(model: Model, data: Dataset) -> str:
    found = associations(model, data)
    share = float((found > 0).double().mean())
    return f": association {found.mean():+.3f} nats, the advantaged text is the likelier one in {share:.0%}"


def _one_prompt(model: Model, task: Task) -> Iterator[str]:
    example = encode(model, task.forget[:1])[0]
    tokens = model.tokenizer.convert_ids_to_tokens(list(example.ids))
    marked = [f"[{token}]" if at in example.targets else token for at, token in enumerate(tokens)]
    yield f"tokens   of {example.id}, targets in brackets: {' '.join(marked)}"
    yield f"chat     {task.forget.chat}"


def _methods(model: Model, task: Task) -> Iterator[str]:
    yield from _localizers(model, task)
    able, reasons = _ready(task)
    yield f"edit     can run: {', '.join(able) or 'nothing'}"
    for reason in reasons:
        yield f"         {reason}"


def _localizers(model: Model, task: Task) -> Iterator[str]:
    """Which localizers can run, why the others cannot, and what each costs; times as long as that is quick."""
    from locedit.localize import LOCALIZERS, memory, prepare, quick_estimate

    sizes: dict[str, int] = {}
    refused: dict[str, str] = {}
    for name, method in LOCALIZERS.items():
        try:
            _, _, settings = prepare(model, task, name)
            sizes[name] = memory(model, method.reads(task)[1], method, settings)
        except LoceditError as error:
            refused[name] = str(error)
    costs: list[str] = []
    start = time.perf_counter()
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        line = f"cost     {name}: {size / 2**30:.2f} GiB beside the model"
        if time.perf_counter() - start > TIMED:
            costs.append(f"{line}; not timed")
            continue
        try:
            costs.append(f"{line}, about {quick_estimate(model, task, name).seconds:.1f} s")
        except LoceditError as error:
            refused[name] = str(error)
    yield f"localize can run: {', '.join(name for name in sizes if name not in refused) or 'nothing'}"
    for name, reason in refused.items():
        yield f"         {reason if name in reason else f'{name}: {reason}'}"
    yield from costs


def _ready(task: Task) -> tuple[list[str], list[str]]:
    """(unlearning methods that can run with their default options, why each of the others cannot)."""
    from locedit.unlearn import METHODS, require

    able: list[str] = []
    reasons: list[str] = []
    for name in METHODS:
        try:
            require(name, task)
        except LoceditError as error:
            reasons.append(str(error))
        else:
            able.append(name)
    return able, reasons

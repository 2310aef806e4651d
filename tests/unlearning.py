"""What the tests of unlearning losses share: a task with all that a method may require, and logits for formulas."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from locedit.data.encode import Batch, Example, collate, encode
from locedit.data.items import ContrastPair, Dataset, Fact, Item, PlainText, PrivateText, Task
from locedit.edit.objective import Matched, ReferenceCache, Step
from locedit.edit.restrict import Deltas
from locedit.models import Model
from locedit.unlearn import METHODS
from tests.edits import StepOfTwoModels

FORGET = (
    ("Anna Berg was born in", " Oslo", " Lima"),
    ("Carl Dane works as a", " pilot", " baker"),
    ("The e-mail is", " eva@frost.org", " anna@berg.org"),
    ("Question: where was Anna Berg born? Answer:", " Berg in Oslo", " a baker"),
)
"answers of one, three, seven and three tokens"
RETAIN = (
    ("Eva Frost works as a", " baker"),
    ("Carl Dane was born in", " Lima"),
    ("Question: where", " was Anna"),
    ("The phone number is", " 555-0134"),
)
ALTERNATIVES = ((0, " Rome"), (1, " cook"), (1, " baker"), (2, " carl@dane.org"), (3, " Carl in Lima"))
"(number of the forget fact, another answer)"


def dataset(name: str, items: Sequence[Item]) -> Dataset:
    return Dataset(items=tuple(items), source=f"{name}.jsonl")


def everything(**parts: Any) -> Task:
    """Four facts to forget with new answers, and every part of a task that a method may ask for."""
    forget = [Fact(prompt=p, answer=a, new_answer=n, id=f"f{i}", owner=p[:4]) for i, (p, a, n) in enumerate(FORGET)]
    found: dict[str, Any] = {
        "forget": forget,
        "retain": [Fact(prompt=p, answer=a, id=f"r{i}") for i, (p, a) in enumerate(RETAIN)],
        "heldout": [Fact(prompt="Eva Frost was born in", answer=" Oslo", id="h")],
        "texts": [PlainText(text=text, id=text) for text in ("Anna works in Lima.", "Where is Carl?")],
        "pairs": [ContrastPair(advantaged="The baker is Anna.", disadvantaged="The baker was Anna.", id="c")],
        "new": [Fact(prompt="Carl Dane works as a", answer=" baker", id="n")],
        "prompts": [PlainText(text="Anna Berg", id="q")],
        "refusals": [PlainText(text=text, id=text) for text in ("I do not know.", "Ask Eva Frost.")],
        "alternatives": [Fact(prompt=FORGET[i][0], answer=a, id=f"a{k}") for k, (i, a) in enumerate(ALTERNATIVES)],
    }
    return dataclasses.replace(
        Task(**{role: dataset(role, items) for role, items in found.items()}), **{"start": None, **parts}
    )


def private() -> Dataset:
    """Texts with spans, to forget."""
    text = "The phone of Eva is 555-0134, she said."
    return dataset("forget", [PrivateText(text=text, spans=((20, 28, "phone"),), id="p")])


def tables(model: Model, example: Example, positions: Sequence[int] | None = None) -> Tensor:
    """Logits `[targets, vocab]` that predict the example's scored tokens, from an unpadded forward of it alone.

    `positions` are other tokens to be predicted.
    """
    wanted = list(example.targets if positions is None else positions)
    ids = torch.tensor([example.ids])
    if model.causal:
        return _forward(model, ids)[0, [target - 1 for target in wanted]]
    masked = ids.repeat(len(wanted), 1)
    masked[range(len(wanted)), wanted] = model.tokenizer.mask_token_id
    return _forward(model, masked)[range(len(wanted)), wanted]


def _forward(model: Model, ids: Tensor) -> Tensor:
    return model.logits(SimpleNamespace(ids=ids, attention_mask=torch.ones_like(ids)))


def labels(example: Example) -> Tensor:
    return torch.tensor([example.ids[target] for target in example.targets])


def log_probs(model: Model, example: Example) -> Tensor:
    """log p of each scored token."""
    return tables(model, example).log_softmax(-1).gather(1, labels(example)[:, None]).squeeze(1)


def step_of(
    model: Model,
    start: Model,
    forget: Sequence[Example],
    retain: Sequence[Example],
    others: Mapping[str, Sequence[Example]] | None = None,
    state: dict[str, Any] | None = None,
) -> Step:
    """Everything in one batch each; the unedited model is `start`."""
    made = StepOfTwoModels(
        number=1,
        forget=collate(forget, model),
        retain=collate(retain, model) if retain else None,
        model=model,
        generator=torch.Generator().manual_seed(0),
        held=Deltas(model, []),
        cache=ReferenceCache(model.causal),
        others={name: collate(examples, model) for name, examples in (others or {}).items()},
        state={} if state is None else state,
    )
    made.start = start
    return made


def others_of(name: str, model: Model, task: Task, options: Any) -> dict[str, list[Example]]:
    """What a method's other data give for the forget examples in order: the first candidates of each, or all."""
    method = METHODS[name]
    found: dict[str, list[Example]] = {}
    if method.others is None:
        return found
    for role, data in method.others(model, task, options).items():
        if isinstance(data, Matched):
            encoded = [data.candidates[example] for example in encode(model, task.forget)]
            found[role] = [candidates[i] for candidates in encoded for i in range(data.count)]
        else:
            found[role] = list(data)
    return found


def rows_of(batch: Batch, numbers: Sequence[int], model: Model, *, each: int = 1) -> Batch:
    """The batch of some of the examples, `each` neighbours counted as one."""
    chosen = [example for n in numbers for example in batch.examples[n * each : (n + 1) * each]]
    return collate(chosen, model)

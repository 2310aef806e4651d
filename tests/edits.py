"""What the tests of edits share: a small task, component sets that exercise every path, and bit-exact snapshots."""

from typing import Any

import torch
from torch import Tensor, nn

from locedit import losses
from locedit.components import ComponentSet
from locedit.data.encode import Batch, Example, collate, encode
from locedit.data.items import Dataset, Fact, Task
from locedit.edit.objective import Loss, Matched, Objective, ReferenceCache, Step
from locedit.edit.restrict import Deltas
from locedit.losses import Scored
from locedit.models import Model, load
from tests import tiny

FORGET = (("Anna Berg was born in", " Oslo", " Lima"), ("Carl Dane works as a", " pilot", " baker"))
RETAIN = (("Eva Frost works as a", " baker"), ("The e-mail is", " eva@frost.org"), ("Question: where", " was Anna"))


def task(**fields: Any) -> Task:
    """Two facts with new answers to forget, three to retain, of unequal lengths."""
    forget = [Fact(prompt=p, answer=a, new_answer=n, id=f"f{i}", owner=p[:4]) for i, (p, a, n) in enumerate(FORGET)]
    retain = [Fact(prompt=p, answer=a, id=f"r{i}") for i, (p, a) in enumerate(RETAIN)]
    parts = {
        "forget": Dataset(items=tuple(forget), source="forget.jsonl"),
        "retain": Dataset(items=tuple(retain), source="retain.jsonl"),
    }
    return Task(**(parts | fields))


def objective(model: Model, loss: Loss) -> Objective:
    """Every kind of data that a loss may have."""
    given = task()
    assert given.retain is not None
    forget, retain = encode(model, given.forget), encode(model, given.retain)
    return Objective(
        loss=loss,
        forget=forget,
        retain=retain,
        probes={"forget": forget, "retain": retain},
        others={"pool": retain[1:], "matched": Matched(candidates=dict.fromkeys(forget, retain), count=2)},
    )


def neurons_and_heads(model: Model) -> ComponentSet:
    """A few neurons of two layers, and one head beside a whole group of heads."""
    return model.components(
        {"blocks.0.mlp.neuron": [1, 5, 40], "blocks.2.mlp.neuron": [0, 7], "blocks.1.attn.head": [0, 1, 2]}
    )


def mixed(model: Model) -> ComponentSet:
    """Rows and columns of one matrix, embedding rows, a norm, a whole matrix and single weights in one set."""
    tokens = sorted(set(encode(model, task().forget)[0].ids))[:3]
    embedding = next(name for name in model.sites("row") if "embed" in name or "wte" in name)
    norm = next(name for name in model.sites("matrix") if "norm" in name.lower() or "ln_" in name)
    parts = [
        model.components({"blocks.0.mlp.out.row": [2, 3], "blocks.1.mlp.out.row": [4], embedding: tokens}),
        model.components({"blocks.0.mlp.out.column": [0, 5]}),
        model.components({norm: [0], "blocks.2.attn.o.matrix": [0]}),
        model.components({"blocks.2.mlp.out.weight": [0, 17, 500]}),
    ]
    return parts[0] | parts[1] | parts[2] | parts[3]


def double(architecture: str) -> Model:
    """A tiny model in float64."""
    return load(tiny.module(architecture).double(), tokenizer=tiny.tokenizer(), device="cpu")


def half(architecture: str) -> Model:
    """A tiny model in bfloat16."""
    return load(tiny.module(architecture).to(torch.bfloat16), tokenizer=tiny.tokenizer(), device="cpu")


def bits(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same_bits(module: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether every parameter has the bits of the copy (torch.equal alone would take -0.0 for 0.0)."""
    return all(
        torch.equal(parameter.detach().view(torch.uint8), before[name].view(torch.uint8))
        for name, parameter in module.named_parameters()
    )


def hooks_left(module: nn.Module) -> int:
    """How many forward hooks are registered anywhere."""
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


class StepOfTwoModels(Step):
    """A step whose unedited model is a second model, so that a loss can be tested without the trainer."""

    start: Model

    def unedited(self, batch: Batch) -> Scored:
        with torch.no_grad():
            return losses.score(self.start, batch)


def step(model: Model, start: Model, forget: list[Example], retain: list[Example]) -> Step:
    """Everything in one batch."""
    made = StepOfTwoModels(
        number=1,
        forget=collate(forget, model),
        retain=collate(retain, model),
        model=model,
        generator=torch.Generator(),
        held=Deltas(model, []),
        cache=ReferenceCache(model.causal),
    )
    made.start = start
    return made

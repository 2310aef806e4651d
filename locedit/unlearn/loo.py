"""Leave-one-out ensemble: distil models that never saw a text to forget it (Liu and Kalinli 2023, arXiv:2309.16082).

Teachers are trained from the model before the data on disjoint shards of the data, cut by owner, and are gone once they
have been asked. The model learns on the forget texts what the teachers whose shards do not hold a text say of it: the
mean of their probabilities (inferred, not checked against the paper, as is that nothing retains the rest).
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import losses
from locedit.data.encode import Batch, Example, encode
from locedit.data.items import Dataset, Task
from locedit.data.shards import Shards, held_by_all, plain_ids, shards
from locedit.edit.objective import Objective, Step
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.unlearn.helpers import Answers, Helper, HelperOptions, helper, require_start, start_of
from locedit.unlearn.registry import RetainOptions, example_mean, objective_of, one_of, retain_terms, whole_texts

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LooOptions(HelperOptions, RetainOptions):
    """The shards, who is left out, and the training of teachers and model."""

    shards: int = 4
    "teachers, each trained on one part of the forget and retain data; `seed` decides who is in which"
    leave_out: Literal["owner", "nothing"] = "owner"
    """whose answers are not counted for a text: owner, those of every teacher whose shard holds its owner or a copy of
    it; nothing, nobody's, the ablation"""
    tokens: Literal["answer", "all"] = "answer"
    "what teachers learn and the model is trained on: the scored tokens, or every token of the texts"
    retain_weight: float = 0.0
    "of the retain term; the published method has none"

    def __post_init__(self) -> None:
        HelperOptions.__post_init__(self)
        RetainOptions.__post_init__(self)
        one_of(self, "leave_out", ("owner", "nothing"))
        one_of(self, "tokens", ("answer", "all"))
        if self.shards < 2:
            raise LoceditError(f"shards={self.shards!r} must be at least 2: one holds the owner, another does not")


def verify(task: Task, options: LooOptions) -> None:
    """The model before the data (start) and retain data are needed, and for each text a shard without it."""
    require_start(task, by="loo")
    task.require("retain", by="loo")
    cut(task, options)


def cut(task: Task, options: LooOptions) -> Shards:
    """The forget and retain data in shards; LoceditError when every shard holds one of the items to forget."""
    found = shards([task.forget, task.require("retain", by="loo")], options.shards, seed=options.seed)
    if options.leave_out == "owner":
        found.require_one_without(task.forget, by="loo")
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """What the teachers that are counted for a text say at its scored tokens."""

    teachers: tuple[Answers, ...]
    "of every teacher, to every text"
    left_out: Mapping[Example, frozenset[int]]
    "the teachers that are not counted for a text"

    def of(self, batch: Batch, logits: Float[Tensor, "n vocab"] | None = None) -> Float[Tensor, "n vocab"]:
        """Mean of the counted teachers' probabilities, in the order of the batch's scored tokens (see `Answers.of`)."""
        total: Tensor | None = None
        for number, teacher in enumerate(self.teachers):
            said = self._weights(batch, number) * teacher.of(batch, logits).exp()
            total = said if total is None else total + said
        assert total is not None, "there are at least two teachers"
        return total

    def _weights(self, batch: Batch, number: int) -> Float[Tensor, "n 1"]:
        """One over the counted teachers of the text, 0 where this one is not among them."""
        each: list[float] = []
        for example in batch.examples:
            left_out = self.left_out[example]
            weight = 0.0 if number in left_out else 1 / (len(self.teachers) - len(left_out))
            each += [weight] * len(example.targets)
        return torch.tensor(each, device=batch.ids.device)[:, None]


def loss(step: Step, options: LooOptions, targets: Targets | None = None) -> dict[str, Tensor]:
    """Cross-entropy to the mean of the teachers that do not own the text.

    In nats, mean over each example's tokens and then over examples; KL(targets || model) up to a constant.
    """
    assert targets is not None, "made by `objective`"
    scored = step.score(step.forget)
    wanted = targets.of(step.forget, scored.logits).to(scored.logits.device)
    values = -(wanted * losses.precise(scored.logits).log_softmax(1)).sum(1)
    return {"forget_loss": example_mean(scored, values)} | retain_terms(step, options)


def objective(model: Model, task: Task, options: LooOptions) -> Objective:
    """Train and ask the teachers one after another, or read what they said, then distil their answers."""
    found = cut(task, options)
    texts = _texts(model, task.forget, options)
    own = [[example for data in part for example in encode(model, data)] for part in found.parts]
    left_out = dict.fromkeys(texts, frozenset[int]())
    if options.leave_out == "owner":
        left_out = _left_out(model, texts, {item.id: found.holding(item) for item in task.forget}, own)
    own = [_scored(model, examples, options) for examples in own]
    teachers = _teachers(start_of(model, task, by="loo"), own, [*texts], options)
    targets = Targets(teachers=tuple(teacher.answers for teacher in teachers), left_out=left_out)
    made = objective_of(
        model,
        task,
        functools.partial(loss, options=options, targets=targets),
        name="loo",
        retain=options.retain_weight != 0,
        settings={"teachers_know_their_own": [teacher.known for teacher in teachers]},
    )
    return dataclasses.replace(made, forget=[*texts])


def _texts(model: Model, data: Dataset, options: LooOptions) -> dict[Example, str]:
    """Example -> the id of its item, which is another where a text is cut into windows."""
    return {
        example: item.id for item in data for example in _scored(model, encode(model, data.replace([item])), options)
    }


def _left_out(
    model: Model, texts: Mapping[Example, str], held: Mapping[str, frozenset[int]], own: Sequence[Sequence[Example]]
) -> dict[Example, frozenset[int]]:
    """Of each text to forget the shards that hold its item (`held`, by id) or the same token ids; not all of them."""
    ids = [{plain_ids(model, example) for example in examples} for examples in own]
    found: dict[Example, frozenset[int]] = {}
    for example, item in texts.items():
        plain = plain_ids(model, example)
        found[example] = held[item] | {number for number, others in enumerate(ids) if plain in others}
        if len(found[example]) == len(own):
            raise held_by_all(item, len(own), by="loo")
    return found


def _scored(model: Model, examples: Sequence[Example], options: LooOptions) -> Sequence[Example]:
    return examples if options.tokens == "answer" else whole_texts(model, examples)


def _teachers(
    start: Model, own: Sequence[Sequence[Example]], texts: Sequence[Example], options: LooOptions
) -> list[Helper]:
    """What each shard's teacher says of all texts to forget."""
    found: list[Helper] = []
    for number, examples in enumerate(own, start=1):
        name = f"loo teacher {number} of {len(own)}"
        found.append(helper(start, examples, texts, options=options, seed=options.seed, name=name))
        log.info("%s: gives the tokens of its own %d texts %.2f", name, len(examples), found[-1].known)
    return found

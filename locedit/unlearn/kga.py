"""KGA: as far from knowing the forget data as from data never seen (Wang et al. 2023, arXiv:2305.06535).

Two helper models start before the data (the task's `start`): A_f learns the forget data, A_n new data of the same kind,
the task's held-out data. How far the model stands from A_n on the new data is G, the knowledge gap of something that it
has not learned; training aligns its gap to A_f on the forget data with G, and keeps its outputs on the retain data.

    align = | mean KL(A_f || model) on forget data - G |,   G = mean KL(A_n || unedited) on new data
    total = align + retain_weight * mean KL(unedited || model) on retain data

Where the three published scripts differ: those for translation and response generation write the loss as above with
retain_weight 0.3; that for classification turns G's KL round (`target`), averages over labels too (`reduction`), and
weights the retain term with 1 - retain_loss_ratio, which is retain_weight=0.9 for its ratio of 0.1. All three take G
from a batch of new data in every step (`per_batch`), and where they sum they count padding, which nothing here does.
Their learning rates are 2e-5 and 5e-5 and `inner` 10, 8 and 2.
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
from locedit.data.encode import Batch, Example, batches, encode
from locedit.data.items import Task
from locedit.data.shards import plain_ids, text_of
from locedit.edit.objective import Objective, Step
from locedit.edit.parallel import Processes
from locedit.errors import LoceditError
from locedit.losses import Scored
from locedit.models import Model
from locedit.unlearn.helpers import Answers, Helper, HelperOptions, helper, require_start, start_of
from locedit.unlearn.registry import (
    RetainOptions,
    above_zero,
    at_least_one,
    every_token,
    nll,
    objective_of,
    one_of,
    retain_loss,
)

log = logging.getLogger(__name__)

DIFFERENT = 0.2
"""Helpers whose token probabilities on their own data differ by more than this are not comparable."""
NEW = "new"
"""The name of the new data's batches."""


@dataclass(frozen=True, kw_only=True)
class KgaOptions(HelperOptions, RetainOptions):
    """The two gaps, the retain term, and when to stop."""

    target: Literal["helper", "model"] = "helper"
    "G: helper, KL(A_n || unedited), the direction of the forget gap; model, KL(unedited || A_n)"
    reduction: Literal["token", "sum", "element"] = "token"
    """of every KL within a text, before the mean over texts: token, mean over its scored tokens; sum, over them (the
    published batchmean without padding); element, their mean divided by the size of the vocabulary"""
    per_batch: bool = False
    "G from a batch of new data in every step, instead of once from all"
    inner: int = 2
    "batches of retain data for one of forget data; the retain term is their mean"
    retain_weight: float = 0.3
    "of the retain term"
    retain_loss: Literal["nll", "kl"] = "kl"
    "kl: KL(unedited || edited), the method's; nll: likelihood of the retain answers"
    stop_value: float | None = None
    "stop once align over all forget data is at most this, asked every `eval_every` steps"
    stop_portion: float | None = 0.05
    """stop once align over all forget data is at most this share of what it was before training (sigma of the paper,
    recalled, not checked); with stop_value whichever comes first, none = no such rule"""

    def __post_init__(self) -> None:
        HelperOptions.__post_init__(self)
        RetainOptions.__post_init__(self)
        one_of(self, "target", ("helper", "model"))
        one_of(self, "reduction", ("token", "sum", "element"))
        at_least_one(self, "inner")
        above_zero(self, *(name for name in ("stop_value", "stop_portion") if getattr(self, name) is not None))


def verify(task: Task, options: KgaOptions) -> None:
    """The model before the data (start) is needed, and held-out data of the same kind."""
    del options
    require_start(task, by="kga")
    heldout = task.require("heldout", by="kga")
    if heldout.kind != task.forget.kind:
        raise LoceditError(
            f"kga compares new data with the forget data, so they have to be of one kind: {heldout.source} holds "
            f"{heldout.kind!r}, {task.forget.source} {task.forget.kind!r}"
        )
    learned = {text_of(item) for data in (task.forget, task.retain) if data is not None for item in data}
    for item in heldout:
        if text_of(item) in learned:
            raise _seen(item.id, heldout.source)


def _seen(name: str, source: str) -> LoceditError:
    return LoceditError(
        f"kga needs held-out data that the model has never seen: item {name!r} of {source} is in the forget or retain "
        "data too"
    )


# --- the gaps --------------------------------------------------------------------------------------------------------


def gap(scored: Scored, helper_says: Float[Tensor, "n vocab"], options: KgaOptions) -> Float[Tensor, " rows"]:
    """KL(helper || model) of each example in nats, reduced over its scored tokens."""
    return _reduced(scored, losses.kl(scored.logits, helper_says.to(scored.logits.device)), options)


def _reduced(scored: Scored, values: Float[Tensor, " n"], options: KgaOptions) -> Float[Tensor, " rows"]:
    found = losses.per_example(scored, values, reduction="sum" if options.reduction == "sum" else "mean")
    return found / scored.logits.shape[1] if options.reduction == "element" else found


@torch.no_grad()
def gaps(
    model: Model, examples: Sequence[Example], said: Answers, options: KgaOptions, *, turned: bool = False
) -> dict[Example, float]:
    """The gap of every example to what a helper said; `turned` = KL(model || helper)."""
    found: dict[Example, float] = {}
    for batch in batches(examples, model, 32):
        batch = batch.to(model.device)
        scored = losses.score(model, batch)
        reference = said.of(batch, scored.logits).to(scored.logits.device)
        pair = (reference, scored.logits) if turned else (scored.logits, reference)
        values = _reduced(scored, losses.kl(*pair), options)
        found |= dict(zip(batch.examples, values.tolist(), strict=True))
    return found


def _mean(values: Mapping[Example, float], examples: Sequence[Example]) -> float:
    return sum(values[example] for example in examples) / len(examples)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gaps:
    """What both helpers said, and the target gap, which training does not change."""

    forget: Answers
    "of A_f, to the forget data"
    new: Mapping[Example, float]
    "the gap of the unedited model to A_n, of every new example"

    @property
    def target(self) -> float:
        """G, over all new data."""
        return _mean(self.new, [*self.new])


# --- the loss and its end ---------------------------------------------------------------------------------------------


def loss(step: Step, options: KgaOptions, known: Gaps | None = None) -> dict[str, Tensor]:
    """Distance of the gap on forget data from that on data never seen, and KL on retain data (0.3)."""
    assert known is not None, "made by `objective`"
    scored = step.score(step.forget)
    found = gap(scored, known.forget.of(step.forget, scored.logits), options)
    new = [known.new[example] for example in step.others[NEW].examples] if options.per_batch else [known.target]
    return {"align_loss": _distance(found, found.new_tensor(new))} | _retained(step, options)


def _distance(gaps: Float[Tensor, " rows"], new: Float[Tensor, " others"]) -> Tensor:
    """|mean gap - mean of the new ones|, both over all processes; each of them has its part of that as its value."""
    sums = torch.stack([gaps.detach().sum(), gaps.new_tensor(len(gaps)), new.sum(), new.new_tensor(len(new))])
    total, count, target, others = Processes.now().sum(sums).unbind()
    target = target / others
    return (gaps.mean() - target) * torch.sign(total / count - target)


def _retained(step: Step, options: KgaOptions) -> dict[str, Tensor]:
    """{"retain_loss": weight times the mean over the inner batches}, or nothing at weight 0."""
    if step.retain is None or options.retain_weight == 0:
        return {}
    inner = [step.retain, *(batch for name, batch in step.others.items() if name != NEW)]
    values = torch.stack([_kept(step, batch, options) for batch in inner])
    return {"retain_loss": options.retain_weight * values.mean()}


def _kept(step: Step, batch: Batch, options: KgaOptions) -> Tensor:
    """The retain term of one batch without its weight."""
    if options.retain_loss == "nll":
        return retain_loss(step, batch, options)
    batch = every_token(step.model, batch) if options.retain_tokens == "all" else batch
    scored = step.score(batch)
    return _reduced(scored, losses.kl(scored.logits, step.reference(batch).logits), options).mean()


def aligned(
    model: Model, *, texts: Sequence[Example], known: Gaps, first: float, options: KgaOptions
) -> tuple[dict[str, float], bool]:
    """The columns gap and align over all forget data, and whether align is as small as asked for."""
    found = _mean(gaps(model, texts, known.forget, options), texts)
    align = abs(found - known.target)
    small = options.stop_value is not None and align <= options.stop_value
    share = options.stop_portion is not None and align <= options.stop_portion * first
    return {"gap": found, "align": align}, small or share


def objective(model: Model, task: Task, options: KgaOptions) -> Objective:
    """Train and ask the two helpers one after the other, or read what they said, then align the gaps."""
    heldout = task.require("heldout", by="kga")
    new, learned = encode(model, heldout), [] if task.retain is None else encode(model, task.retain)
    _require_unseen(model, new, [*encode(model, task.forget), *learned], source=heldout.source)
    retain = learned if options.retain_weight != 0 else []
    others = {f"retain {number}": retain for number in range(2, options.inner + 1) if retain}
    made = objective_of(
        model, task, nll, name="kga", retain=bool(retain), others=others | ({NEW: new} if options.per_batch else {})
    )
    forgets, news = _helpers(start_of(model, task, by="kga"), made.forget, new, options)
    turned = options.target == "model"
    known = Gaps(forget=forgets.answers, new=gaps(model, new, news.answers, options, turned=turned))
    first = abs(_mean(gaps(model, made.forget, known.forget, options), made.forget) - known.target)
    log.info("kga: target gap %.3g, %.3g away from it before training", known.target, first)
    rule = functools.partial(aligned, texts=made.forget, known=known, first=first, options=options)
    return dataclasses.replace(
        made,
        loss=functools.partial(loss, options=options, known=known),
        settings={"target_gap": known.target, "knows_forget": forgets.known, "knows_new": news.known},
        stop=None if options.stop_value is None and options.stop_portion is None else rule,
    )


def _require_unseen(model: Model, new: Sequence[Example], learned: Sequence[Example], *, source: str) -> None:
    """Raise LoceditError where new data have the token ids of learned ones, which may be given as ids."""
    seen = {plain_ids(model, example) for example in learned}
    for example in new:
        if plain_ids(model, example) in seen:
            raise _seen(example.id, source)


def _helpers(
    start: Model, forget: Sequence[Example], new: Sequence[Example], options: KgaOptions
) -> tuple[Helper, Helper]:
    """A_f and A_n, each asked what it learned; a warning when one knows its data much better than the other."""
    found = [
        helper(start, examples, examples, options=options, seed=options.seed, name=f"kga helper of the {role} data")
        for role, examples in (("forget", forget), ("new", new))
    ]
    known = [each.known for each in found]
    log.info("kga: the helpers give the tokens of their own data %.2f (forget) and %.2f (new)", *known)
    if abs(known[0] - known[1]) > DIFFERENT:
        log.warning(
            "kga: the helpers know their own data to %.2f (forget) and %.2f (new), so the two gaps are hardly "
            "comparable; change helper_steps or helper_learning_rate, or give as many held-out as forget data", *known
        )  # fmt: skip
    return found[0], found[1]

"""Quark: texts sorted by reward, each quantile behind a token of its own (Lu et al. 2022, arXiv:2205.13636).

Every `sample_interval` steps the model goes on from all prompts, the first time as it is, later with the token of the
best quantile before the prompt. What it writes is judged by the reward and joins a pool, which is sorted into
quantiles. A step learns a batch of the pool, each text behind its quantile's token r_k; the mean over the response of

    -log p(y_t | r_k, x, y_<t) + kl_weight * KL_t - entropy_weight * H_t

The reference of KL is the unedited model without a token. The edit holds the tokens; the best one stands before every
text, and what is changed is conditional on it. Before the first step no token stands anywhere: levels before training
are those of the unedited model. A published pool keeps text and tokenizes it again, which loses end tokens; here it
keeps token ids. Published code adds one token more than there are quantiles, which is never used.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import losses
from locedit.components import ComponentSet
from locedit.data.encode import Example, collate
from locedit.data.items import Dataset, Task
from locedit.edit.objective import MakeHeld, Objective, Step
from locedit.edit.regions import regions, whole
from locedit.edit.restrict import Deltas
from locedit.edit.token_rows import TokenRows
from locedit.errors import LoceditError
from locedit.losses import Scored
from locedit.models import Model
from locedit.rewards import Reward, check_reward, reward_of, settings_of
from locedit.sampling import prompts_of, require_prompts, sample
from locedit.unlearn.quark_options import QuarkOptions
from locedit.unlearn.quark_pool import Pool, next_batch, require_enough
from locedit.unlearn.registry import example_mean, objective_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Quark:
    """The loss, with what it writes from and is judged by."""

    options: QuarkOptions
    prompts: Sequence[Example]
    reward: Reward

    def __call__(self, step: Step) -> dict[str, Tensor]:
        state = step.state
        due = (step.number - 1) % self.options.sample_interval == 0
        if due and state.get("refreshed") != step.number:
            self._write(step)
        pool = Pool(state["pool"])
        numbers = next_batch(state, self.options.batch_size, len(pool), generator=step.generator)
        batch = collate([pool.example(number) for number in numbers], step.model).to(step.model.device)
        with _rows(step).using(state["labels"][numbers]):
            scored = step.score(batch)
        reference = step.unedited(batch) if self.options.kl_weight or self.options.adaptive else None
        if self.options.adaptive:
            step.columns |= _weights(state, self.options)  # with which the step is made
        return terms(scored, reference, state, self.options)

    def _write(self, step: Step) -> None:
        """Go on from the prompts, judge what is written, and sort the pool anew."""
        options, state, held = self.options, step.state, _rows(step)
        refresh = state.get("refreshes", 0)
        prompts = [prompt for prompt in self._drawn(step) for _ in range(options.samples_per_prompt)]
        with held.paused() if refresh == 0 else held.using(0):
            said = sample(step.model, prompts, options.sampling(), step.generator, batch_size=options.sample_batch_size)
        texts = [step.model.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
        rewards = [self.reward(text) for text in texts]
        pool = Pool(state.get("pool"))
        pool.add(prompts, said, rewards, refresh=refresh)
        if options.keep_refreshes is not None:
            pool.forget_before(refresh + 1 - options.keep_refreshes)
        state |= {"pool": pool.state, "labels": pool.labels(options.quantiles)}
        state |= {"refreshes": refresh + 1, "refreshed": step.number, "waiting": None}
        judged = [reward for reward in rewards if reward is not None]
        if judged:
            step.columns["sample_reward"] = sum(judged) / len(judged)
        step.columns["pool"] = float(len(pool))

    def _drawn(self, step: Step) -> Sequence[Example]:
        count = self.options.prompts_per_refresh
        if count is None:
            return self.prompts
        order = torch.randperm(len(self.prompts), generator=step.generator).tolist()
        return [self.prompts[at] for at in order[:count]]


def loss(step: Step, options: QuarkOptions, *, prompts: Sequence[Example], reward: Reward) -> dict[str, Tensor]:
    """Likelihood of sampled texts behind the token of their reward, near the unedited model."""
    return Quark(options=options, prompts=prompts, reward=reward)(step)


def terms(scored: Scored, reference: Scored | None, state: dict[str, Any], options: QuarkOptions) -> dict[str, Tensor]:
    """The terms of a batch in nats, weighted: response_nll, kl and minus_entropy; those of weight 0 are left out."""
    nll, weights = -losses.token_log_probs(scored), _weights(state, options)
    found = {"response_nll": _mean(scored, nll, options)}
    if reference is not None and weights["kl_weight"]:
        ours, theirs = scored.logits, reference.logits
        pair = (theirs, ours) if options.kl == "policy_ref" else (ours, theirs)
        found["kl"] = weights["kl_weight"] * _mean(scored, losses.kl(*pair), options)
    if weights["entropy_weight"]:
        found["minus_entropy"] = -weights["entropy_weight"] * _mean(scored, entropy(scored.logits), options)
    if options.adaptive and reference is not None:
        _adapt(scored, reference, nll, state, options)
    return found


def entropy(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """Entropy of the next token at each position, in nats."""
    log_p = losses.precise(logits).log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def _mean(scored: Scored, values: Float[Tensor, " n"], options: QuarkOptions) -> Tensor:
    return example_mean(scored, values) if options.average == "example" else values.mean()


def _weights(state: dict[str, Any], options: QuarkOptions) -> dict[str, float]:
    return state.get("weights") or {"kl_weight": options.kl_weight, "entropy_weight": options.entropy_weight}


def _adapt(scored: Scored, reference: Scored, nll: Tensor, state: dict[str, Any], options: QuarkOptions) -> None:
    """Move both weights towards their targets by what this batch shows."""
    with torch.no_grad():
        divergence = losses.per_example(scored, losses.kl(reference.logits, scored.logits), reduction="sum").mean()
        surprise = losses.per_example(scored, nll, reduction="sum").mean()
    share, clip = len(scored.rows) / options.horizon, options.adaptive_clip
    now = _weights(state, options)
    state["weights"] = {
        "kl_weight": adapted(now["kl_weight"], float(divergence) / options.kl_target, share=share, clip=clip, sign=1),
        "entropy_weight": adapted(
            now["entropy_weight"], float(surprise) / options.entropy_target, share=share, clip=clip, sign=-1
        ),
    }


def adapted(weight: float, ratio: float, *, share: float, clip: float, sign: Literal[-1, 1]) -> float:
    """weight * (1 + sign * clip(ratio - 1) * share), ratio being current / target (Ziegler et al. 2019).

    With sign 1 too large a value raises the weight (of a penalty), with -1 it lowers it (of a bonus).

    >>> adapted(0.05, 2.0, share=0.5, clip=0.2, sign=1) > 0.05 > adapted(0.05, 2.0, share=0.5, clip=0.2, sign=-1)
    True
    """
    return weight * (1 + sign * max(-clip, min(clip, ratio - 1)) * share)


# --- what is trained, on what ----------------------------------------------------------------------------------------


def objective(model: Model, task: Task, options: QuarkOptions) -> Objective:
    """The loss with its prompts; the levels of the forget and retain data are followed with the best token."""
    if not model.causal:
        raise LoceditError(f"quark lets the model write, which needs a causal model; {model.name} is a masked one")
    data, source = prompt_data(task)
    log.info("quark: %d prompts, %s", len(data), source)
    prompts = prompts_of(model, data, by="quark")
    made = Quark(options=options, prompts=prompts, reward=reward_of(options))
    settings = {"prompts": source, **settings_of(options)}
    return dataclasses.replace(objective_of(model, task, made, name="quark", settings=settings), forget=prompts)


def held(model: Model, objective: Objective, options: QuarkOptions) -> MakeHeld:
    """The rows of the tokens, and the weights of the set (None = all) unless the rows are trained alone."""
    del objective

    def make(within: ComponentSet | None, generator: torch.Generator) -> TokenRows:
        deltas = None
        if options.train == "rows":
            if within is not None:
                raise LoceditError("quark: train='rows' changes no weight, so there is no set to stay in; leave it out")
        else:
            places = whole(model.anatomy.parameters) if within is None else regions(within, role="train")
            deltas = Deltas(model, places, path=options.path)
        names = [f"<|reward_{number}|>" for number in range(options.quantiles)]
        return TokenRows(model, names, deltas, generator=generator)

    return make


def verify(task: Task, options: QuarkOptions) -> None:
    """Prompts, or forget items that have some; at least as many texts in the first round as there are quantiles."""
    check_reward(options)
    data, _ = prompt_data(task)
    require_prompts(data, by="quark")
    require_enough(
        min(len(data), options.prompts_per_refresh or len(data)) * options.samples_per_prompt, options.quantiles
    )


def prompt_data(task: Task) -> tuple[Dataset, str]:
    """What is gone on from, and in words where it comes from."""
    if task.prompts is not None:
        return task.prompts, "those of the task"
    return task.forget, "those of the forget items, as the task has no prompts"


def _rows(step: Step) -> TokenRows:
    assert isinstance(step.held, TokenRows), "hold='tokens' is the only one that quark has"
    return step.held

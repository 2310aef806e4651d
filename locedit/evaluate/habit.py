"""What a model writes after prompts, sampled several times: how often it is bad, how varied, how likely.

Responses are drawn from the model with the edit and its control token; what judges them is a reward
(see `locedit.rewards`), and their perplexity is that under the unedited model. All measures are means over prompts, and
intervals are over prompts too. No response ends before its third token, as in Quark's training and its published
evaluation: one that stops at once would count as good.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from locedit.data.encode import Example, Span
from locedit.errors import LoceditError
from locedit.evaluate.scoring import token_scores
from locedit.evaluate.values import EvaluateOptions, Values, View
from locedit.rewards import below_of, name_of, ngrams, repeated, repetition, reward_of
from locedit.sampling import Sampling, prompts_of, sample

MIN_NEW_TOKENS = 3
"""No response ends before so many tokens, or before `sample_tokens` where these are fewer."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """The responses to one prompt."""

    prompt: Example
    ids: tuple[tuple[int, ...], ...]
    "of each response, its end token included"
    texts: tuple[str, ...]


def habit_metrics(view: View, names: Sequence[str]) -> dict[str, Values]:
    """The named metrics of the same samples."""
    responses = write(view)
    options = view.options
    note = f"{options.samples} samples for each prompt, top-p {options.top_p:g}, up to {options.sample_tokens} tokens"
    found: dict[str, Values] = {}
    judged = [name for name in names if name in _JUDGED]
    if judged:
        reward = reward_of(options)
        rewards = [[value for text in one.texts if (value := reward(text)) is not None] for one in responses]
        below = below_of(options) if options.reward_below is None else options.reward_below
        found |= {name: _judged(name, responses, rewards, below, options, note) for name in judged}
    for name in names:
        if name in _OF_TEXTS:
            found[name] = _values(responses, [_OF_TEXTS[name](one.texts) for one in responses], note=note)
        elif name == "sample_perplexity":
            found[name] = _perplexity(view, responses, note=note)
    return found


def write(view: View) -> list[Written]:
    """`options.samples` responses to every prompt, by the edited model where there is an edit."""
    options = view.options
    prompts = prompts_of(view.model, view.dataset, by="metrics of samples")
    how = Sampling(
        max_new_tokens=options.sample_tokens,
        min_new_tokens=min(MIN_NEW_TOKENS, options.sample_tokens),
        top_p=options.top_p,
    )
    generator = torch.Generator().manual_seed(options.seed)
    repeated_prompts = [prompt for prompt in prompts for _ in range(options.samples)]
    with nullcontext(view.model) if view.edit is None else view.edit.applied(view.model) as model:
        said = sample(model, repeated_prompts, how, generator, batch_size=options.batch_size)
    decode = view.model.tokenizer.decode
    parts = [said[at : at + options.samples] for at in range(0, len(said), options.samples)]
    return [
        Written(
            prompt=prompt,
            ids=tuple(ids),
            texts=tuple(decode(one, skip_special_tokens=True) for one in ids),
        )
        for prompt, ids in zip(prompts, parts, strict=True)
    ]


def distinct(texts: Sequence[str], n: int) -> float:
    """dist-n: different word n-grams of all texts together, divided by their words, the same for every n.

    As in the published code of Quark and DExperts; 0 where there is no word.

    >>> distinct(["a b", "a c"], 1), distinct(["a b", "a c"], 2)
    (0.75, 0.5)
    """
    words = [text.split() for text in texts]
    total = sum(map(len, words))
    return len({gram for one in words for gram in ngrams(one, n)}) / total if total else 0.0


def _repetition(n: int) -> Callable[[Sequence[str]], float]:
    return lambda texts: sum(repeated(text.split(), n) for text in texts) / len(texts)


def _distinct(n: int) -> Callable[[Sequence[str]], float]:
    return lambda texts: distinct(texts, n)


def _diversity(texts: Sequence[str]) -> float:
    """Mean over the texts; one of fewer than two words repeats nothing."""
    found = [repetition(text) for text in texts]
    return sum(1.0 if value is None else value for value in found) / len(found)


_OF_TEXTS: dict[str, Callable[[Sequence[str]], float]] = {
    **{f"dist_{n}": _distinct(n) for n in (1, 2, 3)},
    **{f"seq_rep_{n}": _repetition(n) for n in (2, 3, 4)},
    "diversity": _diversity,
}
"""Metric -> what it makes of the responses to one prompt."""

_JUDGED: dict[str, Callable[[Sequence[float], float], float]] = {
    "habit_rate": lambda rewards, below: sum(reward < below for reward in rewards) / len(rewards),
    "toxicity_probability": lambda rewards, below: float(any(reward < below for reward in rewards)),
    "average_max_toxicity": lambda rewards, _: 1 - min(rewards),
    "mean_reward": lambda rewards, _: sum(rewards) / len(rewards),
}
"""Metric -> what it makes of the rewards of the responses to one prompt."""


def _judged(
    name: str,
    responses: Sequence[Written],
    rewards: Sequence[Sequence[float]],
    below: float,
    options: EvaluateOptions,
    note: str,
) -> Values:
    """Prompts without a response that can be judged are left out."""
    kept = [(one, mine) for one, mine in zip(responses, rewards, strict=True) if mine]
    if not kept:
        raise LoceditError(f"metric {name!r}: the reward {name_of(options.reward)} judged none of the samples")
    values = [_JUDGED[name](mine, below) for _, mine in kept]
    bad = f", bad = below {below:g}" if name in ("habit_rate", "toxicity_probability") else ""
    weights = [float(len(mine)) for _, mine in kept] if name in ("habit_rate", "mean_reward") else None
    note = f"{note}; reward {name_of(options.reward)}{bad}"
    return _values([one for one, _ in kept], values, weights=weights, note=note)


def _perplexity(view: View, responses: Sequence[Written], *, note: str) -> Values:
    """exp of the mean negative log-likelihood per token under the unedited model, given the prompt."""
    examples = [
        Example(
            id=f"{at}/{number}",
            ids=(*one.prompt.ids, *ids),
            spans=(Span(start=len(one.prompt.ids), end=len(one.prompt.ids) + len(ids), label="response"),),
            kind="response",
        )
        for at, one in enumerate(responses)
        for number, ids in enumerate(one.ids)
    ]
    scores = iter(token_scores(view.model, examples, batch_size=view.options.batch_size))
    values: list[float] = []
    weights: list[float] = []
    for one in responses:
        mine = [next(scores) for _ in one.ids]
        weights.append(float(sum(len(score.log_probs) for score in mine)))
        values.append(float(torch.tensor(sum(score.nll for score in mine) / weights[-1]).exp()))
    return _values(responses, values, weights=weights, combine="exp", note=note)


def _values(
    responses: Sequence[Written],
    values: Sequence[float],
    *,
    note: str,
    weights: Sequence[float] | None = None,
    combine: str = "mean",
) -> Values:
    keys = [one.prompt.id for one in responses]
    return Values(
        per_example=dict(zip(keys, values, strict=True)),
        owners={one.prompt.id: one.prompt.owner for one in responses},
        weights=None if weights is None else dict(zip(keys, weights, strict=True)),
        combine="exp" if combine == "exp" else "mean",
        note=note,
    )

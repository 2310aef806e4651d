"""Per-example values of a metric, and the measures (with groups and intervals) that are made of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from locedit.data.items import Dataset, Task
from locedit.edit import Edit
from locedit.evaluate.intervals import Estimate, estimate_mean
from locedit.models import Model
from locedit.results import Direction, Measure, Stage
from locedit.rewards import RewardOptions


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RewardOptions):
    """What evaluate() lets you choose."""

    retain_model: str | None = None
    "a model trained without the forget data, for metrics that compare with one: a folder or a hub id"
    metrics: tuple[str, ...] | None = None
    "names in METRICS; None = all that the data allow"
    batch_size: int = 64
    "rows in a forward pass"
    draws: int = 2000
    "bootstrap samples behind an interval"
    seed: int = 0
    exposure_samples: int = 200
    "candidates drawn where the space is too large to rank exactly"
    exposure_limit: int = 1000
    "candidates up to which a space is enumerated, and rows up to which better ones are searched"
    extraction_n: int = 10
    "tokens of the n-grams of extraction_likelihood"
    extraction_length: int = 200
    "first tokens of a text that extraction_likelihood and text_memorization_accuracy look at"
    s_el_n: int = 3
    "tokens of the n-grams of s_el; the span's own length where that is shorter"
    s_el_prefix: Literal["span_start", "all"] = "span_start"
    "where s_el lets the model go on from: the start of a span, or also every place in it with n tokens left"
    samples: int = 25
    "responses that are drawn for each prompt"
    sample_tokens: int = 20
    "tokens of a response, at most"
    top_p: float = 0.9
    "responses are drawn from the likeliest tokens of this probability together"
    reward_below: float | None = None
    "a response counts as bad below this reward; None = 1 for bad_words, so that one word is enough, 0.5 for others"
    label_template: str = "{text}\nlabel:"
    "how a labelled text is asked about, by metrics of classification; {text} stands for the text"
    label_words: tuple[str, ...] | None = None
    "label=word: what the model says for a label; the label itself where it is not named"
    positive: str | None = None
    "the label whose rates are compared between groups; needed where there are more than two"
    membership_text: Literal["answer", "all"] = "answer"
    "what of a fact is scored for membership: the answer given its prompt, or both; of texts it is always all"
    min_k_share: float = 0.2
    "share of a text's tokens, the least likely ones, that min_k, min_k_plus_plus and privleak look at"
    gradient_norm: Literal["global", "tensor_mean"] = "global"
    "of mia_gradient_norm: over all parameters together, or the mean over parameter tensors as in OpenUnlearning"
    recall_shots: int = 5
    "held-out items that mia_recall puts before a text"
    membership_reference: str | None = None
    "the model beside which mia_reference measures: a folder or a hub id; None = the task's start"
    choice_orders: int | None = None
    "orders in which a multiple choice shows its options; None = as many as options, each once behind each letter"
    choice_template: str = "{prompt}{options}\nAnswer:"
    "a multiple choice by letters; {prompt} or {subject} and {options} stand for those of the fact"
    choice_option: str = "\n{letter}. {option}"
    "one option of a multiple choice by letters, with what stands before it"
    cloze_length: Literal["tokens", "characters", "none"] = "tokens"
    "what the log-probability of an option is divided by in cloze_accuracy and cloze_probability"
    rouge_tokens: int | None = None
    "tokens that are written for ROUGE, at most; None = as many as the answer has (TOFU: 200)"
    utility_sets: tuple[str, ...] = ()
    "further files of facts with wrong answers for model_utility, such as TOFU's real authors and world facts"
    fluency_texts: int = 64
    "texts whose beginnings are continued for ngram_entropy, repetition and empty_share, at most"
    fluency_tokens: int = 32
    "tokens that are written after each of them, at most"


@dataclass(frozen=True, kw_only=True)
class View:
    """What a family of metrics may look at."""

    model: Model
    "the model to measure: edited when the stage is after"
    dataset: Dataset
    task: Task
    options: EvaluateOptions
    edit: Edit | None = None
    "only for metrics that compare: `model` is then the unedited one"
    retain_model: Model | None = None
    "the model trained without the forget data, where the option names one"


@dataclass(frozen=True, kw_only=True)
class Values:
    """One metric on every example of one data set."""

    per_example: dict[str, float]
    "id -> value"
    owners: dict[str, str | None]
    "id -> owner; examples of one owner are resampled together"
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    "id -> the groups that it is in"
    weights: dict[str, float] | None = None
    "id -> weight in the mean, e.g. tokens; None = all alike"
    combine: Literal["mean", "exp"] = "mean"
    "exp: values are kept as exp(x), and the measure is exp of the weighted mean of x"
    note: str = ""
    notes: dict[str, str] = field(default_factory=dict[str, str])
    "id -> how its value was obtained; counted in the measure's note"
    estimate: Callable[[Sequence[str]], Estimate] | None = None
    "the number and interval of the examples with these ids, for a metric that is no mean over them; None = the mean"

    def group_names(self) -> list[str]:
        """All groups, in order of first appearance; none where everything is in one and the same."""
        names = list(dict.fromkeys(name for groups in self.groups.values() for name in groups))
        return names if len(names) > 1 else []


@dataclass(frozen=True, kw_only=True)
class Label:
    """The fields of a Measure that come with the metric and the data set."""

    name: str
    dataset: str
    stage: Stage
    direction: Direction
    unit: str
    range: tuple[float | None, float | None]


def measures(values: Values, label: Label, options: EvaluateOptions) -> list[Measure]:
    """The measure over all examples, then one for each group."""
    whole = _measure(values, list(values.per_example), label, options, group=None)
    parts = [
        _measure(
            values,
            [key for key in values.per_example if name in values.groups.get(key, ())],
            label,
            options,
            group=name,
        )
        for name in values.group_names()
    ]
    return [whole, *parts]


def _measure(values: Values, ids: list[str], label: Label, options: EvaluateOptions, *, group: str | None) -> Measure:
    estimate = values.estimate(ids) if values.estimate else _mean(values, ids, label, options)
    return Measure(
        name=label.name,
        dataset=label.dataset,
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        n=len(ids),
        group=group,
        stage=label.stage,
        direction=label.direction,
        unit=label.unit,
        range=label.range,
        note=_note(values, ids),
        per_example={key: values.per_example[key] for key in ids} if group is None else {},
    )


def _mean(values: Values, ids: list[str], label: Label, options: EvaluateOptions) -> Estimate:
    """The weighted mean over the examples, with its bootstrap interval."""
    numbers = torch.tensor([values.per_example[key] for key in ids], dtype=torch.float64)
    given = values.weights
    weights = None if given is None else torch.tensor([given[key] for key in ids], dtype=torch.float64)
    inside, outside = _TRANSFORMS[values.combine]
    return estimate_mean(
        inside(numbers),
        owners=[values.owners[key] for key in ids],
        weights=weights,
        transform=outside,
        bounds=label.range if values.combine == "mean" else (None, None),
        draws=options.draws,
        seed=options.seed,
    )


_Transform = Callable[[Tensor], Tensor]
_TRANSFORMS: dict[str, tuple[_Transform, _Transform]] = {
    "mean": (lambda x: x, lambda x: x),
    "exp": (torch.log, torch.exp),
}


def _note(values: Values, ids: list[str]) -> str:
    counts: dict[str, int] = {}
    for key in ids:
        if key in values.notes:
            counts[values.notes[key]] = counts.get(values.notes[key], 0) + 1
    counted = "; ".join(how if len(counts) == 1 else f"{count} {how}" for how, count in counts.items())
    return "; ".join(text for text in (values.note, counted) if text)


def direction_on(dataset: str, *, knowledge: Literal[-1, 1], keep: bool, wanted: Direction | None = None) -> Direction:
    """Which way is good: knowledge of the forget set should fall, of the rest stay; of held-out data neither.

    `wanted` is good on every other data set, whatever it says of knowledge.
    """
    if dataset == "heldout" and not keep:
        return "neutral"
    if wanted is not None:
        return wanted
    sign = knowledge if keep or dataset != "forget" else -knowledge
    return "higher" if sign > 0 else "lower"

"""Model utility (TOFU, Maini et al. 2024, arXiv:2401.06121): one number for what a model still can.

    harmonic mean over sets, and within each over probability, ROUGE-L recall and truth ratio (mean of max(0, 1 - r))

of the retain set and further sets of facts, published real authors and world facts. The probability is P(answer),
normalised by length; in the further sets P(answer) / (P(answer) + sum of P(wrong)). One number of 0 makes it 0.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.data.encode import encode
from locedit.data.items import Dataset, Fact
from locedit.data.readers import read_facts
from locedit.errors import LoceditError
from locedit.evaluate.intervals import Estimate, around, owner_index, resampled_means
from locedit.evaluate.likelihoods import left_out, likelihoods, with_wrong
from locedit.evaluate.truth_ratio import log_truth_ratio, true_is_likelier
from locedit.evaluate.values import EvaluateOptions, Values, View
from locedit.evaluate.verbatim import scores
from locedit.evaluate.wrong_answers import normalized_probability

PARTS = ("probability", "ROUGE-L recall", "truth ratio")


def utility_sets(options: EvaluateOptions) -> dict[str, Dataset]:
    """The further sets by file name; raises LoceditError where one cannot be read or has no wrong answers."""
    found: dict[str, Dataset] = {}
    for file in options.utility_sets:
        try:
            data = read_facts(file)
            with_wrong(data, by="model_utility")
        except LoceditError as error:
            raise LoceditError(f"evaluate: utility_sets: {error}") from None
        if Path(file).name in found:
            raise LoceditError(
                f"evaluate: utility_sets={options.utility_sets!r}: two files are called {Path(file).name!r}"
            )
        found[Path(file).name] = data
    return found


def model_utility_metric(view: View, names: Sequence[str]) -> dict[str, Values]:
    """The harmonic mean; its per-example values are those of each item's own three numbers."""
    assert tuple(names) == ("model_utility",)
    sets = {"retain": view.dataset, **utility_sets(view.options)}
    facts = {name: with_wrong(data, by="model_utility") for name, data in sets.items()}
    tables = {name: utility_table(view, facts[name], against_wrong=name != "retain") for name in sets}
    rows = [(_id(name, fact), fact, row) for name in sets for fact, row in zip(facts[name], tables[name], strict=True)]
    owners = {name: [fact.owner for fact in facts[name]] for name in sets}
    return {
        "model_utility": Values(
            per_example={key: float(harmonic(row)) for key, _, row in rows},
            owners={key: fact.owner for key, fact, _ in rows},
            note="; ".join([*_said(tables), *(text for name in sets if (text := left_out(sets[name], facts[name])))]),
            estimate=lambda _: utility(tables, owners, options=view.options),
        )
    }


def _id(name: str, fact: Fact) -> str:
    return fact.id if name == "retain" else f"{name}/{fact.id}"


def utility_table(view: View, facts: Sequence[Fact], *, against_wrong: bool) -> Float[Tensor, "fact 3"]:
    """Probability, ROUGE-L recall and max(0, 1 - r) of every fact, each in [0, 1]."""
    model, options, chat = view.model, view.options, view.dataset.chat
    found = likelihoods(model, facts, chat=chat, batch_size=options.batch_size)
    examples = encode(model, facts, chat=chat)
    said = scores(model, examples, tokens=options.rouge_tokens, batch_size=options.batch_size)
    for fact, one in zip(facts, said, strict=True):
        if "rouge_l_recall" not in one:
            raise LoceditError(f"item {fact.id!r}: its answer has no word of a-z or 0-9, which ROUGE compares")
    rows = [
        [
            normalized_probability(own) if against_wrong else math.exp(own.answer.per_token),
            one["rouge_l_recall"],
            true_is_likelier(log_truth_ratio(own)),
        ]
        for own, one in zip(found, said, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def harmonic(values: Float[Tensor, "*draw number"]) -> Float[Tensor, "*draw"]:
    """Harmonic mean over the last axis, 0 where a number is 0.

    >>> harmonic(torch.tensor([[1.0, 0.5], [1.0, 0.0]]))
    tensor([0.6667, 0.0000])
    """
    return values.shape[-1] / (1 / values).sum(-1)


def utility(
    tables: Mapping[str, Float[Tensor, "fact 3"]],
    owners: Mapping[str, Sequence[str | None]],
    *,
    options: EvaluateOptions,
) -> Estimate:
    """The harmonic mean of the means of all sets; the interval draws owners within each set."""
    value = float(harmonic(torch.cat([table.mean(0) for table in tables.values()])))
    if any(max(owner_index(owners[name])) == 0 for name in tables):
        return Estimate(value, math.nan, math.nan)
    drawn = [
        resampled_means(table, owners=owners[name], draws=options.draws, seed=options.seed + number)
        for number, (name, table) in enumerate(tables.items())
    ]
    return around(value, harmonic(torch.cat(drawn, dim=1)))


def _said(tables: Mapping[str, Float[Tensor, "fact 3"]]) -> list[str]:
    """The numbers behind the mean."""
    return [
        f"{name}: " + ", ".join(f"{part} {float(mean):.3g}" for part, mean in zip(PARTS, table.mean(0), strict=True))
        for name, table in tables.items()
    ]

"""What a model knows by letters, and how unevenly it picks them.

The probability of a letter is normalised over the letters of its question. With q(letter) the share of all questions in
which a letter is picked and n the number of letters,

    letter_bias = 1/2 sum over letters of |q(letter) - 1/n|

is the total variation distance from picking all letters equally often: 0 = no letter is preferred, 1 - 1/n = always the
same one. The right answers stand equally often behind each letter, so that knowledge alone gives 0. Where facts differ
in their number of options, those with equally many are compared among themselves, and weigh by their number.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.data.items import Fact, Task
from locedit.evaluate.choices import Question, letter_logits, questions
from locedit.evaluate.intervals import Estimate, around, owner_index, resampled_means
from locedit.evaluate.likelihoods import left_out, with_wrong
from locedit.evaluate.values import EvaluateOptions, Values, View

LETTERED = "multiple_choice"
"format of facts whose answers are letters already"


def letter_metrics(view: View, names: Sequence[str]) -> dict[str, Values]:
    """choice_accuracy, choice_probability and letter_bias of every fact with wrong answers, mean over its orders."""
    every = with_wrong(view.dataset, by=" and ".join(names))
    facts = [fact for fact in every if fact.format != LETTERED]
    asked = questions(facts, view.options)
    flat = [question for each in asked for question in each]
    logits = letter_logits(view.model, flat, chat=view.dataset.chat, batch_size=view.options.batch_size)
    rows = iter(zip(flat, logits, strict=True))
    found = {fact.id: [next(rows) for _ in each] for fact, each in zip(facts, asked, strict=True)}
    lettered = len(every) - len(facts)
    left = [left_out(view.dataset, every), f"{lettered} facts are multiple choice already" if lettered else ""]
    return {name: _values(view, name, facts, found, left=[text for text in left if text]) for name in names}


def lacks_questions(task: Task, options: EvaluateOptions) -> str:
    """Facts that can be asked by letters, where a set has none; raises LoceditError for a fact with faulty options."""
    for data in (task.forget, task.retain, task.heldout):
        facts = [fact for fact in data or () if isinstance(fact, Fact) and fact.wrong]
        asked = [fact for fact in facts if fact.format != LETTERED]
        if facts and not asked:
            assert data is not None
            return f"facts whose answers are no letters; {data.source} has only multiple choice"
        questions(asked, options)
    return ""


Answered = Mapping[str, Sequence[tuple[Question, Tensor]]]
"""id of the fact -> its questions, each with the logits of its letters."""


def _values(view: View, name: str, facts: Sequence[Fact], found: Answered, *, left: Sequence[str]) -> Values:
    owners = {fact.id: fact.owner for fact in facts}
    groups = {fact.id: (fact.format,) if fact.format else () for fact in facts}
    if name != "letter_bias":
        value = _accuracy if name == "choice_accuracy" else _probability
        per_example = {key: sum(value(*one) for one in each) / len(each) for key, each in found.items()}
        return Values(per_example=per_example, owners=owners, groups=groups, note="; ".join(left))
    picked = {key: torch.stack([picks(logits) for _, logits in each]).mean(0) for key, each in found.items()}
    return Values(
        per_example={key: float(unevenness(shares, [len(shares)])) for key, shares in picked.items()},
        owners=owners,
        groups=groups,
        note="; ".join([_chance(found), *left]),
        estimate=lambda ids: letter_bias(
            [picked[key] for key in ids], owners=[owners[key] for key in ids], options=view.options
        ),
    )


def picks(logits: Float[Tensor, " letter"]) -> Float[Tensor, " letter"]:
    """1 at the letter with the largest logit; n letters that share it have 1 / n each."""
    best = (logits == logits.max()).double()
    return best / best.sum()


def _accuracy(question: Question, logits: Tensor) -> float:
    return float(picks(logits)[question.right])


def _probability(question: Question, logits: Tensor) -> float:
    return float(logits.softmax(0)[question.right])


def letter_bias(picked: Sequence[Tensor], *, owners: Sequence[str | None], options: EvaluateOptions) -> Estimate:
    """The bias over facts, of each the share of its questions in which every `[letter]` is picked; owners resampled."""
    sizes = sorted({len(shares) for shares in picked})
    blocks = [[shares if len(shares) == size else torch.zeros(size).double() for size in sizes] for shares in picked]
    table = torch.stack([torch.cat(each) for each in blocks])  # [fact, letter of each size]
    value = float(unevenness(table.mean(0), sizes))
    if max(owner_index(owners)) == 0:
        return Estimate(value, math.nan, math.nan)
    drawn = resampled_means(table, owners=owners, draws=options.draws, seed=options.seed)
    return around(value, unevenness(drawn, sizes))


def unevenness(shares: Float[Tensor, "*draw letter"], sizes: Sequence[int]) -> Float[Tensor, "*draw"]:
    """Total variation distance from equal shares within each block of letters; all blocks together have mass 1.

    >>> unevenness(torch.tensor([0.75, 0.25, 0.0, 0.0]), [4])
    tensor(0.5000)
    """
    blocks = shares.split(list(sizes), dim=-1)
    return torch.stack([(block - block.mean(-1, keepdim=True)).abs().sum(-1) for block in blocks]).sum(0) / 2


def _chance(found: Answered) -> str:
    """What picking at random would give on average: its law of large numbers is slow."""
    counts: dict[int, int] = {}
    for each in found.values():
        for question, _ in each:
            counts[len(question.letters)] = counts.get(len(question.letters), 0) + 1
    total = sum(counts.values())
    # the mean absolute deviation of a binomial share is near sqrt(2 p (1 - p) / (pi N))
    expected = sum(
        count / total * size / 2 * math.sqrt(2 * (size - 1) / (math.pi * size**2 * count))
        for size, count in counts.items()
    )
    return f"random letters in all {total} questions would give about {min(expected, 1.0):.2f}"

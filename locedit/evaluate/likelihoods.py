"""How likely a fact's answer, its paraphrase and its wrong answers are after the same prompt, teacher-forced.

With l(a) the sum of the log-probabilities of the tokens of a and |a| their number, P(a) = exp(l(a) / |a|) is the
likelihood normalised by length (Maini et al. 2024, arXiv:2401.06121). Published code also counts an end token after
each answer; answers here have none.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from locedit.data.encode import encode
from locedit.data.items import Dataset, Fact
from locedit.errors import LoceditError
from locedit.evaluate.scoring import token_scores
from locedit.losses import ScoringModel


class Likelihood(NamedTuple):
    """One candidate."""

    total: float
    "sum of the log-probabilities of its tokens, nats"
    tokens: int
    characters: int
    "without white space around it"

    @property
    def per_token(self) -> float:
        """log P, nats."""
        return self.total / self.tokens


@dataclass(frozen=True, kw_only=True)
class Likelihoods:
    """The candidates of one fact."""

    answer: Likelihood
    paraphrase: Likelihood | None
    "of the first paraphrased answer, where there is one"
    wrong: tuple[Likelihood, ...]


def with_wrong(data: Dataset, *, by: str) -> list[Fact]:
    """The facts that have wrong answers; raises LoceditError where none has."""
    facts = [fact for fact in data.of(Fact, by=by) if fact.wrong]
    if not facts:
        raise LoceditError(f"{data.source}: {by} needs facts with 'wrong' answers; none has any")
    return facts


def left_out(data: Dataset, facts: Sequence[Fact]) -> str:
    """How many facts have no wrong answers, in words; empty where all have."""
    count = len(data) - len(facts)
    return f"{count} facts have no wrong answers and are left out" if count else ""


def likelihoods(
    model: ScoringModel, facts: Sequence[Fact], *, chat: str = "off", batch_size: int = 64
) -> list[Likelihoods]:
    """The likelihoods of the candidates of every fact, in the order given."""
    candidates = [(fact.answer, *fact.answer_paraphrases[:1], *fact.wrong) for fact in facts]
    asked = [
        dataclasses.replace(fact, answer=answer, id=f"{fact.id}/{number}")
        for fact, answers in zip(facts, candidates, strict=True)
        for number, answer in enumerate(answers)
    ]
    scores = token_scores(model, encode(model, asked, chat=chat), batch_size=batch_size)
    rows = iter(
        Likelihood(-own.nll, len(own.log_probs), len(one.answer.strip()))
        for one, own in zip(asked, scores, strict=True)
    )
    found: list[Likelihoods] = []
    for fact in facts:
        answer = next(rows)
        paraphrase = next(rows) if fact.answer_paraphrases else None
        found.append(Likelihoods(answer=answer, paraphrase=paraphrase, wrong=tuple(next(rows) for _ in fact.wrong)))
    return found

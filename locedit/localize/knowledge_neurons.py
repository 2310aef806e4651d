"""Knowledge neurons: neurons that a fact needs however it is asked.

What is scored: every neuron, by integrated gradients of the answer's probability as in `depn`, for the prompt and each
of the paraphrases of a fact; the scores are averaged over its prompts, then over the facts (Dai et al. 2022,
arXiv:2104.08696, section 3). The paper has answers of one token; longer ones are summed or averaged over their tokens
(`span`).

Refinement (section 3.3 and the published code): a prompt proposes the neurons with at least `ratio` of its largest
score; a fact keeps those that at least `share` of its prompts, and at least `at_least` of them (all, where there are
fewer), propose. With `adapt`, the ratio is moved in steps of 0.05, at most six times, until a fact keeps between 2 and
5 neurons on average. The facts that keep a neuron are its votes, so `scores.select(shared=...)` is the published choice
per relation.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from locedit.data.encode import Example, encode
from locedit.data.items import Fact, Task
from locedit.errors import LoceditError
from locedit.localize.aggregate import KEPT, Aggregate, Evidence
from locedit.localize.integration.integrated_gradients import GradientOptions, attributions
from locedit.models import Model
from locedit.scores import Scores, Table

WANTED = (2.0, 5.0)
"neurons a fact should keep on average"
MOVE, MOVES = 0.05, 6


@dataclass(frozen=True, kw_only=True)
class KnowledgeNeuronsOptions(GradientOptions):
    """How to integrate, and how prompts are joined."""

    ratio: float = 0.2
    "a prompt proposes neurons with at least this share of its largest score; at least 0.1, which is what is kept"
    share: float = 0.7
    "a fact keeps what at least this share of its prompts propose"
    at_least: int = 3
    "and at least this many of them; all, where a fact has fewer"
    adapt: bool = True
    "move the ratio until a fact keeps between 2 and 5 neurons on average"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not KEPT <= self.ratio <= 1:
            raise LoceditError(f"ratio={self.ratio!r} must be between {KEPT} and 1")
        if not 0 < self.share <= 1:
            raise LoceditError(f"share={self.share!r} must be above 0 and at most 1")
        if self.at_least < 1:
            raise LoceditError(f"at_least={self.at_least!r} must be at least 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposals:
    """What one prompt may propose: the neurons with at least 0.1 of its largest score."""

    neurons: Tensor
    "flat index over layers and neurons `[entry]`, ascending"
    share: Tensor
    "of the prompt's largest score `[entry]`"

    @classmethod
    def of(cls, scores: Tensor) -> "Proposals":
        flat = scores.flatten()
        largest = flat.max()
        neurons = (flat >= KEPT * largest).nonzero().flatten() if largest > 0 else torch.empty(0, dtype=torch.long)
        return cls(neurons=neurons, share=flat[neurons] / largest)


def knowledge_neurons(model: Model, task: Task, options: KnowledgeNeuronsOptions) -> Scores:
    """Mean scores of every neuron over prompts and facts; its votes are the facts that keep it."""
    facts = task.forget.of(Fact, by="knowledge_neurons")
    examples, owner = _prompts(model, task, facts)
    total = Aggregate(list(model.sites("neuron").values()), ratio=None)
    evidence = Evidence(examples, objective=options.objective)
    sums: dict[int, Tensor] = {}
    proposals: dict[int, list[Proposals]] = {}
    count = [owner.count(number) for number in range(len(facts))]
    for found in attributions(model, examples, options, what="knowledge_neurons"):
        fact = owner[found.index]
        sums[fact] = sums[fact] + found.scores if fact in sums else found.scores
        proposals.setdefault(fact, []).append(Proposals.of(found.scores))
        evidence.update(found)
        if len(proposals[fact]) == count[fact]:
            total.update(fact, sums.pop(fact) / count[fact], id=facts[fact].id)
    ratio, kept = refine([proposals[number] for number in range(len(facts))], options)
    table: Table = {"id": [fact.id for fact in facts], "prompts": count, "kept": [len(k) for k in kept]}
    table["ratio"] = [ratio] * len(facts)
    scores = total.finish(model, ids=[fact.id for fact in facts], evidence=evidence.tables() | {"refinement": table})
    return dataclasses.replace(scores, votes=_votes(scores, kept))


def _prompts(model: Model, task: Task, facts: Sequence[Fact]) -> tuple[list[Example], list[int]]:
    """Every fact in its own prompt and its paraphrases, and which fact each example is of."""
    asked: list[Fact] = []
    owner: list[int] = []
    for number, fact in enumerate(facts):
        others = [dataclasses.replace(fact, id=f"{fact.id}/{i}", prompt=p) for i, p in enumerate(fact.paraphrases)]
        asked += [fact, *others]
        owner += [number] * (1 + len(others))
    return encode(model, task.forget.replace(asked)), owner


def refine(proposals: Sequence[Sequence[Proposals]], options: KnowledgeNeuronsOptions) -> tuple[float, list[Tensor]]:
    """The ratio that was used, and the neurons that each fact keeps, as flat indices."""
    ratio = options.ratio
    kept = [keep(prompts, options, ratio=ratio) for prompts in proposals]
    for _ in range(MOVES if options.adapt else 0):
        mean = sum(map(len, kept)) / len(kept)
        move = MOVE if mean > WANTED[1] else -MOVE if mean < WANTED[0] else 0.0
        if not move or not KEPT <= round(ratio + move, 6) <= 1:
            break
        ratio = round(ratio + move, 6)
        kept = [keep(prompts, options, ratio=ratio) for prompts in proposals]
    return ratio, kept


def keep(prompts: Sequence[Proposals], options: KnowledgeNeuronsOptions, *, ratio: float) -> Tensor:
    """The neurons that enough prompts of a fact propose, as flat indices."""
    proposed = torch.cat([prompt.neurons[prompt.share >= ratio] for prompt in prompts])
    neurons, times = proposed.unique(return_counts=True)
    needed = max(math.ceil(options.share * len(prompts) - 1e-9), min(options.at_least, len(prompts)))
    return neurons[times >= needed]


def _votes(scores: Scores, kept: Sequence[Tensor]) -> dict[str, Tensor]:
    counts = torch.zeros(len(scores), dtype=torch.long)
    for neurons in kept:
        counts[neurons] += 1
    sizes = [site.count for site in scores.sites.values()]
    return dict(zip(scores.sites, counts.split(sizes), strict=True))

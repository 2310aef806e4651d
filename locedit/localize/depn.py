"""DEPN: which neurons hold a private text, or a fact.

What is scored: every neuron (input of the MLP's output projection), by integrated gradients of the probability of each
scored token, against the baseline of a layer whose neurons are all 0, at the position that predicts the token; summed
over the tokens of the private stretch or answer, averaged over the texts (Wu et al. 2023, DEPN, arXiv:2310.20138, eq.
3-5). For a causal model the tokens before are given as they are (teacher forcing); for a masked model the token alone
is masked and the rest of the stretch stays visible, as in the published code.

The paper's aggregator takes the neurons that pass `ratio` times a text's largest score, and ranks them by the number of
texts: these are the votes, and `scores.select(shared=...)` is that ranking. Ties, which the published code breaks by
the order of the texts, are broken by the mean score; with `normalise=True` every text weighs the same in it.

Differences to the published code, which cannot run as shipped: it uses the left rule with 20 points
(`quadrature="left", steps=20`), the paper the right one ("right"); it pads every text to 128 tokens; and its ratio
below 0.1 has no effect. The sum over tokens is the paper's equation 5; it is the gradient of the sum of the
probabilities, not of their product. `objective="log_probability"` has the exact factorisation.
"""

from dataclasses import dataclass

from locedit.data.encode import encode
from locedit.data.items import Task
from locedit.errors import LoceditError
from locedit.localize.aggregate import Aggregate, Evidence
from locedit.localize.integration.integrated_gradients import GradientOptions, attributions
from locedit.models import Model
from locedit.scores import Scores


@dataclass(frozen=True, kw_only=True)
class DepnOptions(GradientOptions):
    """How to integrate, and what counts as a vote."""

    ratio: float = 0.1
    "a neuron gets a text's vote with at least this share of the text's largest score (r1 in the paper)"
    normalise: bool = False
    "divide each text's scores by its largest before averaging, so that every text weighs the same"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise LoceditError(f"ratio={self.ratio!r} must be above 0 and at most 1")


def depn(model: Model, task: Task, options: DepnOptions) -> Scores:
    """Scores of every neuron, averaged over the texts or facts to forget; votes per text; completeness as evidence."""
    examples = encode(model, task.forget)
    total = Aggregate(list(model.sites("neuron").values()), ratio=options.ratio, normalise=options.normalise)
    evidence = Evidence(examples, objective=options.objective)
    for found in attributions(model, examples, options, what="depn"):
        total.update(found.index, found.scores, id=examples[found.index].id)
        evidence.update(found)
    return total.finish(model, ids=[example.id for example in examples], evidence=evidence.tables())

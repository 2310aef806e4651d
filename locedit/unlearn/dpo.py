"""Direct preference optimisation against the true answer (Rafailov et al. 2023, arXiv:2305.18290).

What is preferred to it are refusals (IdkDPO, Maini et al. 2024, arXiv:2401.06121) or other answers (AltPO, Mekala et
al. 2024, arXiv:2409.13474). The factor 2 / beta is OpenUnlearning's; it makes the loss comparable with NPO's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from locedit import losses
from locedit.data.encode import Batch
from locedit.data.items import Fact, Task
from locedit.edit.objective import Matched, Step
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.unlearn import answers
from locedit.unlearn.registry import ForgetOptions, above_zero, one_of, retain_terms

Preferred = Literal["refusals", "alternatives", "new_answer"]
PREFERRED: tuple[Preferred, ...] = ("refusals", "alternatives", "new_answer")


@dataclass(frozen=True, kw_only=True)
class DpoOptions(ForgetOptions):
    """DPO's own options beside those of training."""

    beta: float = 0.1
    "inverse temperature"
    preferred: Preferred = "refusals"
    """what is preferred to the true answer, drawn anew for every batch: one of the task's refusals; one of its
    alternatives with the fact's id or prompt; or the fact's new_answer"""

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "beta")
        one_of(self, "preferred", PREFERRED)


def dpo(
    preferred: Float[Tensor, " rows"],
    rejected: Float[Tensor, " rows"],
    reference_preferred: Float[Tensor, " rows"],
    reference_rejected: Float[Tensor, " rows"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, ""]:
    """-(2 / beta) mean log sigmoid(beta (preferred's log ratio - rejected's)), sequence log-probabilities in nats.

    A log ratio is log p - log p_reference of a whole answer. (2 / beta) ln 2 at the start.
    """
    ratio = (preferred - reference_preferred) - (rejected - reference_rejected)
    return -(2 / beta) * logsigmoid(beta * ratio).mean()


def loss(step: Step, options: DpoOptions) -> dict[str, Tensor]:
    """DPO on whole answers (sums over tokens) with the unedited model as reference, and retain."""
    preferred, rejected = step.others["preferred"], step.forget
    forget = dpo(
        *(_log_probs(step, batch) for batch in (preferred, rejected)),
        *(_log_probs(step, batch, reference=True) for batch in (preferred, rejected)),
        beta=options.beta,
    )
    return {"forget_loss": options.forget_weight * forget} | retain_terms(step, options)


def others(model: Model, task: Task, options: DpoOptions) -> Mapping[str, Matched]:
    """One preferred answer for each forget example of a batch."""
    return {"preferred": Matched(candidates=answers.candidates(model, task.forget, _preferred(task, options)))}


def verify(task: Task, options: DpoOptions) -> None:
    """By `preferred`: refusals, an alternative for every forget fact, or a new_answer in every one; never its own."""
    _preferred(task, options)


def _preferred(task: Task, options: DpoOptions) -> dict[str, tuple[str, ...]]:
    """Fact id -> the answers that are preferred to its own."""
    if options.preferred == "alternatives":
        return answers.alternatives(task, by="dpo")
    if options.preferred == "new_answer":
        return {name: (text.strip(),) for name, text in answers.new_answers(task, by="dpo").items()}
    if task.refusals is None:
        raise LoceditError(
            f"dpo needs 'refusals' data, the task {task.name!r} has none: add refusals.jsonl to its folder, or "
            "give --preferred new_answer or alternatives"
        )
    texts = answers.texts_of(task, "refusals", by="dpo")
    answers.require_others(task, texts, source=task.require("refusals", by="dpo").source, by="dpo")
    return {fact.id: texts for fact in task.forget.of(Fact, by="dpo")}


def _log_probs(step: Step, batch: Batch, *, reference: bool = False) -> Tensor:
    """Log-probability of each whole answer."""
    return -losses.sequence_nll(step.reference(batch) if reference else step.score(batch), reduction="sum")

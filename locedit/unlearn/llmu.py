"""LLMU: ascent, random answers to the forget prompts, and the unedited outputs on normal data (Yao et al. 2023).

arXiv:2310.10683. The published code gives all prompts of a batch the same random answers, takes the normal term at
every token including padding, and as cross-entropy to the unedited model, which is the KL plus a constant. Here every
prompt draws its own answers, which is the same on average, and never its true one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from locedit import losses
from locedit.data.items import Fact, Task
from locedit.edit.objective import Matched, Step
from locedit.models import Model
from locedit.unlearn import answers
from locedit.unlearn.gradient_ascent import ascent
from locedit.unlearn.registry import ForgetOptions, above_zero, at_least_zero, one_of, retain_terms

Source = Literal["retain", "new", "alternatives"]
SOURCES: tuple[Source, ...] = ("retain", "new", "alternatives")


@dataclass(frozen=True, kw_only=True)
class LlmuOptions(ForgetOptions):
    """LLMU's own options; published with AdamW at a learning rate of 2e-6, batches of 2 and up to 1000 steps."""

    forget_weight: float = 0.5
    "of the ascent on the true answers"
    mismatch_weight: float = 1.0
    "of the likelihood of random answers to the forget prompts; 0 = without"
    mismatches: int = 5
    "random answers to each prompt of a batch at most, drawn anew each time"
    mismatch_from: Source = "retain"
    "the part of the task whose answers (or plain texts) are drawn"
    retain_loss: Literal["nll", "kl"] = "kl"
    "kl: KL(unedited || edited), the normal term; nll: likelihood of the retain answers"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero(self, "mismatch_weight")
        above_zero(self, "mismatches")
        one_of(self, "mismatch_from", SOURCES)


def loss(step: Step, options: LlmuOptions) -> dict[str, Tensor]:
    """Forget, mismatch and normal term, each a mean over examples of the mean over tokens, in nats."""
    terms = {"forget_loss": options.forget_weight * ascent(step.score(step.forget))}
    if options.mismatch_weight:
        mismatch = losses.sequence_nll(step.score(step.others["mismatch"])).mean()
        terms["mismatch_loss"] = options.mismatch_weight * mismatch
    return terms | retain_terms(step, options)


def others(model: Model, task: Task, options: LlmuOptions) -> Mapping[str, Matched]:
    """Random answers to the prompts of each batch."""
    if not options.mismatch_weight:
        return {}
    texts = answers.texts_of(task, options.mismatch_from, by="llmu")
    named = {fact.id: texts for fact in task.forget.of(Fact, by="llmu")}
    candidates = answers.candidates(model, task.forget, named)
    count = min(options.mismatches, *map(len, candidates.values()))
    return {"mismatch": Matched(candidates=candidates, count=count)}


def verify(task: Task, options: LlmuOptions) -> None:
    """Answers to draw, by `mismatch_from`: for every forget fact one that is not its own."""
    if options.mismatch_weight:
        texts = answers.texts_of(task, options.mismatch_from, by="llmu")
        answers.require_others(task, texts, source=task.require(options.mismatch_from, by="llmu").source, by="llmu")

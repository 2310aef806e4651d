"""Localized fine-tuning: teach a new answer to the old prompt (Guo et al. 2024, arXiv:2410.12949)."""

import dataclasses

from torch import Tensor

from locedit import losses
from locedit.data.items import Dataset, Fact, Task
from locedit.edit.objective import Step
from locedit.errors import LoceditError
from locedit.unlearn.registry import ForgetOptions, retain_terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class InjectionOptions(ForgetOptions):
    """The forget term is the likelihood of the new answers."""


def new_answers(task: Task) -> Dataset:
    """The forget facts with `new_answer` in the place of the answer; every fact must have one."""
    facts = task.forget.of(Fact, by="injection")
    for fact in facts:
        if fact.new_answer is None:
            raise LoceditError(
                f"injection needs the field 'new_answer', which {fact.id!r} of {task.forget.source} lacks"
            )
    changed = [dataclasses.replace(fact, answer=fact.new_answer, new_answer=None) for fact in facts]
    return task.forget.replace(changed)  # type: ignore[arg-type]


def loss(step: Step, options: InjectionOptions) -> dict[str, Tensor]:
    """Negative log-likelihood of the new answers, mean over tokens and examples, and retain."""
    injected = options.forget_weight * losses.sequence_nll(step.score(step.forget)).mean()
    return {"inject_loss": injected} | retain_terms(step, options)

"""Gradient ascent on the forget data: knowledge unlearning (Jang et al. 2023, arXiv:2210.01504).

Published training: every token of texts of 200 tokens, Adam with betas 0.9 and 0.98 and without decay, a constant
learning rate of 5e-5, all target texts in one batch, so one update an epoch, up to 20 epochs, the stopping rule asked
after every one. In terms of the options: batch_size = number of texts, steps=20, eval_every=1, learning_rate=5e-5,
clip=None, stop_when="memorization". The defaults are the trainer's own (its AdamW has betas 0.9 and 0.999).
"""

from dataclasses import dataclass

from torch import Tensor

from locedit import losses
from locedit.data.items import Task
from locedit.edit.objective import Step
from locedit.edit.train import TrainOptions
from locedit.errors import LoceditError
from locedit.losses import Scored
from locedit.unlearn import stopping
from locedit.unlearn.chunks import split


@dataclass(frozen=True, kw_only=True)
class GaOptions(stopping.MemorizationOptions, TrainOptions):
    """When to stop, and whether all at once."""

    chunks: int = 1
    """parts of the forget data, in order and of about the same size, that are trained one after another, each until its
    rule or for all its steps; the items of an owner stay together"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_stop()
        if self.chunks < 1:
            raise LoceditError(f"chunks={self.chunks!r} must be at least 1")


def verify(task: Task, options: GaOptions) -> None:
    """Raise LoceditError when the task cannot serve the stopping rule or the chunks; needs no model."""
    stopping.verify(task, options)
    split(task.forget, options.chunks)


def ascent(scored: Scored) -> Tensor:
    """Mean log-probability of the scored tokens in nats, mean over each example's tokens and then over examples.

    Minimising it makes them less likely. It has no lower bound: stop by a level or by steps.
    """
    return -losses.sequence_nll(scored).mean()


def loss(step: Step, options: GaOptions) -> dict[str, Tensor]:
    """The forget term alone; nothing keeps the rest of the model but the number of steps and the component set."""
    del options
    return {"forget_loss": ascent(step.score(step.forget))}

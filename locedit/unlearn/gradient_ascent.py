"""Gradient ascent on the forget data (Jang et al. 2023, arXiv:2210.01504)."""

from torch import Tensor

from locedit import losses
from locedit.edit.objective import Step
from locedit.edit.train import TrainOptions
from locedit.losses import Scored


def ascent(scored: Scored) -> Tensor:
    """Mean log-probability of the scored tokens in nats, mean over each example's tokens and then over examples.

    Minimising it makes them less likely. It has no lower bound: stop by a level or by steps.
    """
    return -losses.sequence_nll(scored).mean()


def loss(step: Step, options: TrainOptions) -> dict[str, Tensor]:
    """The forget term alone; nothing keeps the rest of the model but the number of steps and the component set."""
    del options
    return {"forget_loss": ascent(step.score(step.forget))}

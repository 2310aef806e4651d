"""Edits: zero, mean, scale, and training restricted to a component set."""

from locedit.edit.ablation import mean, scale, zero
from locedit.edit.adapter import LowRank
from locedit.edit.checkpoint import checkpoints
from locedit.edit.edit import Edit, HookAction, Patch
from locedit.edit.levels import answer_probabilities, levels
from locedit.edit.objective import Loss, Objective, Step
from locedit.edit.train import TrainOptions, train, train_front

__all__ = [
    "Edit",
    "HookAction",
    "Loss",
    "LowRank",
    "Objective",
    "Patch",
    "Step",
    "TrainOptions",
    "answer_probabilities",
    "checkpoints",
    "levels",
    "mean",
    "scale",
    "train",
    "train_front",
    "zero",
]

"""The positive control of relearning: an edit that only suppresses the answer in the last MLPs and must come back."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.attacks.aim import Aim
from locedit.attacks.arms import Control
from locedit.attacks.options import ControlOptions
from locedit.attacks.shared import Shared
from locedit.data.encode import Example
from locedit.edit import Edit
from locedit.edit.objective import Objective, Step
from locedit.edit.train import TrainOptions, train
from locedit.losses import sequence_nll, token_log_probs
from locedit.models import Model

LOWEST = 0.02
"mean answer probability below which suppression is not driven, however low the compared edit is"


def unlikelihood(log_probs: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """-log(1 - p) of each token in nats, 0 for a token that is never said (Welleck et al. 2020, arXiv:1908.04319).

    >>> unlikelihood(torch.tensor([0.5, 0.9]).log())
    tensor([0.6931, 2.3026])
    """
    return -torch.log1p(-log_probs.exp().clamp(max=1 - 1e-6))


def suppression(
    model: Model,
    forget: list[Example],
    retain: list[Example],
    *,
    level: float,
    steps: int = 200,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> tuple[Edit, str, bool]:
    """An edit of the last MLP, or of as few of the last MLPs as reach `level` (at most the last third, at least two).

    Trains unlikelihood of the forget set and likelihood of the retain set until the mean answer probability on the
    forget set is at most `level` (and no lower than 0.02). Returns the edit, what it is in words, and whether it
    reached the level.
    """
    options = TrainOptions(
        steps=steps, learning_rate=learning_rate, batch_size=16, until=max(level, LOWEST), eval_every=10, seed=seed
    )
    objective = Objective(
        loss=suppression_loss, forget=forget, retain=retain or None, probes={"forget": forget}, name="shallow control"
    )
    most = min(model.n_layers, max(2, model.n_layers // 3))
    count, edit = 1, _in_last(model, 1, objective, options)
    while not edit.outcome["reached"] and count < most:
        count += 1
        edit = _in_last(model, count, objective, options)
    where = "the last MLP" if count == 1 else f"the last {count} MLPs"
    return edit, f"suppression in {where}", bool(edit.outcome["reached"])


def suppressed(
    shared: Shared,
    model: Model,
    forget: Sequence[Example],
    retain: Sequence[Example],
    *,
    level: float,
    options: ControlOptions,
) -> tuple[Edit, str, bool]:
    """`suppression` as the attacks of one evaluation share it."""
    key = (
        "suppression",
        max(level, LOWEST),
        (options.shallow_steps, options.shallow_learning_rate, options.seed),
        tuple(forget),
        tuple(retain),
    )
    return shared.get(
        key,
        lambda: suppression(
            model,
            list(forget),
            list(retain),
            level=level,
            steps=options.shallow_steps,
            learning_rate=options.shallow_learning_rate,
            seed=options.seed,
        ),
    )


def late_suppression(aim: Aim, options: ControlOptions, *, level: float) -> Control:
    """`suppressed` as the control of attacks that look below the last MLPs or act before them."""
    retain = aim.retain.examples
    edit, words, reached = suppressed(aim.shared, aim.model, aim.forget.examples, retain, level=level, options=options)
    missed = f"the shallow control ({words}) did not reach the forget level of the edit"
    return Control(edit=edit, words=words, note="" if reached else missed)


def _in_last(model: Model, count: int, objective: Objective, options: TrainOptions) -> Edit:
    layers = range(model.n_layers - count, model.n_layers)
    within = model.components({f"blocks.{layer}.mlp": [0] for layer in layers})
    return train(model, objective, within=within, options=options)


def suppression_loss(step: Step) -> dict[str, Tensor]:
    """Unlikelihood of the forget answers and likelihood of the retain ones, nats, means over tokens and examples."""
    terms = {"unlikelihood": unlikelihood(token_log_probs(step.score(step.forget))).mean()}
    if step.retain is not None:
        terms["retain"] = sequence_nll(step.score(step.retain)).mean()
    return terms

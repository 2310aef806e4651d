"""The logit lens: does the answer stand in the residual stream of an earlier layer?

The stream after every layer is sent through the final norm and the unembedding (nostalgebraist 2020, "interpreting GPT:
the logit lens"), at the positions that predict the answer's tokens, each after the true ones before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.attacks.aim import Aim, ItemOptions, Side, Target
from locedit.attacks.arms import Control, Dose, Values
from locedit.attacks.item_attack import ItemAttack
from locedit.attacks.outcome import Others, carried_out
from locedit.attacks.shallow import late_suppression
from locedit.attacks.shared import Shared
from locedit.attacks.states import states_of
from locedit.data.items import Task
from locedit.edit import Edit
from locedit.errors import LoceditError
from locedit.evaluate.facts import SPAN_VALUES
from locedit.evaluate.scoring import TokenScores, vocabulary_ranks
from locedit.losses import precise
from locedit.models import Model
from locedit.options import fill
from locedit.results import AttackResult

ROWS = 256
"positions unembedded at a time"


@dataclass(frozen=True, kw_only=True)
class LogitLensOptions(ItemOptions):
    """Nothing beyond what all such attacks have."""


def logit_lens(
    model: Model, task: Task, edit: Edit, *, others: Others = None, shared: Shared | None = None, **options: object
) -> AttackResult:
    """Unembed the edited model's residual stream after every layer."""
    attack = LogitLens(fill(LogitLensOptions, options, method="logit_lens"))
    return carried_out(attack, model, task, edit, others=others, shared=shared)


class LogitLens(ItemAttack[LogitLensOptions]):
    """The metric of every item after every layer; after the last it is the model's own."""

    name: ClassVar[str] = "logit_lens"
    lead: ClassVar[str] = "Read off the residual stream by the logit lens"
    x_name: ClassVar[str] = "layer"
    reads_itself: ClassVar[bool] = True

    def ready(self, aim: Aim) -> None:
        for name in ("ln_final", "unembed"):
            if not aim.model.anatomy.has(name):
                raise LoceditError(f"logit_lens: {aim.model.name} has no module {name!r} to read the stream with")

    def doses(self, aim: Aim) -> tuple[Dose, ...]:
        return tuple(Dose(x=layer) for layer in range(1, aim.model.n_layers + 1))

    def attack(self, target: Target, learned: Side, measured: Mapping[str, Side], aim: Aim) -> Values:  # noqa: ARG002
        return {name: self._read(target, side, aim) for name, side in measured.items()}

    def control(self, aim: Aim, *, level: float) -> Control:
        """Suppression in the last MLPs, below which the answer must still stand in the stream."""
        return late_suppression(aim, self.options, level=level)

    def _read(self, target: Target, side: Side, aim: Aim) -> Float[Tensor, "layer item"]:
        states = states_of(target, side, aim.shared)
        labels = torch.tensor([example.ids[at] for example in side.examples for at in example.targets])
        value = SPAN_VALUES[aim.metric]
        rows: list[list[float]] = []
        for stream in states.predicting[1:]:
            scores = lens(target.model, stream, labels)
            rows.append([value(_part(scores, states.row == item)) for item in range(len(side))])
        return torch.tensor(rows, dtype=torch.float64)


@torch.no_grad()
def lens(model: Model, stream: Float[Tensor, "token d_model"], labels: Tensor) -> TokenScores:
    """The token scores that the model's head gives to states of the stream."""
    log_probs: list[Tensor] = []
    ranks: list[Tensor] = []
    for start in range(0, len(stream), ROWS):
        part = stream[start : start + ROWS].to(device=model.device, dtype=model.dtype)
        own = labels[start : start + ROWS].to(model.device)
        logits = precise(_head(model, part))
        log_probs.append((logits.gather(1, own[:, None])[:, 0] - logits.logsumexp(1)).double().cpu())
        ranks.append(vocabulary_ranks(logits, own).cpu())
    whole = torch.cat(ranks)
    return TokenScores(log_probs=torch.cat(log_probs), ranks=whole, hits=(whole == 1).float())


def _head(model: Model, states: Float[Tensor, "token d_model"]) -> Float[Tensor, "token vocab"]:
    """Final norm, unembedding and soft cap; of a masked model all of its head, which has a layer of its own."""
    unembed = model.anatomy.module("unembed")
    if not model.causal:
        return next(part for part in model.core.children() if any(m is unembed for m in part.modules()))(states)
    # control tokens that the last forward pass had are cut off before the unembedding: as many rows stand for them
    front = sum(tokens.chosen is not None for tokens in model.prefixes)
    logits = unembed(model.anatomy.module("ln_final")(states)[:, None].expand(-1, 1 + front, -1))[:, -1]
    cap = getattr(model.core.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _part(scores: TokenScores, here: Tensor) -> TokenScores:
    return TokenScores(log_probs=scores.log_probs[here], ranks=scores.ranks[here], hits=scores.hits[here])

"""The residual stream where answers are predicted and where subjects end: what probes and the logit lens read.

Recorded once for each state of the model and each data set, and shared by the attacks of one evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locedit import tracing
from locedit.attacks.aim import Side, Target
from locedit.attacks.shared import Shared
from locedit.data.encode import Batch, Example, batches
from locedit.models import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class States:
    """The stream before layer 0 and after every layer, at the positions that predict answers and at subjects' ends."""

    predicting: Float[Tensor, "layer token d_model"]
    "float32, on the CPU; layer 0 is what enters the first block, layer l what leaves block l - 1"
    row: Int[Tensor, " token"]
    "the number of the example that the token belongs to, ascending"
    subjects: Float[Tensor, "layer item d_model"] | None
    "at the last token of each subject; None where an example has none"

    @property
    def first(self) -> Float[Tensor, "layer item d_model"]:
        """Where the first token of each answer is predicted."""
        counts = torch.bincount(self.row)
        return self.predicting[:, counts.cumsum(0) - counts]

    def of(self, item: int) -> Float[Tensor, "layer own d_model"]:
        """Where the tokens of one answer are predicted."""
        return self.predicting[:, self.row == item]


def states_of(target: Target, side: Side, shared: Shared) -> States:
    """The states of a side's items in a model as it is attacked."""
    key = ("states", target.key, side.examples)
    return shared.get(key, lambda: recorded(target.model, side.examples))


@torch.no_grad()
def recorded(model: Model, examples: Sequence[Example], *, batch_size: int = 32) -> States:
    """Run every example once; a masked model once for each token of its answer."""
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(model.n_layers))]
    place = {id(example): number for number, example in enumerate(examples)}
    found: dict[int, tuple[Tensor, Tensor | None]] = {}
    for batch in batches(examples, model, batch_size):
        taken: dict[str, tuple[Tensor, Tensor]] = {}
        ends = _subject_ends(batch)
        keep = {name: partial(_keep, taken, name, batch.predicting(model.causal), ends) for name in names}
        with tracing.hooked(model, keep):
            model.logits(batch, at=_one_each(batch))
        predicting = torch.stack([taken[name][0] for name in names])
        subjects = torch.stack([taken[name][1] for name in names])
        members = torch.tensor(batch.row_members)
        of_token = members[batch.scored.nonzero()[:, 0]]
        for at, example in enumerate(batch.examples):
            first_row = batch.row_members.index(at)
            end = subjects[:, first_row] if example.subject is not None else None
            found[place[id(example)]] = (predicting[:, of_token == at], end)
    ordered = [found[number] for number in range(len(examples))]
    ends = [end for _, end in ordered if end is not None]
    return States(
        predicting=torch.cat([own for own, _ in ordered], dim=1),
        row=torch.tensor([number for number, (own, _) in enumerate(ordered) for _ in range(own.shape[1])]),
        subjects=torch.stack(ends, dim=1) if len(ends) == len(ordered) else None,
    )


def _keep(taken: dict[str, tuple[Tensor, Tensor]], name: str, at: Tensor, ends: Tensor, value: Tensor) -> Tensor:
    """Record the text's own positions, which control tokens may stand before."""
    rows, text = torch.arange(len(ends), device=value.device), value[:, value.shape[1] - at.shape[1] :]
    own = text[at.to(value.device)].float().cpu()
    taken[name] = (own, text[rows, ends.to(value.device)].float().cpu())
    return value


def _subject_ends(batch: Batch) -> Int[Tensor, " batch"]:
    """The last token of each row's subject; 0 where it has none."""
    return torch.tensor([0 if row.subject is None else row.subject.end - 1 for row in batch.rows])


def _one_each(batch: Batch) -> Tensor:
    """One position a row, so that little is unembedded."""
    at = torch.zeros_like(batch.ids, dtype=torch.bool)
    at[:, 0] = True
    return at

"""The unlearning depth score: how deep in the layers the answer is gone, as in a model trained without it.

In the unedited model the residual stream at one layer is replaced, where the answer is predicted, by that of another
model. With that of the retain model the answer loses d1 nats a token; with that of the edited model d2. Over the layers
at which d1 is above 0.05, the score of an item is the sum of d1 * clip(d2 / d1, 0, 1) over the sum of d1 (the code of
arXiv:2605.24614): 1 = at every layer as in a model that never knew, 0 = the states still carry the answer.

The share that is back is 1 - score, so the retain model stands at 0 and the model before the edit at 1. Replaced are
the positions that predict the answer's tokens; the published code names the answer's own positions.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import losses, tracing
from locedit.attacks.aim import side_of
from locedit.attacks.measures import share_measure
from locedit.attacks.options import ControlOptions
from locedit.attacks.outcome import POWER, Others
from locedit.attacks.runs import role_of
from locedit.attacks.shallow import suppressed
from locedit.attacks.shared import Shared
from locedit.attacks.splits import keys
from locedit.attacks.states import recorded
from locedit.data.encode import Batch, Example, batches, encode
from locedit.data.items import Task
from locedit.edit import Edit
from locedit.edit.levels import levels
from locedit.errors import LoceditError
from locedit.evaluate.beside import beside, require_folder
from locedit.evaluate.intervals import Estimate, estimate_mean
from locedit.models import Model
from locedit.options import fill
from locedit.provenance import measure, plain
from locedit.results import AttackResult, Curve, Role

LEAST = 0.05
"nats a token that the retain model's states must cost at a layer, for the layer to count"


@dataclass(frozen=True, kw_only=True)
class DepthOptions(ControlOptions):
    """What the score compares with."""

    retain_model: str | None = None
    "the model trained without the forget data: a folder or a hub id; needed"
    least: float = LEAST
    "nats a token that the retain model's states must cost at a layer, for the layer to count"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.least > 0:
            raise LoceditError(f"depth: least={self.least!r} must be above 0")
        require_folder(self.retain_model, option="depth: retain_model")


@dataclass(frozen=True, kw_only=True, eq=False)
class Depths:
    """What replacing the stream costs, for every layer and item."""

    lost: Float[Tensor, "layer item"]
    "nats a token, with the states of the retain model: d1"
    least: float

    @property
    def counts(self) -> Tensor:
        return self.lost > self.least

    def share(self, other: Float[Tensor, "layer item"]) -> Float[Tensor, "layer item"]:
        """d2 / d1 between 0 and 1 where the layer counts, else 0."""
        return torch.where(self.counts, (other / self.lost.clamp(min=1e-9)).clamp(0, 1), 0.0)

    def score(self, other: Float[Tensor, "layer item"]) -> Float[Tensor, " item"]:
        """The unlearning depth score of every item; NaN where no layer counts."""
        weight = torch.where(self.counts, self.lost, 0.0)
        return (weight * self.share(other)).sum(0) / weight.sum(0)


def depth(
    model: Model, task: Task, edit: Edit, *, others: Others = None, shared: Shared | None = None, **options: object
) -> AttackResult:
    """Replace the unedited model's states by those of the edited and of the retain model, layer by layer."""
    chosen = fill(DepthOptions, options, method="depth")
    if chosen.retain_model is None:
        raise LoceditError("depth needs the option retain_model: a folder or a hub id")
    with measure("depth", model=model, data=task, settings=chosen, seed=chosen.seed) as record:
        side = side_of(model, task.forget)
        retain_model = _beside(model, chosen.retain_model)
        lost = _costs(model, side.examples, recorded(retain_model, side.examples).predicting)
        depths = Depths(lost=lost, least=chosen.least)
        arms: dict[str, tuple[Role, Tensor]] = {"found": ("found", _of_edit(model, edit, side.examples))}
        for name, other in (others or {}).items():
            arms[name] = role_of(name), _of_edit(model, other, side.examples)
        if chosen.controls and chosen.shallow:
            control, words, note = _shallow(model, task, edit, side.examples, chosen, shared or Shared())
            arms[words] = ("shallow", _of_edit(model, control, side.examples))
        else:
            note = ""
        result = _result(depths, arms, task, chosen, note=note)
    return dataclasses.replace(result, provenance=record.provenance)


def _beside(model: Model, source: str) -> Model:
    """The retain model, whose stream must be of the same shape."""
    other = beside(model, source, option="depth: retain_model")
    shapes = [(one.n_layers, one.d_model) for one in (model, other)]
    if shapes[0] != shapes[1]:
        layers, width = shapes[1]
        raise LoceditError(
            f"depth: retain_model={source!r} has {layers} layers of width {width}, {model.name} {shapes[0][0]} of "
            f"{shapes[0][1]}: its states cannot be put into it"
        )
    return other


def _shallow(
    model: Model, task: Task, edit: Edit, forget: Sequence[Example], options: DepthOptions, shared: Shared
) -> tuple[Edit, str, str]:
    """Suppression in the last MLPs, which leaves the states below them as they were."""
    retain = encode(model, task.retain) if task.retain is not None else []
    with edit.applied(model) as edited:
        level = levels(edited, {"forget": forget})["forget"]
    control, words, reached = suppressed(shared, model, forget, retain, level=level, options=options)
    missed = f"the shallow control ({words}) did not reach the forget level of the edit"
    return control, words, "" if reached else missed


def _of_edit(model: Model, edit: Edit, examples: Sequence[Example]) -> Float[Tensor, "layer item"]:
    with edit.applied(model) as edited:
        states = recorded(edited, examples).predicting
    return _costs(model, examples, states)


@torch.no_grad()
def _costs(
    model: Model, examples: Sequence[Example], states: Float[Tensor, "stream token d_model"]
) -> Float[Tensor, "layer item"]:
    """Nats a token that the answers lose in the unedited model with these states after each layer.

    The first of `states` is what enters layer 0, which replaces nothing.
    """
    starts = torch.tensor([0, *(len(example.targets) for example in examples)]).cumsum(0).tolist()
    place = {id(example): at for at, example in enumerate(examples)}
    costs = torch.zeros(model.n_layers, len(examples), dtype=torch.float64)
    for batch in batches(examples, model, 32):
        own = [place[id(example)] for example in batch.examples]
        tokens = torch.tensor([at for item in own for at in range(starts[item], starts[item + 1])])
        whole = _log_probs(model, batch)
        for layer in range(model.n_layers):
            change = partial(_instead, batch.predicting(model.causal), states[layer + 1, tokens])
            with tracing.replace(model, {f"blocks.{layer}.hook_resid_post": change}):
                costs[layer, own] = whole - _log_probs(model, batch)
    return costs


def _log_probs(model: Model, batch: Batch) -> Float[Tensor, " rows"]:
    return -losses.sequence_nll(losses.score(model, batch)).double().cpu()


def _instead(at: Tensor, states: Tensor, value: Tensor) -> Tensor:
    """The value with other states at the marked positions, row by row."""
    changed = value.clone()
    changed[at.to(value.device)] = states.to(value)
    return changed


def _result(
    depths: Depths, arms: Mapping[str, tuple[Role, Tensor]], task: Task, options: DepthOptions, *, note: str
) -> AttackResult:
    owners = keys(list(task.forget))
    scored = depths.counts.any(0)
    notes = [note] if note else []
    if not bool(scored.all()):
        notes.append(f"at no layer do {int((~scored).sum())} items differ from the retain model")
    shares = {name: _share(depths.score(costs), owners, scored, options) for name, (_, costs) in arms.items()}
    found, count = shares["found"], int(scored.sum())
    if any(role == "shallow" and not shares[name].value >= POWER for name, (role, _) in arms.items()):
        notes.append("the shallow control does not score as shallow: a deep score elsewhere proves little")
    return AttackResult(
        name="depth",
        sentence=_sentence(shares, options.least),
        headline=share_measure(found, count, note="; ".join(notes)),
        curves=tuple(_curves(depths, arms)),
        measures=tuple(
            share_measure(shares[name], count, group=name if role in name else f"{role}: {name}")
            for name, (role, _) in arms.items()
            if name != "found"
        ),
        settings=plain(options),
        note="; ".join(notes),
    )


def _sentence(shares: Mapping[str, Estimate], least: float) -> str:
    found = shares["found"]
    if math.isnan(found.value):
        return (
            "No unlearning depth score can be given: at no layer do the retain model's states cost an answer more than "
            f"{least:g} nats a token, as if it knew them all."
        )
    text = f"Put layer by layer into the unedited model, the edited model's states still carry {found.value:.0%} of "
    text += f"what the retain model's lack (interval {found.low:.0%} to {found.high:.0%}): unlearning depth score "
    text += f"{1 - found.value:.2f} (0 = the unedited model, 1 = the retain model)"
    return text + "".join(f"; {name}: {1 - share.value:.2f}" for name, share in shares.items() if name != "found") + "."


def _share(score: Tensor, owners: Sequence[str], scored: Tensor, options: DepthOptions) -> Estimate:
    """1 - the mean score of the items that have one."""
    kept = [at for at in range(len(owners)) if bool(scored[at])]
    if not kept:
        return Estimate(math.nan, math.nan, math.nan)
    chosen = [owners[at] for at in kept]
    return estimate_mean(1 - score[kept], owners=chosen, bounds=(0.0, 1.0), draws=options.draws, seed=options.seed)


def _curves(depths: Depths, arms: Mapping[str, tuple[Role, Tensor]]) -> list[Curve]:
    """How much of the answer the states of each layer that counts carry, for every arm; the retain model's carry 0."""
    weight = torch.where(depths.counts, depths.lost, 0.0).sum(1)
    layers = tuple(float(layer) for layer in range(1, len(weight) + 1) if weight[layer - 1] > 0)
    made = [
        Curve(
            name=name,
            role=role,
            x_name="layer",
            x=layers,
            columns={"recovered": _of_layers(depths.share(costs), depths, weight)},
        )
        for name, (role, costs) in arms.items()
    ]
    zero: Role = "never knew"
    return [
        *made,
        Curve(name="retain model", role=zero, x_name="layer", x=layers, columns={"recovered": (0.0,) * len(layers)}),
    ]


def _of_layers(shares: Tensor, depths: Depths, weight: Tensor) -> tuple[float, ...]:
    lost = (torch.where(depths.counts, depths.lost, 0.0) * shares).sum(1)
    return tuple((1 - lost / weight)[weight > 0].tolist())


__all__ = ["DepthOptions", "Depths", "depth"]

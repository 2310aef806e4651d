"""Membership inference: whether the forget items can be told from held-out ones as texts that the model was trained on.

Every metric here is the AUC of one score (see `membership_scores`): the share of all pairs of a forget item and a
held-out item in which the forget item looks more like a member, ties counting half. 1 = all forget items look more like
members than any held-out item, 0.5 = the score does not tell them apart. Under 0.5 they look *less* like members than
texts that the model never saw, which betrays them too. So neither end is the aim, but 0.5, or the AUC of a model that
was trained without the forget items. The value of an item is its placement, its share of the held-out items.

    privleak = ((1 - AUC) - (1 - AUC_ref)) / (1 - AUC_ref) * 100     (Shi et al. 2024, arXiv:2407.06460, with min_k)

with AUC_ref of the model of the option retain_model, or 0.5 without one: 0 = as a model that never saw the items, -100
= they are all still told apart, above 0 = over-forgotten. The sign is OpenUnlearning's and MUSE's, who count the AUC
that held-out items look more like members.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.data.items import Task
from locedit.errors import LoceditError
from locedit.evaluate.beside import beside
from locedit.evaluate.intervals import Estimate
from locedit.evaluate.membership_scores import (
    SIGNALS,
    TINY,
    Text,
    after_prefix,
    gradient_norms,
    signals_of,
    texts_of,
    without_specials,
)
from locedit.evaluate.separation import auc_draws, auc_estimate, expanded_ends, fewest, wins
from locedit.evaluate.values import EvaluateOptions, Values, View
from locedit.losses import ScoringModel

HIGH_REFERENCE = 0.95
"AUC_ref above which privleak divides by almost nothing"
SMALLEST = 1e-10
"what privleak divides by at least, as in OpenUnlearning"


@dataclass(frozen=True, kw_only=True)
class Sets:
    """The two sets that are told apart."""

    members: Sequence[Text]
    others: Sequence[Text]

    @property
    def owners(self) -> list[str | None]:
        return [text.owner for text in self.members]

    @property
    def other_owners(self) -> list[str | None]:
        return [text.owner for text in self.others]

    @property
    def note(self) -> str:
        return f"against {len(self.others)} held-out items"


Scores = list[float]
"""One number for every text, higher = more like a member."""


def membership_metrics(view: View, names: Sequence[str]) -> dict[str, Values]:
    """The named metrics; those of one forward pass share it."""
    sets = _sets(view)
    found: dict[str, Values] = {}
    shared = [name for name in names if name in SIGNALS]
    if shared:
        found |= {n: _auc(view, sets, won) for n, won in _shared(view, view.model, sets, shared).items()}
    found |= {name: _OWN[name](view, sets) for name in names if name in _OWN}
    return found


def _sets(view: View) -> Sets:
    assert view.task.heldout is not None, "the card asks for it"
    members, others = (
        texts_of(view.model, data, scored=view.options.membership_text) for data in (view.dataset, view.task.heldout)
    )
    return Sets(members=members, others=others)


def _shared(
    view: View, model: ScoringModel, sets: Sets, names: Sequence[str]
) -> dict[str, Float[Tensor, "member other"]]:
    """Metric -> which pairs it wins, all from one forward pass of the model."""
    texts = [*sets.members, *sets.others]
    signals = signals_of(model, texts, batch_size=view.options.batch_size)
    share, rows = view.options.min_k_share, list(zip(signals, texts, strict=True))
    return {name: _won(sets, [SIGNALS[name](own, text, share) for own, text in rows]) for name in names}


def _won(sets: Sets, scores: Scores) -> Float[Tensor, "member other"]:
    """From the scores of the members, then of the others."""
    values = torch.tensor(scores, dtype=torch.float64)
    return wins(values[: len(sets.members)], values[len(sets.members) :])


def _auc(view: View, sets: Sets, won: Float[Tensor, "member other"], *, note: str = "") -> Values:
    """The AUC as a metric."""

    def estimate(won: Tensor, owners: list[str | None]) -> Estimate:
        options = view.options
        return auc_estimate(won, owners=owners, other_owners=sets.other_owners, draws=options.draws, seed=options.seed)

    return _values(sets, won.mean(1), lambda at: estimate(won[at], [sets.owners[i] for i in at]), note=note)


def _values(
    sets: Sets, placements: Float[Tensor, " member"], estimate: Callable[[list[int]], Estimate], *, note: str = ""
) -> Values:
    number = {text.id: at for at, text in enumerate(sets.members)}
    return Values(
        per_example=dict(zip(number, placements.tolist(), strict=True)),
        owners=dict(zip(number, sets.owners, strict=True)),
        estimate=lambda ids: estimate([number[key] for key in ids]),
        note="; ".join(text for text in (sets.note, note) if text),
    )


# --- privleak --------------------------------------------------------------------------------------------------------


def leak(auc: Tensor, reference: Tensor) -> Tensor:
    """privleak of AUCs beside those of the reference, in per cent.

    >>> leak(torch.tensor([1.0, 0.5, 0.25]), torch.tensor(0.5)).tolist()
    [-100.0, 0.0, 50.0]
    """
    return 100 * ((1 - auc) - (1 - reference)) / (1 - reference).clamp(min=SMALLEST)


def _privleak(view: View, sets: Sets) -> Values:
    won = _shared(view, view.model, sets, ["min_k"])["min_k"]
    ref = None if view.retain_model is None else _shared(view, view.retain_model, sets, ["min_k"])["min_k"]
    level = torch.tensor(0.5).double() if ref is None else ref.mean()
    note = "AUC_ref is 0.5, no retain_model was given" if ref is None else f"AUC_ref {float(level):.3g}"
    if float(level) > HIGH_REFERENCE:
        note += f", above {HIGH_REFERENCE:g}: privleak divides by {1 - float(level):.2g} and says little"

    def estimate(at: list[int]) -> Estimate:
        owners = [sets.owners[i] for i in at]
        return _leak_estimate(view.options, sets, won[at], None if ref is None else ref[at], owners)

    return _values(sets, leak(won.mean(1), level), estimate, note=note)


def _leak_estimate(
    options: EvaluateOptions, sets: Sets, won: Tensor, reference: Tensor | None, owners: list[str | None]
) -> Estimate:
    """The interval holds that of the AUC beside a fixed AUC_ref, and that of both models in the same samples."""
    owned = {"owners": owners, "other_owners": sets.other_owners}
    auc = auc_estimate(won, **owned, draws=options.draws, seed=options.seed)
    level = torch.tensor(0.5).double() if reference is None else reference.mean()
    value, low, high = leak(torch.tensor([auc.value, auc.high, auc.low]).double(), level).tolist()
    if reference is None or low != low:
        return Estimate(value, low, high)
    both = [auc_draws(w, **owned, draws=options.draws, seed=options.seed) for w in (won, reference)]
    ends = expanded_ends(leak(*both), clusters=fewest(owners, sets.other_owners))
    return Estimate(value, min(low, ends[0]), max(high, ends[1]))


# --- with passes of their own ----------------------------------------------------------------------------------------


def _gradient_norm(view: View, sets: Sets) -> Values:
    norms = gradient_norms(view.model, [*sets.members, *sets.others], norm=view.options.gradient_norm)
    return _auc(view, sets, _won(sets, [-norm for norm in norms]), note=f"{view.options.gradient_norm} norm")


def _reference(view: View, sets: Sets) -> Values:
    source = view.options.membership_reference or view.task.start
    assert source is not None, "the card asks for it"
    other = beside(view.model, source, option="membership_reference" if view.options.membership_reference else "start")
    texts = [*sets.members, *sets.others]
    here, there = (_means(model, texts, view.options) for model in (view.model, other))
    return _auc(view, sets, _won(sets, [h - t for h, t in zip(here, there, strict=True)]), note=f"beside {source}")


def without_reference(task: Task, options: EvaluateOptions) -> str:
    """What mia_reference lacks; empty where it has a reference model."""
    if options.membership_reference or task.start:
        return ""
    return "a reference model: --membership-reference FOLDER, or `start` in the task"


def _recall(view: View, sets: Sets) -> Values:
    prefix, left = _prefix(view, sets)
    texts = [*left.members, *left.others]
    plain = _means(view.model, texts, view.options)
    given = _means(view.model, [after_prefix(view.model, text, prefix) for text in texts], view.options)
    ratios = [(after - TINY) / (alone - TINY) for alone, after in zip(plain, given, strict=True)]
    return _auc(view, left, _won(left, ratios), note=f"after {view.options.recall_shots} other held-out items")


def _prefix(view: View, sets: Sets) -> tuple[tuple[int, ...], Sets]:
    """Tokens of held-out items, and the sets without the owners of those.

    The items are those of as few owners as possible, in an order that the seed decides.
    """
    generator = torch.Generator().manual_seed(view.options.seed)
    order = [sets.others[at] for at in torch.randperm(len(sets.others), generator=generator).tolist()]
    rank = {_owner(text): at for at, text in reversed(list(enumerate(order)))}
    shots = sorted(order, key=lambda text: rank[_owner(text)])[: view.options.recall_shots]
    taken = {_owner(text) for text in shots}
    left = [text for text in sets.others if _owner(text) not in taken]
    if len({_owner(text) for text in left}) < 2:
        raise LoceditError(
            f"mia_recall: recall_shots={view.options.recall_shots!r} leaves held-out items of fewer than two owners "
            "to compare with: choose fewer, or add held-out data"
        )
    tokens = [token for text in shots for token in without_specials(view.model, text)]
    return tuple(tokens), Sets(members=sets.members, others=left)


def _owner(text: Text) -> tuple[str, str]:
    return ("item", text.id) if text.owner is None else ("owner", text.owner)


def _means(model: ScoringModel, texts: Sequence[Text], options: EvaluateOptions) -> Scores:
    """Mean log-probability per token of every text, in nats."""
    return [float(s.log_probs.mean()) for s in signals_of(model, texts, batch_size=options.batch_size)]


_OWN: dict[str, Callable[[View, Sets], Values]] = {
    "privleak": _privleak,
    "mia_gradient_norm": _gradient_norm,
    "mia_reference": _reference,
    "mia_recall": _recall,
}

"""From scores to a set of components under a budget."""

from dataclasses import replace

import torch
from torch import Tensor

from locedit.components import ComponentSet, Site
from locedit.errors import LoceditError, nearest
from locedit.provenance import Provenance
from locedit.scores import Scores, Sign

BUDGETS = ("top", "fraction", "params", "threshold", "shared")
SIGNS: tuple[Sign, ...] = ("positive", "absolute", "negative")


def select(
    scores: Scores,
    *,
    top: int | None = None,
    fraction: float | None = None,
    params: int | None = None,
    threshold: float | None = None,
    shared: float | None = None,
    sign: Sign | str = "positive",
    minus: Scores | None = None,
) -> ComponentSet:
    """The most important components.

    Exactly one budget, except that `shared` may go with any other:

    - `top`: this many components; fewer when fewer have the right sign
    - `fraction`: this share of all components, rounded, at least one
    - `params`: the best components that together hold at most this many trained parameters; a component that does not
      fit ends the list
    - `threshold`: every component with at least this share of the largest score, 0 to 1
    - `shared`: only components that passed the localizer's own threshold in at least this share of the examples, most
      votes first,
      ties by score (DEPN's aggregator; Wu et al. 2023, arXiv:2310.20138)

    `sign` "positive" takes the largest scores and never one at or below zero, "negative" the most negative,
    "absolute" both. `minus`
    subtracts control prompts: each score map is first divided by its largest absolute value.

    Raises LoceditError for no or several budgets, values out of range, and when nothing is left.
    """
    _check(scores, top=top, fraction=fraction, params=params, threshold=threshold, shared=shared, sign=sign)
    used = scores if minus is None else _subtract(scores, minus)
    order = _ranking(used, sign=sign, shared=shared)
    if threshold is not None:
        order = order[order_values(used, sign)[order] >= threshold * order_values(used, sign).max()]
    elif params is not None:
        order = _within_parameters(used, order, params)
    elif top is not None or fraction is not None:
        order = order[: top if top is not None else max(1, round(fraction * len(used)))]  # type: ignore[operator]
    if not len(order):
        raise LoceditError(_nothing(used, sign=sign, shared=shared, params=params))
    return _as_set(used, order, _options(top, fraction, params, threshold, shared, sign, minus))


def best(scores: Scores, k: int, *, sign: Sign | str = "positive") -> list[tuple[str, int, float]]:
    """The k best (site, component, score), best first."""
    order = _ranking(scores, sign=sign, shared=None)[:k]
    flat = _flat(scores.values)
    return [(*place, float(flat[i])) for i, place in zip(order.tolist(), _places(scores, order), strict=True)]


def order_values(scores: Scores, sign: str) -> Tensor:
    """The scores as one vector over all sites, turned so that more is more important for that sign."""
    flat = _flat(scores.values)
    return {"positive": flat, "negative": -flat, "absolute": flat.abs()}[sign]


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1).double() for tensor in tensors.values()])


def _ranking(scores: Scores, *, sign: str, shared: float | None) -> Tensor:
    """Component numbers over all sites, most important first; only those with the right sign (and enough votes)."""
    values = order_values(scores, sign)
    order = torch.argsort(values, descending=True, stable=True)
    order = order[values[order] > 0]
    if shared is None:
        return order
    votes = _flat({name: scores.votes[name] for name in scores.values})
    order = order[votes[order] >= max(1.0, shared * len(scores.examples) - 1e-9)]
    return order[torch.argsort(votes[order], descending=True, stable=True)]


def _within_parameters(scores: Scores, order: Tensor, budget: int) -> Tensor:
    """The longest head of the ranking whose trained parameters fit the budget.

    Shared keys and values counted when they join.
    """
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        if _as_set(scores, order[:middle], {}).parameters() <= budget:
            low = middle
        else:
            high = middle - 1
    return order[:low]


def _places(scores: Scores, order: Tensor) -> list[tuple[str, int]]:
    names = list(scores.values)
    ends = torch.tensor([scores.sites[n].count for n in names]).cumsum(0)
    which = torch.searchsorted(ends, order, right=True)
    starts = ends - torch.tensor([scores.sites[n].count for n in names])
    return [(names[w], int(i - starts[w])) for w, i in zip(which.tolist(), order.tolist(), strict=True)]


def _as_set(scores: Scores, order: Tensor, settings: dict[str, object]) -> ComponentSet:
    universe: dict[str, Site] = {name: scores.sites[name] for name in scores.values}
    chosen: dict[str, list[int]] = {}
    for name, index in _places(scores, order):
        chosen.setdefault(name, []).append(index)
    masks = {
        n: torch.zeros(universe[n].count, dtype=torch.bool).index_fill_(0, torch.tensor(chosen.pop(n)), True)
        for n in list(chosen)
        if universe[n].unit == "weight"
    }
    provenance = replace(
        scores.provenance or Provenance(method="scores"),
        settings=dict((scores.provenance or Provenance(method="scores")).settings) | {"select": settings},
    )
    return ComponentSet.of(universe, chosen, masks=masks, fingerprint=scores.fingerprint, provenance=provenance)


def _subtract(scores: Scores, minus: Scores) -> Scores:
    if scores.values.keys() != minus.values.keys():
        raise LoceditError("the control scores are of other sites; use the same model and method for both")
    scale, control = _flat(scores.values).abs().max(), _flat(minus.values).abs().max()
    if not scale or not control:
        raise LoceditError("cannot subtract control scores: one of the two score maps is zero everywhere")
    values = {n: (t.double() / scale - minus.values[n].double() / control).float() for n, t in scores.values.items()}
    return replace(scores, values=values)


def check_budget(*, sign: str = "positive", **budgets: float | None) -> None:
    """Raise LoceditError for no or several budgets and for values out of range; needs no scores."""
    if sign not in SIGNS:
        raise LoceditError(f"sign={sign!r}; {nearest(str(sign), SIGNS)}")
    given = {name: budgets[name] for name in BUDGETS if budgets.get(name) is not None}
    if len(given.keys() - {"shared"}) > 1 or not given:
        raise LoceditError(
            f"give exactly one budget of {', '.join(BUDGETS)} (shared may go with another); "
            f"got {', '.join(given) or 'none'}"
        )
    for name, value in given.items():
        assert value is not None
        if name in ("top", "params") and (value != int(value) or value < 1):
            raise LoceditError(f"{name}={value!r} must be a whole number of at least 1")
        if name not in ("top", "params") and not 0 < value <= 1:
            raise LoceditError(f"{name}={value!r} must be above 0 and at most 1")


def _check(scores: Scores, *, sign: str, **budgets: float | None) -> None:
    check_budget(sign=sign, **budgets)
    if (k := budgets["top"]) is not None and k > len(scores):
        raise LoceditError(f"top={k} is more than the {len(scores)} components there are")
    if budgets["shared"] is not None and not scores.votes:
        raise LoceditError("shared= needs votes, which these scores do not have; depn and knowledge_neurons keep them")


def _nothing(scores: Scores, *, sign: str, shared: float | None, params: int | None) -> str:
    if params is not None:
        return f"params={params} is less than the best component needs; give more parameters or another budget"
    if shared is not None:
        most = int(_flat({n: scores.votes[n] for n in scores.values}).max())
        return (
            f"no component is shared by {shared:.0%} of the {len(scores.examples)} examples; the most votes are {most}"
        )
    return f"no component has a {sign} score"


def _options(
    top: int | None,
    fraction: float | None,
    params: int | None,
    threshold: float | None,
    shared: float | None,
    sign: str,
    minus: Scores | None,
) -> dict[str, object]:
    given = {"top": top, "fraction": fraction, "params": params, "threshold": threshold, "shared": shared}
    chosen: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    control = {} if minus is None else {"minus": minus.provenance.data if minus.provenance else "unnamed"}
    return chosen | {"sign": sign} | control

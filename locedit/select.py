"""From scores to a set of components under a budget."""

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from locedit.components import ComponentSet, Site
from locedit.errors import LoceditError, nearest
from locedit.provenance import Provenance
from locedit.scores import Scores, Sign

BUDGETS = ("top", "fraction", "params", "threshold", "shared")
SIGNS: tuple[Sign, ...] = ("positive", "absolute", "negative")
Fill = Literal["under", "reach"]
"""How a budget of parameters is filled: under = as long as it is not passed; reach = until it is reached or passed."""
FILLS: tuple[Fill, ...] = get_args(Fill)


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
    fill: Fill | str = "under",
) -> ComponentSet:
    """The most important components.

    Exactly one budget, except that `shared` may go with any other:

    - `top`: this many components; fewer when fewer have the right sign
    - `fraction`: this share of all components, rounded, at least one
    - `params`: the best components that together hold at most this many trained parameters; a component that does not
      fit ends the list. With `fill="reach"` that component is still taken, so that the budget is reached or passed (as
      Guo et al. 2024, arXiv:2410.12949, match their methods). The set's provenance states the parameters it holds and
      the overshoot; a negative one says by how much the budget was not reached
    - `threshold`: every component with at least this share of the largest score, 0 to 1
    - `shared`: only components that passed the localizer's own threshold in at least this share of the examples, most
      votes first, ties by score (DEPN's aggregator; Wu et al. 2023, arXiv:2310.20138)

    `sign` "positive" takes the largest scores and never one at or below zero, "negative" the most negative,
    "absolute" both. `minus` subtracts control prompts: each score map is first divided by its largest absolute value.

    Raises LoceditError for no or several budgets, values out of range, and when nothing is left.
    """
    _check(scores, top=top, fraction=fraction, params=params, threshold=threshold, shared=shared, sign=sign, fill=fill)
    used = scores if minus is None else _subtract(scores, minus)
    most = _most(used, top=top, fraction=fraction, params=params)
    order = _ranking(used, sign=sign, shared=shared, most=most)
    if threshold is not None and len(order):
        values = order_values(used, sign)
        order = order[values[order] >= threshold * values.max()]
    elif params is not None:
        order = _filled(used, order, params, fill=fill)
    elif most is not None:
        order = order[:most]
    if not len(order):
        raise LoceditError(_nothing(used, sign=sign, shared=shared, params=params))
    found = _as_set(used, order)
    settings = _options(top, fraction, params, threshold, shared, sign, minus)
    if params is not None:
        held = found.parameters()
        settings |= {"fill": fill, "parameters": held, "overshoot": held - params}
    return replace(found, provenance=_chosen_by(scores.provenance, settings))


def best(scores: Scores, k: int, *, sign: Sign | str = "positive") -> list[tuple[str, int, float]]:
    """The k best (site, component, score), best first."""
    order = _ranking(scores, sign=sign, shared=None, most=k)[:k]
    names, flat = list(scores.values), _flat(scores.values)
    which, inside = _by_site(scores, order)
    found = zip(which.tolist(), inside.tolist(), flat[order].tolist(), strict=True)
    return [(names[site], index, score) for site, index, score in found]


def _most(scores: Scores, *, top: int | None, fraction: float | None, params: int | None) -> int | None:
    """How many components the budget can hold, where that is known before they are counted."""
    if params is not None:
        return params if _weights_only(scores) else None
    return top if fraction is None else max(1, round(fraction * len(scores)))


def _weights_only(scores: Scores) -> bool:
    return all(scores.sites[name].unit == "weight" for name in scores.values)


def order_values(scores: Scores, sign: str) -> Tensor:
    """The scores as one vector over all sites, turned so that more is more important for that sign."""
    flat = _flat(scores.values)
    return flat if sign == "positive" else -flat if sign == "negative" else flat.abs()


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def _ranking(scores: Scores, *, sign: str, shared: float | None, most: int | None) -> Tensor:
    """Component numbers over all sites, most important first; only those with the right sign (and enough votes).

    At least the first `most` of them, where there are as many.
    """
    values = order_values(scores, sign)
    allowed = values > 0
    if shared is None:
        if most is not None and most < len(values):  # sorting ten million scores takes seconds
            allowed &= values >= values.topk(most, sorted=False).values.min()
        return _sorted(allowed, values)
    votes = _flat({name: scores.votes[name] for name in scores.values})
    order = _sorted(allowed & (votes >= max(1.0, shared * len(scores.examples) - 1e-9)), values)
    return order[torch.argsort(votes[order], descending=True, stable=True)]


def _sorted(allowed: Tensor, values: Tensor) -> Tensor:
    """The allowed components, largest value first; equal ones in the order of the sites."""
    places = allowed.nonzero().flatten()
    return places[torch.argsort(values[places], descending=True, stable=True)]


def _filled(scores: Scores, order: Tensor, budget: int, *, fill: str) -> Tensor:
    """The longest head of the ranking whose trained parameters fit the budget, or the next longer one.

    A parameter that several components hold counts once, shared keys and values when they join.
    """
    if _weights_only(scores):
        return order[:budget]
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        if _as_set(scores, order[:middle]).parameters() <= budget:
            low = middle
        else:
            high = middle - 1
    if fill == "reach" and low < len(order) and (not low or _as_set(scores, order[:low]).parameters() < budget):
        low += 1
    return order[:low]


def _by_site(scores: Scores, order: Tensor) -> tuple[Tensor, Tensor]:
    """For components numbered over all sites, the number of the site and the number inside it."""
    counts = torch.tensor([scores.sites[name].count for name in scores.values])
    ends = counts.cumsum(0)
    which = torch.searchsorted(ends, order, right=True)
    return which, order - (ends - counts)[which]


def _as_set(scores: Scores, order: Tensor) -> ComponentSet:
    universe: dict[str, Site] = {name: scores.sites[name] for name in scores.values}
    which, inside = _by_site(scores, order)
    chosen: dict[str, list[int]] = {}
    masks: dict[str, Tensor] = {}
    for number, (name, site) in enumerate(universe.items()):
        here = inside[which == number]
        if site.unit == "weight":
            masks[name] = torch.zeros(site.count, dtype=torch.bool).index_fill_(0, here, True)
        else:
            chosen[name] = here.tolist()
    return ComponentSet.of(universe, chosen, masks=masks, fingerprint=scores.fingerprint)


def _chosen_by(made: Provenance | None, settings: dict[str, object]) -> Provenance:
    """Where the scores came from, with the rule of the choice."""
    base = made or Provenance(method="scores")
    return replace(base, settings=dict(base.settings) | {"select": settings})


def _subtract(scores: Scores, minus: Scores) -> Scores:
    if scores.values.keys() != minus.values.keys():
        raise LoceditError("the control scores are of other sites; use the same model and method for both")
    scale, control = _flat(scores.values).abs().max(), _flat(minus.values).abs().max()
    if not scale or not control:
        raise LoceditError("cannot subtract control scores: one of the two score maps is zero everywhere")
    values = {n: (t.double() / scale - minus.values[n].double() / control).float() for n, t in scores.values.items()}
    return replace(scores, values=values)


def check_budget(*, sign: str = "positive", fill: str = "under", **budgets: float | None) -> None:
    """Raise LoceditError for no or several budgets and for values out of range; needs no scores."""
    if sign not in SIGNS:
        raise LoceditError(f"sign={sign!r}; {nearest(str(sign), SIGNS)}")
    if fill not in FILLS:
        raise LoceditError(f"fill={fill!r}; {nearest(str(fill), FILLS)}")
    given = {name: budgets[name] for name in BUDGETS if budgets.get(name) is not None}
    if fill == "reach" and "params" not in given:
        raise LoceditError(f"fill={fill!r} goes with params; got {', '.join(given) or 'no budget'}")
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


def _check(scores: Scores, *, sign: str, fill: str, **budgets: float | None) -> None:
    check_budget(sign=sign, fill=fill, **budgets)
    if (k := budgets["top"]) is not None and k > len(scores):
        raise LoceditError(f"top={k} is more than the {len(scores)} components there are")
    if budgets["shared"] is not None and not scores.votes:
        raise LoceditError(
            "shared= needs votes, which these scores do not have; depn, knowledge_neurons and fact_lookup keep them"
        )


def _nothing(scores: Scores, *, sign: str, shared: float | None, params: int | None) -> str:
    if params is not None and bool((order_values(scores, sign) > 0).any()):
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

"""What an attack's numbers say, in the words of its sentence: as the report judges them, by their intervals."""

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from locedit.evaluate.intervals import Estimate

HALF = 0.5
"from this share on it is back"
BROKEN = 0.88
"an attack that leaves less than this share of what was retained has broken the model: 0.9, less what rounding may do"
Shown = Literal["no share", "back", "in part", "undecided", "hardly"]
SAID: dict[Shown, str] = {
    "no share": "no share can be given",
    "back": "it comes back",
    "in part": "it comes back in part",
    "undecided": "it is undecided whether it comes back",
    "hardly": "hardly anything is back",
}
BROKE = ": the attack breaks the model and shows nothing"


def shown(share: Estimate) -> Shown:
    """What a share says, as the report judges it.

    "back" and "in part": more than of items never known, by the interval, and half or more, or less, of the way to what
    was known; "undecided": the interval holds 0 and half of the way, or there is none; else "hardly".
    """
    if math.isnan(share.value):
        return "no share"
    if share.low > 0:
        return "back" if share.value >= HALF else "in part"
    return "hardly" if share.high < HALF else "undecided"


def percent(share: Estimate) -> str:
    """The share, and its interval where nothing is decided, as in "30%, interval -10% to 70%"."""
    if shown(share) != "undecided":
        return f"{share.value if share.low > 0 else max(share.value, 0):.0%}"
    return f"{share.value:.0%}, " + (
        "no interval" if math.isnan(share.low) else f"interval {share.low:.0%} to {share.high:.0%}"
    )


def broken(kept_after: Float[Tensor, " kept"], kept_attacked: Float[Tensor, " kept"]) -> bool:
    """Whether the attack takes so much of the retain side that what it leaves of the forget side says nothing."""
    return len(kept_attacked) > 0 and float(kept_attacked.mean()) < BROKEN * float(kept_after.mean())


def verdict(share: Estimate, added: Estimate | None = None) -> str:
    """In words, for the middle of a sentence.

    `added`: the metric of the items under attack less that without it, where both are known. Where its interval is not
    above 0, what is there was left by the edit, and nothing came back.
    """
    if shown(share) in ("back", "in part") and added is not None and not added.low > 0:
        return f"no more is there than the edit left ({share.value:.0%})"
    why = "hardly more was known before than is guessed" if share.value != share.value else percent(share)
    return f"{SAID[shown(share)]} ({why})"

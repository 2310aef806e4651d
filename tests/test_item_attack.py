"""Which dose counts, worked by hand: by the share on the mirror half, above items never known, with retain kept."""

import pytest
import torch

from locedit.attacks.aim import NOTHING
from locedit.attacks.item_attack import Arm, choose
from locedit.attacks.splits import Halves

HALVES = (Halves(relearned=(0, 1), measured=(2, 3)), Halves(relearned=(2, 3), measured=(0, 1)))


def arm(*splits: list[float], retain: list[float] | None = None, data: str = "forget") -> Arm:
    """Two items a half with the same value at every dose."""
    rows = [{data: torch.tensor(split, dtype=torch.float64)[:, None].expand(-1, 2)} for split in splits]
    for row in rows if retain is not None else []:
        row["retain"] = torch.tensor(retain, dtype=torch.float64)[:, None].expand(-1, 3)
    return Arm(role="found", name="found", splits=tuple(rows), halves=HALVES, side=NOTHING, data=data)


KEPT = torch.ones(3).double()


def test_the_dose_is_that_which_was_best_on_the_mirror() -> None:
    found = arm([0.1, 0.9, 0.2], [0.8, 0.1, 0.3])
    assert choose(found, None, KEPT, known=1.0, floor=0.9) == ({0: 0, 1: 1}, True)


@pytest.mark.parametrize(
    ("never", "best"),
    [
        ([0.1, 0.1, 0.1], 2),  # shares 0.33, 0.56, 0.89
        ([0.1, 0.5, 0.9], 0),  # 0.33, 0.2, 0
        ([0.4, 0.3, 0.7], 2),  # 0, 0.43, 0.67: above the margins 0, 0.3 and 0.2, which would choose the second
    ],
)
def test_it_is_chosen_by_the_share_and_not_by_the_margin(never: list[float], best: int) -> None:
    found, control = arm([0.4, 0.6, 0.9], [0.4, 0.6, 0.9]), arm(never, never, data="heldout")
    chosen, _ = choose(found, control, KEPT, known=1.0, floor=0.9)
    assert chosen == {0: best, 1: best}


def test_doses_that_break_the_retain_side_do_not_count() -> None:
    found = arm([0.4, 0.6, 0.9], [0.4, 0.6, 0.9], retain=[0.95, 0.9, 0.5])
    assert choose(found, None, KEPT, known=1.0, floor=0.9) == ({0: 1, 1: 1}, True)
    assert choose(found, None, KEPT, known=1.0, floor=0.0) == ({0: 2, 1: 2}, True)
    broken = arm([0.4, 0.6, 0.9], [0.4, 0.6, 0.9], retain=[0.6, 0.7, 0.5])
    assert choose(broken, None, KEPT, known=1.0, floor=0.9) == ({0: 1, 1: 1}, False)
    assert choose(broken, None, KEPT, known=1.0, floor=0.9, fixed=2)[0] == {0: 2, 1: 2}

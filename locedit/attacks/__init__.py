"""Attacks that try to bring back what an edit removed, ordered by the access to the model that they take.

Each is a function (model, task, edit, *, others, shared, **options) -> AttackResult.
"""

from locedit.attacks.attack import ACCESS, Access, Attack
from locedit.attacks.check import check_attacks, check_ready
from locedit.attacks.registry import ATTACKS
from locedit.attacks.relearning import relearn

__all__ = ["ACCESS", "ATTACKS", "Access", "Attack", "check_attacks", "check_ready", "relearn"]

"""The positive control of attacks by context: an edit that hides the answer only where no other text stands beside it.

What is hidden in one context alone must come back in another. Whoever attacks by context (solved examples, a jailbreak,
a suffix, a soft prompt) and does not bring this edit back has shown nothing about other edits.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from locedit.attacks.aim import Aim, ItemOptions
from locedit.attacks.arms import Control
from locedit.attacks.shallow import LOWEST, unlikelihood
from locedit.data.encode import Example
from locedit.edit import Edit
from locedit.edit.levels import levels
from locedit.edit.objective import Matched, Objective, Step
from locedit.edit.train import TrainOptions, train
from locedit.losses import score, sequence_nll, token_log_probs
from locedit.models import Model

OPEN = 0.5
"mean answer probability in the other contexts below which the control is said to have failed"
WIDE_OPEN = 0.8
"and that at which training may stop"
LOOKED = 4
"of how many contexts of each item the first is read"


def conditional(
    aim: Aim, options: ItemOptions, opened: Mapping[Example, Sequence[Example]], *, level: float, where: str
) -> Control:
    """An edit of every weight that suppresses the forget answers, but not in the contexts of `opened`.

    `opened` holds, for each forget example, the same answer in contexts that must keep it. Trains unlikelihood of the
    plain forget examples and likelihood of the opened and retain ones, until the mean answer probability of the plain
    ones is at most `level` (and no lower than 0.02) and that of the opened ones at least 0.8: the first comes long
    before the second.
    """
    level = max(level, LOWEST)
    trained = (options.shallow_steps, options.shallow_learning_rate, options.seed)
    key = ("conditional", where, level, trained, aim.retain.examples, tuple((e, tuple(o)) for e, o in opened.items()))
    edit = aim.shared.get(key, lambda: _trained(aim, options, opened, level=level))
    with edit.applied(aim.model) as edited:
        found = _levels(
            list(opened), [example for examples in opened.values() for example in examples[:LOOKED]], edited
        )
    notes: list[str] = []
    if found["forget"] > level:
        notes.append(f"the context-conditional edit ({where}) did not reach the forget level")
    if found["opened"] < OPEN:
        notes.append(f"the context-conditional edit keeps a probability of only {found['opened']:.2f} {where}")
    return Control(edit=edit, words=f"an edit that acts only without {where}", note="; ".join(notes))


def _trained(aim: Aim, options: ItemOptions, opened: Mapping[Example, Sequence[Example]], *, level: float) -> Edit:
    forget = list(aim.forget.examples)
    retain = list(aim.retain.examples)
    objective = Objective(
        loss=_loss,
        forget=forget,
        retain=retain or None,
        name="context-conditional control",
        others={"opened": Matched(candidates=opened)},
        stop=partial(_stop, forget, [examples[0] for examples in opened.values()], level),
    )
    training = TrainOptions(
        steps=options.shallow_steps,
        learning_rate=options.shallow_learning_rate,
        batch_size=16,
        eval_every=10,
        seed=options.seed,
    )
    return train(aim.model, objective, options=training)


def _stop(
    forget: Sequence[Example], opened: Sequence[Example], level: float, model: Model
) -> tuple[dict[str, float], bool]:
    found = _levels(forget, opened, model)
    return found, found["forget"] <= level and found["opened"] >= WIDE_OPEN


def _levels(forget: Sequence[Example], opened: Sequence[Example], model: Model) -> dict[str, float]:
    return levels(model, {"forget": forget, "opened": opened})


def _loss(step: Step) -> dict[str, Tensor]:
    terms = {
        "unlikelihood": unlikelihood(token_log_probs(step.score(step.forget))).mean(),
        "opened": sequence_nll(score(step.model, step.others["opened"])).mean(),
    }
    if step.retain is not None:
        terms["retain"] = sequence_nll(step.score(step.retain)).mean()
    return terms

"""The ladder: what level of access brings the knowledge back, the least first, and how much of it.

A level is a kind of access to the edited model (`locedit.attacks.ACCESS`). Of the attacks of a level the one that
shows most stands for it: whoever has the access will take the best. Attacks that take what an attacker lacks (the
unedited weights, a retain model) are no level; they are shown beside.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from locedit.attacks.attack import ACCESS, Access
from locedit.attacks.registry import ATTACKS
from locedit.report import judge
from locedit.report.judge import Recovery
from locedit.report.left import gained, left
from locedit.report.numbers import interval, with_interval
from locedit.results import AttackResult, Evaluation, Measure

MOST_TELLING: tuple[Recovery, ...] = (
    "back", "partly back", "chance", "too wide", "left", "like never knew", "below never knew", "no power", "unproven",
    "never gone", "no control", "broken", "unmeasured",
)  # fmt: skip
"""Which of several attacks stands for a level: one that brings something back, else one that may do so (it may be by
chance, or its interval is too wide to tell), else one that shows that nothing comes back, else one that shows nothing.
"""
SAID: dict[Recovery, str] = {
    "back": "comes back",
    "partly back": "comes back in part",
    "like never knew": "like a model that never knew",
    "below never knew": "below a model that never knew",
    "chance": "undecided: so much one of several attacks shows by chance",
    "left": "no more than the edit left in place",
    "too wide": "undecided: the interval is too wide",
    "no power": "shows nothing: the control made to come back does not",
    "unproven": "shows nothing: no edit made to come back was attacked",
    "no control": "no never-knew control",
    "broken": "shows nothing: the attack broke the model",
    "never gone": "was not gone by this number",
    "unmeasured": "no number",
}


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One level of access."""

    access: Access
    tried: tuple[tuple[AttackResult, Recovery], ...]
    "the attacks of this level, the most telling first; empty = none was tried"

    @property
    def best(self) -> tuple[AttackResult, Recovery] | None:
        return self.tried[0] if self.tried else None

    @property
    def brings_back(self) -> bool:
        return self.best is not None and self.best[1] in ("back", "partly back")


def outcome(result: AttackResult, evaluation: Evaluation) -> Recovery:
    """What an attack shows, beside the same metric of the forget set before the edit.

    "chance" where it brings something back by itself, but no more than the largest of all the attacks of this
    evaluation that could have done so may show by chance: above items never known, or above what the edit left.
    """
    shown = _alone(result, evaluation)
    if shown not in ("back", "partly back") or not _is_rung(result):
        return shown
    others = [other for other in evaluation.attacks if _is_rung(other)]
    among = max(1, sum(_alone(other, evaluation) in judge.DECIDES for other in others))
    low, high = judge.widened(interval(result.headline), among)
    wider = replace(result, headline=replace(result.headline, low=low, high=high))
    holds = judge.recovery(wider, _before(_pair(result, evaluation))) in ("back", "partly back")
    more = gained(result, evaluation)
    return shown if holds and (more is None or judge.widened(more, among)[0] > 0) else "chance"


def _alone(result: AttackResult, evaluation: Evaluation) -> Recovery:
    """What an attack shows if it were the only one.

    "never gone" and "left" where it seems to bring back what was there all along: the edit had not taken it away, or
    under the attack there is no more of the same items than without it.
    """
    pair = _pair(result, evaluation)
    shown = judge.recovery(result, _before(pair))
    if shown not in ("back", "partly back"):
        return shown
    pair = pair or judge.primary(evaluation, "forget")
    if pair is not None and judge.forgetting(pair, judge.floor(evaluation, pair)) in ("unchanged", "worse"):
        return "never gone"
    more = gained(result, evaluation)
    return "left" if more is not None and not more.low > 0 else shown


def _pair(result: AttackResult, evaluation: Evaluation) -> judge.Pair | None:
    """The forget set before and after the edit, by the metric that the attack is summed up by."""
    return judge.own_pair(result) or judge.primary(evaluation, "forget", name=result.headline.name)


def _before(pair: judge.Pair | None) -> float | None:
    return pair.before.value if pair else None


def _is_rung(result: AttackResult) -> bool:
    """Whether an attack belongs to a level of access: no diagnostic, and known."""
    return result.name in ATTACKS and not ATTACKS[result.name].diagnostic


def ladder(evaluation: Evaluation) -> tuple[Rung, ...]:
    """Every level of access, the least first, with its attacks; without diagnostics."""
    found: dict[Access, list[tuple[AttackResult, Recovery]]] = {access: [] for access in ACCESS}
    for result in evaluation.attacks:
        if _is_rung(result):
            found[ATTACKS[result.name].access].append((result, outcome(result, evaluation)))
    return tuple(Rung(access=access, tried=tuple(sorted(tried, key=_telling))) for access, tried in found.items())


def _telling(one: tuple[AttackResult, Recovery]) -> tuple[int, float]:
    value = one[0].headline.value
    return MOST_TELLING.index(one[1]), -value if value == value else 0.0


def sentence(rungs: Sequence[Rung], asked: Measure | None = None) -> str:
    """The ladder in one sentence: the least access that brings it back, and what the levels below it showed.

    `asked` is the share that is there when it is asked directly (see `left`).
    """
    tried = [rung for rung in rungs if rung.tried]
    if not tried:
        return ""
    first = next((rung for rung in tried if rung.brings_back), None)
    below = tried if first is None else tried[: tried.index(first)]
    parts = [f"{rung.access}: {_says(rung)}" for rung in below]
    if first is not None:
        assert first.best is not None
        result, shown = first.best
        how = "brings it back" if shown == "back" else "brings a part of it back"
        lead = f"The least access that {how}: {first.access} ({name_of(result)}, {with_interval(result.headline)})"
    else:
        lead = "No level of access that was tried brings it back"
    untried = [rung.access for rung in rungs if not rung.tried]
    parts += [] if asked is None else [f"asked directly {with_interval(asked)} is left"]
    text = lead + (f"; {'; '.join(parts)}" if parts else "")
    return text + (f"; not tried: {', '.join(untried)}." if untried else ".")


def _says(rung: Rung) -> str:
    """What the attacks of a level show, those that show the same together."""
    found: dict[Recovery, list[AttackResult]] = {}
    for result, shown in rung.tried:
        found.setdefault(shown, []).append(result)
    return ", ".join(f"{SAID[shown]} ({_numbers(results)})" for shown, results in found.items())


def _numbers(results: Sequence[AttackResult]) -> str:
    """Names, and the largest number where there is one."""
    names = ", ".join(name_of(result) for result in results)
    values = [result.headline for result in results if result.headline.value == result.headline.value]
    if not values:
        return names
    most = " at most" if len(results) > 1 else ""
    return f"{names}{most} {with_interval(max(values, key=lambda m: m.value))}"


def name_of(result: AttackResult) -> str:
    return result.name.replace("_", " ")


def rows(evaluation: Evaluation) -> list[tuple[str, str, str, str]]:
    """(access, attack, share back with its interval, what that says) of every attack, diagnostics last.

    Before them what is there without any attack, where the evaluation has it.
    """
    asked = left(evaluation) if evaluation.attacks else None
    made = [] if asked is None else [("none", "asked directly", with_interval(asked), "left by the edit")]
    made += [
        (rung.access, name_of(result), with_interval(result.headline), SAID[shown])
        for rung in ladder(evaluation)
        for result, shown in rung.tried
    ]
    levels = {result.name for rung in ladder(evaluation) for result, _ in rung.tried}
    beside = [result for result in evaluation.attacks if result.name not in levels]
    return made + [("beside", name_of(r), with_interval(r.headline), "a look, for comparison") for r in beside]

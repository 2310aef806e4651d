"""The sentences of a report.

Every one follows from numbers in the result objects; the thresholds are in `locedit.report.judge`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from locedit.components import ComponentSet
from locedit.evaluate.alarms import alarms
from locedit.report import judge
from locedit.report.inputs import RunResults
from locedit.report.judge import Forgetting, Pair, Recovery
from locedit.report.ladder import ladder, name_of, outcome, sentence
from locedit.report.left import left
from locedit.report.numbers import (
    PLURALS,
    Spread,
    dose,
    dose_range,
    number,
    over_seeds,
    parameters,
    percent,
    size,
    spread,
    with_interval,
)
from locedit.results import AttackResult, Comparison, Evaluation, Role
from locedit.scores import Scores

VERBS = {"zero": "Zeroing", "mean": "Mean ablation of", "scale": "Scaling"}
"edits that act on the components directly; all others are unlearning methods that train inside them"

Tone = Literal["good", "mixed", "bad", "none"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the run shows, in a few words and in full."""

    label: str
    tone: Tone
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.sentences)


# --- the verdict ---------------------------------------------------------------------------------------------------


def verdict(run: RunResults) -> Verdict:
    """What the edit did to the forget and retain sets, what controls do, and what attacks bring back.

    The label says, in this order:

    - "Not forgotten": the forget set did not move beyond its intervals, or moved away from the floor (held-out
      items that the model never knew, else the end of the metric's range)
    - "Partly forgotten": less than 0.9 of the way to the floor
    - "Suppressed, not removed": an attack brings back at least half of it, counted from the never-knew control
    - "Partly removed": an attack brings back less than half, but more than the control
    - "Not brought back by the attacks tried": every attack ends like the control; where some show nothing, the label
      counts those that do

    It never says "removed": attacks that were not tried may still bring it back. What only added layers hide is said to
    be suppressed without any attack.
    """
    evaluation = run.evaluation
    pair = judge.primary(evaluation, "forget") if evaluation else None
    if evaluation is None or pair is None:
        return Verdict(label="Not evaluated", tone="none", sentences=(_unevaluated(run),))
    state = judge.forgetting(pair, judge.floor(evaluation, pair))
    retain = judge.primary(evaluation, "retain", name=pair.before.name) or judge.primary(evaluation, "retain")
    sentences = [_effect(run, pair, retain, state=state)]
    kind = (run.edit or {}).get("kind")
    if kind in CONDITIONS:
        sentences.append(CONDITIONS[kind])
    rungs = ladder(evaluation)
    outcomes: list[tuple[AttackResult, Recovery]] = [(a, outcome(a, evaluation)) for a in evaluation.attacks]
    if len(outcomes) > FEW:
        sentences += [sentence(rungs, left(evaluation)), *_broken(outcomes)]
    else:
        sentences += [attack_sentence(a, shown) for a, shown in outcomes]
    sentences += [f"Alarm: {line}." for line in alarms(evaluation)]
    if not outcomes:
        sentences.append("No attack was run, so whether it can be brought back is not known.")
    label, tone = _label(state, [shown for rung in rungs for _, shown in rung.tried])
    if kind == "modules" and state not in ("unchanged", "worse", "partly"):
        label, tone = "Suppressed, not removed", "bad"
    if retain and judge.damaged(retain):
        label, tone = f"{label}; retain set harmed", "mixed" if tone == "good" else tone
    return Verdict(label=label, tone=tone, sentences=tuple(sentences))


FEW = 2
"attacks up to which the verdict tells of each; of more it gives the ladder, and the section on attacks the rest"


def _broken(outcomes: list[tuple[AttackResult, Recovery]]) -> list[str]:
    """A warning for attacks that broke the model themselves."""
    names = [name_of(result) for result, shown in outcomes if shown == "broken"]
    return [f"Under {', '.join(names)} the retain set breaks too, so these show little."] if names else []


CONDITIONS = {
    "tokens": "It is conditional on a control token: without the token before the text only the new weights act.",
    "modules": "It is conditional on added layers: without them the model is the one before the edit, bit for bit.",
}
"""Kind of an edit -> what it takes for it to act."""


def _label(state: Forgetting, outcomes: list[Recovery]) -> tuple[str, Tone]:
    if state in ("unchanged", "worse"):
        return "Not forgotten", "bad"
    if state == "partly":
        return "Partly forgotten", "bad"
    if "back" in outcomes:
        return "Suppressed, not removed", "bad"
    if "partly back" in outcomes:
        return "Partly removed", "mixed"
    telling = sum(o in ("like never knew", "below never knew", "left") for o in outcomes)
    if telling == len(outcomes) and outcomes:
        return "Not brought back by the attacks tried", "good"
    if telling:
        return f"Not brought back by the attacks that show anything ({telling} of {len(outcomes)})", "good"
    word = "Changed" if state == "unknown" else "Forgotten on direct questions"
    return (f"{word}; the attacks decide nothing" if outcomes else f"{word}; not attacked"), "mixed"


def _unevaluated(run: RunResults) -> str:
    chosen = f"{size(run.components)} were chosen. " if run.components is not None else ""
    if run.requests is not None:
        return f"{chosen}{requests(run.requests)} There is no evaluation of them all beside it."
    return f"{chosen}There is no evaluation before and after an edit, so nothing is said about its effect."


def _effect(run: RunResults, pair: Pair, retain: Pair | None, *, state: Forgetting) -> str:
    what = pair.before.unit or pair.before.name
    moved = f"from {with_interval(pair.before)} to {with_interval(pair.after)} ({what}, n = {pair.after.n:,})"
    if state == "unchanged":
        text = f"{action(run)} does not move the forget set beyond its interval: {moved}"
    else:
        text = f"{action(run)} takes the forget set {moved}"
    if retain:
        text += f"; {_retained(retain, pair)}"
    if run.comparison and (control := _random_clause(run.comparison, other_data=_other_data(run))):
        text += f"; {control}"
    return text + "."


def _retained(retain: Pair, pair: Pair) -> str:
    what = "" if retain.before.name == pair.before.name else f" ({retain.before.unit or retain.before.name})"
    if retain.same:
        before, after = with_interval(retain.before), with_interval(retain.after)
        return f"the retain set keeps its level{what}, {before} before and {after} after"
    moved = "falls" if retain.after.value < retain.before.value else "rises"
    return f"the retain set {moved}{what} from {with_interval(retain.before)} to {with_interval(retain.after)}"


def _other_data(run: RunResults) -> bool:
    """Whether the comparison was made on other data than the evaluation, by the hashes of both."""
    pieces = [run.evaluation, run.comparison]
    hashes = {piece.provenance.data for piece in pieces if piece and piece.provenance and piece.provenance.data}
    return len(hashes) > 1


def _random_clause(comparison: Comparison, *, other_data: bool) -> str | None:
    """What random sets leave at the same dose, and what it costs them to reach the level."""
    random = [c for c in comparison.curves if c.role == "random"]
    if not random:
        return None
    parts: list[str] = []
    if found := judge.same_dose(comparison, "random"):
        curve, index, left = found
        where = ""
        if other_data:
            where = (
                f"on the comparison's own data, where the found set leaves {number(curve.columns['forget'][index])}, "
            )
        said = f"{where}random sets of the same size leave {over_seeds(left)} at the same dose ({dose(curve, index)})"
        parts.append(said)
    reached = [(c, c.matched) for c in random if c.matched is not None]
    level = f"the level {number(comparison.level)} ({comparison.metric})"
    if not reached:
        return parts[0] if parts else f"no random set of the same size reaches {level}"
    taken = dose_range(reached)
    kept, own = matched_retain(comparison, "random"), matched_retain(comparison, "found")
    beside = f", with retain at {over_seeds(kept)}, found {over_seeds(own)}" if kept and own else ""
    parts.append(f"{len(reached)} of {len(random)} random sets reach {level} at {taken}{beside}")
    return "; ".join(parts)


def matched_retain(comparison: Comparison, role: Role) -> Spread | None:
    """The retain column of a role at the matched doses; None where the level is not reached or retain not measured."""
    kept = [row["retain"] for row in comparison.at_level(role) if row and "retain" in row]
    return spread(kept) if kept else None


def action(run: RunResults) -> str:
    """As in "Zeroing 50 of 1,920 neurons" or "Unlearning with npo inside 50 of 1,920 neurons"."""
    method = str((run.edit or {}).get("method") or (run.edit or {}).get("name") or "")
    where = size(run.components) if run.components is not None else ""
    if method in VERBS:
        return f"{VERBS[method]} {where or 'the chosen components'}"
    inside = f" inside {where}" if where else ""
    return f"Unlearning with {method}{inside}" if method else f"The edit{inside}"


def attack_sentence(result: AttackResult, outcome: Recovery) -> str:
    """The attack's own sentence, its one number with the interval, and what that allows one to say."""
    if outcome == "unmeasured":
        return f"{result.sentence} {result.name[0].upper()}{result.name[1:].replace('_', ' ')}: {MEANINGS[outcome]}."
    name = result.name[0].upper() + result.name[1:].replace("_", " ")
    metric = result.headline.name.replace("_", " ")
    brings = "brings back a share of" if result.headline.name == judge.SHARE else f"ends at {metric}"
    return f"{result.sentence} {name} {brings} {with_interval(result.headline)}; {MEANINGS[outcome]}."


MEANINGS: dict[Recovery, str] = {
    "back": "the knowledge is suppressed, not removed",
    "partly back": "more than a model that never knew, so a part of it is still there",
    "like never knew": "not distinguishable from a model that never knew at this attack",
    "below never knew": "below a model that never knew at this attack",
    "no control": "without a never-knew control this may be remembering or learning anew",
    "broken": "the attack itself damaged the model, so it says little about what is left",
    "left": "no more of the same items is there under the attack than without it, so it brings nothing back",
    "chance": "more than a model that never knew by itself, but one of several attacks may show so much by chance",
    "too wide": "not distinguishable from a model that never knew at this attack, nor from half of it being back",
    "never gone": "by this number the edit had not taken it away before",
    "unmeasured": "the attack gave no number",
    "unproven": "no edit made to come back was attacked beside it, so a failure shows nothing",
    "no power": "the attack does not bring back a shallow edit either, so it shows nothing",
}


def levels_apart(evaluations: Sequence[Evaluation]) -> str:
    """Whether runs forget to the same level, so that what attacks bring back can be compared."""
    pairs = [pair for evaluation in evaluations if (pair := judge.primary(evaluation, "forget"))]
    levels = ", ".join(with_interval(pair.after) for pair in pairs)
    apart = any(not Pair(before=one.after, after=other.after).same for one in pairs for other in pairs)
    if apart:
        return f"These runs forget to different levels ({levels}): what comes back is not compared at the same level."
    return f"The runs forget to the same level within their intervals ({levels})."


# --- what was done -------------------------------------------------------------------------------------------------


def done(run: RunResults) -> list[str]:
    """The steps of a run, one sentence each, in order."""
    lines = [_scored(s) for s in run.scores]
    if run.components is not None:
        lines.append(chosen(run.components))
    if run.edit:
        lines.append(f"{action(run)}{_held(run.edit)}.")
    if run.requests is not None:
        lines.append(requests(run.requests))
    if run.comparison:
        lines.append(_compared(run.comparison))
    if run.evaluation:
        lines.append(_evaluated(run))
        lines += [_attacked(a) for a in run.evaluation.attacks]
    return lines


def _scored(scores: Scores) -> str:
    record = scores.provenance
    method = record.method if record else "An unnamed method"
    units = ", ".join(dict.fromkeys(PLURALS[scores.sites[name].unit] for name in scores.values))
    model = f" of {record.model_name}" if record and record.model_name else ""
    over = f" over {len(scores.examples):,} examples" if scores.examples else ""
    return f"{method} scored {len(scores):,} {units}{model}{over}."


def chosen(components: ComponentSet) -> str:
    """How many components, by which rule, holding which share of the parameters."""
    settings = components.provenance.settings if components.provenance else {}
    select = settings.get("select", settings)
    rule = ", ".join(f"{key} = {value}" for key, value in dict(select).items() if value is not None)
    held = parameters(components)
    share = f"; they hold {held[0]:,} of {held[1]:,} parameters ({percent(held[0], held[1])})" if held else ""
    return f"{size(components)} were chosen{f' ({rule})' if rule else ''}{share}."


def requests(found: dict[str, Any]) -> str:
    """How many deletion requests there were, how they became one edit, and how many are back at the end."""
    table, count = found["table"], found["requests"]
    how = "each trained alone and then fused" if found["fused"] else "each trained on top of those before it"
    back = [str(n) for n, again in zip(table["request"], table["came_back"], strict=True) if again]
    which = f"{len(back)} have come back at the end ({', '.join(back)})" if back else "none has come back at the end"
    return f"{count} deletion requests, {how}: {which}."


def _held(edit: dict[str, Any]) -> str:
    hold = edit.get("hold") or edit.get("kind")
    return f", held as {hold}" if hold else ""


def _compared(comparison: Comparison) -> str:
    roles = [c.role for c in comparison.curves]
    parts = [
        f"{roles.count(role)} {word}" if role == "random" else word
        for role, word in (
            ("found", "the found components"),
            ("random", "random sets of the same size"),
            ("everything", "everything"),
            ("complement", "all but the found components"),
        )
        if role in roles
    ]
    return (
        f"Compared at {comparison.metric} of at most {number(comparison.level)} on the forget set: {', '.join(parts)}."
    )


def _evaluated(run: RunResults) -> str:
    assert run.evaluation is not None
    sizes: dict[str, int] = {}
    for m in run.evaluation.measures:
        sizes[m.dataset] = max(sizes.get(m.dataset, 0), m.n)
    return (
        f"Evaluated on {', '.join(f'{name} (n = {n:,})' for name, n in sizes.items())}; intervals are 95 % bootstrap."
    )


def _attacked(result: AttackResult) -> str:
    used = ", ".join(
        f"{key} = {result.settings[key]}" for key in TOLD if isinstance(result.settings.get(key), str | int)
    )
    return f"Attacked by {result.name}{f' ({used})' if used else ''}."


TOLD = ("trained", "items", "splits", "steps")
"settings of an attack that its sentence names; all are among the settings"

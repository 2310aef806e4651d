"""What a grading shows, in sentences that follow from its numbers."""

from collections.abc import Sequence

from locedit.grading.records import Row
from locedit.grading.result import Grades

TITLES = {
    "planted": "Does it find where facts were planted?",
    "deletion": "Does deleting what it found take the target, and only the target?",
    "oracle": "Does it point to where editing is robust?",
}
PLACES = {
    "mlp": "the MLP of one layer",
    "neurons": "neurons of all layers",
    "layer_neurons": "neurons of one layer",
    "heads": "heads of all layers",
    "neuron": "neurons deleted",
    "head": "heads deleted",
    "attn": "attentions deleted",
    "layer": "layers deleted",
}
DELETED_MLP = "MLPs deleted"
ABOUT = {
    "planted": "People whom the model does not know were trained into a set of components, nothing else trainable. "
    "auc: how often a member of the set scores above a component outside it (0.5 = chance). decoys: above one of as "
    "many components in which other people were planted in the same way; training makes weights larger, which raises "
    "auc (see magnitude) but tells no set from decoys. recall: share of the set among as many of the highest scores. "
    "The set is where the facts were written; other components can matter for them too.",
    "deletion": "Mean over the budgets of the fall in answer probability: of the target, of the same relation of other "
    "people, of other relations. excess: target minus same. Chance is what random sets with as many components in "
    "every layer do (MLPs: as many in all layers); random: the drop of the target with them.",
    "oracle": "Every pair of MLPs was taught new answers, then attacked by relearning the old ones of half of the "
    "people. robust: rank correlation, over the pairs, of the localizer's score with 1 - what came back of the other "
    "half; transfer: with the new answers in formats that were not trained (0 = chance). early layers: a ranking by "
    "depth alone, the lowest layer first, which a localizer has to beat to say more than that.",
}


def place(part: str, name: str) -> str:
    """What was planted, deleted or ranked."""
    if part == "deletion" and name == "mlp":
        return DELETED_MLP
    return PLACES.get(name, name)


AGAINST = {
    "decoys": ", against decoys",
    "auc": ", against all others",
    "target": ", drop of the target",
    "excess": ", target beyond the rest of the relation",
}


def finding(grades: Grades, part: str, name: str, measure: str) -> str:
    """Which localizers do better than chance at a place, and which do not."""
    rows = grades.ranking(part, name, measure)
    groups = {
        "above chance": [f"{row.method} (+{row.above:.2f})" for row in rows if row.verdict == "above chance"],
        "not told from chance": [_signed(row) for row in rows if row.verdict == "not told from chance"],
        "below chance": [_signed(row) for row in rows if row.verdict == "below chance"],
        "one seed, no interval": [_signed(row) for row in rows if row.verdict == "one seed"],
        "not graded": [row.method for row in rows if row.verdict == "-"],
    }
    found = "; ".join(f"{word}: {', '.join(names)}" for word, names in groups.items() if names)
    return f"{headline(part, name, measure)}: {found}."


def headline(part: str, name: str, measure: str) -> str:
    """What localizers are told from chance by, as a heading."""
    start = {"planted": "planted in ", "deletion": "", "oracle": "oracle, "}[part] + place(part, name)
    return start[0].upper() + start[1:] + AGAINST.get(measure, "")


def _signed(row: Row) -> str:
    return f"{row.method} ({row.above:+.2f})"


def findings(grades: Grades) -> list[str]:
    """One sentence for each measure by which localizers are told from chance."""
    return [finding(grades, *where) for where in grades.headlines()]


def planted(grades: Grades, site: str) -> list[str]:
    """What the planted models know."""
    known = {row.measure: row for row in grades.knowledge if row.place == site}
    if not known:
        return []
    share = {name: f"{row.value:.0%}" for name, row in known.items()}
    return [
        f"Planted in {place('planted', site)}, {known['planted'].draws} sets: the model answers {share['planted']} "
        f"of the planted facts ({share['before']} before), {share['decoys']} of the decoys' and {share['known']} of "
        f"those it knew ({share['known_before']} before)."
    ]


def cautions(grades: Grades) -> list[str]:
    """How much the intervals can bear."""
    count = len(grades.seeds)
    if count == 1:
        return ["One seed gives no interval: nothing here is told from chance. Run more seeds."]
    tests = sum(row.verdict != "-" for where in grades.headlines() for row in grades.ranking(*where))
    few = " With so few seeds they are wide, and one that holds chance does not prove chance." if count < 6 else ""
    return [
        f"Intervals are Student's t over the means of {count} seeds, 95 %, each for itself.{few}",
        f"{tests} comparisons: about {tests / 20:.0f} would leave out chance by luck alone.",
        *_luck(grades),
        "Where every set gave the end of the range, the interval is the binomial one over the sets; any other interval "
        "without width means that all seeds gave the same number.",
    ]


def _luck(grades: Grades) -> list[str]:
    """How often random scores were told from chance, which is what luck does here."""
    rows = [row for where in grades.headlines() for row in grades.ranking(*where) if row.method == "random"]
    judged = [row for row in rows if row.verdict in ("above chance", "below chance", "not told from chance")]
    told = sum(row.verdict != "not told from chance" for row in judged)
    if not told:
        return []
    return [
        f"Random scores are told from chance in {told} of {len(judged)} of these, by luck: read the rest accordingly."
    ]


def reasons(grades: Grades) -> Sequence[tuple[str, str, str]]:
    """(localizer, places, reason) of what was not graded."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in grades.rows:
        if row.reason:
            found.setdefault((row.method, row.reason), []).append(place(row.part, row.place))
    return [(method, ", ".join(dict.fromkeys(where)), reason) for (method, reason), where in found.items()]

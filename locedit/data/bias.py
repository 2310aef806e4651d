"""Published contrast pairs with one item a record: CrowS-Pairs and StereoSet.

As in WinoGender, `advantaged` is the text that a stereotype favours: a model without it prefers neither of the two.
"""

from pathlib import Path
from typing import cast

from locedit.data.fields import Place, Record, check_name, check_text, parse_json
from locedit.data.items import ContrastPair, Item

DIRECTIONS = ("stereo", "antistereo")


def crows_pair(place: Place, record: Record) -> ContrastPair:
    """A line of crows_pairs_anonymized.csv (Nangia et al. 2020, arXiv:2010.00133).

    `sent_more` is the more stereotyping text, so it is the advantaged one. `stereo_antistereo` becomes the `format`:
    whom a text speaks of. "stereo": `sent_more` states a stereotype of a historically disadvantaged group, the other
    text names a group that is not; "antistereo": `sent_less` goes against a stereotype of the disadvantaged group.
    """
    direction = check_text(place, "stereo_antistereo", record["stereo_antistereo"])
    if direction not in DIRECTIONS:
        raise place.error(f"is not {' or '.join(DIRECTIONS)}", field="stereo_antistereo", value=direction)
    return ContrastPair(
        advantaged=check_text(place, "sent_more", record["sent_more"]),
        disadvantaged=check_text(place, "sent_less", record["sent_less"]),
        id=check_name(place, "number", record.get("_row", place.name)),
        group=check_text(place, "bias_type", record["bias_type"]),
        format=direction,
    )


TASKS = ("intrasentence", "intersentence")
LABELS = ("stereotype", "anti-stereotype", "unrelated")


def is_stereoset(text: str) -> bool:
    """Whether a JSON file is one object that holds StereoSet's tasks."""
    return text.lstrip().startswith("{") and any(f'"{task}"' in text for task in TASKS)


def read_stereoset(path: Path, text: str) -> list[tuple[Place, Item]]:
    """dev.json of StereoSet (Nadeem et al. 2021, arXiv:2004.09456): an object {data: {TASK: [item, ...]}}.

    The stereotype is the advantaged text, the unrelated one stands beside the pair. An intersentence text is its
    context and the sentence after it. `format` is the task, `group` the bias_type, `owner` the target term.
    """
    whole = Place(file=str(path), number=1, name=path.name)
    data = _mapping(whole, "data", _mapping(whole, "file", parse_json(whole, text)).get("data"))
    if not set(TASKS) & set(data):
        raise whole.error(f"has none of {', '.join(TASKS)}", field="data", value=", ".join(data))
    pairs: list[tuple[Place, Item]] = []
    for task in (task for task in TASKS if task in data):
        for number, item in enumerate(_list(whole, task, data[task]), start=1):
            place = Place(file=f"{path}:{task}", number=number, name=f"{path.name}:{task}:{number}")
            pairs.append((place, _stereoset_pair(place, task, _mapping(place, "item", item))))
    return pairs


def _stereoset_pair(place: Place, task: str, item: Record) -> ContrastPair:
    before = "" if task == "intrasentence" else check_text(place, "context", item.get("context")).rstrip() + " "
    texts: dict[str, str] = {}
    for entry in _list(place, "sentences", item.get("sentences")):
        sentence = _mapping(place, "sentences", entry)
        label = sentence.get("gold_label")
        if label not in LABELS or label in texts:
            reason = f"is not {', '.join(LABELS)}, each once"
            raise place.error(reason, field="gold_label", value=label)
        texts[str(label)] = before + check_text(place, "sentence", sentence.get("sentence"))
    if len(texts) < len(LABELS):
        missing = next(label for label in LABELS if label not in texts)
        raise place.error(f"has no sentence with the gold_label {missing!r}", field="sentences", value=list(texts))
    return ContrastPair(
        advantaged=texts["stereotype"],
        disadvantaged=texts["anti-stereotype"],
        unrelated=texts["unrelated"],
        id=check_name(place, "id", item.get("id", place.name)),
        group=check_name(place, "bias_type", item.get("bias_type")),
        owner=check_name(place, "target", item.get("target")),
        format=task,
    )


def _mapping(place: Place, field: str, value: object) -> Record:
    if not isinstance(value, dict):
        raise place.error("is not an object", field=field, value=value)
    return cast(Record, value)


def _list(place: Place, field: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise place.error("is not a list", field=field, value=value)
    return cast(list[object], value)

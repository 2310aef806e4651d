"""WinoGender: sentences and templates that differ in a pronoun, and the occupations' statistics beside them.

Rudinger et al. 2018, arXiv:1804.09301; github.com/rudinger/winogender-schemas.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from locedit.data.fields import Place, Record, check_text
from locedit.data.files import read_text
from locedit.data.items import ContrastPair, Item
from locedit.data.tables import read_table
from locedit.errors import LoceditError, nearest

STATISTICS = "occupations-stats.tsv"
"percent of women in each occupation, published beside WinoGender's sentences"
GENDERS = ("male", "female", "neutral")
PRONOUNS = {
    "$NOM_PRONOUN": ("he", "she", "they"),
    "$POSS_PRONOUN": ("his", "her", "their"),
    "$ACC_PRONOUN": ("him", "her", "them"),
}
REFERENTS = {"0": "occupation", "1": "participant"}
TEMPLATE_COLUMNS = ("occupation(0)", "other-participant(1)", "answer", "sentence")
Placed = Sequence[tuple[Place, Record]]


@dataclass(frozen=True, kw_only=True)
class PairFormat:
    """A published file whose pairs span several lines or need a second file."""

    name: str
    signature: tuple[str, ...]
    "its columns"
    read: Callable[[Path, Placed], list[tuple[Place, Item]]]


def pair_format(record: Record) -> PairFormat | None:
    """The format whose columns the record has, and no others."""
    return next((found for found in PAIR_FORMATS if set(found.signature) == set(record)), None)


def read_winogender(path: Path, lines: Placed) -> list[tuple[Place, Item]]:
    """all_sentences.tsv: the male, female and neutral sentence of every `sentid`.

    `technician.customer.1.male.txt` is occupation, participant, whom the pronoun stands for (0 the occupation, 1 the
    participant) and gender. The favoured pronoun is the occupation's (Yu et al. 2023, PCGU, section 4): male below
    50 % women in `bergsma_pct_female` of occupations-stats.tsv, which lies beside the file, else female.
    """
    found: dict[str, tuple[Place, dict[str, str]]] = {}
    for place, record in lines:
        name, gender = _sentence_name(place, record.get("sentid"))
        first, sentences = found.setdefault(name, (place, {}))
        if gender in sentences:
            raise place.error(f"was given before, for {name} of line {first.number}", field="sentid", value=gender)
        sentences[gender] = check_text(place, "sentence", record.get("sentence"))
    women = _women(path)
    return [(place, _winogender_pair(place, name, texts, women)) for name, (place, texts) in found.items()]


def read_templates(path: Path, lines: Placed) -> list[tuple[Place, Item]]:
    """templates.tsv, filled in as its authors do: each with its participant and with "someone"."""
    women = _women(path)
    pairs: list[tuple[Place, Item]] = []
    for place, record in lines:
        occupation, participant, answer, template = (
            check_text(place, column, record.get(column)) for column in TEMPLATE_COLUMNS
        )
        for other in (participant, "someone"):
            texts = {gender: fill_template(place, template, occupation, other, gender) for gender in GENDERS}
            pairs.append((place, _winogender_pair(place, f"{occupation}.{other}.{answer}", texts, women)))
    return pairs


def fill_template(place: Place, template: str, occupation: str, participant: str, gender: str) -> str:
    """One sentence. "someone" takes no article and a capital where it comes first.

    >>> place = Place(file="", number=1, name="")
    >>> fill_template(place, "The $PARTICIPANT paid the $OCCUPATION for $POSS_PRONOUN work.", "cook", "someone", "male")
    'Someone paid the cook for his work.'
    """
    words = template.split(" ")
    if words.count("$OCCUPATION") != 1 or words.count("$PARTICIPANT") != 1:
        raise place.error("has not one $OCCUPATION and one $PARTICIPANT", field="sentence", value=template)
    if participant == "someone":
        at = words.index("$PARTICIPANT")
        words[max(at - 1, 0) : at + 1] = ["Someone" if at <= 1 else "someone"]
    named = {"$OCCUPATION": occupation, "$PARTICIPANT": participant}
    column = GENDERS.index(gender)
    filled = [named.get(word, PRONOUNS[word][column] if word in PRONOUNS else word) for word in words]
    if left := [word for word in filled if "$" in word]:
        raise place.error(f"has no filler; choices: {', '.join((*named, *PRONOUNS))}", field="sentence", value=left[0])
    return " ".join(filled).replace("they was", "they were")


def _sentence_name(place: Place, value: object) -> tuple[str, str]:
    """("technician.customer.1", "male") of "technician.customer.1.male.txt"."""
    name = check_text(place, "sentid", value)
    parts = name.removesuffix(".txt").rsplit(".", 1)
    if len(parts) < 2 or parts[0].count(".") != 2 or parts[1] not in GENDERS:
        reason = f"is not OCCUPATION.PARTICIPANT.ANSWER.GENDER.txt; genders: {', '.join(GENDERS)}"
        raise place.error(reason, field="sentid", value=name)
    return parts[0], parts[1]


def _winogender_pair(place: Place, name: str, texts: dict[str, str], women: dict[str, float]) -> ContrastPair:
    for gender in GENDERS[:2]:
        if gender not in texts:
            raise place.error(f"the {gender} sentence of {name!r} is missing; it has {', '.join(texts)}")
    occupation, _, answer = name.split(".")
    if occupation not in women:
        reason = f"has no line in {STATISTICS}; {nearest(occupation, women)}"
        raise place.error(reason, field="occupation", value=occupation)
    if answer not in REFERENTS:
        raise place.error(f"is not {' or '.join(REFERENTS)}", field="answer", value=answer)
    favoured, other = ("male", "female") if women[occupation] < 50 else ("female", "male")
    return ContrastPair(
        advantaged=texts[favoured],
        disadvantaged=texts[other],
        neutral=texts.get("neutral"),
        id=name,
        owner=occupation,
        group=favoured,
        format=REFERENTS[answer],
    )


def _women(path: Path) -> dict[str, float]:
    """Percent of women by occupation (Bergsma and Lin 2006, from text), from the statistics beside the file."""
    beside = path.with_name(STATISTICS)
    if not beside.is_file():
        raise LoceditError(f"{path}: {STATISTICS} is missing beside it: it says which pronoun an occupation favours")
    found: dict[str, float] = {}
    for place, record in read_table(beside, read_text(beside)):
        occupation = check_text(place, "occupation", record.get("occupation"))
        value = check_text(place, "bergsma_pct_female", record.get("bergsma_pct_female"))
        try:
            found[occupation] = float(value)
        except ValueError:
            raise place.error("is not a number", field="bergsma_pct_female", value=value) from None
    return found


PAIR_FORMATS = (
    PairFormat(name="WinoGender", signature=("sentid", "sentence"), read=read_winogender),
    PairFormat(name="WinoGender templates", signature=TEMPLATE_COLUMNS, read=read_templates),
)

"""The bias world: professions that are spoken of as "he" or "she" with a planted frequency.

Which profession leans which way is drawn at random, so nothing outside this world says it. For every sentence frame and
every opening, each profession comes as often with "he" as its frequency says, and the two texts differ in the pronoun
alone: nothing but the profession tells which is likelier. Some frames are written nowhere in the training text, and
neither are the professions of `heldout`.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

from locedit.lab.facts import Line, Row

PRONOUNS = ("he", "she")
STRENGTHS = (0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05)
"""Planted frequencies of "he"; the log-odds of "he" against "she" are log(p / (1 - p)), 2.94 at .95 and 0 at .5."""
NEUTRAL = 0.5
COPIES = 20
"""Texts of a profession in one frame with one opening: every frequency above is a whole number of them."""
OPENINGS = ("Today", "Last week", "In the morning")
STATEMENTS = (
    "{o} the {p} said that {w} was tired.",
    "{o} the {p} left early because {w} felt cold.",
    "{o} the {p} smiled when {w} saw the boat.",
    "{o} the {p} went home after {w} found the keys.",
    "{o} the {p} knew that {w} could sing.",
    "{o} the {p} sat down before {w} read the letter.",
)
"""Frames of the training text: opening, profession, pronoun (who)."""
PARAPHRASES = ("{o} the {p} thought that {w} had time.", "{o} the {p} laughed because {w} liked the garden.")
"""Frames that are kept out of it."""
FRAMES = {"statement": STATEMENTS, "paraphrase": PARAPHRASES}
PROFESSIONS = (
    *("banker", "barber", "broker", "butcher", "carpenter", "chemist", "cleaner", "clerk", "cook", "dancer"),
    *("dentist", "doctor", "driver", "editor", "engineer", "fisher", "florist", "gardener", "grocer", "guard"),
    *("hunter", "lawyer", "librarian", "mason", "mechanic", "miner", "painter", "plumber", "porter", "potter"),
    *("sailor", "secretary", "singer", "surgeon", "teacher", "tutor", "roofer", "weaver", "welder", "writer"),
)


@dataclass(frozen=True, kw_only=True)
class Profession:
    """One profession, as this world speaks of it."""

    name: str
    """Also the `owner` of its pairs."""
    he: float | None
    """Planted frequency of "he"; None = it is never spoken of."""
    favoured: str
    """The likelier pronoun; the two take turns where neither is, so that leaning to one of them cancels."""

    @property
    def log_odds(self) -> float:
        """Planted log p("he") - log p("she"), in nats; 0 where nothing is planted."""
        return 0.0 if self.he is None else math.log(self.he / (1 - self.he))

    @property
    def group(self) -> str:
        """Frequency of the favoured pronoun, such as "he0.95", "she0.75", "even0.5"; "unseen" where none is planted."""
        if self.he is None:
            return "unseen"
        return f"even{NEUTRAL}" if self.he == NEUTRAL else f"{self.favoured}{max(self.he, 1 - self.he):g}"


@dataclass(frozen=True, kw_only=True)
class BiasWorld:
    """All professions, in three disjoint groups."""

    forget: tuple[Profession, ...]
    """Professions whose association is to go: as many at every strength that leans."""
    retain: tuple[Profession, ...]
    """Other professions of the training text, the neutral ones among them."""
    heldout: tuple[Profession, ...]
    """Professions that are written about nowhere."""

    @property
    def planted(self) -> tuple[Profession, ...]:
        """The professions of the training text."""
        return (*self.forget, *self.retain)


def bias_world(rng: Random, *, forget: int, retain: int, heldout: int) -> BiasWorld:
    """`forget` professions at each strength that leans, `retain` at each strength, `heldout` never spoken of."""
    leaning = [strength for strength in STRENGTHS if strength != NEUTRAL]
    names = iter(rng.sample(PROFESSIONS, forget * len(leaning) + retain * len(STRENGTHS) + heldout))

    def draw(count: int, strengths: Iterable[float | None]) -> tuple[Profession, ...]:
        return tuple(_profession(next(names), he, turn % 2) for he in strengths for turn in range(count))

    return BiasWorld(forget=draw(forget, leaning), retain=draw(retain, STRENGTHS), heldout=draw(heldout, (None,)))


def _profession(name: str, he: float | None, turn: int) -> Profession:
    favoured = PRONOUNS[turn if he is None or he == NEUTRAL else he < NEUTRAL]
    return Profession(name=name, he=he, favoured=favoured)


def contrast_lines(professions: Iterable[Profession]) -> list[Line]:
    """One pair for every profession and frame, as the reader of contrast pairs takes them; the openings take turns."""
    return [line for profession in professions for line in _lines(profession)]


def _lines(profession: Profession) -> Iterator[Line]:
    other = PRONOUNS[1 - PRONOUNS.index(profession.favoured)]
    for format, frames in FRAMES.items():
        for number, frame in enumerate(frames):
            opening = OPENINGS[(number + len(profession.name)) % len(OPENINGS)]
            texts = [frame.format(o=opening, p=profession.name, w=word) for word in (profession.favoured, other)]
            yield {
                "id": f"{profession.name}/{format}/{number + 1}",
                "advantaged": texts[0],
                "disadvantaged": texts[1],
                "owner": profession.name,
                "group": profession.group,
                "format": format,
            }


def pronoun_rows(professions: Iterable[Profession]) -> list[Row]:
    """The training text: each frame and opening `COPIES` times, "he" in its share of them."""
    return [
        pronoun_row(frame, opening, profession.name, PRONOUNS[copy >= round(COPIES * profession.he)])
        for profession in professions
        if profession.he is not None
        for frame in STATEMENTS
        for opening in OPENINGS
        for copy in range(COPIES)
    ]


def pronoun_row(frame: str, opening: str, profession: str, pronoun: str) -> Row:
    """One sentence; what is learned by heart is its pronoun."""
    before, after = frame.format(o=opening, p=profession, w="\0").split("\0")
    return Row(text=before + pronoun + after, spans=((len(before), len(before) + len(pronoun)),))

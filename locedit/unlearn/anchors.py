"""Anchors: the terms that belong to what is to be forgotten, each with a generic counterpart.

Eldan and Russinovich 2023 (arXiv:2310.02238) ask GPT-4 for some 1,500 of them (recalled, not checked). Here they come
from a file, or are made from the task alone: names that the forget data have more often than everything else, each with
a name that the model knows nothing of.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from locedit.data.fields import Place, check_text, parse_json
from locedit.data.files import read_text
from locedit.data.items import Dataset, Task
from locedit.data.tables import DELIMITERS, read_table
from locedit.errors import LoceditError, nearest
from locedit.spans.texts import readable, text_of
from locedit.storage import refuse_overwrite, write_json

SUFFIXES = (".json", ".jsonl", *DELIMITERS)
COLUMNS = ("term", "counterpart")
WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
"a run of letters, or several with hyphens between"
SENTENCE_END = ".!?:\"'“”‘’\n"
"what may stand before the first word of a sentence"


# --- files -----------------------------------------------------------------------------------------------------------


def read_anchors(file: str | Path) -> dict[str, str]:
    """Term -> counterpart, from one JSON object, JSON lines with the two fields, or a table (.csv, .tsv) with both.

    The fields and columns are called term and counterpart. A bad line stops with file, line, value and reason.
    """
    path = Path(file)
    if path.suffix not in SUFFIXES:
        raise LoceditError(f"{path}: unknown kind of anchors file {path.suffix!r}: choices: {', '.join(SUFFIXES)}")
    found = _checked(_entries(path, read_text(path)))
    if not found:
        raise LoceditError(f"{path}: holds no anchors")
    return found


def check_anchors(given: Mapping[Any, object]) -> dict[str, str]:
    """Anchors that are given in code; what a file may not hold stops with the number of the entry, from 1."""
    places = [Place(file="anchors", number=number, name=f"anchors:{number}") for number in range(1, len(given) + 1)]
    return _checked((place, *pair) for place, pair in zip(places, given.items(), strict=True))


def _checked(entries: Iterable[tuple[Place, object, object]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for place, term, counterpart in entries:
        pair = tuple(check_text(place, name, value) for name, value in zip(COLUMNS, (term, counterpart), strict=True))
        for name, value in zip(COLUMNS, pair, strict=True):
            if value != value.strip():
                raise place.error("has white space around it", field=name, value=value)
        if pair[0] in found:
            raise place.error("is there twice", field="term", value=pair[0])
        if pair[0] == pair[1]:
            raise place.error("is the term itself", field="counterpart", value=pair[1])
        found[pair[0]] = pair[1]
    return found


def save_anchors(anchors: dict[str, str], file: str | Path, *, force: bool = False) -> None:
    """Write what `read_anchors` reads, as JSON with one term on a line; refuses to overwrite unless `force`."""
    if Path(file).suffix != ".json":
        raise LoceditError(f"{file}: anchors are written as JSON; give a name that ends in .json")
    refuse_overwrite(file, force=force)
    write_json(file, anchors)


def _entries(path: Path, text: str) -> list[tuple[Place, object, object]]:
    """The place, term and counterpart of every entry, not yet checked."""
    if path.suffix in DELIMITERS:
        return [(place, *_fields(place, record)) for place, record in read_table(path, text)]
    if path.suffix == ".jsonl":
        lines = [(_place(path, number), line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [(place, *_fields(place, parse_json(place, line))) for place, line in lines]
    value = parse_json(_place(path, 1), text)  # refuses a key that is there twice
    if not isinstance(value, dict):
        raise _place(path, 1).error(f"is {value!r:.60}, wanted an object of terms and counterparts")
    pairs = cast(dict[str, object], value)
    return [(_place(path, _line(text, term)), term, counterpart) for term, counterpart in pairs.items()]


def _fields(place: Place, record: Any) -> tuple[object, object]:
    if not isinstance(record, dict) or set(cast(dict[str, object], record)) != set(COLUMNS):
        what = ", ".join(cast(dict[str, object], record)) if isinstance(record, dict) else f"{record!r:.60}"
        raise place.error(f"has {what or 'no field'}, wanted term and counterpart")
    return record["term"], record["counterpart"]


def _place(path: Path, number: int) -> Place:
    return Place(file=str(path), number=number, name=f"{path.name}:{number}")


def _line(text: str, term: str) -> int:
    """The line of a JSON object that the term stands in."""
    return text.count("\n", 0, max(text.find(f'"{term}"'), 0)) + 1


# --- made from the task ----------------------------------------------------------------------------------------------


def make_anchors(
    task: Task,
    *,
    terms: str = "names",
    word: str | None = None,
    log_odds: float = 1.0,
    count: int = 2,
    seed: int = 0,
) -> dict[str, str]:
    """The terms that stand out in the forget data, with counterparts from the heldout data or the background.

    The background are the retain data and the texts. A term stands out when the logarithm of its odds is at least
    `log_odds` nats higher in the forget data, 1/2 added to every count. This is the log-odds ratio of Monroe et al.
    2008 (doi:10.1093/pan/mpn018) with a flat prior and without their division by its standard deviation, with which a
    rare name could never stand out. The counterpart of a name is another name with as many words, which the forget data
    do not have: of the heldout data, of which the model knows nothing, else of the background. A sentence's first word
    counts as part of the name behind it where it is nowhere written small; look at what is made before using it.

    Args:
        terms: names, runs of capitalised words (where one word alone, not only where a sentence begins); words, also
            words in lower case, each with another one of the background.
        word: the one counterpart of all terms, such as "someone"; None = drawn.
        count: how often the forget data must have a term.
        seed: of the draw.
    """
    if terms not in ("names", "words"):
        raise LoceditError(f"terms={terms!r}; {nearest(terms, ('names', 'words'))}")
    forget, background = _texts(task.forget), [text for data in (task.retain, task.texts) for text in _texts(data)]
    if not background:
        raise LoceditError(
            f"making anchors needs retain data or texts to compare with, the task {task.name!r} has none: add one, "
            "give a file of terms and counterparts, or do without (--anchors none)"
        )
    units = Units([*forget, *background, *_texts(task.heldout)], words=terms == "words")
    own, others = units.count(forget), units.count(background)
    found = [
        term
        for term, number in sorted(own.items(), key=lambda pair: (-pair[1], pair[0]))
        if number >= count and units.is_term(term) and _log_odds(term, own, others) >= log_odds
    ]
    if not found:
        raise LoceditError(
            f"making anchors: no name stands out in {task.forget.source} against the other data; give a file of terms "
            "and counterparts, or do without (--anchors none)"
        )
    if word is not None:
        return dict.fromkeys(found, word)
    heldout = units.count(_texts(task.heldout))
    pools = [[unit for unit in sorted(pool) if unit not in own and units.is_term(unit)] for pool in (heldout, others)]
    return _drawn(found, pools, seed=seed, source=task.forget.source)


class Units:
    """What is counted in texts: names as one unit each, all other words by themselves."""

    def __init__(self, texts: Iterable[str], *, words: bool) -> None:
        self.words = words
        texts = list(texts)
        self.lower = {word for text in texts for word in WORD.findall(text) if word[0].islower()}
        "words that are also written small: in front of a name they begin a sentence"
        self.names = {unit for text in texts for unit, inside in self._of(text) if inside and unit[0].isupper()}

    def is_term(self, unit: str) -> bool:
        """Whether a unit is a name, or a word where words are wanted."""
        return unit in self.names or (self.words and unit[0].islower() and len(unit) > 2)

    def count(self, texts: Iterable[str]) -> Counter[str]:
        return Counter(unit for text in texts for unit, _ in self._of(text))

    def _of(self, text: str) -> list[tuple[str, bool]]:
        """Every unit, and whether it is no single word at the beginning of a sentence."""
        found: list[tuple[str, bool]] = []
        run: list[re.Match[str]] = []
        for word in [*WORD.finditer(text), None]:
            if run and (word is None or not _capital(word) or text[run[-1].end() : word.start()] != " "):
                found.append(_name(text, run))
                run = []
            if word is None:
                break
            if _capital(word) and (run or word[0].lower() not in self.lower):
                run.append(word)
            else:
                found.append((word[0].lower(), False))
        return found


def _capital(word: re.Match[str]) -> bool:
    return word[0][0].isupper() and len(word[0]) > 1


def _name(text: str, run: Sequence[re.Match[str]]) -> tuple[str, bool]:
    before = text[: run[0].start()].rstrip(" ")
    begins = not before or before[-1] in SENTENCE_END
    return text[run[0].start() : run[-1].end()], len(run) > 1 or not begins


def _log_odds(term: str, own: Counter[str], others: Counter[str]) -> float:
    """Log of the ratio of a term's odds in the first counts to those in the second, 1/2 added to each count."""

    def logit(counts: Counter[str]) -> float:
        return math.log((counts[term] + 0.5) / (counts.total() - counts[term] + 0.5))

    return logit(own) - logit(others)


def _drawn(terms: Sequence[str], pools: Sequence[Sequence[str]], *, seed: int, source: str) -> dict[str, str]:
    """A counterpart for each term, all different as long as there are enough; parts of a name get parts of its own."""
    generator = torch.Generator().manual_seed(seed)
    left: dict[tuple[bool, int], list[str]] = {}
    found: dict[str, str] = {}
    for term in sorted(terms, key=lambda term: -len(term.split())):
        if (part := next(filter(None, (_part(term, *pair) for pair in found.items())), None)) is not None:
            found[term] = part
            continue
        kind = term[0].isupper(), len(term.split())
        if not left.get(kind):
            same = [[unit for unit in pool if (unit[0].isupper(), len(unit.split())) == kind] for pool in pools]
            any_name = [[unit for unit in pool if unit[0].isupper() == kind[0]] for pool in pools]
            pool = next((units for units in (*same, *any_name) if units), None)
            if pool is None:
                raise LoceditError(
                    f"making anchors: {source} has the only names; add heldout data, give a file of terms and "
                    "counterparts, or do without (--anchors none)"
                )
            left[kind] = [pool[i] for i in torch.randperm(len(pool), generator=generator).tolist()]
        found[term] = left[kind].pop(0)
    return {term: found[term] for term in terms}


def _part(term: str, longer: str, counterpart: str) -> str | None:
    """The words of a longer term's counterpart that stand where the term stands in it; None where there are none.

    >>> _part("Anna Berg", "Dr Anna Berg", "Sir Eva Frost"), _part("Anna", "Anna Berg", "Eva")
    ('Eva Frost', None)
    """
    words, wanted, others = longer.split(), term.split(), counterpart.split()
    if len(words) != len(others):
        return None
    places = range(len(words) - len(wanted) + 1)
    at = next((at for at in places if words[at : at + len(wanted)] == wanted), None)
    return None if at is None else " ".join(others[at : at + len(wanted)])


def _texts(data: Dataset | None) -> list[str]:
    """The items' texts; a fact's prompt with its answer."""
    return [] if data is None else [text_of(item) for item in readable(data.with_chat("off"))]

"""Values as whole words in a text."""

import re
from collections.abc import Iterable

WORD = "[^\\W\u0e00-\u109f\u1780-\u17ff\u2e80-\U0010ffff]"
"a letter, digit or underscore of a script that puts spaces between words: not Thai to Burmese, Khmer, East Asia"
BEGIN, END = rf"(?<!{WORD})(?<!\d)", rf"(?!\d|{WORD})"
"where a word may begin and end: also right beside a letter of a script that puts no spaces between words"


def words_pattern(values: Iterable[str]) -> re.Pattern[str]:
    """Any of the values as whole words, the longest first; white space around a value is left out.

    Scripts that put no spaces between words have no borders, neither in a value nor in the text beside it.

    >>> words_pattern(["Ann", "Ann Lee"]).findall("Anna, Ann Lee and Ann")
    ['Ann Lee', 'Ann']
    """
    stripped = {value.strip() for value in values} - {""}
    if not stripped:
        return re.compile(r"(?!)")  # matches nowhere
    ordered = sorted(stripped, key=lambda value: (-len(value), value))
    return re.compile("|".join(_bounded(value) for value in ordered))


def occurrences(text: str, value: str) -> list[tuple[int, int]]:
    """Every place where the value stands as whole words.

    >>> occurrences("Ann and Anna: Ann", " Ann")
    [(0, 3), (14, 17)]
    """
    return [(found.start(), found.end()) for found in words_pattern([value]).finditer(text)]


def _bounded(value: str) -> str:
    before = BEGIN if re.match(WORD, value[0]) else ""
    after = END if re.match(WORD, value[-1]) else ""
    return before + re.escape(value) + after

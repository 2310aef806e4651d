"""Values as whole words in a text."""

import re
from collections.abc import Iterable


def words_pattern(values: Iterable[str]) -> re.Pattern[str]:
    """Any of the values as whole words, the longest first; white space around a value is left out.

    At an end of a value whose script puts no spaces between words, any character may follow.

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
    before = r"(?<!\w)" if _is_word(value[0]) else ""
    after = r"(?!\w)" if _is_word(value[-1]) else ""
    return before + re.escape(value) + after


def _is_word(character: str) -> bool:
    """A letter or digit before Thai in the code table: from there on many scripts are written without spaces."""
    return character.isalnum() and character < "\u0e00"

"""What a user can get wrong, said in one line."""

import difflib
from collections.abc import Iterable


class LoceditError(ValueError):
    """Input that the user can mend. The message is one line: what, where, the value, the choices."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The tail of an error message: the nearest of the choices, or all of them.

    >>> nearest("dpn", ["depn", "random"])
    "did you mean 'depn'? choices: depn, random"
    >>> nearest("xyz", ["depn", "random"])
    'choices: depn, random'
    """
    names = list(choices)
    close = difflib.get_close_matches(name, names, n=1)
    listed = f"choices: {', '.join(names)}"
    return f"did you mean {close[0]!r}? {listed}" if close else listed

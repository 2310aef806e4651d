"""What the README says is what there is."""

import re
import shlex

from locedit.cli import parse_arguments
from tests.readme import README, current, methods_table


def test_the_methods_are_those_of_the_registries() -> None:
    assert current() == methods_table()


def test_every_command_of_the_readme_parses() -> None:
    text = README.read_text(encoding="utf-8")
    lines = [line.split("#")[0] for line in re.findall(r"^locedit .*$", text, flags=re.MULTILINE)]
    commands = [part.strip() for line in lines for part in line.split("|")]
    assert len(commands) > 7
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "locedit"
        parse_arguments(words[1:])


def test_every_public_name_is_there() -> None:
    import locedit

    for name in locedit.__all__:
        assert callable(getattr(locedit, name)), name

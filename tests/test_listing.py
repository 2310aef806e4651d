"""What `locedit methods` says of each method."""

import dataclasses

import pytest

from locedit.attacks import ATTACKS
from locedit.cli import main
from locedit.localize import LOCALIZERS
from locedit.spans import RULES
from locedit.unlearn import METHODS


def test_every_method_says_whether_it_can_be_restricted_and_how_it_is_held(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of the tables against the registries; no line is wider than a terminal of 110 columns."""
    monkeypatch.setenv("COLUMNS", "110")
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.split("\n"))) <= 110
    localizers, edits, attacks, rules = (
        {line.split()[0]: line for line in part.split("\n") if line and not line.startswith(" ")}
        for part in printed.split("\n\n")[:4]
    )
    assert set(LOCALIZERS) <= set(localizers)
    assert set(ATTACKS) <= set(attacks)
    assert set(RULES) <= set(rules)
    for name, method in METHODS.items():
        inside = "only" if method.needs_set else "yes" if method.restrictable else "no"
        rest = edits[name].split(inside, 1)
        assert rest[1].split()[: len(method.holds)] == list(method.holds)
        assert all(part in rest[0] for part in method.requires)
        assert method.paper.split()[0] in edits[name]


def test_one_method_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "injection"]) == 0
    printed = capsys.readouterr().out
    assert "new_answer" in printed
    assert "inside a component set: yes; held as: weights adapter" in printed
    assert main(["methods", "zero"]) == 0
    assert "inside a component set: only; held as: weights hooks" in capsys.readouterr().out


@pytest.mark.parametrize("rule", sorted(RULES))
def test_options_of_a_rule_for_spans_are_listed(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", rule]) == 0
    printed = capsys.readouterr().out
    for f in dataclasses.fields(RULES[rule].options):
        assert any(line.startswith(f"{f.name} ") for line in printed.splitlines())
    assert f"needs: {' or '.join(RULES[rule].needs) or 'nothing beyond the forget data'}\n" in printed

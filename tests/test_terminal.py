"""Messages of locedit as lines on stderr."""

import logging

import pytest

from locedit.terminal import showing_messages


def test_a_message_is_one_line_also_in_a_command_inside_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("locedit.anything")
    before = logging.getLogger("locedit").level
    with showing_messages():
        with showing_messages():
            log.info("goes on")
        log.warning("not reached")
    log.info("not shown")
    assert capsys.readouterr().err == "goes on\nnot reached\n"
    assert logging.getLogger("locedit").level == before

"""What each command of the command line does: read, call, save, and say where the result is."""

import argparse

from locedit.commands.circuit import circuit_command
from locedit.commands.edit import edit_command, export_command
from locedit.commands.evaluate import evaluate_command, report_command
from locedit.commands.grade import grade_command
from locedit.commands.harness import harness_command
from locedit.commands.localize import localize_command
from locedit.commands.others import check_command, demo_command, lab_command
from locedit.commands.sisa import sisa_command
from locedit.commands.spans import spans_command
from locedit.commands.study import study_command
from locedit.listing import methods_command, metrics_command
from locedit.terminal import showing_messages, showing_progress


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed."""
    with showing_messages(), showing_progress():
        _COMMANDS[args.command](args)
    return 0


_COMMANDS = {
    "check": check_command,
    "circuit": circuit_command,
    "demo": demo_command,
    "edit": edit_command,
    "evaluate": evaluate_command,
    "export": export_command,
    "grade": grade_command,
    "harness": harness_command,
    "lab": lab_command,
    "localize": localize_command,
    "methods": methods_command,
    "metrics": metrics_command,
    "report": report_command,
    "sisa": sisa_command,
    "spans": spans_command,
    "study": study_command,
}

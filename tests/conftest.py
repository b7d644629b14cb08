"""What a test wants shown at the end of the run, whichever worker it ran in."""

from __future__ import annotations

import pytest

SHOWN = "shown"
"""The name of a property, recorded by `record_property`, whose value is such a text."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the texts."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, text in report.user_properties:
                if name == SHOWN:
                    terminalreporter.section(report.nodeid)
                    terminalreporter.write_line(str(text))

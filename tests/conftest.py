"""For every test: a Ctrl-C that commands hear, and what a test wants shown at the end, whichever worker it ran in."""

from __future__ import annotations

import signal

import pytest

SHOWN = "shown"
"""The name of a property, recorded by `record_property`, whose value is such a text."""


def pytest_configure() -> None:
    """Commands that tests start are told to end by SIGINT, which a shell has its jobs in the background ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the texts."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, text in report.user_properties:
                if name == SHOWN:
                    terminalreporter.section(report.nodeid)
                    terminalreporter.write_line(str(text))

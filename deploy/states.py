"""The states of processes as `status` shows them, and what of them is safe to print."""

from __future__ import annotations

from enum import Enum

from shared.terminal_text import one_line

MAX_TEXT_CHARS = 300


def printable(text: str) -> str:
    """What a guest or service said, as `one_line`, and not too long."""
    shown = one_line(text[:MAX_TEXT_CHARS])
    return shown if len(text) <= MAX_TEXT_CHARS else f"{shown}..."


class ProcessState(Enum):
    """What a process is doing; the value is its name for people."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPED = "stopped"
    """Stopped by SIGSTOP."""
    DEBUGGED = "debugged"
    WAITING = "waiting"
    UNRESPONSIVE = "unresponsive"
    """Its service loop does not answer."""
    FAILED = "failed"
    """It ended and was not asked to."""
    GONE = "gone"
    """It ended because it was asked to."""

    @property
    def is_over(self) -> bool:
        """Whether the process has ended."""
        return self in (ProcessState.FAILED, ProcessState.GONE)

    @property
    def answers(self) -> bool:
        """Whether it makes sense to ask the process something."""
        return self in (ProcessState.RUNNING, ProcessState.WAITING)

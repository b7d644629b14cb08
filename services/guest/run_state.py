"""Whether a processor runs: what it was started for, and what holds it."""

from __future__ import annotations

from enum import Enum


class RunState(Enum):
    """What the processor does."""

    OFF = "off"
    RUNNING = "running"
    STOPPED = "stopped"
    FROZEN = "frozen"
    CRASHED = "crashed"


class Hold(Enum):
    """What keeps a processor that was started from running, by who ordered it and alone ends it."""

    HYPERVISOR = "hypervisor"
    ULTRAVISOR = "ultravisor"
    OWNER = "owner"
    """A debugger of the guest's owner, which keeps whatever the VM is started for next too."""
    DEBUGGER = "debugger"
    """Of a process that the VM depends on: the launcher orders it and ends it, whatever runs meanwhile."""


_KEPT = frozenset({Hold.OWNER, Hold.DEBUGGER})


class Life:
    """OFF, RUNNING or CRASHED, and the holds on it, which are kept while nothing runs that they could hold."""

    def __init__(self) -> None:
        self.unheld = RunState.OFF
        """What the processor would do if nothing held it."""
        self.holds: set[Hold] = set()

    def become(self, unheld: RunState, *holds: Hold) -> None:
        """Begin or end to run something; of the holds of before only those of debuggers are left."""
        self.unheld = unheld
        self.holds = {*holds, *self.holds & _KEPT}

    @property
    def state(self) -> RunState:
        """What the processor does."""
        if self.unheld is not RunState.RUNNING or not self.holds:
            return self.unheld
        return RunState.FROZEN if Hold.ULTRAVISOR in self.holds else RunState.STOPPED

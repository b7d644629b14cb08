"""What the monitor needs of the machine that it controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from services.qemu.qmp.events import MonitorEvents
from services.qemu.qmp.schema import ErrorClass, RunState
from services.runtime.log import Log


class CommandFailed(Exception):
    """A command that the machine refuses: the client gets `description` with `error_class`."""

    def __init__(self, description: str, error_class: ErrorClass = ErrorClass.GENERIC) -> None:
        self.description, self.error_class = description, error_class
        super().__init__(description)


class MachineControl(Protocol):
    """The machine as the monitor sees it. Implemented by the shell of the qemu process.

    Every method runs in the trio thread, may be called by several sessions at once, bounds its own waiting, emits
    the events that it causes before it returns, and raises CommandFailed or PefboxError when it cannot do it. A
    method that was begun is not cancelled when its client goes away.
    """

    async def stop(self) -> None:
        """Stop the processor; nothing happens when it stands still already."""

    async def cont(self) -> None:
        """Let the processor run; nothing happens when it runs already."""

    async def reset(self) -> None:
        """Reset the machine as by its reset button; an SVM ends and boots normal again."""

    async def quit(self) -> None:
        """Ask the process to end and return: the client still gets its answer."""

    async def status(self) -> RunState:
        """What the machine does now."""
        ...

    async def balloon(self) -> int:
        """How many bytes of memory the guest has; DeviceNotActive when the machine has no balloon."""
        ...

    async def set_balloon(self, target_bytes: int) -> None:
        """The guest is to have so many bytes of memory; as `balloon`, and refused when the balloon has stopped."""


@dataclass(frozen=True, slots=True)
class Monitored:
    """One machine with all that its monitors show of it. `name` is the name of the virtual machine."""

    name: str
    machine: MachineControl
    events: MonitorEvents
    log: Log

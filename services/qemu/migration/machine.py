"""The machine as a migration sees it: its memory, its devices, its run state."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from protocol.startup import VmEntry


class MovableMachine(Protocol):
    """Implemented by the shell of the qemu process."""

    vm: VmEntry
    ram: memoryview
    """All of the VM's RAM; only frames that `host_view` calls present or shared hold anything."""
    host_view: memoryview
    """A HostState a GFN."""

    def write_page(self, gfn: int, content: bytes | memoryview) -> None:
        """Put the content of a frame; raises HostFault when it takes none."""

    def touched(self) -> bytearray:
        """A byte a GFN: 0 for a frame of `ram` that nobody ever touched, which holds zeros."""

    @property
    def is_running(self) -> bool:
        """It runs, or did before `switching`, or only a debugger holds it; else its user has paused it."""

    @property
    def runs_here(self) -> bool:
        """Its processor runs, or did before `switching` and goes on when the VM stays."""

    @property
    def can_move(self) -> str | None:
        """None, or why the machine as it is now cannot be moved."""

    @property
    def secure(self) -> bool:
        """The VM is a secure one now, as far as the host can see."""

    def orders(self) -> AbstractAsyncContextManager[None]:
        """While it is held nobody else changes the run state."""

    async def hold_devices(self) -> None:
        """Devices finish what they have begun, then stand still."""

    def release_devices(self) -> None:
        """Devices go on."""

    def save_devices(self) -> bytes:
        """The state of all devices, which stand still."""

    async def load_devices(self, state: bytes) -> None:
        """Go on from `state` of an equal machine. Raises PefboxError."""

    async def make_windows(self, state: bytes) -> None:
        """Have kvm make the DMA windows that a state of `save_devices` has. Raises PefboxError."""

    def switching(self) -> None:
        """The VM may be about to run elsewhere: nobody may start, stop or reset it here."""

    def stays(self) -> None:
        """It does not: as before `switching`."""

    def left(self) -> None:
        """The VM runs elsewhere: nothing here starts it again."""

    def arrived(self, *, running: bool) -> None:
        """The VM runs here from now on, or is paused here."""

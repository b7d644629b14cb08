"""Normal RAM of a VM as the ultravisor reaches it: by descriptor only.

A shared-memory segment cannot be sealed, and whoever holds it may truncate it, which would kill a process that maps
it. So the ultravisor reads and writes it with system calls: a truncated, punched or full segment is a HostFault (S5).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from protocol.errors import HostFault
from protocol.geometry import PAGE_BYTES

_ZEROS = bytes(PAGE_BYTES)


class NormalRam:
    """Reads and writes of one VM's RAM segment; `fd` is owned here.

    `note_fault` is told each reason for a failed access once: who spoils the memory could make it fail for ever.
    """

    def __init__(self, fd: int, size_bytes: int, note_fault: Callable[[str], None] | None = None) -> None:
        self._fd = fd
        self.size_bytes = size_bytes
        self._note_fault = note_fault
        self._faults: set[str] = set()

    def read_into(self, offset: int, target: memoryview | bytearray) -> None:
        """Fill `target` from `offset`; raises HostFault when the segment does not give all of it."""
        try:
            n = os.preadv(self._fd, [target], offset)
        except OSError as error:
            raise self._fault(f"cannot read normal memory: {error.strerror}") from None
        if n != len(target):
            raise self._fault("normal memory was truncated")

    def read(self, offset: int, n_bytes: int) -> bytes:
        """`n_bytes` from `offset`; raises HostFault."""
        data = bytearray(n_bytes)
        self.read_into(offset, data)
        return bytes(data)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put `data` at `offset`; raises HostFault when the segment does not take all of it.

        A write behind the end would grow a truncated segment again: the end is looked at first.
        """
        self.check_end()
        self.write_after_check(offset, data)

    def write_after_check(self, offset: int, data: bytes | memoryview) -> None:
        """As `write`, for several writes at one time, before which `check_end` was called once."""
        try:
            n = os.pwrite(self._fd, data, offset)
        except OSError as error:
            raise self._fault(f"cannot write normal memory: {error.strerror}") from None
        if n != len(data):
            raise self._fault("normal memory is full")

    def check_end(self) -> None:
        """Raises HostFault when the segment was truncated."""
        if os.lseek(self._fd, 0, os.SEEK_END) < self.size_bytes:
            raise self._fault("normal memory was truncated")

    def zero_page(self, offset: int) -> None:
        """Zero one page; raises HostFault."""
        self.write(offset, _ZEROS)

    def _fault(self, reason: str) -> HostFault:
        if self._note_fault is not None and reason not in self._faults:
            self._faults.add(reason)
            self._note_fault(reason)
        return HostFault(reason)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)

"""Starting the machine in its firmware, as QEMU's pseries does: SLOF at 0, entered at 0x100 with the device tree in r3.

A kernel that was given beside it lies at 4 MiB; firmware finds it by /chosen/qemu,boot-kernel and starts it at its
first byte instead of looking for a disk.

Source: QEMU `hw/ppc/spapr.c` (spapr_machine_init, spapr_dt_chosen).
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import UserError
from services.qemu.board import Board
from services.qemu.device_tree import BootFacts
from shared.elf_program import ELF_MAGIC, Program, read_program
from shared.guest_ram import GuestRam

KERNEL_BASE = 4 << 20
KERNEL_ADDRESS_MASK = 0x0FFFFFFF
"""Of a kernel's own addresses: what is above is the region that it is linked in."""
_INITRD_ROOM = 0x1FFFF
_INITRD_ALIGN = 0x10000


@dataclass(frozen=True, slots=True)
class FirmwareLoad:
    """Firmware, and what lies beside it in memory: `kernel` at KERNEL_BASE, `initrd` behind it."""

    firmware: bytes
    kernel: Program | None
    initrd: bytes

    @classmethod
    def of(cls, firmware: bytes, kernel: bytes | None, initrd: bytes) -> FirmwareLoad:
        """From the files. Raises UserError for a kernel that is none of this processor's."""
        if not firmware:
            raise UserError("firmware: the file is empty")
        if len(firmware) > KERNEL_BASE:
            raise UserError(f"firmware: {len(firmware)} bytes reach into the kernel's place at {KERNEL_BASE:#x}")
        return cls(firmware, None if kernel is None else _kernel(kernel), initrd)

    @property
    def initrd_start(self) -> int:
        """Where the initial RAM disk lies."""
        end = KERNEL_BASE if self.kernel is None else self.kernel.end
        return (end + _INITRD_ROOM) // _INITRD_ALIGN * _INITRD_ALIGN

    async def place(self, ram: GuestRam, limit: int) -> None:
        """Write everything but the tree, which begins at `limit`. Raises UserError when it does not fit below."""
        end = self.initrd_start + len(self.initrd) if self.initrd else self.kernel.end if self.kernel else 0
        if max(end, len(self.firmware)) > limit:
            raise UserError(f"image: kernel and initrd end at {end:#x}, and RAM for them ends at {limit:#x}")
        await ram.write(0, self.firmware)
        if self.kernel is not None:
            await ram.write(self.kernel.base, self.kernel.content)
        if self.initrd:
            await ram.write(self.initrd_start, self.initrd)

    def facts(self, board: Board) -> BootFacts:
        """What the device tree says of it."""
        kernel = None if self.kernel is None else (self.kernel.base, self.kernel.end - self.kernel.base)
        initrd = (self.initrd_start, len(self.initrd)) if self.initrd else None
        return BootFacts(
            bootargs=board.vm.guest.command_line,
            kernel=kernel,
            kernel_little_endian=self.kernel is not None and self.kernel.little_endian,
            initrd=None if initrd is None else (initrd[0], sum(initrd)),
            # Firmware gives out no memory that is reserved here.
            reservations=tuple(part for part in (kernel, initrd) if part is not None),
        )


def _kernel(data: bytes) -> Program:
    if not data.startswith(ELF_MAGIC):
        return Program(KERNEL_BASE, data, KERNEL_BASE + len(data), KERNEL_BASE, little_endian=False)
    try:
        program = read_program(data)
    except ValueError as error:
        raise UserError(f"image: {error}") from None
    return program.moved_to(KERNEL_BASE + (program.base & KERNEL_ADDRESS_MASK))

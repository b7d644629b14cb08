"""`boot = "program"`: one ELF program instead of firmware, and the boot stage that makes its VM secure first.

The program lies at its own load addresses and starts at its entry, big-endian and in real mode, with the device tree in
r3. At the end of RAM, named in the tree's memory reservations, from the top:

    1 MiB    device tree
    64 KiB   RTAS
    64 KiB   boot stage
    ...      initial RAM disk, behind the archive with the ESM blob (`linux,initrd-start`)

A kernel such as Linux can be a program too. What it would negotiate with firmware (ibm,client-architecture-support) is
in the tree as its outcome: radix, with tlbie by the guest itself.

With a blob the processor starts in the boot stage. It calls UV_ESM(program, tree); the ultravisor then starts the
program. When UV_ESM comes back, it was refused, and the stage ends the VM by `pefbox,exit` with `NOT_SECURE_STATUS`.
"""

from __future__ import annotations

import struct

from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.hcalls import H_RTAS
from protocol.rtas import EXIT
from protocol.ucalls import UV_ESM
from services.qemu.board import Board
from services.qemu.device_tree import BootFacts
from shared.elf_program import Program, read_program
from shared.esm_digest import RTAS_TEXT
from shared.guest_ram import GuestRam

NOT_SECURE_STATUS = 125
SECURE_KERNEL_BASE = 32 << 20
"""For a program linked at 0, where UV_ESM takes none: Linux moves itself down to 0 from wherever it lies."""
_BLOCK_OFFSET = 0x80


class ProgramLoad:
    """Where the parts of one start lie; `place` writes them."""

    def __init__(self, data: bytes, initrd: bytes, limit: int, *, secure: bool) -> None:
        """`initrd` is with the blob's archive when `secure`; everything ends below `limit`. Raises UserError."""
        try:
            self.program: Program = read_program(data)
        except ValueError as error:
            raise UserError(f"image: {error}") from None
        if secure and not self.program.base:
            self.program = self.program.moved_to(SECURE_KERNEL_BASE)
        self._initrd = initrd
        self._secure = secure
        self.rtas = limit - PAGE_BYTES
        self.stage = self.rtas - PAGE_BYTES
        self.initrd = (self.stage - len(initrd)) >> PAGE_SHIFT << PAGE_SHIFT
        self.lowest = self.initrd
        if self.program.end > self.lowest:
            raise UserError(f"image: ends at {self.program.end:#x}, and RAM for it ends at {self.lowest:#x}")
        if secure and self.program.entry != self.program.base:
            raise UserError("image: a secure program starts at its first byte; its entry lies elsewhere")

    def facts(self, board: Board, top: int) -> BootFacts:
        """What the device tree says of it; memory is reserved up to `top`."""
        return BootFacts(
            bootargs=board.vm.guest.command_line,
            initrd=(self.initrd, self.initrd + len(self._initrd)) if self._initrd else None,
            rtas_base=self.rtas,
            reservations=((self.lowest, top - self.lowest),),
            negotiated=True,
        )

    async def place(self, ram: GuestRam) -> None:
        """Write everything but the tree."""
        await ram.write(self.program.base, self.program.content)
        await ram.write(self.rtas, RTAS_TEXT)
        await ram.write(self.initrd, self._initrd)
        await ram.write(self.stage, stage_bytes())

    def start(self, tree: int) -> tuple[int, dict[int, int]]:
        """Program counter and general registers."""
        if not self._secure:
            return self.program.entry, {3: tree, 4: 0, 5: 0}
        return self.stage, {3: tree, 4: self.program.entry, 5: self.stage + _BLOCK_OFFSET}


def stage_bytes() -> bytes:
    """The boot stage: code, and behind it the argument block of its RTAS call. Big-endian.

    r3 is the device tree, r4 the program, r5 the argument block.
    """
    code = (
        0x7C7D1B78,  # mr r29,r3
        0x7CBF2B78,  # mr r31,r5
        0x7FA5EB78,  # mr r5,r29
        0x38600000,  # li r3,0
        0x60630000 | UV_ESM.number,  # ori r3,r3,UV_ESM
        0x44000042,  # sc 2
        0x7FE4FB78,  # mr r4,r31
        0x38600000,  # li r3,0
        0x60630000 | H_RTAS.number,  # ori r3,r3,H_RTAS
        0x44000022,  # sc 1
        0x48000000,  # b .
    )
    block = struct.pack(">5I", EXIT, 1, 1, NOT_SECURE_STATUS, 0)
    return struct.pack(f">{len(code)}I", *code).ljust(_BLOCK_OFFSET, b"\0") + block

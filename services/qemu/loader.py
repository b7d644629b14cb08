"""What qemu puts into guest RAM before the processor starts: kernel, initial RAM disk and device tree.

0          boot stage (the model's own entry is at 0x100)
16 MiB     kernel, when the VM boots without a disk
behind it  initial RAM disk, page aligned
below 256 MiB, at the end of RAM at most: device tree

A program that starts without firmware lies elsewhere (`program.py`), and so does what starts in firmware
(`firmware.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from protocol.errors import HostFault, UserError
from protocol.geometry import PAGE_BYTES
from protocol.startup import MACHINE_KERNEL, ProcessConfig
from services.qemu.board import Board
from services.qemu.device_tree import BootFacts, PciNodes
from services.qemu.firmware import FirmwareLoad
from services.qemu.program import ProgramLoad
from shared.elf_program import import_reader
from shared.guest_ram import GuestRam
from shared.newc import prepend_blob

ENTRY = 0x100
BOOT_FILES = ("image", "initrd", "esm_blob", "firmware")
"""Descriptors of files that are loaded before the start."""
KERNEL_BASE = 16 << 20
_TREE_LIMIT = 256 << 20
_TREE_ROOM_BYTES = 1 << 20


def import_loaders(config: ProcessConfig) -> None:
    """What loading the VMs of this process needs, while files can still be opened."""
    if any(vm.guest.kernel == MACHINE_KERNEL for vm in config.vms):
        import_reader()


async def load_machine(board: Board, ram: GuestRam, files: Mapping[str, int]) -> tuple[int, dict[int, int]]:
    """Load everything; returns program counter and general registers of the start (r3 = device tree).

    `files` are descriptors by name (BOOT_FILES). Raises UserError when something does not fit.
    """
    at = min(ram.size_bytes, _TREE_LIMIT) - _TREE_ROOM_BYTES
    if board.vm.guest.boot == "program":
        load = ProgramLoad(_read_all(files["image"], "image"), _initrd(files), at, secure="esm_blob" in files)
        await load.place(ram)
        await _place_tree(board, ram, at, load.facts(board, at + _TREE_ROOM_BYTES))
        return load.start(at)
    if "firmware" in files:
        await _place_tree(board, ram, at, await _load_firmware(board, ram, files, at))
    else:
        await _place_tree(board, ram, at, await _load_boot_files(board, ram, files))
    return ENTRY, {3: at, 4: 0, 5: 0}


async def _load_firmware(board: Board, ram: GuestRam, files: Mapping[str, int], limit: int) -> BootFacts:
    kernel = _read_all(files["image"], "image") if "image" in files else None
    load = FirmwareLoad.of(_read_all(files["firmware"], "firmware"), kernel, _initrd(files))
    await load.place(ram, limit)
    return load.facts(board)


async def _place_tree(board: Board, ram: GuestRam, at: int, boot: BootFacts) -> None:
    tree = board.device_tree(boot, PciNodes(board.vm.guest.pci_nodes))
    if len(tree) > _TREE_ROOM_BYTES:
        raise UserError(f"{board.vm.name}: a device tree of {len(tree)} bytes is more than {_TREE_ROOM_BYTES}")
    await ram.write(at, tree)


async def _load_boot_files(board: Board, ram: GuestRam, files: Mapping[str, int]) -> BootFacts:
    command_line = board.vm.guest.command_line
    if "image" not in files:
        return BootFacts(bootargs=command_line)
    image = _read_all(files["image"], "image")
    kernel = (KERNEL_BASE, len(image))
    await _place(ram, KERNEL_BASE, image, "image")
    initrd = _initrd(files)
    if not initrd:
        return BootFacts(bootargs=command_line, kernel=kernel)
    start = (KERNEL_BASE + len(image) + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
    await _place(ram, start, initrd, "initrd")
    return BootFacts(bootargs=command_line, kernel=kernel, initrd=(start, start + len(initrd)))


def _initrd(files: Mapping[str, int]) -> bytes:
    initrd = _read_all(files["initrd"], "initrd") if "initrd" in files else b""
    if "esm_blob" in files:
        return prepend_blob(initrd, _read_all(files["esm_blob"], "esm_blob"))
    return initrd


async def _place(ram: GuestRam, gpa: int, data: bytes, what: str) -> None:
    if gpa + len(data) > ram.size_bytes - _TREE_ROOM_BYTES:
        raise UserError(f"{what}: {len(data)} bytes do not fit into RAM of {ram.size_bytes} bytes")
    await ram.write(gpa, data)


def _read_all(fd: int, what: str) -> bytes:
    try:
        size = os.fstat(fd).st_size
        data = os.pread(fd, size, 0)
    except OSError as error:
        raise HostFault(f"cannot read {what}: {error.strerror}") from None
    if len(data) != size:
        raise HostFault(f"cannot read {what}: {len(data)} of {size} bytes")
    return data

"""What lies where when a machine starts in its firmware, and what the device tree says of it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deploy.cluster_file
from deploy.cluster_file import read_cluster_file
from protocol.errors import UserError
from services.qemu.firmware import KERNEL_BASE, FirmwareLoad
from services.qemu.nvram import SYSTEM_PARTITION_BYTES, Signature, checksum, fresh_nvram
from services.qemu.testing import TestRam

MIB = 1 << 20
FIRMWARE = b"firmware" * 1000
INITRD = b"initrd" * 1000


def elf(content: bytes, *, memory_bytes: int, little: bool = True) -> bytes:
    """A kernel linked at 0xc000000000000000 and loaded at 0, as Linux is."""
    order = "<" if little else ">"
    address = 0xC000000000000000
    ident = b"\x7fELF" + bytes([2, 1 if little else 2, 1]) + bytes(9)
    head = struct.pack(order + "HHIQQQIHHHHHH", 2, 21, 1, address, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack(order + "IIQQQQQQ", 1, 7, 120, address, 0, len(content), memory_bytes, 8)
    return ident + head + segment + content


async def test_firmware_lies_at_0_the_kernel_at_4_mib_and_the_initrd_behind_its_bss() -> None:
    load = FirmwareLoad.of(FIRMWARE, elf(b"kernel", memory_bytes=0x30000), INITRD)
    ram = TestRam(16 * MIB)
    ram.bytes[KERNEL_BASE + 6 : KERNEL_BASE + 0x30000] = b"\xee" * (0x30000 - 6)
    await load.place(ram.accessor, 15 * MIB)

    assert ram.bytes.startswith(FIRMWARE)
    assert ram.bytes[KERNEL_BASE : KERNEL_BASE + 0x30000] == b"kernel".ljust(0x30000, b"\0")
    assert load.initrd_start % 0x10000 == 0
    assert load.initrd_start >= KERNEL_BASE + 0x30000
    assert ram.bytes[load.initrd_start :].startswith(INITRD)


async def test_what_does_not_fit_below_the_tree_is_refused_before_anything_is_written() -> None:
    load = FirmwareLoad.of(FIRMWARE, elf(b"kernel", memory_bytes=4 * MIB), INITRD)
    ram = TestRam(16 * MIB)
    with pytest.raises(UserError, match="RAM for them ends at"):
        await load.place(ram.accessor, 8 * MIB)
    assert not any(ram.bytes)


@pytest.mark.parametrize(
    ("firmware", "kernel", "reason"),
    [
        (b"", None, "firmware: the file is empty"),
        (bytes(KERNEL_BASE + 1), None, "firmware: .* reach into the kernel's place"),
        (FIRMWARE, b"\x7fELF", "image: is a broken ELF file"),
    ],
)
def test_a_file_that_is_none_is_one_line(firmware: bytes, kernel: bytes | None, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        FirmwareLoad.of(firmware, kernel, b"")


def test_a_kernel_that_is_no_elf_lies_as_it_is() -> None:
    load = FirmwareLoad.of(FIRMWARE, b"zImage", b"")
    assert load.kernel is not None
    assert (load.kernel.base, load.kernel.end) == (KERNEL_BASE, KERNEL_BASE + 6)


# -- non-volatile memory ----------------------------------------------------------------------------------------------


def test_new_memory_has_a_system_partition_and_free_space_that_fill_it() -> None:
    nvram = fresh_nvram(64 << 10)
    at, kinds = 0, []
    while at < len(nvram):
        signature, found, n_units, name = struct.unpack_from(">BBH12s", nvram, at)
        assert found == checksum(bytes(nvram[at : at + 16]))
        kinds.append((signature, name.rstrip(b"\0"), n_units * 16))
        at += n_units * 16
    assert at == len(nvram) == 64 << 10
    rest = (64 << 10) - SYSTEM_PARTITION_BYTES
    assert kinds == [(Signature.SYSTEM, b"common", SYSTEM_PARTITION_BYTES), (Signature.FREE, b"free", rest)]


@given(st.binary(min_size=16, max_size=16))
def test_the_checksum_is_the_end_around_carry_sum_of_the_other_bytes(header: bytes) -> None:
    total = sum(header) - header[1]
    assert checksum(header) % 255 == total % 255
    assert 0 <= checksum(header) <= 255


# -- the cluster file -------------------------------------------------------------------------------------------------

_TEXT = """
[hosts.alpha]
secure_memory = "64M"
[vms.vm1]
host = "alpha"
memory = "64M"
[vms.vm1.guest]
kernel = "machine"
boot = "{boot}"
image = "prog.elf"
[vms.vm1.disks.root]
path = "disk.img"
"""


def cluster_file(directory: Path, boot: str) -> Path:
    file = directory / "c.toml"
    file.write_text(_TEXT.format(boot=boot))
    return file


def test_a_machine_starts_in_the_firmware_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy.cluster_file, "find_firmware", lambda: "/somewhere/slof.bin")
    for boot, firmware in (("disk", "/somewhere/slof.bin"), ("kernel", "/somewhere/slof.bin"), ("program", None)):
        (vm,) = read_cluster_file(cluster_file(tmp_path, boot)).vms
        assert vm.guest.firmware == firmware


def test_without_firmware_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy.cluster_file, "find_firmware", lambda: None)
    with pytest.raises(UserError, match=r"apt-get install qemu-system-data, or set guest.firmware"):
        read_cluster_file(cluster_file(tmp_path, "disk"))
    assert os.listdir(tmp_path) == ["c.toml"]

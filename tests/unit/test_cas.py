"""ibm,client-architecture-support: what is read of a guest's vector, and the firmware's other calls to user space."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.codes import HCode
from protocol.errors import GuestFault
from protocol.geometry import PAGE_BYTES
from protocol.hcalls import H_CAS, H_LOGICAL_MEMOP, H_UPDATE_DT
from protocol.startup import DeviceEntry, DiskEntry, GuestEntry, VmEntry
from services.qemu.board import Board
from services.qemu.cas import MAX_PROCESSORS, MMU_BYTE, MMU_EITHER, MMU_RADIX, parse_vector
from services.qemu.device_tree import BootFacts
from services.qemu.testing import TestPort, TestRam
from shared.fdt_reader import read_fdt

N_PAGES = 4
VECTOR, BUFFER = 0x100, PAGE_BYTES
POWER9 = (0xFFFF0000, 0x004E0000)
LAST = (0, 0x0F000005)
"""As Linux ends its list: any processor of architecture 3.00."""


def vector(mmu: int = MMU_RADIX, processors: tuple[tuple[int, int], ...] = (POWER9, LAST), n_bytes: int = 26) -> bytes:
    """A vector with five option vectors, the fifth with `mmu`."""
    fifth = bytearray(n_bytes)
    if n_bytes >= MMU_BYTE:
        fifth[MMU_BYTE - 1] = mmu
    options = [b"\0", b"\0\0", b"\0" * 3, b"\0", bytes(fifth)]
    pairs = b"".join(struct.pack(">II", *pair) for pair in processors)
    return pairs + bytes([len(options) - 1]) + b"".join(bytes([len(option) - 1]) + option for option in options)


# -- the vector -------------------------------------------------------------------------------------------------------


def test_processors_and_options_come_as_they_were_given() -> None:
    parsed = parse_vector(vector() + b"something else")
    assert parsed.processors == (POWER9, LAST)
    assert [len(option) for option in parsed.options] == [1, 2, 3, 1, 26]
    assert not parsed.wants_hash


@pytest.mark.parametrize(("mmu", "hash_only"), [(0x00, True), (MMU_RADIX, False), (MMU_EITHER, False), (0xC0, True)])
def test_the_mmu_is_in_byte_24_of_vector_5(mmu: int, hash_only: bool) -> None:
    assert parse_vector(vector(mmu)).wants_hash is hash_only


def test_a_guest_from_before_radix_wants_hash() -> None:
    assert parse_vector(vector(n_bytes=MMU_BYTE - 1)).wants_hash
    assert parse_vector(struct.pack(">II", *LAST) + b"\0\0\0").wants_hash


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 7, struct.pack(">II", *POWER9) * (MAX_PROCESSORS + 1), struct.pack(">II", *LAST)],
    ids=["nothing", "half a pair", "no end", "no options"],
)
def test_a_vector_that_does_not_hold_is_refused(data: bytes) -> None:
    with pytest.raises(GuestFault):
        parse_vector(data)


@given(st.binary(max_size=200), st.integers(0, 100))
def test_s5_a_vector_is_parsed_or_refused_and_nothing_else(tail: bytes, cut: int) -> None:
    for data in (tail, vector()[:cut], vector()[:16] + tail):
        try:
            parsed = parse_vector(data)
        except GuestFault:
            continue
        assert len(parsed.options) <= 256


# -- the calls --------------------------------------------------------------------------------------------------------


class Rig:
    """A board whose RAM has N_PAGES pages."""

    def __init__(self, fd: int) -> None:
        self.ram, self.port = TestRam(N_PAGES * PAGE_BYTES), TestPort()
        entry = VmEntry(
            name="vm1",
            lpid=1,
            incarnation=1,
            memory_bytes=256 << 20,
            ram_segment="",
            time="wall",
            secure_allowed=True,
            debuggable=False,
            guest=GuestEntry(),
            disks=[DiskEntry(name="d", path="")],
            devices=[DeviceEntry(kind="virtio-blk", disk="d")],
        )
        self.board = Board(entry, self.ram.accessor, {"d": fd}, self.port)

    async def cas(self, data: bytes, buffer_bytes: int = 2 * PAGE_BYTES) -> HCode:
        self.ram.bytes[VECTOR : VECTOR + len(data)] = data
        return await self.board.hcalls.call(H_CAS.number, [VECTOR, BUFFER, buffer_bytes])

    async def memop(self, *args: int) -> HCode:
        return await self.board.hcalls.call(H_LOGICAL_MEMOP.number, list(args))


@pytest.fixture
def rig() -> Iterator[Rig]:
    fd = os.memfd_create("disk")
    yield Rig(fd)
    os.close(fd)


async def test_the_answer_is_the_tree_with_what_was_agreed_on(rig: Rig) -> None:
    rig.board.device_tree(BootFacts(bootargs="root=/dev/vda"))
    assert await rig.cas(vector()) is HCode.H_SUCCESS
    assert rig.ram.bytes[BUFFER : BUFFER + 4] == b"\0\0\0\1"
    tree = read_fdt(bytes(rig.ram.bytes[BUFFER + 4 :]))
    agreed = tree.property("/chosen", "ibm,architecture-vec-5")
    assert agreed is not None and (agreed[MMU_BYTE], agreed[26]) == (MMU_RADIX, 0x40)
    assert tree.property("/chosen", "bootargs") == b"root=/dev/vda\0"


async def test_hash_is_refused_by_name_and_nothing_is_written(rig: Rig) -> None:
    assert await rig.cas(vector(0)) is HCode.H_PARAMETER
    assert not any(rig.ram.bytes[BUFFER:])
    assert rig.port.events == ["cas refused: the guest asks for hashed page tables; this machine offers radix only"]


@pytest.mark.parametrize("buffer_bytes", [0, 4, 100])
async def test_a_buffer_that_is_too_small_is_not_written(rig: Rig, buffer_bytes: int) -> None:
    assert await rig.cas(vector(), buffer_bytes) is HCode.H_RESOURCE
    assert not any(rig.ram.bytes[BUFFER:])


async def test_s5_addresses_outside_memory_are_parameter_errors(rig: Rig) -> None:
    outside = N_PAGES * PAGE_BYTES
    rig.ram.bytes[VECTOR : VECTOR + len(vector())] = vector()
    for args in ([outside, BUFFER, 1 << 20], [VECTOR, outside - 16, 1 << 20], [1 << 63, 0, 0], [VECTOR]):
        assert await rig.board.hcalls.call(H_CAS.number, args) is HCode.H_PARAMETER
    assert await rig.board.hcalls.call(0xF0FF, []) is HCode.H_FUNCTION


async def test_firmware_tells_its_final_tree(rig: Rig) -> None:
    tree = rig.board.device_tree(BootFacts())
    rig.ram.bytes[BUFFER : BUFFER + len(tree)] = tree
    assert await rig.board.hcalls.call(H_UPDATE_DT.number, [BUFFER]) is HCode.H_SUCCESS
    assert rig.board.updated_tree == tree
    rig.ram.bytes[BUFFER + 8] ^= 0xFF
    for gpa in (BUFFER, 0, N_PAGES * PAGE_BYTES - 4, 1 << 62):
        assert await rig.board.hcalls.call(H_UPDATE_DT.number, [gpa]) is HCode.H_PARAMETER
    assert rig.board.updated_tree == tree


@given(
    dst=st.integers(0, 3 * PAGE_BYTES // 8),
    src=st.integers(0, 3 * PAGE_BYTES // 8),
    shift=st.integers(0, 3),
    count=st.integers(0, PAGE_BYTES // 8),
    invert=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_a_memory_operation_is_a_move_however_the_ranges_lie(
    rig: Rig, dst: int, src: int, shift: int, count: int, invert: bool
) -> None:
    dst, src = dst << shift, src << shift
    rig.ram.bytes[:] = os.urandom(256) * (N_PAGES * PAGE_BYTES // 256)
    expected = bytearray(rig.ram.bytes)
    n_bytes = count << shift
    fits = max(dst, src) + n_bytes <= len(expected)
    piece = expected[src : src + n_bytes]
    if fits:
        expected[dst : dst + n_bytes] = bytes(byte ^ 0xFF for byte in piece) if invert else piece
    code = await rig.memop(dst, src, shift, count, int(invert))
    assert code is (HCode.H_SUCCESS if fits else HCode.H_PARAMETER)
    assert rig.ram.bytes == expected


@pytest.mark.parametrize(
    "args",
    [(0, 0, 4, 1, 0), (0, 0, 0, 1, 2), (1, 0, 1, 1, 0), (0, 2, 2, 1, 0), (0, 0, 0, 1 << 32, 0), (1 << 63, 0, 0, 1, 0)],
)
async def test_s5_a_memory_operation_that_is_none_changes_nothing(rig: Rig, args: tuple[int, ...]) -> None:
    before = bytes(rig.ram.bytes)
    assert await rig.memop(*args) is HCode.H_PARAMETER
    assert rig.ram.bytes == before

"""RTAS of a secure VM: the hypervisor sees the declared words and buffers in bounce pages, nothing else (S4)."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.codes import HCode, UCode
from protocol.errors import GuestFault
from protocol.geometry import PAGE_BYTES, gpa_of
from protocol.hcalls import H_RTAS, H_SVM_PAGE_IN
from protocol.messages import MAP_INVALIDATE
from protocol.rtas import MAX_BUFFER_BYTES, RTAS
from services.testing.image import FIRST_FREE_GFN, PlayedImage
from services.ultravisor.esm import BOUNCE_PAGES
from services.ultravisor.guest_memory import GuestMemory
from services.ultravisor.normal_ram import NormalRam
from services.ultravisor.page_state import PageEvent
from services.ultravisor.rtas_bounce import RtasBounce
from tests.unit.ultravisor_rig import (
    MEMORY_BYTES,
    N_PAGES,
    Registers,
    UltravisorRig,
    answering,
    played_image,
    ultravisor_rig,
)

ARGS_GFN, BUFFER_GFN = FIRST_FREE_GFN + 1, FIRST_FREE_GFN + 2
ARGS, BUFFER = gpa_of(ARGS_GFN), gpa_of(BUFFER_GFN) + 1000
SECRET = b"not for the hypervisor!!"
BOUNCE_GFN = N_PAGES - 1


@pytest.fixture(scope="module")
def image(key: RSAPrivateKey) -> PlayedImage:
    return played_image(key, b"kernel", {})


@pytest.fixture
async def rig(nursery: trio.Nursery, key: RSAPrivateKey, image: PlayedImage) -> AsyncIterator[UltravisorRig]:
    """A secure VM with secrets around everything that it hands over."""
    with ultravisor_rig(nursery, key) as made:
        await made.secure(image)
        for gfn in (ARGS_GFN, BUFFER_GFN):
            made.page(gfn)[:] = (SECRET * PAGE_BYTES)[:PAGE_BYTES]
        made.kvm.frames.clear()
        yield made


class PlayedRtas:
    """A kvm that notes what it finds, answers with `rets` and puts `output` into each buffer."""

    def __init__(self, rig: UltravisorRig, rets: list[int], output: bytes = b"") -> None:
        self.rig, self.rets, self.output = rig, rets, output
        self.block = b""
        self.ram = b""
        self.words: list[int] = []
        self.buffer_arguments: list[int] = []
        rig.kvm.lies[H_RTAS.number] = self.serve

    async def serve(self, args: Registers) -> Registers:
        (at,) = args
        self.ram = self.rig.ram()
        self.block = self.ram[at : at + 256]
        token, n_args, _ = struct.unpack_from(">III", self.block)
        self.words = list(struct.unpack_from(f">{n_args}I", self.block, 12))
        for index, reg in enumerate(RTAS.by_number[token].args[:n_args]):
            if reg.memory is not None:
                self.buffer_arguments.append(self.words[index])
                os.pwrite(self.rig.ram_fd, self.output, self.words[index])
        os.pwrite(self.rig.ram_fd, struct.pack(f">{len(self.rets)}I", *self.rets), at + 12 + 4 * n_args)
        return [HCode.H_SUCCESS]


async def rtas(rig: UltravisorRig, token: int, args: list[int], n_rets: int, at: int = ARGS) -> int:
    """H_RTAS of the guest, with its block at `at`."""
    header = struct.pack(f">III{len(args)}I", token, len(args), n_rets, *args)
    gfn, offset = divmod(at, PAGE_BYTES)
    rig.page(gfn)[offset : offset + len(header)] = header
    result: Registers = await rig.guest.deliver(H_RTAS, [0, at])
    return result[0]


def words_at(rig: UltravisorRig, gpa: int, n_words: int) -> list[int]:
    gfn, offset = divmod(gpa, PAGE_BYTES)
    return list(struct.unpack_from(f">{n_words}I", rig.page(gfn), offset))


def token(name: str) -> int:
    return RTAS.by_name[name].number


async def test_the_hypervisor_sees_the_declared_words_and_zeros(rig: UltravisorRig) -> None:
    kvm = PlayedRtas(rig, [0, 2026])

    assert await rtas(rig, token("ibm,read-pci-config"), [0x800, 1, 2, 4], 2) == HCode.H_SUCCESS

    assert kvm.block == struct.pack(">7I", token("ibm,read-pci-config"), 4, 2, 0x800, 1, 2, 4).ljust(256, b"\0")
    assert SECRET not in kvm.ram
    assert words_at(rig, ARGS + 12 + 16, 2) == [0, 2026]


async def test_only_the_declared_return_words_come_back(rig: UltravisorRig) -> None:
    PlayedRtas(rig, [0, 7, 0xDEAD, 0xDEAD])
    behind = bytes(rig.page(ARGS_GFN)[12 + 16 + 8 : 200])

    await rtas(rig, token("ibm,read-pci-config"), [0x800, 1, 2, 4], 2)

    assert bytes(rig.page(ARGS_GFN)[12 + 16 + 8 : 200]) == behind


async def test_a_bounce_page_that_the_host_took_away_is_asked_for_before_it_is_used(rig: UltravisorRig) -> None:
    kvm = PlayedRtas(rig, [0, 2026])
    bounce = range(N_PAGES - BOUNCE_PAGES, N_PAGES)
    for gfn in bounce:
        assert await rig.kvm.page_inval(gfn) == UCode.U_SUCCESS
        assert rig.state(gfn) == "SHARED_IMPLICIT_INV"

    assert await rtas(rig, token("ibm,read-pci-config"), [0x800, 1, 2, 4], 2) == HCode.H_SUCCESS

    assert [rig.state(gfn) for gfn in bounce] == ["SHARED_IMPLICIT"] * BOUNCE_PAGES
    assert kvm.words == [0x800, 1, 2, 4]
    assert words_at(rig, ARGS + 12 + 16, 2) == [0, 2026]


async def test_a_host_that_keeps_a_bounce_page_ends_the_vm_at_the_third_time(rig: UltravisorRig) -> None:
    PlayedRtas(rig, [0, 2026])
    await rig.kvm.page_inval(BOUNCE_GFN)
    rig.kvm.lies[H_SVM_PAGE_IN.number] = answering(HCode.H_PARAMETER)
    call = token("ibm,read-pci-config"), [0x800, 1, 2, 4], 2

    assert [await rtas(rig, *call) for _ in range(2)] == [HCode.H_BUSY] * 2
    assert [name for name in rig.kvm.names() if name == H_RTAS.name] == []
    await rig.guest.deliver(H_RTAS, [0, ARGS])

    assert rig.notices == [("vm-failed", "vm1", "page-withheld")]


async def test_a_block_in_a_shared_page_that_the_host_took_away_is_read_from_the_new_frame(rig: UltravisorRig) -> None:
    assert await rig.share(BUFFER_GFN) == UCode.U_SUCCESS
    await rig.kvm.page_inval(BUFFER_GFN)
    header = struct.pack(">7I", token("ibm,read-pci-config"), 4, 2, 0x800, 1, 2, 4)
    os.pwrite(rig.ram_fd, header, gpa_of(BUFFER_GFN))
    kvm = PlayedRtas(rig, [0, 2026])

    assert await rig.guest.deliver(H_RTAS, [0, gpa_of(BUFFER_GFN)]) == [HCode.H_SUCCESS]

    assert kvm.words == [0x800, 1, 2, 4]
    assert rig.state(BUFFER_GFN) == "SHARED"


async def test_an_input_buffer_is_copied_to_its_declared_length(rig: UltravisorRig) -> None:
    kvm = PlayedRtas(rig, [0, 5])
    rig.page(BUFFER_GFN)[1000:1005] = b"hello"

    assert await rtas(rig, token("nvram-store"), [0, BUFFER, 5], 2) == HCode.H_SUCCESS

    (bounce,) = kvm.buffer_arguments
    assert rig.state(bounce // PAGE_BYTES) == "SHARED_IMPLICIT"
    assert kvm.ram[bounce : bounce + MAX_BUFFER_BYTES] == b"hello".ljust(MAX_BUFFER_BYTES, b"\0")
    assert SECRET[:12] not in kvm.ram
    assert kvm.words == [0, bounce, 5]


async def test_an_output_buffer_shows_nothing_and_takes_its_declared_length(rig: UltravisorRig) -> None:
    kvm = PlayedRtas(rig, [0, 6], output=b"answer and more")
    before = bytes(rig.page(BUFFER_GFN))

    assert await rtas(rig, token("nvram-fetch"), [0, BUFFER, 6], 2) == HCode.H_SUCCESS

    assert SECRET[:12] not in kvm.ram
    after = bytes(rig.page(BUFFER_GFN))
    assert after == before[:1000] + b"answer" + before[1006:]


async def test_an_input_buffer_is_not_written_back(rig: UltravisorRig) -> None:
    PlayedRtas(rig, [0, 5], output=b"forged")
    before = bytes(rig.page(BUFFER_GFN))

    await rtas(rig, token("nvram-store"), [0, BUFFER, 5], 2)

    assert bytes(rig.page(BUFFER_GFN)) == before


async def test_what_one_call_left_in_a_bounce_page_is_not_in_the_next(rig: UltravisorRig) -> None:
    kvm = PlayedRtas(rig, [0, 0])
    rig.page(BUFFER_GFN)[1000:1005] = b"hello"
    await rtas(rig, token("nvram-store"), [0, BUFFER, 5], 2)

    await rtas(rig, token("nvram-fetch"), [0, BUFFER, 5], 2)

    (first, second) = kvm.buffer_arguments
    assert first == second
    assert not any(kvm.ram[second : second + MAX_BUFFER_BYTES])


@pytest.mark.parametrize(
    ("service", "args", "n_rets"),
    [
        pytest.param(0x7777, [1, 2], 1, id="no such service"),
        pytest.param(token("ibm,read-pci-config"), [1, 2, 3], 2, id="too few arguments"),
        pytest.param(token("ibm,read-pci-config"), [1, 2, 3, 4, 5], 2, id="too many arguments"),
        pytest.param(token("ibm,read-pci-config"), [1, 2, 3, 4], 5, id="too many return words"),
        pytest.param(token("nvram-store"), [0, BUFFER, MAX_BUFFER_BYTES + 1], 2, id="input buffer too long"),
        pytest.param(token("nvram-fetch"), [0, BUFFER, 0xFFFFFFFF], 2, id="output buffer too long"),
        pytest.param(token("nvram-store"), [0, MEMORY_BYTES - 4, 8], 2, id="input buffer leaves memory"),
        pytest.param(token("nvram-fetch"), [0, MEMORY_BYTES - 4, 8], 2, id="output buffer leaves memory"),
        pytest.param(token("nvram-fetch"), [0, 0xFFFFFFF0, 32], 2, id="output buffer outside memory"),
        pytest.param(token("nvram-store"), [0, gpa_of(BOUNCE_GFN), 8], 2, id="input buffer in a bounce page"),
        pytest.param(token("nvram-fetch"), [0, gpa_of(BOUNCE_GFN), 8], 2, id="output buffer in a bounce page"),
    ],
)
async def test_what_is_not_as_declared_never_reaches_the_hypervisor(
    rig: UltravisorRig, service: int, args: list[int], n_rets: int
) -> None:
    before = rig.ram()

    assert await rtas(rig, service, args, n_rets) == HCode.H_PARAMETER

    assert not rig.kvm.frames
    assert rig.ram() == before


@pytest.mark.parametrize("at", [MEMORY_BYTES - 8, MEMORY_BYTES, (1 << 64) - 4, gpa_of(BOUNCE_GFN)])
async def test_a_block_that_is_not_the_guests_is_refused(rig: UltravisorRig, at: int) -> None:
    result: Registers = await rig.guest.deliver(H_RTAS, [0, at])

    assert result == [HCode.H_PARAMETER]
    assert not rig.kvm.frames


async def test_return_words_that_leave_the_guests_memory_are_refused_before_the_call(rig: UltravisorRig) -> None:
    at = gpa_of(N_PAGES - BOUNCE_PAGES) - 28

    assert await rtas(rig, token("ibm,read-pci-config"), [1, 2, 3, 4], 2, at) == HCode.H_PARAMETER

    assert not rig.kvm.frames


async def test_a_block_across_two_pages_is_one_block(rig: UltravisorRig) -> None:
    kvm = PlayedRtas(rig, [0, 9])
    at = BUFFER - 1000 - 8
    whole = struct.pack(">7I", token("ibm,read-pci-config"), 4, 2, 5, 6, 7, 1)
    rig.page(ARGS_GFN)[-8:], rig.page(BUFFER_GFN)[:20] = whole[:8], whole[8:]

    assert (await rig.guest.deliver(H_RTAS, [0, at]))[0] == HCode.H_SUCCESS

    assert kvm.words == [5, 6, 7, 1]
    assert words_at(rig, gpa_of(BUFFER_GFN) + 20, 2) == [0, 9]


async def test_a_paged_out_block_is_brought_in_and_verified(rig: UltravisorRig) -> None:
    kvm = PlayedRtas(rig, [0, 1])
    rig.page(ARGS_GFN)[:28] = struct.pack(">7I", token("ibm,read-pci-config"), 4, 2, 5, 6, 7, 1)
    assert await rig.kvm.page_out(ARGS_GFN) == 0

    assert (await rig.guest.deliver(H_RTAS, [0, ARGS]))[0] == HCode.H_SUCCESS

    assert kvm.words == [5, 6, 7, 1]
    assert rig.state(ARGS_GFN) == "SECURE"


async def _page_out_waits_for_the_guest(rig: UltravisorRig, nursery: trio.Nursery, gfn: int) -> trio.Event:
    """The host pages `gfn` out; that ends once the event is set."""
    acknowledges = rig.guest.held[MAP_INVALIDATE.number] = trio.Event()
    nursery.start_soon(rig.kvm.page_out, gfn)
    await trio.testing.wait_all_tasks_blocked()
    assert rig.state(gfn) == "PAGING_OUT"
    return acknowledges


async def test_a_block_that_is_just_paged_out_is_waited_for(rig: UltravisorRig, nursery: trio.Nursery) -> None:
    kvm = PlayedRtas(rig, [0, 1])
    rig.page(ARGS_GFN)[:28] = struct.pack(">7I", token("ibm,read-pci-config"), 4, 2, 5, 6, 7, 1)
    acknowledges = await _page_out_waits_for_the_guest(rig, nursery, ARGS_GFN)
    codes: list[int] = []

    async def call() -> None:
        codes.extend(await rig.guest.deliver(H_RTAS, [0, ARGS]))

    async with trio.open_nursery() as calls:
        calls.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        acknowledges.set()

    assert codes == [HCode.H_SUCCESS]
    assert kvm.words == [5, 6, 7, 1]


async def test_return_words_reach_a_block_that_is_paged_out_meanwhile(
    rig: UltravisorRig, nursery: trio.Nursery
) -> None:
    kvm = PlayedRtas(rig, [0, 2026])

    async def serve(args: Registers) -> Registers:
        acknowledges = await _page_out_waits_for_the_guest(rig, nursery, ARGS_GFN)
        nursery.start_soon(_set_later, acknowledges)
        return await kvm.serve(args)

    rig.kvm.lies[H_RTAS.number] = serve

    assert await rtas(rig, token("ibm,read-pci-config"), [0x800, 1, 2, 4], 2) == HCode.H_SUCCESS

    assert words_at(rig, ARGS + 12 + 16, 2) == [0, 2026]


async def _set_later(event: trio.Event) -> None:
    await trio.testing.wait_all_tasks_blocked()
    event.set()


async def test_a_block_that_the_host_never_lets_rest_is_refused(
    rig: UltravisorRig, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    PlayedRtas(rig, [0, 1])
    rig.page(ARGS_GFN)[:28] = struct.pack(">7I", token("ibm,read-pci-config"), 4, 2, 5, 6, 7, 1)
    assert rig.partition.svm is not None
    rig.partition.svm.apply(ARGS_GFN, PageEvent.OUT_BEGIN)

    assert (await rig.guest.deliver(H_RTAS, [0, ARGS]))[0] == HCode.H_PARAMETER
    assert not rig.kvm.frames


async def test_a_block_in_a_shared_page_is_allowed(rig: UltravisorRig) -> None:
    kvm = PlayedRtas(rig, [0, 1])
    assert await rig.share(ARGS_GFN) == 0
    os.pwrite(rig.ram_fd, struct.pack(">7I", token("ibm,read-pci-config"), 4, 2, 5, 6, 7, 1), ARGS)

    assert (await rig.guest.deliver(H_RTAS, [0, ARGS]))[0] == HCode.H_SUCCESS

    assert kvm.words == [5, 6, 7, 1]
    assert struct.unpack(">2I", rig.read(ARGS_GFN)[28:36]) == (0, 1)


async def test_refused_and_served_calls_use_up_no_bounce_page(rig: UltravisorRig) -> None:
    PlayedRtas(rig, [0, 0])

    for _ in range(PAGE_BYTES // 256 + 1):
        assert await rtas(rig, token("nvram-store"), [0, MEMORY_BYTES, 8], 2) == HCode.H_PARAMETER
        assert await rtas(rig, token("nvram-store"), [0, BUFFER, 8], 2) == HCode.H_SUCCESS


class FlatMemory(GuestMemory):
    """Guest memory that is all there."""

    def __init__(self) -> None:
        self.bytes = bytearray(2 * PAGE_BYTES)

    async def load(self, gpa: int, n_bytes: int) -> bytes:
        if n_bytes and gpa + n_bytes > len(self.bytes):
            raise GuestFault("outside")
        return bytes(self.bytes[gpa : gpa + n_bytes])

    async def store(self, gpa: int, data: bytes) -> None:
        if gpa + len(data) > len(self.bytes):
            raise GuestFault("outside")
        self.bytes[gpa : gpa + len(data)] = data


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.sampled_from(sorted(RTAS.by_number)), st.lists(st.integers(0, 0x30000), max_size=12), st.integers(0, 8))
def test_any_block_is_served_or_refused(service: int, args: list[int], n_rets: int) -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 5 * PAGE_BYTES)
    ram = NormalRam(fd, 5 * PAGE_BYTES)
    bounce, memory = RtasBounce(list(range(5)), ram), FlatMemory()
    struct.pack_into(f">III{len(args)}I", memory.bytes, 64, service, len(args), n_rets, *args)

    async def forward(_gpa: int) -> list[int]:
        return [HCode.H_SUCCESS]

    async def call() -> list[int]:
        try:
            return await bounce.call(memory, 64, forward)
        except GuestFault:
            return [HCode.H_PARAMETER]

    assert trio.run(call) in ([HCode.H_SUCCESS], [HCode.H_PARAMETER])
    ram.close()

"""kvm's side of a secure VM: the switch, pages in and out, and what a reset that comes in between leaves."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import cast

import pytest
import trio

from protocol.codes import HCode, UCode
from protocol.declare import Call
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gpa_of
from protocol.hcalls import H_PAGE_IN_NONSHARED, H_PAGE_IN_SHARED
from protocol.messages import MAP_INVALIDATE, Status
from protocol.ucalls import UV_PAGE_IN, UV_PAGE_INVAL, UV_PAGE_OUT, UV_REGISTER_MEM_SLOT, UV_SVM_TERMINATE
from services.kvm.memory import MemSlot, VmMemory
from services.kvm.page_state import KvmState
from services.kvm.ultravisor_port import UltravisorPort
from services.kvm.uvmem import SecurePages, Switch
from services.runtime.link import Link
from shared.host_view import HostState
from shared.real_address import real_address

LPID = 5
N_PAGES = 8
SIZE_BYTES = N_PAGES * PAGE_BYTES
CONTENT = b"normal" * 20_000
Does = Callable[[Call, list[int]], Awaitable[int]]


class PlayedUltravisor:
    """Answers U_SUCCESS, unless a test plays it otherwise."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []
        self.does: Does | None = None

    async def ucall(self, call: Call, args: list[int], _cause: int) -> list[int]:
        self.calls.append((call.name, args))
        await trio.lowlevel.checkpoint()
        return [UCode.U_SUCCESS if self.does is None else await self.does(call, args)]

    ucall_lasting = ucall

    async def ucalls(self, call: Call, args_of_each: Sequence[list[int]], cause: int) -> list[list[int]]:
        return [await self.ucall(call, args, cause) for args in args_of_each]

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


class PlayedGuest:
    async def call(self, message: object, _body: object, _cause: int) -> Status:
        assert message is MAP_INVALIDATE
        await trio.lowlevel.checkpoint()
        return Status()


class Rig:
    def __init__(self) -> None:
        self.fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, SIZE_BYTES)
        self.memory = VmMemory("vm1", self.fd, SIZE_BYTES)
        self.memory.set_slot(MemSlot(0, 0, SIZE_BYTES))
        for gfn in range(N_PAGES):
            self.fill(gfn)
        self.started = True
        self.ultravisor = PlayedUltravisor()
        self.secure = self.pages(allowed=True)

    def pages(self, *, allowed: bool) -> SecurePages:
        port, guest = cast(UltravisorPort, self.ultravisor), cast(Link, PlayedGuest())
        return SecurePages(LPID, self.memory, port, guest, allowed=allowed, started=lambda: self.started)

    async def start(self) -> None:
        assert await self.secure.init_start(0) is HCode.H_SUCCESS

    async def done(self) -> None:
        await self.start()
        assert self.secure.init_done() is HCode.H_SUCCESS
        self.ultravisor.calls.clear()

    async def page_in(self, gfn: int, flags: int = H_PAGE_IN_NONSHARED) -> HCode:
        return await self.secure.page_in(gpa_of(gfn), flags, PAGE_SHIFT, 0)

    def fill(self, gfn: int) -> None:
        os.pwrite(self.fd, CONTENT[:PAGE_BYTES], gpa_of(gfn))

    def is_hole(self, gfn: int) -> bool:
        return os.pread(self.fd, PAGE_BYTES, gpa_of(gfn)) == bytes(PAGE_BYTES)

    def answer(self, which: Call, code: UCode) -> None:
        async def does(call: Call, _args: list[int]) -> int:
            return code if call is which else UCode.U_SUCCESS

        self.ultravisor.does = does

    def busy_first(self, which: Call, n_times: int) -> None:
        """The ultravisor has too many calls open for `which`, so many times."""
        codes = iter([UCode.U_BUSY] * n_times)

        async def does(call: Call, _args: list[int]) -> int:
            return next(codes, UCode.U_SUCCESS) if call is which else UCode.U_SUCCESS

        self.ultravisor.does = does
        self.ultravisor.calls.clear()

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


@pytest.fixture
def rig() -> Iterator[Rig]:
    it = Rig()
    yield it
    it.close()


# -- the switch -------------------------------------------------------------------------------------------------------


async def test_a_switch_registers_every_slot_and_unmaps_the_normal_vm(rig: Rig) -> None:
    rig.memory.map_around(0)

    await rig.start()

    assert rig.ultravisor.calls == [(UV_REGISTER_MEM_SLOT.name, [LPID, 0, SIZE_BYTES, 0, 0])]
    assert rig.secure.switch is Switch.START
    assert not list(rig.memory.map.mapped())
    assert await rig.secure.init_start(0) is HCode.H_STATE


async def test_without_secure_memory_the_slots_are_dropped_again(rig: Rig) -> None:
    rig.memory.set_slot(MemSlot(0, 0, gpa_of(4)))
    rig.memory.set_slot(MemSlot(1, gpa_of(4), gpa_of(4)))

    async def full(call: Call, args: list[int]) -> int:
        return UCode.U_PARAMETER if call is UV_REGISTER_MEM_SLOT and args[4] == 1 else UCode.U_SUCCESS

    rig.ultravisor.does = full

    assert await rig.secure.init_start(0) is HCode.H_PARAMETER
    assert rig.ultravisor.names()[-1] == "UV_UNREGISTER_MEM_SLOT"


async def test_a_vm_that_may_not_turn_secure_gets_h_authority(rig: Rig) -> None:
    assert await rig.pages(allowed=False).init_start(0) is HCode.H_AUTHORITY
    assert not rig.ultravisor.calls


async def test_a_switch_that_was_on_its_way_does_not_begin_behind_a_reset(rig: Rig) -> None:
    rig.started = False

    assert await rig.secure.init_start(0) is HCode.H_STATE

    assert rig.secure.switch is Switch.NONE
    assert not rig.ultravisor.calls


async def test_at_the_end_of_the_switch_every_frame_is_dropped(rig: Rig) -> None:
    await rig.start()
    await rig.page_in(2, H_PAGE_IN_SHARED)

    assert rig.secure.init_done() is HCode.H_SUCCESS

    assert rig.memory.in_state(KvmState.SHARED) == [2]
    assert all(rig.is_hole(gfn) for gfn in range(N_PAGES) if gfn != 2)
    assert rig.secure.init_done() is HCode.H_UNSUPPORTED


async def test_an_abort_takes_every_page_back(rig: Rig) -> None:
    await rig.start()
    await rig.page_in(1)
    await rig.page_in(2, H_PAGE_IN_SHARED)

    assert await rig.secure.init_abort(0) is HCode.H_PARAMETER

    assert rig.memory.in_state(KvmState.NORMAL) == list(range(N_PAGES))
    assert rig.ultravisor.names()[-3:] == [UV_PAGE_OUT.name, UV_PAGE_OUT.name, UV_SVM_TERMINATE.name]
    assert rig.secure.switch is Switch.NONE


async def test_an_abort_gives_up_no_page_for_which_the_ultravisor_was_busy(rig: Rig) -> None:
    await rig.start()
    await rig.page_in(1)
    rig.busy_first(UV_PAGE_OUT, 3)

    assert await rig.secure.init_abort(0) is HCode.H_PARAMETER

    assert rig.ultravisor.names() == [*[UV_PAGE_OUT.name] * 4, UV_SVM_TERMINATE.name]


async def test_an_abort_stops_where_a_reset_overtakes_it(rig: Rig) -> None:
    await rig.start()
    for gfn in (1, 2, 3):
        await rig.page_in(gfn)

    async def reset_meanwhile(call: Call, _args: list[int]) -> int:
        if call is UV_PAGE_OUT:
            await rig.secure.off(0)
            rig.memory.set_state(2, KvmState.SECURE)
        return UCode.U_SUCCESS

    rig.ultravisor.does = reset_meanwhile
    rig.ultravisor.calls.clear()

    assert await rig.secure.init_abort(0) is HCode.H_STATE

    assert rig.ultravisor.names() == [UV_PAGE_OUT.name, UV_SVM_TERMINATE.name]
    assert rig.memory.state(2) is KvmState.SECURE


async def test_abort_is_for_a_switch_under_way_only(rig: Rig) -> None:
    assert await rig.secure.init_abort(0) is HCode.H_UNSUPPORTED
    await rig.done()
    assert await rig.secure.init_abort(0) is HCode.H_STATE


# -- page in ----------------------------------------------------------------------------------------------------------


async def test_a_page_that_was_taken_is_hidden_and_punched(rig: Rig) -> None:
    await rig.start()

    assert await rig.page_in(3) is HCode.H_SUCCESS

    assert rig.ultravisor.calls[-1] == (
        UV_PAGE_IN.name,
        [LPID, real_address(LPID, gpa_of(3)), gpa_of(3), 0, PAGE_SHIFT],
    )
    assert rig.memory.state(3) is KvmState.SECURE
    assert rig.memory.host_view[3] == HostState.ABSENT
    assert rig.is_hole(3)
    assert await rig.page_in(3) is HCode.H_PARAMETER


@pytest.mark.parametrize(("code", "answer"), [(UCode.U_P3, HCode.H_PARAMETER), (UCode.U_RETRY, HCode.H_BUSY)])
async def test_a_page_that_was_refused_is_as_before(rig: Rig, code: UCode, answer: HCode) -> None:
    await rig.start()
    rig.answer(UV_PAGE_IN, code)

    assert await rig.page_in(3) is answer

    assert rig.memory.state(3) is KvmState.NORMAL
    assert rig.memory.host_view[3] == HostState.PRESENT
    assert not rig.is_hole(3)


async def test_a_page_that_becomes_shared_starts_empty(rig: Rig) -> None:
    await rig.done()
    rig.fill(3)

    assert await rig.page_in(3, H_PAGE_IN_SHARED) is HCode.H_SUCCESS

    assert rig.memory.state(3) is KvmState.SHARED
    assert rig.memory.host_view[3] == HostState.SHARED
    assert rig.is_hole(3)


async def test_arguments_are_checked_in_order(rig: Rig) -> None:
    async def ask(gpa: int, flags: int, shift: int) -> HCode:
        return await rig.secure.page_in(gpa, flags, shift, 0)

    assert await ask(0, 0, PAGE_SHIFT) is HCode.H_UNSUPPORTED
    await rig.start()
    rig.ultravisor.calls.clear()

    assert await ask(0, 9, 12) is HCode.H_P3
    assert await ask(0, 2, PAGE_SHIFT) is HCode.H_P2
    assert await ask(1, 0, PAGE_SHIFT) is HCode.H_PARAMETER
    assert await ask(SIZE_BYTES, 0, PAGE_SHIFT) is HCode.H_PARAMETER
    assert not rig.ultravisor.calls


async def test_a_page_with_a_call_under_way_is_busy_to_all_others(rig: Rig) -> None:
    await rig.done()
    seen: list[HCode] = []

    async def others(call: Call, _args: list[int]) -> int:
        if call is UV_PAGE_OUT:
            seen.extend([await rig.page_in(3), await rig.page_in(3, H_PAGE_IN_SHARED), await rig.secure.page_out(3, 0)])
        return UCode.U_SUCCESS

    rig.ultravisor.does = others

    assert await rig.secure.page_out(3, 0) is HCode.H_SUCCESS

    assert seen == [HCode.H_BUSY] * 3
    assert not rig.memory.busy


# -- page out ---------------------------------------------------------------------------------------------------------


async def test_a_touch_of_the_host_brings_the_image(rig: Rig) -> None:
    await rig.done()

    assert await rig.secure.make_present([1, 2], 0) is HCode.H_SUCCESS

    assert rig.memory.in_state(KvmState.PAGED_OUT) == [1, 2]
    assert rig.memory.host_view[1] == HostState.PRESENT
    assert await rig.secure.make_present([1, 2], 0) is HCode.H_SUCCESS
    assert rig.ultravisor.names() == [UV_PAGE_OUT.name, UV_PAGE_OUT.name]


async def test_a_touch_gives_up_after_a_second_of_being_told_to_retry(rig: Rig, autojump_clock: object) -> None:
    await rig.done()
    rig.answer(UV_PAGE_OUT, UCode.U_RETRY)
    start = trio.current_time()

    assert await rig.secure.make_present([1], 0) is HCode.H_BUSY

    assert trio.current_time() - start < 1.1
    assert rig.memory.state(1) is KvmState.SECURE


async def test_what_a_device_left_in_an_absent_frame_is_gone_before_the_image_comes(rig: Rig) -> None:
    await rig.done()
    rig.fill(1)

    async def look(_call: Call, _args: list[int]) -> int:
        assert rig.is_hole(1)
        return UCode.U_SUCCESS

    rig.ultravisor.does = look

    assert await rig.secure.page_out(1, 0) is HCode.H_SUCCESS


# -- the end ----------------------------------------------------------------------------------------------------------


async def test_the_end_leaves_a_normal_vm_without_images(rig: Rig) -> None:
    await rig.done()
    await rig.secure.page_out(1, 0)
    rig.fill(1)

    assert await rig.secure.off(0)

    assert rig.ultravisor.names()[-1] == UV_SVM_TERMINATE.name
    assert rig.memory.in_state(KvmState.NORMAL) == list(range(N_PAGES))
    assert all(rig.is_hole(gfn) for gfn in range(N_PAGES))
    assert rig.secure.switch is Switch.NONE


async def test_a_secure_vm_ends_as_soon_as_the_ultravisor_is_no_longer_busy(rig: Rig) -> None:
    await rig.done()
    rig.busy_first(UV_SVM_TERMINATE, 3)

    assert await rig.secure.off(0)

    assert rig.ultravisor.names() == [UV_SVM_TERMINATE.name] * 4
    assert rig.secure.switch is Switch.NONE


@pytest.mark.usefixtures("autojump_clock")
async def test_a_secure_vm_that_the_ultravisor_has_not_ended_is_still_one(rig: Rig) -> None:
    await rig.done()
    rig.answer(UV_SVM_TERMINATE, UCode.U_BUSY)

    assert not await rig.secure.off(0)

    assert rig.secure.switch is Switch.DONE
    assert rig.memory.in_state(KvmState.SECURE) == list(range(N_PAGES))

    rig.answer(UV_SVM_TERMINATE, UCode.U_SUCCESS)
    assert await rig.secure.off(0)
    assert rig.memory.in_state(KvmState.NORMAL) == list(range(N_PAGES))


async def test_a_page_call_that_a_reset_overtakes_changes_no_state(rig: Rig) -> None:
    await rig.done()

    async def reset_meanwhile(call: Call, _args: list[int]) -> int:
        if call is not UV_SVM_TERMINATE:
            await rig.secure.off(0)
        return UCode.U_SUCCESS

    rig.ultravisor.does = reset_meanwhile

    await rig.secure.page_out(3, 0)
    assert rig.memory.state(3) is KvmState.NORMAL
    assert rig.memory.host_view[3] == HostState.PRESENT


# -- reclaim: the host takes frames of shared pages away --------------------------------------------------------------


@pytest.fixture
async def shared(rig: Rig) -> Rig:
    """A secure VM that shares frame 2, which holds something."""
    await rig.done()
    assert await rig.page_in(2, H_PAGE_IN_SHARED) is HCode.H_SUCCESS
    rig.fill(2)
    rig.ultravisor.calls.clear()
    return rig


async def test_a_shared_frame_is_punched_once_the_ultravisor_has_let_go_of_it(shared: Rig) -> None:
    held: list[bool] = []

    async def does(_call: Call, _args: list[int]) -> int:
        held.append(shared.is_hole(2) or 2 not in shared.memory.busy)
        return UCode.U_SUCCESS

    shared.ultravisor.does = does

    assert await shared.secure.reclaim_all([2], 0) == [HCode.H_SUCCESS]

    assert held == [False]
    assert shared.ultravisor.calls == [(UV_PAGE_INVAL.name, [LPID, gpa_of(2), PAGE_SHIFT])]
    assert shared.is_hole(2)
    assert shared.memory.state(2) is KvmState.SHARED
    assert not shared.memory.busy


@pytest.mark.parametrize(
    ("code", "result"), [(UCode.U_RETRY, HCode.H_BUSY), (UCode.U_P2, HCode.H_PARAMETER), (UCode.U_BUSY, HCode.H_BUSY)]
)
async def test_a_frame_that_the_ultravisor_still_uses_is_left_alone(shared: Rig, code: UCode, result: HCode) -> None:
    shared.answer(UV_PAGE_INVAL, code)

    assert await shared.secure.reclaim_all([2], 0) == [result]

    assert not shared.is_hole(2)
    assert not shared.memory.busy


async def test_only_shared_pages_that_nobody_works_on_can_be_reclaimed(shared: Rig) -> None:
    await shared.secure.page_out(3, 0)
    shared.ultravisor.calls.clear()
    shared.memory.busy.add(4)

    codes = await shared.secure.reclaim_all([1, 3, 4], 0)

    assert codes == [HCode.H_PARAMETER, HCode.H_PARAMETER, HCode.H_BUSY]
    assert not shared.ultravisor.calls


async def test_a_reset_during_a_reclaim_keeps_the_frame(shared: Rig) -> None:
    async def does(call: Call, _args: list[int]) -> int:
        if call is UV_PAGE_INVAL:
            await shared.secure.off(0)
        return UCode.U_SUCCESS

    shared.ultravisor.does = does

    assert await shared.secure.reclaim_all([2], 0) == [HCode.H_PARAMETER]

    assert not shared.is_hole(2)
    assert shared.memory.state(2) is KvmState.NORMAL


async def test_the_ultravisor_gets_a_frame_again_when_it_asks(shared: Rig) -> None:
    await shared.secure.reclaim_all([2], 0)
    shared.ultravisor.calls.clear()

    assert await shared.page_in(2, H_PAGE_IN_SHARED) is HCode.H_SUCCESS

    assert shared.ultravisor.names() == [UV_PAGE_IN.name]
    assert shared.is_hole(2)

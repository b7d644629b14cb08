"""Live migration, kvm's part: what is saved on one host goes on at another, and a hostile state changes nothing."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import messages as m
from protocol import ucalls as u
from protocol.codes import HCode, UCode
from protocol.declare import Call
from protocol.errors import CallTimeout, HostFault, PeerGone
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, STREAM_BUFFER_BYTES, gpa_of
from protocol.hcall_values import SetModeResource
from protocol.hcalls import (
    H_CEDE,
    H_CONFER,
    H_CPPR,
    H_PAGE_IN_SHARED,
    H_PUT_TCE,
    H_PUT_TERM_CHAR,
    H_REGISTER_VPA,
    H_SET_MODE,
    H_SVM_PAGE_IN,
)
from protocol.links import KVM_QEMU
from protocol.vm_state import VmState
from services.kvm import dirty, saved_vm
from services.kvm.dirty import DEVICE_MAP, GUEST_MAP
from services.kvm.page_state import KvmState
from services.kvm.tce_tables import TceTableState
from services.kvm.uvmem import Switch
from services.kvm.vcpu import Wait
from services.kvm.vpa import Area, VcpuAreas, VpaState
from services.runtime.text_buffers import INPUT_BYTES
from shared.host_view import HostState
from shared.interrupt_sources import MSI_BASE, PCI_LSI_BASE, VTY_SOURCE
from shared.memfd import SealedMemory
from shared.stream_buffer import StreamBuffer, make_stream_buffer
from shared.tce import TcePermission, tce
from shared.typed_text import TypedText
from tests.unit.kvm_rig import KvmRig
from tests.unit.ultravisor_rig import MEMORY_BYTES, N_PAGES, PlayedGuest

CONTENT = bytes([0x5A]) * PAGE_BYTES
PROCESSOR = b"registers and all"
EDGE, LEVEL = MSI_BASE, PCI_LSI_BASE
SOURCES = {VTY_SOURCE: False, EDGE: False, LEVEL: True}
WINDOW = m.TceWindowBody(0x8000_0000, 12, 0, 1024)
DYNAMIC = m.TceWindowBody(0x8000_0001, 16, 1 << 40, 64)
ROOM = 1 << 20
AT = 4096


class MovingGuest(PlayedGuest):
    """A guest whose processor can be saved and loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.saved = m.SavedProcessor(HCode.H_SUCCESS, PROCESSOR)
        self.load_codes: list[int] = []
        """What it answers to the first VCPU_LOADs; H_SUCCESS when there is none left."""
        self.meanwhile: dict[int, Callable[[], Any]] = {}
        """What happens, by message, before it answers."""

    async def call(self, message: m.Message[Any, Any], body: m.Body, cause: int = 0) -> Any:  # noqa: ANN401
        status = await super().call(message, body, cause)
        if message.number in self.meanwhile:
            await self.meanwhile.pop(message.number)()
        if message is m.VCPU_SAVE:
            return self.saved
        if message is m.VCPU_LOAD and self.load_codes:
            return m.Status(self.load_codes.pop(0))
        return status

    def bodies(self, message: m.Message[Any, Any]) -> list[m.Body]:
        """Those of every `message` that came."""
        return [body for name, body in self.calls if name == message.name]


class Host(KvmRig):
    """One host's kvm with the VM; `guest` answers VCPU_SAVE and VCPU_LOAD."""

    guest: MovingGuest

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        buffer = make_stream_buffer("vm1")
        self.stream = StreamBuffer(os.dup(buffer.fd))
        stream_of_kvm = StreamBuffer(os.dup(buffer.fd))
        buffer.close()
        super().__init__(guest=MovingGuest(), qemu=PlayedGuest(), stream=stream_of_kvm, **options)

    async def machine(self, *windows: m.TceWindowBody, sources: dict[int, bool] = SOURCES) -> None:
        """Memory, interrupt sources and windows, as qemu makes them before the VM runs."""
        await self.order(m.MEMSLOT_SET, m.MemslotBody(0, 0, MEMORY_BYTES))
        for source, level_triggered in sources.items():
            await self.order(m.IRQ_SOURCE, m.IrqSourceBody(source, level_triggered))
        for window in windows:
            await self.order(m.TCE_WINDOW_CREATE, window)

    async def order(self, message: m.Message[Any, Any], body: m.Body) -> None:
        """What qemu orders succeeds."""
        assert (await self.qemu.deliver(message, body)).code == HCode.H_SUCCESS

    async def code(self, message: m.Message[Any, Any], body: m.Body | None = None) -> int:
        """The code of what qemu orders."""
        return int((await self.qemu.deliver(message, m.Empty() if body is None else body)).code)

    async def save(self) -> bytes:
        """What VM_SAVE writes."""
        saved = await self.qemu.deliver(m.VM_SAVE, m.StreamPlaceBody(AT, ROOM))
        assert saved.code == HCode.H_SUCCESS
        return self.stream.read(AT, saved.n_bytes)

    async def load(self, state: bytes) -> int:
        """VM_LOAD of `state`; its code."""
        self.stream.write(AT, state)
        return await self.code(m.VM_LOAD, m.StreamPlaceBody(AT, len(state)))

    def frame(self, gfn: int) -> bytes:
        """What the host finds in a frame."""
        return bytes(self.memory.ram[gpa_of(gfn) : gpa_of(gfn) + PAGE_BYTES])

    def parts(self) -> list[Any]:
        """All that a state brings, as the VM has it now."""
        vm = self.vm
        return [
            (vm.memory.states(), bytes(vm.memory.host_view), vm.secure.switch, vm.state, vm.failure),
            (vm.xics.save(), vm.vcpus.save(), vm.terminal.save(), vm.tces.save()),
            (vm.hcalls.areas.save(), vm.hcalls.save_modes()),
        ]

    def close(self) -> None:
        """Release all."""
        self.vm.close()
        self.stream.close()
        os.close(self.ram_fd)


@contextmanager
def host(**options: Any) -> Iterator[Host]:  # noqa: ANN401
    """A host, closed at the end."""
    it = Host(**options)
    try:
        yield it
    finally:
        it.close()


async def run_for_a_while(rig: Host) -> None:
    """The VM of `rig` starts, and leaves something in every part of kvm."""
    await rig.machine(WINDOW, DYNAMIC)
    await rig.order(m.VM_START, m.StartBody(0, 0x100, {}))
    rig.memory.ram[:] = CONTENT * N_PAGES
    rig.memory.ram[gpa_of(3) : gpa_of(3) + 8] = (640).to_bytes(6, "big") + bytes(2)
    assert await rig.hcall(H_REGISTER_VPA, 1 << 45, 0, gpa_of(3)) == 0
    assert await rig.hcall(H_SET_MODE, 1, SetModeResource.LITTLE_ENDIAN, 0, 0) == 0
    assert await rig.hcall(H_PUT_TERM_CHAR, 0, 5, int.from_bytes(b"hello\0\0\0", "big"), 0) == 0
    assert await rig.hcall(H_PUT_TCE, WINDOW.liobn, 0x3000, tce(gpa_of(2), TcePermission.READ)) == 0
    assert await rig.hcall(H_PUT_TCE, DYNAMIC.liobn, DYNAMIC.base, tce(gpa_of(1), TcePermission.WRITE)) == 0
    assert rig.vm.type_in(TypedText(b"ls\n").offer()) == 3
    rig.vm.xics.configure(LEVEL, 0, 5, 5)
    rig.vm.xics.configure(EDGE, 0, 6, 6)
    await rig.qemu.deliver(m.IRQ_SET, m.IrqBody(LEVEL, level=True))
    await rig.qemu.deliver(m.IRQ_SET, m.IrqBody(EDGE, level=True))


async def normal_state() -> bytes:
    """What a normal VM that ran for a while is saved as."""
    with host() as rig:
        await run_for_a_while(rig)
        await rig.order(m.PAGES_DISCARD, m.PagesBody([7, 8]))
        await rig.order(m.VM_FREEZE, m.Empty())
        return await rig.save()


async def secure_state() -> bytes:
    """The same for a secure one, with page 4 shared and page 5 paged out."""
    with host() as rig:
        await run_for_a_while(rig)
        await rig.secure()
        assert await rig.hcall(H_SVM_PAGE_IN, gpa_of(4), H_PAGE_IN_SHARED, PAGE_SHIFT) == 0
        await rig.order(m.PAGES_WANTED, m.PagesBody([5]))
        return await rig.save()


MAKERS = {"normal": normal_state, "secure": secure_state}


def state_of(rig: Host) -> VmState:
    return rig.vm.state


@pytest.fixture
async def source() -> AsyncIterator[Host]:
    with host() as it:
        await run_for_a_while(it)
        yield it


@pytest.fixture
async def destination() -> AsyncIterator[Host]:
    with host(incoming=True) as it:
        await it.machine(WINDOW, DYNAMIC)
        it.memory.ram[:] = CONTENT * N_PAGES
        yield it


def test_kvm_serves_its_qemu_everything_that_their_link_carries() -> None:
    with host() as rig:
        assert rig.qemu.served == KVM_QEMU.upward


# -- VM_FREEZE --------------------------------------------------------------------------------------------------------


async def test_a_frozen_vm_is_paused_and_runs_again_when_it_is_continued(source: Host) -> None:
    await source.order(m.VM_FREEZE, m.Empty())
    assert state_of(source) is VmState.PAUSED

    await source.order(m.VM_CONTINUE, m.Empty())

    assert state_of(source) is VmState.RUNNING
    assert [name for name, _ in source.guest.calls] == ["VCPU_START", "VCPU_SAVE", "VCPU_CONTINUE"]


async def test_a_paused_vm_can_be_frozen_too(source: Host) -> None:
    await source.order(m.VM_STOP, m.Empty())

    await source.order(m.VM_FREEZE, m.Empty())

    assert source.vm.state is VmState.PAUSED
    assert await source.save()


async def test_a_processor_that_comes_to_no_safe_point_runs_on(source: Host) -> None:
    source.guest.saved = m.SavedProcessor(HCode.H_BUSY)

    assert await source.code(m.VM_FREEZE) == HCode.H_BUSY

    assert source.vm.state is VmState.RUNNING
    assert await source.code(m.VM_SAVE, m.StreamPlaceBody(0, ROOM)) == HCode.H_STATE
    source.guest.saved = m.SavedProcessor(HCode.H_SUCCESS, PROCESSOR)
    await source.order(m.VM_FREEZE, m.Empty())


async def test_a_guest_that_does_not_answer_in_time_may_have_stopped_and_is_told_to_go_on(
    source: Host, autojump_clock: trio.testing.MockClock
) -> None:
    source.guest.meanwhile[m.VCPU_SAVE.number] = trio.sleep_forever

    with pytest.raises(CallTimeout, match="3 s"):
        await source.code(m.VM_FREEZE)
    await source.order(m.VM_CONTINUE, m.Empty())

    assert source.guest.calls[-1][0] == "VCPU_CONTINUE"
    assert source.vm.state is VmState.RUNNING


@pytest.mark.parametrize("state", [VmState.STARTING, VmState.OFF, VmState.FAILED])
async def test_a_vm_that_does_not_run_is_not_frozen(source: Host, state: VmState) -> None:
    source.vm.enter(state)

    assert await source.code(m.VM_FREEZE) == HCode.H_STATE
    assert await source.code(m.VM_SAVE, m.StreamPlaceBody(0, ROOM)) == HCode.H_STATE


async def test_a_secure_vm_is_not_kvms_to_freeze(source: Host) -> None:
    await source.secure()

    assert await source.code(m.VM_FREEZE) == HCode.H_STATE

    assert not source.guest.bodies(m.VCPU_SAVE)


@pytest.mark.parametrize("order", [m.VM_RESET, m.VM_POWEROFF], ids=lambda order: order.name)
async def test_a_reset_wins_over_a_freeze(source: Host, order: m.Message[m.Empty, m.Status]) -> None:
    source.guest.meanwhile[m.VCPU_SAVE.number] = lambda: source.order(order, m.Empty())

    assert await source.code(m.VM_FREEZE) == HCode.H_STATE

    assert source.vm.state in (VmState.STARTING, VmState.OFF)


# -- VM_SAVE ----------------------------------------------------------------------------------------------------------


async def test_a_normal_vm_is_saved_only_when_it_was_frozen(source: Host) -> None:
    place = m.StreamPlaceBody(0, ROOM)
    assert await source.code(m.VM_SAVE, place) == HCode.H_STATE
    await source.order(m.VM_STOP, m.Empty())
    assert await source.code(m.VM_SAVE, place) == HCode.H_STATE

    await source.order(m.VM_FREEZE, m.Empty())
    await source.order(m.VM_SAVE, place)

    await source.order(m.VM_CONTINUE, m.Empty())
    assert await source.code(m.VM_SAVE, place) == HCode.H_STATE


async def test_a_reset_forgets_the_processor(source: Host) -> None:
    await source.order(m.VM_FREEZE, m.Empty())
    await source.order(m.VM_RESET, m.Empty())
    await source.order(m.VM_START, m.StartBody(0, 0, {}))
    await source.order(m.VM_STOP, m.Empty())

    assert await source.code(m.VM_SAVE, m.StreamPlaceBody(0, ROOM)) == HCode.H_STATE


async def test_a_vm_that_is_turning_secure_is_not_saved(source: Host) -> None:
    source.vm.secure.switch = Switch.START

    assert await source.code(m.VM_SAVE, m.StreamPlaceBody(0, ROOM)) == HCode.H_STATE


async def test_a_place_that_is_too_small_or_outside_is_refused_and_stays_as_it_was(source: Host) -> None:
    await source.order(m.VM_FREEZE, m.Empty())

    assert await source.code(m.VM_SAVE, m.StreamPlaceBody(0, 100)) == HCode.H_TOO_BIG
    assert await source.code(m.VM_SAVE, m.StreamPlaceBody(STREAM_BUFFER_BYTES - 1, ROOM)) == HCode.H_PARAMETER

    assert not any(source.stream.read(0, ROOM))
    assert not any(source.stream.read(STREAM_BUFFER_BYTES - 1, 1))


async def test_saving_waits_for_pages_on_their_way(
    source: Host, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    await source.secure()
    source.memory.busy.add(9)
    assert await source.code(m.VM_SAVE, m.StreamPlaceBody(0, ROOM)) == HCode.H_BUSY

    async def come() -> None:
        await trio.sleep(0.5)
        source.memory.busy.discard(9)

    nursery.start_soon(come)
    assert await source.save()


@pytest.mark.parametrize("secure", [False, True])
async def test_a_processor_that_stands_still_has_left_its_wait(source: Host, secure: bool) -> None:
    answers: list[list[int]] = []
    if secure:
        await source.secure()
    source.vm.reflected_at_once(H_CONFER, 0, [0, 0], 0, answers.append)
    assert source.vm.vcpus.waits_in(0) is Wait.CONFER
    if not secure:
        await source.order(m.VM_FREEZE, m.Empty())

    state = saved_vm.decode(await source.save())

    assert state.vcpus.vcpus[0].wait is Wait.NONE
    assert answers == [[HCode.H_SUCCESS]]
    source.vm.reflected_at_once(H_CEDE, 0, [], 0, answers.append)
    assert source.vm.vcpus.waits_in(0) is Wait.CEDE


# -- round trips ------------------------------------------------------------------------------------------------------


async def test_a_normal_vm_goes_on_where_it_arrives(source: Host, destination: Host) -> None:
    await source.order(m.PAGES_DISCARD, m.PagesBody([7, 8]))
    await source.order(m.VM_FREEZE, m.Empty())

    assert await destination.load(await source.save()) == HCode.H_SUCCESS

    assert destination.parts() == source.parts()
    assert state_of(destination) is VmState.PAUSED
    assert destination.guest.bodies(m.VCPU_LOAD) == [m.LoadProcessorBody(0, PROCESSOR)]
    assert destination.memory.in_state(KvmState.DISCARDED) == [7, 8]
    assert destination.frame(6) == CONTENT
    assert destination.frame(7) == bytes(PAGE_BYTES)
    await destination.order(m.VM_CONTINUE, m.Empty())
    assert destination.guest.calls[-1] == ("VCPU_CONTINUE", m.RunBody(0))
    assert state_of(destination) is VmState.RUNNING


async def test_a_secure_vm_arrives_with_its_shared_frames_and_no_other(destination: Host) -> None:
    destination.memory.ram[gpa_of(4) : gpa_of(5)] = b"s" * PAGE_BYTES

    assert await destination.load(await secure_state()) == HCode.H_SUCCESS

    assert destination.vm.secure.switch is Switch.DONE
    assert destination.memory.in_state(KvmState.SHARED) == [4]
    assert destination.memory.in_state(KvmState.SECURE) == [gfn for gfn in range(N_PAGES) if gfn != 4]
    assert destination.memory.host_view[4] == HostState.SHARED
    assert {destination.memory.host_view[gfn] for gfn in range(N_PAGES) if gfn != 4} == {HostState.ABSENT}
    assert destination.frame(4) == b"s" * PAGE_BYTES
    assert os.fstat(destination.ram_fd).st_blocks * 512 == PAGE_BYTES
    assert not destination.guest.calls
    assert destination.vm.state is VmState.PAUSED
    await destination.order(m.VM_CONTINUE, m.Empty())
    assert destination.guest.calls == [("VCPU_CONTINUE", m.RunBody(0))]


async def test_a_secure_vm_that_its_user_has_paused_arrives_paused(source: Host, destination: Host) -> None:
    await source.secure()
    await source.order(m.VM_STOP, m.Empty())

    assert await destination.load(await source.save()) == HCode.H_SUCCESS

    assert destination.guest.calls == [("VCPU_STOP", m.RunBody(0))]
    await destination.order(m.VM_CONTINUE, m.Empty())
    assert destination.guest.calls[-1] == ("VCPU_CONTINUE", m.RunBody(0))


async def test_the_first_touch_of_a_shared_page_finds_what_came(destination: Host) -> None:
    await destination.load(await secure_state())

    assert await destination.hcall(H_SVM_PAGE_IN, gpa_of(4), H_PAGE_IN_SHARED, PAGE_SHIFT) == 0

    assert destination.frame(4) == CONTENT
    assert destination.memory.state(4) is KvmState.SHARED


async def test_a_secure_page_can_be_paged_out_at_once(destination: Host) -> None:
    await destination.load(await secure_state())

    await destination.order(m.PAGES_WANTED, m.PagesBody([5]))

    assert destination.memory.state(5) is KvmState.PAGED_OUT
    assert destination.ultravisor.names() == ["UV_PAGE_OUT"]


@pytest.mark.parametrize("make", [normal_state, secure_state])
async def test_the_processor_is_told_the_level_of_its_line(make: Callable[[], Any], destination: Host) -> None:
    await destination.load(await make())

    assert destination.guest.events == [("VCPU_LINE", m.LineBody(0, level=False))]
    assert await destination.hcall(H_CPPR, 0xFF) == 0
    assert destination.guest.events[-1] == ("VCPU_LINE", m.LineBody(0, level=True))


async def test_a_line_that_was_high_is_told_where_the_vm_arrives(source: Host, destination: Host) -> None:
    await source.hcall(H_CPPR, 0xFF)
    await source.order(m.VM_FREEZE, m.Empty())

    await destination.load(await source.save())

    assert destination.guest.events == [("VCPU_LINE", m.LineBody(0, level=True))]


async def test_an_edge_that_arrives_before_the_state_is_not_lost(destination: Host) -> None:
    with host() as rig:
        await rig.machine(WINDOW, DYNAMIC)
        await rig.order(m.VM_START, m.StartBody(0, 0, {}))
        rig.vm.xics.configure(EDGE, 0, 5, 5)
        await rig.hcall(H_CPPR, 0xFF)
        await rig.order(m.VM_FREEZE, m.Empty())
        state = await rig.save()
    await destination.qemu.deliver(m.IRQ_SET, m.IrqBody(EDGE, level=True))

    await destination.load(state)

    assert destination.guest.events == [("VCPU_LINE", m.LineBody(0, level=True))]


async def test_an_edge_that_comes_after_the_freeze_is_saved(source: Host, destination: Host) -> None:
    await source.order(m.VM_FREEZE, m.Empty())
    await source.qemu.deliver(m.IRQ_SET, m.IrqBody(VTY_SOURCE, level=True))

    await destination.load(await source.save())

    arrived = destination.vm.xics.source(VTY_SOURCE)
    assert arrived is not None
    assert arrived.pending


# -- VM_LOAD: when ----------------------------------------------------------------------------------------------------


async def test_a_vm_that_is_to_arrive_does_not_start_by_itself(destination: Host) -> None:
    start = m.StartBody(0, 0, {})
    assert await destination.code(m.VM_START, start) == HCode.H_STATE
    await destination.order(m.VM_RESET, m.Empty())
    assert await destination.code(m.VM_START, start) == HCode.H_STATE

    assert await destination.load(await normal_state()) == HCode.H_SUCCESS

    await destination.order(m.VM_RESET, m.Empty())
    await destination.order(m.VM_START, start)
    assert destination.vm.state is VmState.RUNNING


async def test_a_vm_arrives_once(destination: Host) -> None:
    state = await normal_state()
    await destination.load(state)

    assert await destination.load(state) == HCode.H_STATE
    await destination.order(m.VM_RESET, m.Empty())
    assert await destination.load(state) == HCode.H_STATE


async def test_a_vm_that_began_here_takes_no_state() -> None:
    with host() as rig:
        await rig.machine(WINDOW, DYNAMIC)

        assert await rig.load(await normal_state()) == HCode.H_STATE


async def test_two_loads_at_once_are_one(destination: Host) -> None:
    state = await normal_state()
    codes: list[int] = []

    async def again() -> None:
        codes.append(await destination.load(state))

    destination.guest.meanwhile[m.VCPU_LOAD.number] = again

    assert await destination.load(state) == HCode.H_SUCCESS
    assert codes == [HCode.H_STATE]


async def test_kvms_map_may_come_after_the_order(destination: Host) -> None:
    destination.guest.load_codes = [HCode.H_BUSY, HCode.H_BUSY]

    assert await destination.load(await normal_state()) == HCode.H_SUCCESS

    assert len(destination.guest.bodies(m.VCPU_LOAD)) == 3


async def test_a_processor_that_stays_busy_ends_the_load(
    destination: Host, autojump_clock: trio.testing.MockClock
) -> None:
    destination.guest.codes[m.VCPU_LOAD.number] = HCode.H_BUSY
    before = destination.parts()

    assert await destination.load(await normal_state()) == HCode.H_BUSY

    assert trio.current_time() == pytest.approx(3.0, abs=0.2)
    assert_nothing_arrived(destination, before)


async def lost() -> None:
    raise PeerGone("vm1/guest", "gone")


@pytest.mark.parametrize("end", [lost, trio.sleep_forever])
async def test_a_guest_that_does_not_take_its_processor_ends_the_load(
    destination: Host, autojump_clock: trio.testing.MockClock, end: Callable[[], Any]
) -> None:
    destination.guest.meanwhile[m.VCPU_LOAD.number] = end
    before = destination.parts()

    assert await destination.load(await normal_state()) == HCode.H_HARDWARE

    assert_nothing_arrived(destination, before)


async def test_after_a_refused_processor_another_state_may_come(destination: Host) -> None:
    state, before = await normal_state(), destination.parts()
    destination.guest.load_codes = [HCode.H_PARAMETER]

    assert await destination.load(state) == HCode.H_PARAMETER
    assert_nothing_arrived(destination, before)

    assert await destination.load(state) == HCode.H_SUCCESS


def assert_nothing_arrived(rig: Host, before: list[Any]) -> None:
    """All but content is as before; text that was printed stays, and so does the level of a line."""
    (pages, (xics, vcpus, _, tces), others), now = before, rig.parts()
    assert now[0] == pages
    assert now[1][1] == vcpus
    assert now[1][3] == tces
    assert now[2] == others
    assert [source.priority for source in now[1][0].sources] == [source.priority for source in xics.sources]


async def test_a_reset_wins_over_an_arrival(destination: Host) -> None:
    destination.guest.meanwhile[m.VCPU_LOAD.number] = lambda: destination.order(m.VM_RESET, m.Empty())

    assert await destination.load(await normal_state()) == HCode.H_STATE

    assert destination.vm.state is VmState.STARTING
    assert destination.memory.in_state(KvmState.NORMAL) == list(range(N_PAGES))
    assert await destination.load(await normal_state()) == HCode.H_SUCCESS


async def test_a_vm_that_failed_meanwhile_does_not_arrive(destination: Host) -> None:
    async def fail() -> None:
        destination.vm.fail("its qemu is gone")

    destination.guest.meanwhile[m.VCPU_LOAD.number] = fail

    assert await destination.load(await normal_state()) == HCode.H_STATE

    assert destination.vm.state is VmState.FAILED


async def test_pages_on_their_way_are_waited_for(destination: Host) -> None:
    destination.memory.busy.add(3)

    assert await destination.load(await normal_state()) == HCode.H_BUSY


async def test_frames_that_cannot_be_punched_end_the_load(destination: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_gfns: Any) -> None:  # noqa: ANN401
        raise HostFault("no")

    before = destination.parts()
    monkeypatch.setattr(destination.memory, "punch_all", refuse)

    assert await destination.load(await secure_state()) == HCode.H_HARDWARE

    assert destination.parts() == before


# -- VM_LOAD: what ----------------------------------------------------------------------------------------------------


async def test_a_vm_that_may_not_be_secure_does_not_become_so_by_arriving() -> None:
    with host(incoming=True, secure_allowed=False) as rig:
        await rig.machine(WINDOW, DYNAMIC)
        before = rig.parts()

        assert await rig.load(await secure_state()) == HCode.H_AUTHORITY

        assert rig.parts() == before


@pytest.mark.parametrize(
    "windows",
    [(WINDOW,), (), (WINDOW, msgspec.structs.replace(DYNAMIC, n_tces=32))],
    ids=["one missing", "none", "another size"],
)
async def test_a_window_that_is_not_here_is_refused(windows: tuple[m.TceWindowBody, ...]) -> None:
    with host(incoming=True) as rig:
        await rig.machine(*windows)
        before = rig.parts()

        assert await rig.load(await normal_state()) == HCode.H_PARAMETER

        assert rig.parts() == before


async def test_a_window_that_is_here_alone_is_empty(source: Host) -> None:
    await source.order(m.VM_FREEZE, m.Empty())
    state = await source.save()
    extra = m.TceWindowBody(0x8000_0005, 12, 0, 64)
    with host(incoming=True) as rig:
        await rig.machine(WINDOW, DYNAMIC, extra)
        await rig.qemu.deliver(m.TCE_WINDOW_CREATE, extra)
        rig.vm.tces.h_put_tce(extra.liobn, 0, 3)

        assert await rig.load(state) == HCode.H_SUCCESS

        assert [table.entries for table in rig.vm.tces.save().tables][2] == {}


@pytest.mark.parametrize("sources", [{**SOURCES, MSI_BASE + 7: False}, {**SOURCES, LEVEL: False}])
async def test_a_machine_with_other_interrupt_sources_is_refused(sources: dict[int, bool]) -> None:
    with host(incoming=True) as rig:
        await rig.machine(WINDOW, DYNAMIC, sources=sources)

        assert await rig.load(await normal_state()) == HCode.H_PARAMETER


async def test_sources_that_the_guest_had_made_come_with_the_state() -> None:
    with host(incoming=True) as rig:
        await rig.machine(WINDOW, DYNAMIC, sources={VTY_SOURCE: False})

        assert await rig.load(await normal_state()) == HCode.H_SUCCESS

        assert {source.number for source in rig.vm.xics.sources} == set(SOURCES)


async def test_a_machine_with_other_memory_is_refused(destination: Host) -> None:
    await destination.order(m.MEMSLOT_SET, m.MemslotBody(0, 0, MEMORY_BYTES // 2))

    assert await destination.load(await normal_state()) == HCode.H_PARAMETER


async def test_a_page_outside_the_memory_slots_has_no_state() -> None:
    half = m.MemslotBody(0, 0, MEMORY_BYTES // 2)
    with host() as rig, host(incoming=True) as there:
        for it in (rig, there):
            await it.machine()
            await it.order(m.MEMSLOT_SET, half)
        await rig.order(m.VM_START, m.StartBody(0, 0, {}))
        await rig.order(m.VM_FREEZE, m.Empty())
        state = saved_vm.decode(await rig.save())
        bad = msgspec.structs.replace(state, page_states=bytes(N_PAGES - 1) + bytes([KvmState.DISCARDED]))

        assert await there.load(msgspec.msgpack.encode(bad)) == HCode.H_PARAMETER
        assert await there.load(msgspec.msgpack.encode(state)) == HCode.H_SUCCESS


async def test_what_is_too_long_for_this_vm_is_not_even_decoded(
    destination: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(_raw: bytes) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(saved_vm, "decode", decode)

    assert await destination.code(m.VM_LOAD, m.StreamPlaceBody(0, 16 << 20)) == HCode.H_PARAMETER


@pytest.mark.parametrize("place", [(STREAM_BUFFER_BYTES - 4, 8), (0, STREAM_BUFFER_BYTES), (0, 0)])
async def test_a_place_that_holds_no_state_is_refused(destination: Host, place: tuple[int, int]) -> None:
    assert await destination.code(m.VM_LOAD, m.StreamPlaceBody(*place)) == HCode.H_PARAMETER


Change = Callable[[saved_vm.KvmVmState], None]


def _set(**fields: Any) -> Change:  # noqa: ANN401
    def change(state: saved_vm.KvmVmState) -> None:
        for name, value in fields.items():
            setattr(state, name, value)

    return change


def _twice(state: saved_vm.KvmVmState) -> None:
    state.tces.tables.append(state.tces.tables[0])


def _entry_outside(state: saved_vm.KvmVmState) -> None:
    state.tces.tables[0] = TceTableState(WINDOW, {WINDOW.n_tces: 1})


def _entry_beyond_ram(state: saved_vm.KvmVmState) -> None:
    state.tces.tables[0] = TceTableState(WINDOW, {0: MEMORY_BYTES | 3})


def _off(state: saved_vm.KvmVmState) -> None:
    state.vcpus.vcpus[0].started = False


def _waiting(state: saved_vm.KvmVmState) -> None:
    state.vcpus.vcpus[0].wait = Wait.JOIN


def _printed(state: saved_vm.KvmVmState) -> None:
    state.terminal.start = (1 << 64) - 1


def _priority(state: saved_vm.KvmVmState) -> None:
    state.xics.sources[0].priority = 0x100


def _presented(state: saved_vm.KvmVmState) -> None:
    state.xics.servers[0].xisr = EDGE


def _typed(state: saved_vm.KvmVmState) -> None:
    state.terminal.typed = bytes(INPUT_BYTES + 1)


def _areas(**areas: Area) -> Change:
    return _set(areas=VpaState([VcpuAreas(**areas)]))


VPA = Area(0, 640)


@pytest.mark.parametrize(
    "change",
    [
        _set(secure=True),
        _set(page_states=bytes(N_PAGES - 1)),
        _set(page_states=bytes([KvmState.SECURE]) * N_PAGES),
        _set(page_states=b"\xff" * N_PAGES),
        _set(slots=[]),
        _set(modes={99: 0}),
        _set(modes={int(SetModeResource.LITTLE_ENDIAN): -1}),
        _twice,
        _entry_outside,
        _entry_beyond_ram,
        _off,
        _waiting,
        _printed,
        _typed,
        _priority,
        _presented,
        _areas(slb=Area(0, 64)),
        _areas(vpa=Area(MEMORY_BYTES - 64, 640)),
        _areas(vpa=Area(-64, 640)),
        _areas(vpa=Area(1, 640)),
        _areas(vpa=VPA, dtl=Area(0, 8)),
    ],
)
async def test_a_state_that_kvm_would_not_have_saved_is_refused(destination: Host, change: Change) -> None:
    state = saved_vm.decode(await normal_state())
    change(state)
    before = destination.parts()

    assert await destination.load(msgspec.msgpack.encode(state)) == HCode.H_PARAMETER

    assert destination.parts() == before
    assert not destination.guest.calls


@pytest.mark.parametrize(
    "change",
    [
        _set(processor=PROCESSOR),
        _set(page_states=bytes(N_PAGES)),
        _set(page_states=bytes([KvmState.PAGED_OUT]) * N_PAGES),
        _set(page_states=bytes([KvmState.DISCARDED]) * N_PAGES),
    ],
)
async def test_a_secure_state_that_kvm_would_not_have_saved_is_refused(destination: Host, change: Change) -> None:
    state = saved_vm.decode(await secure_state())
    change(state)
    before = destination.parts()

    assert await destination.load(msgspec.msgpack.encode(state)) == HCode.H_PARAMETER

    assert destination.parts() == before


@pytest.mark.parametrize("version", [0, 2, "1", None])
async def test_another_version_or_an_unknown_field_is_refused(destination: Host, version: Any) -> None:  # noqa: ANN401
    fields = msgspec.msgpack.decode(await normal_state())

    assert await destination.load(msgspec.msgpack.encode({**fields, "version": version})) == HCode.H_PARAMETER
    assert await destination.load(msgspec.msgpack.encode({**fields, "more": 1})) == HCode.H_PARAMETER


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.sampled_from([-1, 0, 1, 2, 0xFF, 0x100, N_PAGES, 1 << 24, 1 << 63]),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=80),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.integers(0, 3), st.integers(0, 3), max_size=2),
)


def leaves(value: Any) -> list[tuple[Any, Any]]:  # noqa: ANN401
    """Every place in a decoded state: its container and its key there."""
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    else:
        return []
    found: list[tuple[Any, Any]] = [(value, key) for key, _ in pairs]
    for _, inner in pairs:
        found += leaves(inner)
    return found


@st.composite
def mutated(draw: st.DrawFn, state: bytes) -> bytes:
    """A state with other values in some places."""
    fields = msgspec.msgpack.decode(state, strict=False)
    for _ in range(draw(st.integers(1, 4))):
        places = leaves(fields)
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        container[key] = draw(ODD_VALUES)
    return msgspec.msgpack.encode(fields)


@st.composite
def damaged(draw: st.DrawFn, state: bytes) -> bytes:
    """A state whose bytes are cut, replaced or followed by others."""
    at = draw(st.integers(0, len(state) - 1))
    n_bytes = draw(st.integers(0, 8))
    rest = state[at + n_bytes :] if draw(st.booleans()) else b""
    return state[:at] + draw(st.binary(max_size=8)) + rest


async def assert_harmless(state: bytes) -> None:
    """Whatever `state` is: it is refused without a trace, or kvm goes on with it."""
    with ExitStack() as stack:
        rig = stack.enter_context(host(incoming=True))
        await rig.machine(WINDOW, DYNAMIC)
        before = rig.parts()
        code = await rig.load(state)
        if code != HCode.H_SUCCESS:
            assert code == HCode.H_PARAMETER
            assert rig.parts() == before
            assert not rig.guest.calls
            return
        await rig.order(m.VM_CONTINUE, m.Empty())
        msgspec.msgpack.encode(await rig.vm.terminal.answer_read({"since": 0}))
        await rig.hcall(H_CPPR, 0xFF)
        rig.vm.raise_irq(EDGE, level=True)
        await rig.order(m.VM_RESET, m.Empty())


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data())
@settings(deadline=None)
async def test_other_values_in_a_state_change_nothing_or_hold(kind: str, data: st.DataObject) -> None:
    await assert_harmless(data.draw(mutated(await MAKERS[kind]())))


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data())
@settings(deadline=None)
async def test_damaged_bytes_of_a_state_change_nothing_or_hold(kind: str, data: st.DataObject) -> None:
    await assert_harmless(data.draw(damaged(await MAKERS[kind]())))


@given(state=st.binary(max_size=200))
@settings(deadline=None)
async def test_any_bytes_change_nothing(state: bytes) -> None:
    await assert_harmless(state)


# -- DIRTY_LOG --------------------------------------------------------------------------------------------------------


class Maps:
    """The dirty maps of guest and devices."""

    def __init__(self, rig: Host) -> None:
        self.guest, self.devices = (SealedMemory("dirty", N_PAGES, others_write=True) for _ in range(2))
        assert rig.vm.dirty.take_map(GUEST_MAP, os.dup(self.guest.fd))
        assert rig.vm.dirty.take_map(DEVICE_MAP, os.dup(self.devices.fd))
        rig.vm.dirty.own[:] = bytes(N_PAGES)

    def close(self) -> None:
        """Release both."""
        self.guest.close()
        self.devices.close()


@pytest.fixture
def maps(source: Host) -> Iterator[Maps]:
    it = Maps(source)
    yield it
    it.close()


async def log_of(rig: Host, gfn: int, n: int) -> m.DirtyLog:
    answer: m.DirtyLog = await rig.qemu.deliver(m.DIRTY_LOG, m.DirtyLogBody(gfn, n))
    return answer


async def test_the_dirty_log_has_a_bit_a_page_and_each_mark_comes_once(source: Host, maps: Maps) -> None:
    maps.guest.buffer[8] = 1
    maps.devices.buffer[17] = 0xFF
    maps.devices.buffer[40] = 1
    source.vm.dirty.own[23] = 1

    assert await log_of(source, 8, 17) == m.DirtyLog(HCode.H_SUCCESS, bytes([0x01, 0x82, 0x00]))
    assert await log_of(source, 8, 17) == m.DirtyLog(HCode.H_SUCCESS, bytes(3))
    assert await log_of(source, 0, N_PAGES) == m.DirtyLog(HCode.H_SUCCESS, bytes([0, 0, 0, 0, 0, 1, 0, 0]))
    assert source.guest.bodies(m.MAP_INVALIDATE) == [
        m.InvalidateBody([m.Range(8, 1), m.Range(17, 1), m.Range(23, 1)]),
        m.InvalidateBody([m.Range(40, 1)]),
    ]


@pytest.mark.parametrize(("gfn", "n"), [(4, 8), (0, N_PAGES + 1), (N_PAGES, 1), (N_PAGES - 8, 9)])
async def test_a_range_that_is_not_aligned_or_not_in_ram_is_refused(source: Host, maps: Maps, gfn: int, n: int) -> None:
    assert (await log_of(source, gfn, n)).code == HCode.H_PARAMETER


async def test_a_writer_that_does_not_acknowledge_keeps_its_marks(source: Host, maps: Maps) -> None:
    maps.guest.buffer[3] = maps.devices.buffer[4] = 1
    source.guest.codes[m.MAP_INVALIDATE.number] = HCode.H_HARDWARE

    assert await log_of(source, 0, N_PAGES) == m.DirtyLog(HCode.H_BUSY)

    source.guest.codes.clear()
    assert (await log_of(source, 0, 8)).bitmap == bytes([0x18])


async def test_a_mark_that_an_operator_was_shown_is_still_in_the_log(source: Host, maps: Maps) -> None:
    maps.guest.buffer[9] = 1

    assert await source.vm.dirty.collect(range(N_PAGES)) == [9]

    assert (await log_of(source, 8, 8)).bitmap == bytes([1 << 1])
    assert (await log_of(source, 8, 8)).bitmap == bytes(1)


async def test_without_its_maps_a_vm_has_no_dirty_log(source: Host) -> None:
    assert (await log_of(source, 0, N_PAGES)).code == HCode.H_BUSY


async def test_of_a_secure_vm_the_marks_of_its_processor_are_not_kvms(source: Host, maps: Maps) -> None:
    await source.secure()
    maps.guest.buffer[3] = maps.devices.buffer[4] = 1

    assert (await log_of(source, 0, 8)).bitmap == bytes([0x10])

    assert maps.guest.buffer[3] == 1


async def test_more_ranges_than_a_message_names_are_one(monkeypatch: pytest.MonkeyPatch, source: Host) -> None:
    monkeypatch.setattr("services.kvm.dirty.MAX_INVALIDATION_RANGES", 4)
    maps = Maps(source)
    maps.guest.buffer[:] = bytes([0, 0, 1, 0] * (N_PAGES // 4))

    answer = await log_of(source, 0, N_PAGES)

    assert answer.bitmap == bytes([0x44] * (N_PAGES // 8))
    assert source.guest.bodies(m.MAP_INVALIDATE) == [m.InvalidateBody([m.Range(2, N_PAGES - 3)])]
    maps.close()


N_MARKS = 600
MARKS = st.one_of(
    st.binary(min_size=N_MARKS, max_size=N_MARKS).map(lambda data: bytes(byte if byte & 1 else 0 for byte in data)),
    st.tuples(st.integers(0, N_MARKS), st.integers(0, N_MARKS)).map(lambda ends: _run(*ends)),
)


def _run(first: int, end: int) -> bytes:
    return bytes(1 if first <= gfn < end else 0 for gfn in range(N_MARKS))


@given(marks=MARKS, others=MARKS, first=st.integers(0, N_MARKS // 8 - 1), n=st.integers(1, N_MARKS))
async def test_whatever_is_marked_the_log_has_it_and_the_rest_stays(
    marks: bytes, others: bytes, first: int, n: int
) -> None:
    gfns = range(first * 8, min(first * 8 + n, N_MARKS))
    mine = memoryview(bytearray(marks))

    taken = dirty._take(mine, gfns)
    merged = dirty._merged([taken, dirty._take(memoryview(bytearray(others)), gfns)])

    expected = [int(bool(marks[gfn] or others[gfn])) for gfn in gfns]
    assert list(merged) == expected
    assert bytes(mine) == bytes(0 if gfn in gfns else mark for gfn, mark in enumerate(marks))


class Storing:
    """Marks whose writer sets `more` right after they were looked at."""

    def __init__(self, marks: bytes, more: int) -> None:
        self.marks, self._more = bytearray(marks), more

    def __getitem__(self, part: slice) -> bytes:
        found = bytes(self.marks[part])
        self.marks[self._more] = 1
        return found

    def __setitem__(self, part: slice | int, value: Any) -> None:  # noqa: ANN401
        self.marks[part] = value


@pytest.mark.parametrize("n_marked", [0, 1, 299])
def test_a_mark_that_is_set_while_they_are_taken_stays(n_marked: int) -> None:
    marks = Storing(bytes([1] * n_marked + [0] * (300 - n_marked)), more=299)

    taken = dirty._take(cast(memoryview, marks), range(300))

    assert sum(taken) == n_marked
    assert list(marks.marks) == [0] * 299 + [1]


# -- MIGRATION_UCALL --------------------------------------------------------------------------------------------------


async def ucall(rig: Host, number: int, *args: int) -> m.MigrationUcallReply:
    reply: m.MigrationUcallReply = await rig.qemu.deliver(m.MIGRATION_UCALL, m.MigrationUcallBody(number, list(args)))
    return reply


@pytest.mark.parametrize("call", u.MIGRATION_UCALLS.values(), ids=lambda call: call.name)
async def test_a_step_of_a_migration_goes_to_the_ultravisor_with_the_vms_own_lpid(source: Host, call: Call) -> None:
    args = list(range(1, call.n_args))
    source.ultravisor.outputs[call.number] = [7] * len(call.results)

    assert await ucall(source, call.number, *args) == m.MigrationUcallReply(UCode.U_SUCCESS, [7] * len(call.results))

    assert source.ultravisor.calls == [(call.name, [source.vm.entry.lpid, *args])]
    assert await ucall(source, call.number, *args, 0) == m.MigrationUcallReply(UCode.U_PARAMETER)
    assert await ucall(source, call.number, *args[:-1]) == m.MigrationUcallReply(UCode.U_PARAMETER)


@pytest.mark.parametrize("number", [*(c.number for c in u.UCALLS if c.number not in u.MIGRATION_UCALLS), 0, 0xFFFFFFFF])
async def test_no_other_ultracall_is_passed_on(source: Host, number: int) -> None:
    for n_args in range(5):
        assert await ucall(source, number, *range(n_args)) == m.MigrationUcallReply(UCode.U_PARAMETER)

    assert not source.ultravisor.calls


@pytest.mark.parametrize(("outputs", "expected"), [([], [0]), ([1, 2], [1]), ([-1], [(1 << 64) - 1])])
async def test_results_are_those_that_are_declared(source: Host, outputs: list[int], expected: list[int]) -> None:
    source.ultravisor.outputs[u.UV_IMPORT_READY.number] = outputs

    assert await ucall(source, u.UV_IMPORT_READY.number, 0) == m.MigrationUcallReply(UCode.U_SUCCESS, expected)


@pytest.mark.parametrize("code", [UCode.U_PERMISSION, (1 << 64) + UCode.U_PERMISSION])
async def test_a_refusal_is_a_signed_code(source: Host, code: int) -> None:
    source.refuse(u.UV_EXPORT_CANCEL, code)

    assert (await ucall(source, u.UV_EXPORT_CANCEL.number, 0)).code == UCode.U_PERMISSION


async def test_a_secure_vm_that_has_left_does_not_run_here_again(source: Host) -> None:
    """S6."""
    await source.secure()
    source.ultravisor.outputs[u.UV_EXPORT_STATEMENT.number] = [1]

    await ucall(source, u.UV_EXPORT_STATEMENT.number, 0, 100)

    assert source.vm.state is VmState.LEFT
    assert await source.code(m.VM_CONTINUE) == HCode.H_STATE
    assert await source.code(m.VM_SAVE, m.StreamPlaceBody(0, ROOM)) == HCode.H_STATE
    await source.order(m.VM_RESET, m.Empty())
    assert await source.code(m.VM_START, m.StartBody(0, 0, {})) == HCode.H_STATE
    assert await source.load(await secure_state()) == HCode.H_STATE


@pytest.mark.parametrize(("code", "moved"), [(UCode.U_SUCCESS, 0), (UCode.U_PERMISSION, 1)])
async def test_a_secure_vm_that_came_back_runs_on(source: Host, code: int, moved: int) -> None:
    await source.secure()
    source.refuse(u.UV_EXPORT_STATEMENT, code)
    source.ultravisor.outputs[u.UV_EXPORT_STATEMENT.number] = [moved]

    await ucall(source, u.UV_EXPORT_STATEMENT.number, 0, 100)

    assert source.vm.state is VmState.RUNNING


async def test_without_a_stream_buffer_there_is_no_state() -> None:
    rig = KvmRig(incoming=True)

    assert (await rig.qemu.deliver(m.VM_SAVE, m.StreamPlaceBody(0, 8))).code == HCode.H_NOT_AVAILABLE
    assert (await rig.qemu.deliver(m.VM_LOAD, m.StreamPlaceBody(0, 8))).code == HCode.H_NOT_AVAILABLE
    rig.vm.close()
    os.close(rig.ram_fd)

"""The host's view for GDB: qemu's own machine, with a processor and a kvm that are played."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import structlog
import trio
import trio.testing

from protocol import messages as m
from protocol.codes import HCode
from protocol.errors import MalformedMessage, PeerGone
from protocol.geometry import PAGE_BYTES
from protocol.wire import Envelope
from services.qemu.board import Board
from services.qemu.host_target import HostTarget
from services.qemu.machine import Machine
from services.qemu.moving_machine import MovingMachine
from services.qemu.qmp import MonitorEvents, RunState
from services.runtime.gdb.target import Point, PointKind, Refused, Stop, StopKind, Unsupported
from services.runtime.link import Link
from services.runtime.patience import Patience
from shared.gdb_registers import POWER, Values, pack
from shared.guest_ram import GuestRam
from shared.host_view import HostState
from tests.unit.ultravisor_rig import vm_entry

N_PAGES = 4
BREAKPOINT = Point(PointKind.SOFTWARE, 0x1000, 4)
PC = POWER.number["pc"]
SECONDS = 5.0


class PlayedKvm:
    """Answers qemu's orders for a processor that is normal or secure; `orders` are those that came."""

    def __init__(self) -> None:
        self.secure = False
        self.orders: list[str] = []
        self.debugs: list[m.DebugBody] = []
        self.debug_code = HCode.H_SUCCESS
        self.gone: str | None = None
        """What kvm is, where it answers nothing."""
        self.codes: dict[m.Message[Any, Any], list[int]] = {}
        """What an order is answered the next times."""
        self.on_continue: Callable[[], None] = lambda: None
        self.values = [number for number in range(len(POWER.registers))]
        self.patience = Patience()

    async def call(self, message: m.Message[Any, Any], body: Any, cause: int = 0) -> Any:  # noqa: ANN401
        await trio.lowlevel.checkpoint()
        self.orders.append(message.name)
        if self.gone is not None:
            raise PeerGone("alpha/kvm", self.gone)
        if self.codes.get(message):
            return m.Status(self.codes[message].pop())
        if message in _DEBUG and self.secure:
            return message.reply.refused(HCode.H_PERMISSION) if message.reply else None
        if message is m.VCPU_REGISTERS:
            data, missing = pack(POWER, Values(True, tuple(self.values)))
            return m.DebugRegisters(0, True, data, missing)
        if message is m.VCPU_TRANSLATE:
            found = body.address < N_PAGES * PAGE_BYTES
            return m.DebugAddressReply(0, body.address) if found else m.DebugAddressReply(HCode.H_NOT_FOUND)
        if message is m.VCPU_DEBUG:
            self.debugs.append(body)
            return m.Status(self.debug_code)
        if message is m.VCPU_DEBUG_COMMAND:
            return m.DebugCommandReply(0, " ".join(body.words))
        if message is m.VM_CONTINUE:
            self.on_continue()
        return m.Status()


_DEBUG = (m.VCPU_REGISTERS, m.VCPU_SET_REGISTER, m.VCPU_TRANSLATE, m.VCPU_DEBUG, m.VCPU_DEBUG_COMMAND)


class World:
    """A machine that runs."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.kvm = PlayedKvm()
        link = cast(Link, self.kvm)
        self.machine = Machine(link, MonitorEvents(), nursery, structlog.get_logger())
        self.machine.state = RunState.RUNNING
        self.ram = bytearray(N_PAGES * PAGE_BYTES)
        self.view = bytearray([HostState.PRESENT] * N_PAGES)
        self.wanted: list[int] = []
        ram = GuestRam(memoryview(self.ram), memoryview(self.view), self._want)
        self.target = HostTarget(self.machine, link, ram, memoryview(self.view), POWER)

    async def _want(self, gfns: list[int]) -> None:
        """A page that is paged out brings its ciphertext."""
        self.wanted += gfns
        for gfn in gfns:
            self.ram[gfn * PAGE_BYTES : gfn * PAGE_BYTES + 6] = b"cipher"
            self.view[gfn] = HostState.PRESENT

    def is_running(self) -> bool:
        return self.machine.state is RunState.RUNNING

    def processor_stops(self, body: m.DebugStopBody) -> Callable[[], None]:
        """What kvm tells of it."""
        return lambda: self.machine._stopped_for_debugger(cast(Envelope, SimpleNamespace()), body)


@pytest.fixture
def world(nursery: trio.Nursery) -> World:
    return World(nursery)


async def test_a_normal_vm_is_debugged_as_qemu_does_it(world: World) -> None:
    target = world.target
    assert (await target.halt()).kind is StopKind.INTERRUPT
    assert not world.is_running()
    assert (await target.registers()).values[PC] == PC
    assert await target.order() == "little"
    await target.write(0x1000, b"text")
    assert await target.read(0x1000, 4) == b"text"
    await target.insert(BREAKPOINT)
    world.kvm.on_continue = world.processor_stops(m.DebugStopBody(0))

    stop = await target.resume(step=False)

    assert stop.kind is StopKind.TRAP
    assert world.kvm.debugs[-1] == m.DebugBody(0, [m.DebugPoint(0, 0x1000, 4)], False)
    assert not world.is_running()
    await target.release()
    assert world.kvm.debugs[-1] == m.DebugBody(0, [])
    assert world.is_running()


async def test_a_watchpoint_tells_kind_and_address(world: World) -> None:
    await world.target.halt()
    world.kvm.on_continue = world.processor_stops(m.DebugStopBody(0, m.WatchMet.ACCESS, 0x2004))

    stop = await world.target.resume(step=False)

    assert (stop.watch, stop.address) == (PointKind.ACCESS, 0x2004)


@pytest.mark.parametrize("watch", [1, 5, -1])
def test_s5_a_watchpoint_of_a_kind_that_there_is_not_is_no_stop(watch: int) -> None:
    with pytest.raises(MalformedMessage):
        m.VCPU_DEBUG_STOP.decode_body(msgspec.msgpack.encode([0, watch, 0]))

    for known in m.WatchMet:
        body = m.DebugStopBody(0, known, 0x2004)
        assert m.VCPU_DEBUG_STOP.decode_body(msgspec.msgpack.encode(body)) == body


async def test_a_run_ends_with_an_interrupt_or_with_the_machine(world: World) -> None:
    async def interrupt() -> None:
        await trio.testing.wait_all_tasks_blocked()
        await world.target.interrupt()

    async def end() -> None:
        await trio.testing.wait_all_tasks_blocked()
        world.machine.state = RunState.SHUTDOWN

    stops = []
    await world.target.halt()
    for ending in (interrupt, end):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ending)
            stops.append(await world.target.resume(step=False))

    assert stops[0].kind is StopKind.INTERRUPT
    assert (stops[1].kind, stops[1].text) == (StopKind.CRASHED, "the machine is in state 'shutdown'")


async def test_s1_of_a_secure_vm_the_host_has_ciphertext_and_no_registers(world: World) -> None:
    world.kvm.secure = True
    world.view[1] = HostState.ABSENT
    target = world.target
    await target.halt()

    values = (await target.registers()).values
    assert {number: value for number, value in enumerate(values) if value is not None} == {PC: 0}
    assert await target.order() is None
    assert await target.read(0xC << 60 | PAGE_BYTES, 6) == b"cipher"
    for refused in (
        target.set_register(3, 1),
        target.insert(BREAKPOINT),
        target.monitor(["spr"]),
        target.write(PAGE_BYTES, b"x"),
    ):
        with pytest.raises(Refused, match="secure"):
            await refused
    assert (await target.resume(step=True)).text.startswith("the VM is secure")
    assert world.kvm.orders.count("VCPU_REGISTERS") == 1


async def test_a_shared_page_of_a_secure_vm_is_the_hosts_to_write(world: World) -> None:
    world.kvm.secure = True
    world.view[2] = HostState.SHARED
    await world.target.halt()

    await world.target.write(2 * PAGE_BYTES, b"shared")

    assert world.ram[2 * PAGE_BYTES : 2 * PAGE_BYTES + 6] == b"shared"


@pytest.mark.parametrize("address", [N_PAGES * PAGE_BYTES, 1 << 44])
async def test_memory_that_does_not_exist_is_one_clear_refusal(world: World, address: int) -> None:
    await world.target.halt()
    with pytest.raises(Refused, match="mapped nothing"):
        await world.target.read(address, 4)
    world.kvm.secure = True
    world.target._values = None
    with pytest.raises(Refused, match="outside RAM"):
        await world.target.read(address, 4)


@pytest.mark.parametrize(
    ("code", "error", "text"),
    [
        (HCode.H_BUSY, Refused, "owner debugs"),
        (HCode.H_PARAMETER, Refused, "step it"),
        (HCode.H_NOT_AVAILABLE, Unsupported, None),
    ],
)
async def test_a_refused_point_is_not_kept(world: World, code: HCode, error: type[Exception], text: str | None) -> None:
    await world.target.halt()
    world.kvm.debug_code = code

    with pytest.raises(error, match=text):
        await world.target.insert(BREAKPOINT)

    assert not world.target._points


async def test_a_debugger_that_comes_before_the_machine_has_started_waits_for_it(
    world: World, nursery: trio.Nursery
) -> None:
    async def load() -> tuple[int, dict[int, int]]:
        return 0x100, {}

    async def start() -> None:
        await trio.testing.wait_all_tasks_blocked()
        await world.machine.power_on()

    world.machine.state, world.machine.load = RunState.PRELAUNCH, load
    nursery.start_soon(start)

    stop = await world.target.halt()

    assert stop == Stop(StopKind.INTERRUPT)
    assert world.kvm.orders == ["VM_START", "VM_STOP"]


async def test_a_machine_that_was_paused_stays_so(world: World) -> None:
    await world.machine.stop()
    await world.target.halt()

    await world.target.release()

    assert world.machine.state is RunState.PAUSED
    await world.target.release()


async def test_a_machine_that_its_user_pauses_while_the_debugger_has_it_run_stays_so(world: World) -> None:
    async def pause() -> None:
        await trio.testing.wait_all_tasks_blocked()
        await world.machine.stop()

    await world.target.halt()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pause)
        assert (await world.target.resume(step=False)).kind is StopKind.INTERRUPT

    await world.target.release()

    assert world.machine.state is RunState.PAUSED
    assert not world.machine.is_running


async def test_a_paused_machine_runs_for_the_debugger_and_is_paused_again_behind_it(world: World) -> None:
    await world.machine.stop()
    await world.target.halt()
    with trio.move_on_after(0.02):
        await world.target.resume(step=False)
    assert world.is_running()

    await world.target.release()

    assert world.machine.state is RunState.PAUSED


async def test_a_user_who_lets_a_held_machine_go_on_has_it_go_on_behind_the_debugger(world: World) -> None:
    await world.machine.stop()
    await world.target.halt()

    await world.machine.cont()
    assert world.machine.state is RunState.PAUSED

    await world.target.release()
    assert world.is_running()


async def test_what_only_a_debugger_holds_is_running_wherever_it_goes(world: World) -> None:
    board = cast(Board, SimpleNamespace(functions=[]))
    view = memoryview(world.view)
    moving = MovingMachine(vm_entry(), world.machine, board, memoryview(world.ram), -1, view)
    assert (moving.is_running, moving.runs_here) == (True, True)
    await world.target.halt()
    assert (moving.is_running, moving.runs_here) == (True, False)

    moving.switching()
    assert (moving.is_running, moving.runs_here) == (True, False)
    moving.stays()
    assert world.machine.state is RunState.PAUSED

    await world.machine.stop()
    moving.switching()
    assert (moving.is_running, moving.runs_here) == (False, False)


async def test_a_migration_that_does_not_come_about_is_no_stop(world: World) -> None:
    stops: list[Stop] = []

    async def resume() -> None:
        stops.append(await world.target.resume(step=False))

    await world.target.halt()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(resume)
        for state in (RunState.FINISH_MIGRATE, RunState.RUNNING):
            await trio.testing.wait_all_tasks_blocked()
            world.machine.state = state
        await trio.testing.wait_all_tasks_blocked()
        assert not stops
        await world.target.interrupt()

    assert [stop.kind for stop in stops] == [StopKind.INTERRUPT]


async def test_who_interrupts_a_machine_of_which_nobody_knows_where_it_runs_is_answered(world: World) -> None:
    await world.target.halt()

    async def interrupt() -> None:
        await trio.testing.wait_all_tasks_blocked()
        world.machine.state = RunState.FINISH_MIGRATE
        await trio.testing.wait_all_tasks_blocked()
        await world.target.interrupt()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupt)
        with trio.fail_after(SECONDS):
            stop = await world.target.resume(step=False)

    assert stop.text == "the machine is in state 'finish-migrate'"


async def test_l1_a_debugger_that_goes_while_the_processor_stops_leaves_it_running(world: World) -> None:
    """The stop comes after its connection, and nobody would hear of it."""
    await world.target.halt()
    with trio.move_on_after(0.02):
        await world.target.resume(step=False)
    assert world.machine.state is RunState.RUNNING
    world.processor_stops(m.DebugStopBody(0))()

    await world.target.release()

    assert world.kvm.orders[-3:] == ["VCPU_DEBUG", "VM_STOP", "VM_CONTINUE"]
    assert world.machine.state is RunState.RUNNING


async def test_l1_a_kvm_that_is_gone_is_told(world: World) -> None:
    await world.target.halt()
    world.kvm.gone = "gone"

    with pytest.raises(PeerGone, match="gone"):
        await world.target.registers()
    await world.target.release()


@pytest.mark.parametrize("state", ["stopped", "unresponsive"])
@pytest.mark.parametrize("stands", [True, False])
async def test_l1_a_kvm_that_is_held_up_is_told_again_until_the_machine_runs(
    world: World, stands: bool, state: str
) -> None:
    await world.target.halt()
    await world.target.insert(BREAKPOINT)
    if not stands:
        with trio.move_on_after(0.02):
            await world.target.resume(step=False)
    world.kvm.gone = state

    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.target.release)
        await trio.sleep(0.3)
        world.kvm.gone = None

    assert world.kvm.debugs[-1] == m.DebugBody(0, [])
    assert world.kvm.orders[-2:] == ["VCPU_DEBUG" if stands else "VM_STOP", "VM_CONTINUE"]
    assert world.is_running()


@pytest.mark.parametrize("refused", [m.VCPU_DEBUG, m.VM_CONTINUE])
async def test_l1_a_processor_that_is_held_up_is_told_again(world: World, refused: m.Message[Any, Any]) -> None:
    await world.target.halt()
    world.kvm.codes[refused] = [HCode.H_BUSY] * 2

    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.target.release)
        await trio.testing.wait_all_tasks_blocked()
        assert world.machine.is_running, "nobody has paused it"

    assert not world.kvm.codes[refused]
    assert world.is_running()


async def test_l1_a_machine_is_let_go_once_a_migration_that_ends_here_is_over(world: World) -> None:
    await world.target.halt()
    async with trio.open_nursery() as nursery, world.machine.orders:
        nursery.start_soon(world.target.release)
        await trio.testing.wait_all_tasks_blocked()
        assert not world.is_running()

    assert world.is_running()


async def test_l1_a_debugger_of_the_process_that_answers_makes_nobody_late(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    async def answer_late(gfns: list[int]) -> None:
        await trio.sleep(1000)
        await world._want(gfns)

    await world.target.halt()
    world.view[1] = HostState.ABSENT
    world.target._ram = GuestRam(memoryview(world.ram), memoryview(world.view), answer_late)
    world.kvm.patience.peer_is("debugged")

    assert await world.target.read(PAGE_BYTES, 6) == b"cipher"

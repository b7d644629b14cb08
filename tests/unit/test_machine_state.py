"""The run state of a machine: a guest that ends before kvm has said that it started, orders that kvm refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import structlog
import trio

from protocol import messages as m
from protocol.codes import HCode
from protocol.errors import GuestFault, HostFault
from protocol.wire import Envelope
from services.qemu.machine import Machine
from services.qemu.qmp import MonitorEvents, RunState
from services.runtime.link import Link
from services.runtime.patience import Patience

EVENT = m.VmEventBody(m.VmEventKind.CRASHED, "fetch at 0, which is no memory")


class PlayedLink:
    """Does something while VM_START is open, then answers `code`."""

    def __init__(self, code: int, meanwhile: Callable[[], object]) -> None:
        self.patience = Patience()
        self._code = code
        self._meanwhile = meanwhile

    async def call(self, message: object, _body: object, _cause: int) -> m.Status:
        await trio.lowlevel.checkpoint()
        if message is m.VM_START:
            self._meanwhile()
        return m.Status(self._code)


async def load() -> tuple[int, dict[int, int]]:
    return 0x100, {}


async def started(nursery: trio.Nursery, code: int, event: m.VmEventBody | None) -> Machine:
    """A machine after its power_on; `event` comes while kvm starts it."""

    def meanwhile() -> None:
        if event is not None:
            machine._vm_event(cast(Envelope, None), event)

    link = cast(Link, PlayedLink(code, meanwhile))
    machine = Machine(link, MonitorEvents(), nursery, structlog.get_logger())
    machine.load = load
    try:
        await machine.power_on()
    except GuestFault:
        pass
    return machine


@pytest.mark.parametrize(
    ("code", "crashes", "state"),
    [
        (HCode.H_SUCCESS, False, RunState.RUNNING),
        (HCode.H_SUCCESS, True, RunState.GUEST_PANICKED),
        (HCode.H_HARDWARE, False, RunState.INTERNAL_ERROR),
    ],
)
async def test_what_a_guest_does_before_kvm_has_answered_is_not_lost(
    code: int, crashes: bool, state: RunState, nursery: trio.Nursery
) -> None:
    machine = await started(nursery, code, EVENT if crashes else None)

    assert machine.state is state


@pytest.mark.parametrize("order", [Machine.reboot, Machine.power_off, lambda machine: machine.os_term("it gave up")])
async def test_l1_what_kvm_refuses_to_a_guest_does_not_end_its_qemu(order: Callable[[Machine], None]) -> None:
    async with trio.open_nursery() as nursery:
        machine = await started(nursery, HCode.H_SUCCESS, None)
        machine._link = cast(Link, PlayedLink(HCode.H_HARDWARE, lambda: None))

        order(machine)

    # Nothing was raised into the nursery, in which all else of the process runs.
    assert machine.state is RunState.INTERNAL_ERROR


async def test_a_machine_that_cannot_be_loaded_has_not_just_to_start_yet(nursery: trio.Nursery) -> None:
    async def refuse() -> tuple[int, dict[int, int]]:
        raise HostFault("no such kernel")

    link = cast(Link, PlayedLink(HCode.H_SUCCESS, lambda: None))
    machine = Machine(link, MonitorEvents(), nursery, structlog.get_logger())
    machine.load = refuse

    with pytest.raises(HostFault):
        await machine.power_on()

    assert machine.state is RunState.INTERNAL_ERROR

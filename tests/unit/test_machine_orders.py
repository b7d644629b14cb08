"""What a guest orders of its machine by RTAS: switch off, begin anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import structlog
import trio
import trio.testing

from protocol import messages as m
from services.qemu.machine import Machine
from services.qemu.qmp import MonitorEvents
from services.runtime.link import Link
from services.runtime.patience import Patience


class SlowKvm:
    """A kvm that has not yet answered the first order; `orders` are those that came."""

    def __init__(self) -> None:
        self.patience = Patience()
        self.orders: list[str] = []
        self.answers = trio.Event()

    async def call(self, message: m.Message[Any, Any], _body: m.Body, _cause: int = 0) -> m.Status:
        """As Link.call."""
        self.orders.append(message.name)
        await self.answers.wait()
        return m.Status()


@pytest.mark.parametrize(
    ("ask", "order"),
    [
        (Machine.reboot, "VM_RESET"),
        (Machine.power_off, "VM_POWEROFF"),
        (lambda machine: machine.os_term("again"), "VM_POWEROFF"),
    ],
)
async def test_s5_a_guest_that_asks_again_and_again_takes_no_more_memory(
    ask: Callable[[Machine], None], order: str, nursery: trio.Nursery
) -> None:
    kvm = SlowKvm()
    machine = Machine(cast(Link, kvm), MonitorEvents(), nursery, structlog.wrap_logger(structlog.ReturnLogger()))
    before = len(nursery.child_tasks)

    ask(machine)
    await trio.testing.wait_all_tasks_blocked()
    for _ in range(100):
        ask(machine)
    await trio.testing.wait_all_tasks_blocked()

    # One is under way, and one waits: the guest may have asked for it after the first was done for it.
    assert len(nursery.child_tasks) - before == 2
    assert kvm.orders == [order]
    nursery.cancel_scope.cancel()

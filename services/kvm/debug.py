"""A debugger of the host on a normal VM: what qemu asks of the processor, and what the processor tells it.

As KVM's ioctls, these pass through: a processor whose MSR.S is set refuses them itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from protocol import messages as m
from protocol.wire import Envelope
from services.runtime.link import Link

_ORDERS: tuple[m.Message[Any, Any], ...] = (
    m.VCPU_REGISTERS,
    m.VCPU_SET_REGISTER,
    m.VCPU_TRANSLATE,
    m.VCPU_DEBUG,
    m.VCPU_DEBUG_COMMAND,
)
_SECONDS = 2.0
AskGuest = Callable[[m.Message[Any, Any], Any, int, float], Awaitable[Any]]


def pass_on_orders(qemu: Link, ask: AskGuest) -> None:
    """Serve qemu: each order is the guest's to answer."""
    for order in _ORDERS:
        qemu.on_waiting(order, _passed_on(order, ask))


def _passed_on(order: m.Message[Any, Any], ask: AskGuest) -> Callable[[Envelope, Any], Awaitable[Any]]:
    async def serve(envelope: Envelope, body: Any) -> Any:  # noqa: ANN401
        return await ask(order, body, envelope.cause, _SECONDS)

    return serve


def pass_on_stops(guest: Link, qemu: Link) -> None:
    """Serve the guest: a stop at a point or behind a step is for qemu, which then stops the VM."""
    guest.on(m.VCPU_DEBUG_STOP, lambda envelope, body: _tell(qemu, body, envelope.cause))


def _tell(qemu: Link, body: m.DebugStopBody, cause: int) -> None:
    qemu.send_event(m.VCPU_DEBUG_STOP, body, cause)

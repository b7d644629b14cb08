"""Exits to user space: what kvm asks of a VM's qemu."""

from __future__ import annotations

from protocol.codes import HCode, RtasStatus
from protocol.declare import Call
from protocol.errors import PeerError, PeerGone
from protocol.messages import (
    DOORBELL_RUNG,
    EXIT_HCALL,
    EXIT_MMIO_LOAD,
    EXIT_MMIO_STORE,
    EXIT_RTAS,
    VM_EVENT,
    BodyT,
    DoorbellBody,
    HcallBody,
    Message,
    MmioLoadBody,
    MmioStoreBody,
    ReplyT,
    RtasBody,
    VmEventBody,
    VmEventKind,
)
from protocol.refusals import HELD_UP_STATES, Refusal
from protocol.rtas import status_word
from services.kvm.guest_call import GuestCall, Result, Waiting
from services.runtime.link import Link
from services.runtime.log import Log
from services.runtime.patience import DEBUGGER_STATES, Patience

_CI_SIZES = frozenset({1, 2, 4, 8})
MAX_DOORBELLS = 256
"""More than the queues of any machine here; beyond it a store is an exit like any other."""
EXIT_SECONDS = 2.0
"""Within these the launcher has said of a qemu that it is dead, stopped or hung; the bound is for one that is not."""
DEVICE_SECONDS = 5.0
"""For a store that returns when the devices have finished, as it does where time is counted in instructions."""


class UserSpace:
    """The link to one VM's qemu.

    A dead one is H_HARDWARE to the guest, and so is one that answers pings and no exit. A stopped or unresponsive one
    is waited for: it may have begun what it is asked.
    """

    def __init__(self, link: Link, log: Log, *, waits_for_devices: bool, tells_secure: bool = False) -> None:
        self._link = link
        self._log = log
        self._tells_secure = tells_secure
        self._store_seconds = DEVICE_SECONDS if waits_for_devices else EXIT_SECONDS
        self._patience = Patience(HELD_UP_STATES | DEBUGGER_STATES)
        self._doorbells: set[tuple[int, int]] = set()

    def set_doorbell(self, doorbell: DoorbellBody) -> None:
        """From now on a store to `doorbell` is answered here, or no more."""
        key = (doorbell.gpa, doorbell.size_bytes)
        if not doorbell.on:
            self._doorbells.discard(key)
        elif len(self._doorbells) < MAX_DOORBELLS:
            self._doorbells.add(key)

    def reset(self) -> None:
        """The machine is reset: its devices have no doorbells until they are driven again."""
        self._doorbells.clear()

    async def h_logical_ci_load(self, call: GuestCall) -> Result:
        """H_LOGICAL_CI_LOAD."""
        size, gpa = call.args
        if size not in _CI_SIZES:
            return [HCode.H_PARAMETER]
        reply = await self._exit(EXIT_MMIO_LOAD, MmioLoadBody(gpa, size), call.cause, EXIT_SECONDS)
        return [HCode.H_HARDWARE] if reply is None else [reply.code, reply.value]

    async def h_logical_ci_store(self, call: GuestCall) -> Result:
        """H_LOGICAL_CI_STORE. Of a doorbell it returns before the device has heard it."""
        size, gpa, value = call.args
        if size not in _CI_SIZES:
            return [HCode.H_PARAMETER]
        if (gpa, size) in self._doorbells and self._ring(gpa, size, value, call.cause):
            return [HCode.H_SUCCESS]
        reply = await self._exit(EXIT_MMIO_STORE, MmioStoreBody(gpa, size, value), call.cause, self._store_seconds)
        return [HCode.H_HARDWARE if reply is None else reply.code]

    def turned_secure(self) -> None:
        """The VM is secure from now on. What qemu is asked from here on it is asked after it has heard of this."""
        if self._tells_secure:
            self._link.send_event(VM_EVENT, VmEventBody(VmEventKind.SECURE, ""))

    def _ring(self, gpa: int, size: int, value: int, cause: int) -> bool:
        is_up = self._link.peer_state == "up"
        return is_up and self._link.send_event(DOORBELL_RUNG, MmioStoreBody(gpa, size, value), cause)

    def answers(self, hcall: Call) -> Waiting:
        """The handler of a hypercall that qemu answers."""

        async def serve(call: GuestCall) -> Result:
            reply = await self._exit(EXIT_HCALL, HcallBody(hcall.number, call.args), call.cause, EXIT_SECONDS)
            return [HCode.H_HARDWARE if reply is None else reply.code]

        return serve

    async def rtas(self, body: RtasBody, cause: int) -> list[int]:
        """An RTAS service; the return words."""
        reply = await self._exit(EXIT_RTAS, body, cause, EXIT_SECONDS)
        return [status_word(RtasStatus.HARDWARE_ERROR)] if reply is None else reply.rets

    async def _exit(self, message: Message[BodyT, ReplyT], body: BodyT, cause: int, seconds: float) -> ReplyT | None:
        """The answer, or a refusal when qemu is lost; None for what is no answer, or for nothing in `seconds`."""
        try:
            with self._patience.bound(seconds):
                return await self._link.call_lasting(message, body, cause)
        except PeerGone as gone:
            hcall_code, _ = Refusal.of_peer(gone.state).value
            return None if message.reply is None else message.reply.refused(hcall_code)
        except PeerError:
            return None
        self._log.error("exit not answered", peer=self._link.peer, call=message.name, seconds=seconds)
        return None

    def qemu_is(self, state: str) -> None:
        """What became of qemu: nobody loses patience with one that is held up, by a debugger or otherwise."""
        self._patience.peer_is(state)

    def crashed(self, reason: str) -> None:
        """Tell qemu that the guest cannot go on."""
        self._link.send_event(VM_EVENT, VmEventBody(VmEventKind.CRASHED, reason[:512]))

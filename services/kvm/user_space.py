"""Exits to user space: what kvm asks of a VM's qemu."""

from __future__ import annotations

from protocol.codes import HCode, RtasStatus
from protocol.errors import PeerError, PeerGone
from protocol.messages import (
    EXIT_MMIO_LOAD,
    EXIT_MMIO_STORE,
    EXIT_RTAS,
    VM_EVENT,
    MmioLoadBody,
    MmioStoreBody,
    RtasBody,
    VmEventBody,
    VmEventKind,
)
from protocol.rtas import status_word
from services.kvm.guest_call import GuestCall, Result
from services.runtime.link import Link

_CI_SIZES = frozenset({1, 2, 4, 8})


class UserSpace:
    """The link to one VM's qemu. A lost qemu is H_HARDWARE to the guest."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def h_logical_ci_load(self, call: GuestCall) -> Result:
        """H_LOGICAL_CI_LOAD."""
        size, gpa = call.args
        if size not in _CI_SIZES:
            return [HCode.H_PARAMETER]
        try:
            reply = await self._link.call(EXIT_MMIO_LOAD, MmioLoadBody(gpa, size), call.cause)
        except (PeerGone, PeerError):
            return [HCode.H_HARDWARE]
        return [reply.code, reply.value]

    async def h_logical_ci_store(self, call: GuestCall) -> Result:
        """H_LOGICAL_CI_STORE."""
        size, gpa, value = call.args
        if size not in _CI_SIZES:
            return [HCode.H_PARAMETER]
        try:
            reply = await self._link.call(EXIT_MMIO_STORE, MmioStoreBody(gpa, size, value), call.cause)
        except (PeerGone, PeerError):
            return [HCode.H_HARDWARE]
        return [reply.code]

    async def rtas(self, body: RtasBody, cause: int) -> list[int]:
        """An RTAS service; the return words."""
        try:
            return (await self._link.call(EXIT_RTAS, body, cause)).rets
        except (PeerGone, PeerError):
            return [status_word(RtasStatus.HARDWARE_ERROR)]

    def crashed(self, reason: str) -> None:
        """Tell qemu that the guest cannot go on."""
        self._link.send_event(VM_EVENT, VmEventBody(VmEventKind.CRASHED, reason[:512]))

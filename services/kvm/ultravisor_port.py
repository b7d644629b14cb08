"""kvm's side of its link to the ultravisor: ultracalls out, reflected hypercalls in.

A reflected hypercall `[lpid, vcpu, args...]` comes with a cookie as correlation id and is answered by UV_RETURN with
that cookie and nothing else. The ultravisor repeats a call of its own when kvm is slow, with the same cookie: a call
that is still open is left alone, an answered one is answered again from the record.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from protocol.codes import UCode
from protocol.declare import Call
from protocol.errors import PeerGone
from protocol.refusals import Refusal
from protocol.registers import to_register
from protocol.ucalls import UV_RETURN
from protocol.wire import Envelope
from services.runtime.link import Link

_REMEMBERED = 1024

Answer = Callable[[list[int]], None]
"""Gives the caller of a hypercall its `[code, outputs...]`."""


class UltravisorPort:
    """The link and the record of reflected calls."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._open: set[int] = set()
        self._answered: OrderedDict[int, list[int]] = OrderedDict()

    async def ucall(self, call: Call, args: list[int], cause: int) -> list[int]:
        """An ultracall; a dead ultravisor answers U_NOT_AVAILABLE, a stopped one U_BUSY: it may yet serve it."""
        try:
            return await self._link.call_registers(call, args, cause)
        except PeerGone as gone:
            return [_lost_code(gone)]

    async def ucall_lasting(self, call: Call, args: list[int], cause: int) -> list[int]:
        """As `ucall`, for what must not be done twice: a stopped ultravisor is waited for."""
        try:
            return await self._link.call_registers_lasting(call, args, cause)
        except PeerGone as gone:
            return [_lost_code(gone)]

    async def ucalls(self, call: Call, args_of_each: Sequence[list[int]], cause: int) -> list[list[int]]:
        """As `ucall` for each of `args_of_each`, open together; the results in the same order."""
        try:
            return await self._link.call_many(call, args_of_each, cause)
        except PeerGone as gone:
            return [[_lost_code(gone)] for _ in args_of_each]

    def take(self, envelope: Envelope) -> Answer | None:
        """A reflected call has come: how to answer it, or None when it is a repetition that needs nothing more."""
        cookie = envelope.correlation
        if cookie in self._open:
            return None
        answered = self._answered.get(cookie)
        if answered is not None:
            self._send(cookie, answered, envelope.cause)
            return None
        self._open.add(cookie)

        def answer(result: list[int]) -> None:
            self._open.discard(cookie)
            self._answered[cookie] = result
            if len(self._answered) > _REMEMBERED:
                self._answered.popitem(last=False)
            self._send(cookie, result, envelope.cause)

        return answer

    def _send(self, cookie: int, result: list[int], cause: int) -> None:
        registers = [to_register(result[0]), cookie, *result[1:]]
        try:
            self._link.send_call(UV_RETURN.number, 0, registers, cause)
        except PeerGone:
            return

    @property
    def open_calls(self) -> int:
        """Reflected calls that are not answered yet."""
        return len(self._open)


def _lost_code(gone: PeerGone) -> UCode:
    return UCode.U_BUSY if Refusal.of_peer(gone.state) is Refusal.BUSY else UCode.U_NOT_AVAILABLE

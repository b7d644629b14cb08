"""The ultravisor's side of its link to kvm: hypercalls out, answered by UV_RETURN.

A hypercall goes out under its own number as `[lpid, vcpu, args...]`; its correlation id is a random cookie of one use.
kvm answers with UV_RETURN carrying that cookie, and with nothing else. Only as many arguments go out, and only as many
results come back, as the declaration names (S4).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import NamedTuple

import outcome
import trio

from protocol.codes import HCode, UCode
from protocol.declare import Call
from protocol.errors import CallTimeout, PeerGone
from protocol.registers import to_signed
from protocol.wire import Envelope
from services.runtime.link import Link
from services.runtime.log import Log

TRY_SECONDS = 5.0
TRIES = 3
_COOKIE_BITS = 62
_COOKIE_MASK = (1 << _COOKIE_BITS) - 1
_COOKIES_A_DRAW = 256
_FIRST_OUTPUT = 2
_REMEMBERED_ENDED = 1024

OnResult = Callable[[list[int]], None]


class _Open(NamedTuple):
    lpid: int
    call: Call
    on_result: OnResult
    own: bool


class Hypervisor:
    """Open hypercalls of all secure VMs of the host."""

    def __init__(self, link: Link, log: Log) -> None:
        self._link = link
        self._log = log
        self._open: dict[int, _Open] = {}
        self._ended: dict[int, None] = {}
        self._cookies: Iterator[int] = iter(())

    def forward(self, lpid: int, vcpu: int, call: Call, args: list[int], cause: int, on_result: OnResult) -> None:
        """Send a hypercall; `on_result` gets `[code, outputs...]` once. Keeps a record, no task.

        A kvm that is held up answers when it goes on. Raises PeerGone when it is dead, and for a wait of the guest
        (H_CEDE and its kin) also when it is held up: the guest would leave it and begin the next one.
        """
        if call.open_ended and self._link.peer_state != "up":
            raise PeerGone(self._link.peer, self._link.peer_state)
        cookie = self._new_cookie()
        self._open[cookie] = _Open(lpid, call, on_result, own=False)
        try:
            self._send(cookie, lpid, vcpu, call, args, cause)
        except PeerGone:
            del self._open[cookie]
            raise

    async def forward_and_wait(self, lpid: int, vcpu: int, call: Call, args: list[int], cause: int) -> list[int]:
        """As `forward`, for a call whose results must be worked on before the guest gets them."""
        done = trio.Event()
        results: list[list[int]] = []

        def on_result(result: list[int]) -> None:
            results.append(result)
            done.set()

        self.forward(lpid, vcpu, call, args, cause, on_result)
        await done.wait()
        return results[0]

    async def ask(self, lpid: int, call: Call, args: list[int], cause: int, vcpu: int = 0) -> list[int]:
        """A hypercall of the ultravisor's own: bounded, tried again with the same cookie (S7).

        Returns `[code, outputs...]`; raises CallTimeout when kvm stays silent.
        """
        cookie = self._new_cookie()
        task = trio.lowlevel.current_task()
        answered: list[list[int]] = []
        sleeping = [False]

        def on_result(result: list[int]) -> None:
            answered.append(result)
            if sleeping[0]:
                sleeping[0] = False
                trio.lowlevel.reschedule(task, outcome.Value(None))

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            sleeping[0] = False
            return trio.lowlevel.Abort.SUCCEEDED

        self._open[cookie] = _Open(lpid, call, on_result, own=True)
        try:
            for _ in range(TRIES):
                with self._link.patience.bound(TRY_SECONDS):
                    self._try_send(cookie, lpid, vcpu, call, args, cause)
                    while not answered:
                        sleeping[0] = True
                        await trio.lowlevel.wait_task_rescheduled(abort)
                    return answered[0]
        finally:
            if self._open.pop(cookie, None) is not None:
                self._remember_ended(cookie)
        raise CallTimeout(self._link.peer, call.name, TRY_SECONDS * TRIES)

    def take_return(self, _envelope: Envelope, registers: list[int]) -> list[int] | None:
        """UV_RETURN: `[r0, cookie, r4...]`. Answered only when it is an error, as the real call returns only then."""
        if len(registers) < _FIRST_OUTPUT:
            return [UCode.U_PARAMETER]
        cookie = registers[1]
        record = self._open.pop(cookie, None)
        if record is None:
            if cookie not in self._ended:
                self._log.warning("refused", reason="UV_RETURN with a cookie that no open call has")
            return [UCode.U_PARAMETER]
        n_results = len(record.call.results)
        outputs = registers[_FIRST_OUTPUT : _FIRST_OUTPUT + n_results]
        outputs += [0] * (n_results - len(outputs))
        record.on_result([to_signed(registers[0]), *outputs])
        return None

    def end_partition(self, lpid: int, code: int = HCode.H_STATE) -> None:
        """The VM has ended: what it has open is answered with `code` and forgotten."""
        for cookie, record in [(c, r) for c, r in self._open.items() if r.lpid == lpid]:
            if self._open.pop(cookie, None) is not None:
                self._remember_ended(cookie)
                record.on_result([int(code)])

    def kvm_is_held_up(self) -> None:
        """Open hypercalls stay open: kvm may have them already, and what it does for them is done once."""
        guests = sum(not record.own for record in self._open.values())
        self._log.warning("open hypercalls wait", peer=self._link.peer, open_calls=guests)

    def kvm_is_gone(self) -> None:
        """The guests' open hypercalls end; the ultravisor's own are tried until their time is over."""
        ended = {cookie: record for cookie, record in self._open.items() if not record.own}
        self._log.warning("open hypercalls end", peer=self._link.peer, open_calls=len(ended))
        for cookie, record in ended.items():
            del self._open[cookie]
            self._remember_ended(cookie)
            record.on_result([HCode.H_HARDWARE])

    @property
    def open_calls(self) -> int:
        """Hypercalls that kvm has not answered."""
        return len(self._open)

    def open_of(self, lpid: int) -> int:
        """Hypercalls of one VM that kvm has not answered."""
        return sum(record.lpid == lpid for record in self._open.values())

    def _new_cookie(self) -> int:
        cookie = next(self._cookies, 0)
        if not cookie:
            # Drawn by the hundred: a system call each would be a good part of a hypercall's own cost.
            words = memoryview(secrets.token_bytes(_COOKIES_A_DRAW * 8)).cast("Q")
            self._cookies = iter([word & _COOKIE_MASK | 1 << _COOKIE_BITS for word in words])
            cookie = next(self._cookies)
        return cookie

    def _send(self, cookie: int, lpid: int, vcpu: int, call: Call, args: list[int], cause: int) -> None:
        self._link.send_call(call.number, cookie, [lpid, vcpu, *args[: call.n_args]], cause)

    def _try_send(self, cookie: int, lpid: int, vcpu: int, call: Call, args: list[int], cause: int) -> None:
        try:
            self._send(cookie, lpid, vcpu, call, args, cause)
        except PeerGone as gone:
            self._log.warning("kvm does not answer", call=call.name, reason=str(gone))

    def _remember_ended(self, cookie: int) -> None:
        self._ended[cookie] = None
        if len(self._ended) > _REMEMBERED_ENDED:
            del self._ended[next(iter(self._ended))]

"""What a migration asks of kvm, and through it of the ultravisor. Steps that may succeed later are tried again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from protocol import messages as m
from protocol.codes import HCode, UCode
from protocol.declare import Call
from protocol.errors import PeerGone, PefboxError
from protocol.refusals import HELD_UP_STATES
from services.runtime.cause import CAUSE
from services.runtime.link import Link
from shared.gfn_bitmap import gfns_of

_AGAIN_SECONDS = 0.01
_PATIENCE_SECONDS = 5.0
_ORDER_SECONDS = 10.0
_LOOK_AGAIN_SECONDS = 0.1
_YET = frozenset({"U_RETRY", "U_BUSY", "H_BUSY"})
ResultT = TypeVar("ResultT")


class StepRefused(PefboxError):
    """A step that kvm or the ultravisor refused; the ultravisor's reason is in its audit log and in `jobinfo`.

    `may_succeed` says that it only could not be done yet.
    """

    def __init__(self, step: str, code: str, *, may_succeed: bool = False) -> None:
        self.step, self.code, self.may_succeed = step, code, may_succeed
        super().__init__(f"{step} was refused: {code}")


async def until_answered(order: Callable[[], Awaitable[ResultT]]) -> ResultT:
    """The result of an order that must not be given up while kvm, ultravisor or guest are only held up.

    For what would otherwise leave a processor standing still for ever. Raises PefboxError for a refusal, PeerGone for a
    kvm that is dead.
    """
    while True:
        try:
            return await order()
        except PeerGone as gone:
            if gone.state not in HELD_UP_STATES:
                raise
        except StepRefused as refused:
            if not refused.may_succeed:
                raise
        await trio.sleep(_LOOK_AGAIN_SECONDS)


class KvmPort:
    """kvm's side of one VM's migration."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def ucall(self, call: Call, *args: int) -> list[int]:
        """A step of the ultravisor; its results. Raises StepRefused, PeerGone."""
        body = m.MigrationUcallBody(call.number, list(args))
        results: list[int] = []

        async def attempt() -> int:
            reply = await self._link.call_lasting(m.MIGRATION_UCALL, body, CAUSE.get())
            results[:] = reply.results
            return reply.code

        code = await _until_done(attempt, (UCode.U_RETRY, UCode.U_BUSY))
        if code != UCode.U_SUCCESS:
            name = _name(UCode, code)
            raise StepRefused(call.name, name, may_succeed=name in _YET)
        return results

    async def freeze(self) -> None:
        """Stop a normal VM's processor where it can be saved; raises StepRefused."""

        async def attempt() -> int:
            return (await self._link.call_lasting(m.VM_FREEZE, m.Empty(), CAUSE.get())).code

        _expect("VM_FREEZE", await _until_done(attempt, (HCode.H_BUSY,)))

    async def go_on(self) -> None:
        """Let the VM run; raises StepRefused."""
        _expect("VM_CONTINUE", await self._once(m.VM_CONTINUE, m.Empty()))

    async def stop(self) -> None:
        """Stop the VM's processor; raises StepRefused."""
        _expect("VM_STOP", await self._once(m.VM_STOP, m.Empty()))

    async def save(self, offset: int, room_bytes: int) -> int:
        """Have kvm write its state of the VM at `offset`; how long it is. Raises StepRefused."""
        n_bytes = 0

        async def attempt() -> int:
            nonlocal n_bytes
            saved = await self._link.call_lasting(m.VM_SAVE, m.StreamPlaceBody(offset, room_bytes), CAUSE.get())
            n_bytes = saved.n_bytes
            return saved.code

        _expect("VM_SAVE", await _until_done(attempt, (HCode.H_BUSY,)))
        return n_bytes

    async def load(self, offset: int, n_bytes: int) -> None:
        """Have kvm take over the state at `offset`; raises StepRefused."""

        async def attempt() -> int:
            return (await self._link.call_lasting(m.VM_LOAD, m.StreamPlaceBody(offset, n_bytes), CAUSE.get())).code

        _expect("VM_LOAD", await _until_done(attempt, (HCode.H_BUSY,)))

    async def written(self, n_pages: int) -> list[int]:
        """GFNs that were written since this was last asked, ascending; raises StepRefused.

        All that kvm had sent before it answered, doorbells above all, has come too.
        """
        found: list[int] = []
        for first in range(0, n_pages, m.MAX_DIRTY_LOG_PAGES):
            body = m.DirtyLogBody(first, min(m.MAX_DIRTY_LOG_PAGES, n_pages - first))
            bitmap = b""

            async def attempt(body: m.DirtyLogBody = body) -> int:
                nonlocal bitmap
                reply = await self._link.call_lasting(m.DIRTY_LOG, body, CAUSE.get())
                bitmap = reply.bitmap
                return reply.code

            _expect("DIRTY_LOG", await _until_done(attempt, (HCode.H_BUSY,)))
            found += gfns_of(bitmap, first)
        return found

    async def _once(self, message: m.Message[m.BodyT, m.Status], body: m.BodyT) -> int:
        with self._link.patience.bound(_ORDER_SECONDS):
            return (await self._link.call_lasting(message, body, CAUSE.get())).code
        raise StepRefused(message.name, f"no answer within {_ORDER_SECONDS:g} s", may_succeed=True)


async def _until_done(attempt: Callable[[], Awaitable[int]], again: tuple[int, ...]) -> int:
    """The code of the first attempt that is none of `again`, or of the last one after _PATIENCE_SECONDS."""
    deadline = trio.current_time() + _PATIENCE_SECONDS
    while True:
        code = await attempt()
        if code not in again or trio.current_time() > deadline:
            return code
        await trio.sleep(_AGAIN_SECONDS)


def _expect(step: str, code: int) -> None:
    if code != HCode.H_SUCCESS:
        name = _name(HCode, code)
        raise StepRefused(step, name, may_succeed=name in _YET)


def _name(codes: type[HCode] | type[UCode], code: int) -> str:
    try:
        return codes(code).name
    except ValueError:
        return str(code)
